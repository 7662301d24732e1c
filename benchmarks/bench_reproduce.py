# SPDX-License-Identifier: Apache-2.0
"""The paper's figures in numbers: what `recipes/reproduce.py` trained, read from its runs' folders.

python -m benchmarks.bench_reproduce --hardware 2core
python -m benchmarks.bench_reproduce --hardware 2core --output_dir runs/reproduce --reuse    runs that are there
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import Load, Record
from hf_locmoe.moe.capacity import min_expert_capacity
from hf_locmoe.report.probe import Probe, probe_checkpoint
from hf_locmoe.report.run import Run, num_starved, read_run


RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "reproduce.py"
RUNS = ("hash", "switch", "locmoe", "placed")
COLUMNS = {
    "run": "run",
    "gate": "gate",
    "perplexities": "validation perplexity after 1/8, 1/2 and all of the steps",
    "starved": "starved experts, most over training and at the end",
    "load_cv": "load CV, first and last quarter",
    "local_share": "node-local share, last quarter",
    "megabytes": "MB between nodes a step, last quarter",
    "token_cosines": "cosine of tokens of the same expert and of different ones",
    "gate_cosine": "cosine of a token with its expert's gate weight",
    "capacity": "least capacity at that cosine, tokens",
    "step_s": "s a step",
    "shares": "computation, overlap, communication, idle, % of a step",
}
NOTES = [
    "One seed, one machine. `hash`, `switch`, `locmoe`: the paper's gates, samples where they were read; `placed`: this"
    " project's default gate with locality coefficient 0.03, batch and expert placement.",
    "Runs come one after the other and others may use the machine meanwhile: seconds of different rows are no comparison, see"
    " `step_*` and `locality_*` for those. The two nodes are two processes of one machine, whose link is its memory.",
    "Starved: below a tenth of an equal share of the tokens between two log events, 10 steps; of all layers' experts.",
]


def part_of(values: list[Any], start: float, end: float) -> list[Any]:
    """Those between two shares of the list, at least one."""
    first = min(int(start * len(values)), len(values) - 1)
    return values[first : max(int(end * len(values)), first + 1)]


def row_of(run: Run, probe: Probe | None) -> dict[str, Any]:
    """A run's numbers, by [`COLUMNS`]."""
    records, facts = run.training, run.training[-1]["model"]
    logged = [entry for entry in run.log if "time/step_s" in entry]

    def mean(entries: list[dict[str, Any]], name: str) -> float:
        return sum(entry[name] for entry in entries) / len(entries)

    starved = [sum(num_starved(layer["load"]) for layer in record["layers"]) for record in records]
    cvs = [record["overall"]["routing/load_cv"] for record in records]
    perplexities = [perplexity for _, perplexity in run.perplexities]
    parts = run.step_parts
    step_s = sum(parts.values())
    row: dict[str, Any] = {
        "run": run.name,
        "gate": facts["gate_type"],
        "perplexities": [perplexities[0], perplexities[(len(perplexities) - 1) // 2], perplexities[-1]],
        "starved": [max(starved), starved[-1], sum(len(layer["load"]) for layer in records[-1]["layers"])],
        "load_cv": [_mean(part_of(cvs, 0, 0.25)), _mean(part_of(cvs, 0.75, 1))],
        "local_share": _mean([share for _, share in part_of(run.local_shares, 0.75, 1)]),
        "megabytes": mean(part_of(logged, 0.75, 1), "comm/bytes_inter_node") / 1e6,
        "step_s": step_s,
        "shares": [100 * part / step_s for part in parts.values()],
    }
    if probe is not None:
        row["token_cosines"] = [
            _mean([layer.same_mean for layer in probe.layers]),
            _mean([layer.different_mean for layer in probe.layers]),
        ]
        if facts["gate_type"] != "hash":
            cosine = _mean([torch.as_tensor(layer.chosen).mean().item() for layer in probe.layers])
            row["gate_cosine"] = cosine
            bound = min_expert_capacity(max(cosine, 0.0), facts["hidden_size"], facts["num_experts"])
            row["capacity"] = float(bound)
    return row


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main(argv: list[str] | None = None, run: Callable[..., Any] = subprocess.run) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--reuse", action="store_true", help="take the runs in `output_dir` as they are")
    parser.add_argument("--options", default="", help="passed on to recipes/reproduce.py")
    parser.add_argument("--hardware", help="short name for the results file; without, the table is printed only")
    args = parser.parse_args(argv)
    load = Load()
    with load:
        if not args.reuse:
            command = [sys.executable, str(RECIPE), "--output_dir", str(args.output_dir)]
            run([*command, "--max_steps", str(args.max_steps), "--options", args.options], check=True)
    text = args.output_dir / "corpus" / "sample.txt"
    rows = []
    for name in RUNS:
        folder = read_run(args.output_dir / name)
        probe = None if folder.checkpoint is None else probe_checkpoint(folder.checkpoint, text)
        rows.append(row_of(folder, probe))
    facts = dict(read_run(args.output_dir / RUNS[0]).training[-1]["model"])
    del facts["gate_type"]  # each row has its own
    config = {
        "max_steps": args.max_steps,
        "nodes": 2,
        "ranks_per_node": 1,
        **facts,
        "seed": 0,
        "options": args.options,
    }
    record = Record(
        theme="reproduce",
        question="What do the paper's figures 6 and 8 to 13 show of a small model on two emulated nodes?",
        config=config,
        command="python -m benchmarks.bench_reproduce"
        + (f" --max_steps {args.max_steps}" if args.max_steps != 600 else ""),
        rows=rows,
        columns=COLUMNS,
        notes=NOTES,
        load={} if args.reuse else load.result(),
    )
    print(record.table())
    if args.hardware:
        print(record.write(args.hardware))


if __name__ == "__main__":
    main()
