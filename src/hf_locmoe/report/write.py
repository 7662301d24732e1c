# SPDX-License-Identifier: Apache-2.0
"""Puts a report together: reads the runs, draws what their data allows, says what is missing and why, writes the page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..moe.capacity import min_expert_capacity
from .figures import (
    capacity_against_angle,
    gate_similarity,
    local_share,
    step_composition,
    token_similarity,
    tokens_per_expert,
    validation_perplexity,
)
from .page import Section, Table, render_page
from .probe import Probe, probe_checkpoint
from .run import STARVED_SHARE, ReportError, Run, num_starved, read_run


PAGE_NAME = "routing.html"


def write_report(
    run_dirs: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    use_model: bool = True,
) -> list[Path]:
    """
    Draws the routing of one run or several into PNG files and one self-contained page.

    Args:
        run_dirs (`Sequence[str]`): `output_dir`s of Trainer's runs; the first is the one the page is about, the others
            are compared with it.
        output_dir (`str` or `os.PathLike`, *optional*): Where to write; the first run's folder if not given.
        text (`str` or `os.PathLike`, *optional*): Text for the figures that need the model; it samples its own if not
            given.
        use_model (`bool`, *optional*, defaults to `True`): Whether to load checkpoints. Without, figures 8 and 9 are left
            out.

    Returns:
        `list[Path]`: The files written, the page first.

    Raises:
        ReportError: No run to report on, or matplotlib is missing.
        OSError: The output folder cannot be written to.
    """
    runs = [read_run(folder) for folder in run_dirs]
    if not runs:
        raise ReportError("`RUN_DIR` is missing: give the `output_dir` of a training run.")
    report = _Report(Path(output_dir if output_dir is not None else runs[0].path), runs, text, use_model)
    return report.write()


class _Report:
    def __init__(self, output_dir: Path, runs: list[Run], text, use_model: bool):
        self.output_dir = output_dir
        self.runs = _with_distinct_names(runs)
        self.text = text
        self.use_model = use_model
        self.files: list[Path] = []

    def write(self) -> list[Path]:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        sections = [self._overview(), self._perplexity(), *self._local_share(), *self._step_composition()]
        for run in self.runs:
            sections += [Section(f"Run {run.name}", level=2)] if len(self.runs) > 1 else []
            sections += [self._load(run), *self._tokens_and_gates(run), self._capacity(run)]
        names = ", ".join(run.name for run in self.runs)
        page = render_page(
            f"Routing of {names}",
            "How the routers spread tokens over experts, beside the figures of the LocMoE paper (arXiv 2401.13920).",
            sections,
            "Written by `locmoe report` from trainer_state.json, routing_stats.jsonl and, where there is one, the checkpoint.",
        )
        path = self.output_dir / PAGE_NAME
        path.write_text(page, encoding="utf-8")
        return [path, *self.files]

    def _save(self, figure, name: str, run: Run | None = None) -> Path:
        suffix = f"_{run.name}" if run is not None and len(self.runs) > 1 else ""
        path = self.output_dir / f"{name}{suffix}.png"
        figure.savefig(path)
        self.files.append(path)
        return path

    def _overview(self) -> Section:
        columns = ["run", "gate", "steps", "validation perplexity", "load CV", "most loaded / mean", "starved experts"]
        columns += ["dropped", "entropy / log n", "cosine"]
        rows = []
        for run in self.runs:
            latest = run.latest or {}
            overall, layers = latest.get("overall", {}), latest.get("layers", [])
            steps = max(
                [entry.get("step", 0) for entry in run.log] + [record["step"] for record in run.records], default=0
            )
            rows.append(
                [
                    run.name,
                    latest.get("model", {}).get("gate_type", ""),
                    f"{steps:,}",
                    f"{run.perplexities[-1][1]:.2f}" if run.perplexities else "",
                    _number(overall.get("routing/load_cv")),
                    _number(overall.get("routing/max_load")),
                    f"{sum(num_starved(layer['load']) for layer in layers)} of {sum(len(layer['load']) for layer in layers)}"
                    if layers
                    else "",
                    _percent(overall.get("routing/drop_rate")),
                    _number(overall.get("routing/entropy")),
                    _number(overall.get("routing/cosine")),
                ]
            )
        about = (
            "The last evaluation of each run, or its last training log where it was not evaluated. Load CV is the standard"
            " deviation of the experts' load over its mean, 0 when balanced; an expert counts as starved below"
            f" {100 * STARVED_SHARE:g} % of an equal share. Values are means over layers; the most loaded expert is the worst layer's."
        )
        return Section("At the end", [about], table=Table(columns, rows), level=2)

    def _perplexity(self) -> Section:
        section = Section(
            "Validation perplexity",
            counterpart="figure 13. There LocMoE lies between Hash and Switch early in training; later the three meet.",
            level=2,
        )
        evaluated = [run for run in self.runs if run.perplexities]
        if not evaluated:
            section.missing = "No evaluation in the log: train with `eval_strategy` set and an `eval_dataset`."
            return section
        section.text = ["exp(validation loss) over the optimizer steps; the router losses are not in it."]
        section.image = self._save(validation_perplexity(evaluated), "fig13_validation_perplexity")
        best = [(run, *min(run.perplexities, key=lambda pair: pair[1])) for run in evaluated]
        section.table = Table(
            ["run", "best", "at step", "last"],
            [[run.name, f"{value:.2f}", f"{step:,}", f"{run.perplexities[-1][1]:.2f}"] for run, step, value in best],
        )
        return section

    def _local_share(self) -> list[Section]:
        """Nothing where no run had several nodes."""
        spread = [run for run in self.runs if run.local_shares]
        if not spread:
            return []
        rows = []
        for run in spread:
            sent = [entry["comm/bytes_inter_node"] for entry in run.log if "comm/bytes_inter_node" in entry]
            rows.append([run.name, _percent(run.local_shares[-1][1]), f"{sent[-1]:,.0f}" if sent else ""])
        return [
            Section(
                "Tokens that stay on their node",
                [
                    "Share of the assignments whose expert lives on the token's node, the mean over layers, while training."
                ],
                image=self._save(local_share(spread), "local_share"),
                table=Table(["run", "last node-local share", "counted bytes between nodes a step"], rows),
                level=2,
            )
        ]

    def _step_composition(self) -> list[Section]:
        """Nothing where no run was spread over ranks."""
        timed = [run for run in self.runs if run.step_parts]
        if not timed:
            return []
        rows = []
        for run in timed:
            parts = run.step_parts
            step_s = sum(parts.values())
            waited = _percent((parts["communication"] + parts["idle"]) / step_s)
            rows.append([run.name, *(_number(value) for value in (step_s, *parts.values())), waited])
        columns = ["run", "step, s", *(f"{part}, s" for part in parts), "waiting for exchanges"]
        return [
            Section(
                "What the time of a step is made of",
                [
                    "Means over ranks and training. Overlap: tokens were under way and the rank computed. Communication: it"
                    " waited for them. Idle: it waited until the last rank had sent its own. Computation is all else, with the"
                    " optimizer and what other libraries exchange."
                ],
                counterpart="figures 10 and 11. There the all-to-all takes 18.10 % of the time on 128 NPUs and 28.74 % on 256"
                " with the baselines, and 5.13 % less with LocMoE.",
                image=self._save(step_composition(timed, as_shares=False), "fig10_step_time"),
                level=2,
            ),
            Section(
                "The same as shares",
                image=self._save(step_composition(timed, as_shares=True), "fig11_step_time_shares"),
                table=Table(columns, rows),
            ),
        ]

    def _load(self, run: Run) -> Section:
        section = Section(
            "Tokens per expert over training",
            counterpart="figure 12. There Switch leaves 40 % of the experts without tokens, and LocMoE none.",
        )
        if run.training:
            section.image = self._save(tokens_per_expert(run), "fig12_tokens_per_expert", run)
            section.text = [
                "Each expert's share of its layer's tokens since the log event before; dashed: an equal share."
            ]
        else:
            section.missing = "No routing statistics of training in routing_stats.jsonl."
        if run.latest is not None:
            section.table = _layer_table(run.latest)
        return section

    def _tokens_and_gates(self, run: Run) -> list[Section]:
        tokens = Section(
            "Tokens of one expert and of different ones",
            counterpart="figure 8, cosine similarity between tokens of the same and of different experts.",
        )
        gates = Section(
            "Tokens and gate weights",
            counterpart="figure 9, cosine between tokens and gate weights.",
        )
        probe, reason = self._probe(run)
        if probe is None:
            tokens.missing = gates.missing = reason
            return [tokens, gates]
        tokens.image = self._save(token_similarity(probe), "fig08_token_similarity", run)
        tokens.text = [f"Cosine of the hidden states that reach a router, in pairs of tokens. Sample: {probe.source}."]
        if probe.config.gate_type == "hash":
            gates.missing = "A hash gate has no weights to be at an angle with."
        else:
            gates.image = self._save(gate_similarity(probe), "fig09_gate_similarity", run)
            gates.text = [
                f"Left: rows are the experts that tokens were sent to, columns the gate weights. Sample: {probe.source}."
            ]
        return [tokens, gates]

    def _probe(self, run: Run) -> tuple[Probe | None, str]:
        """The checkpoint's probe, or why there is none."""
        if not self.use_model:
            return None, "Left out on request: the figure needs the model."
        if run.checkpoint is None:
            return (
                None,
                "The figure needs the model, and the run's folder has no checkpoint: save one with `save_strategy`.",
            )
        probe = probe_checkpoint(run.checkpoint, self.text)
        return probe, "The checkpoint in the run's folder is not a LocMoE causal language model."

    def _capacity(self, run: Run) -> Section:
        section = Section(
            "Capacity against the angle between token and gate weight",
            counterpart="figure 6, drawn for its own width; it measured a cosine of about 0.03.",
        )
        facts = (run.latest or {}).get("model")
        if facts is None:
            section.missing = "The figure needs the model's width, which routing_stats.jsonl holds."
            return section
        cosines = _cosines(run.latest)
        section.image = self._save(capacity_against_angle(facts, cosines), "fig06_capacity_against_angle", run)
        section.text = [
            "Theorem 1: the least number of tokens with which one discriminative token is expected to reach the expert. It"
            " falls as the angle grows towards 90 degrees."
        ]
        if cosines:
            section.text[0] += (
                " The points are the mean cosines that this run measured, of a token with its own expert's weight."
            )
        return section


def _layer_table(record: dict[str, Any]) -> Table:
    columns = ["layer", "load CV", "most loaded / mean", "starved experts", "dropped", "entropy / log n", "cosine"]
    cosines, facts = _cosines(record), record["model"]
    if cosines:
        columns.append("least capacity at that cosine, tokens")
    rows = []
    for layer in record["layers"]:
        starved = f"{num_starved(layer['load'])} of {len(layer['load'])}"
        row = [str(layer["layer"]), _number(layer["load_cv"]), _number(layer["max_load"]), starved]
        row += [_percent(layer["drop_rate"]), _number(layer["entropy"]), _number(cosines.get(layer["layer"]))]
        if cosines:
            cosine = min(max(cosines[layer["layer"]], 0.0), 1.0)
            row.append(f"{min_expert_capacity(cosine, facts['hidden_size'], facts['num_experts']).item():.3g}")
        rows.append(row)
    return Table(columns, rows)


def _cosines(record: dict[str, Any] | None) -> dict[int, float]:
    """The measured mean cosine of each layer; none for a gate without weights."""
    if record is None or record["model"]["gate_type"] == "hash":
        return {}
    return {layer["layer"]: layer["cosine"] for layer in record["layers"]}


def _with_distinct_names(runs: list[Run]) -> list[Run]:
    """Folders of one name, `a/run` and `b/run`, told apart by as much of their paths as it takes."""
    if len({run.name for run in runs}) == len(runs):
        return runs
    parts = [run.path.resolve().parts for run in runs]
    depth = next(
        (d for d in range(2, 1 + max(map(len, parts))) if len({part[-d:] for part in parts}) == len(runs)), None
    )
    if depth is None:
        raise ReportError(f"`RUN_DIR` ({runs[0].path}) is given twice: name each run once.")
    named = zip(runs, parts, strict=True)
    return [Run("-".join(part[-depth:]), run.path, run.log, run.records, run.checkpoint) for run, part in named]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2g} %"


__all__ = ["PAGE_NAME", "write_report"]
