# SPDX-License-Identifier: Apache-2.0
"""The tables of `bench_locality`: what was trained beside what was measured, and whether the aims are reached."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks.cluster import Link
from benchmarks.locality_measure import Variant
from benchmarks.locality_rows import AIMS, REFERENCE, ROUTINGS, Topology
from benchmarks.record import Record, Spread


TIME_AIM = 0.4  # less time than the best of hash, switch and upstream's layouts
LOSS_AIM = 0.01  # nats above the same gate without locality
AIM_LINK = "200mbit"
PAPERS = ("hash", "switch")  # what the paper compares with: 12.68 to 22.24 % less time
HALVED = "hash, bfloat16 on the wire"  # what a row with half the bytes of a value is fairly compared with
SHARE_TOLERANCE = 0.03  # between the trained and the measured node-local share


@dataclass(frozen=True)
class Quality:
    """What the trainings of a row came to, over seeds."""

    local_share: float
    losses: list[float]
    differences: list[float]  # to the same gate without locality, seed by seed
    load_cv: float
    rank_load_cv: float
    dropped: float
    rerouted: float

    @property
    def difference(self) -> float:
        return statistics.fmean(self.differences)

    @property
    def standard_error(self) -> float:
        count = len(self.differences)
        return statistics.stdev(self.differences) / math.sqrt(count) if count > 1 else math.nan

    @property
    def by_seed(self) -> str:
        return " / ".join(f"{difference:+.3f}" for difference in self.differences)

    def cells(self) -> dict[str, str]:
        loss = statistics.fmean(self.losses)
        spread = f" ± {self.standard_error:.3f}" if len(self.differences) > 1 else ""
        return {
            "trained_share": f"{self.local_share:.3f}",
            "loss": f"{loss:.3f}",
            "perplexity": f"{math.exp(loss):.2f}",
            "difference": f"{self.difference:+.3f}{spread}",
            "by_seed": self.by_seed,
            "load_cv": f"{self.load_cv:.2f}",
            "rank_load_cv": f"{self.rank_load_cv:.2f}",
            "dropped": f"{100 * self.dropped:.1f} %",
            "rerouted": f"{100 * self.rerouted:.1f} %",
        }


def qualities(results: list[dict[str, Any]], topology: Topology) -> dict[str, Quality]:
    """By row, of the seeds that were trained."""
    by_row: dict[str, dict[int, dict]] = {}
    for result in results:
        if result["topology"] == str(topology):
            by_row.setdefault(result["routing"], {})[result["seed"]] = result
    found = {}
    for name, seeds in by_row.items():
        reference = by_row.get(REFERENCE.get(ROUTINGS[name].gate, "none"), {})
        runs = list(seeds.values())

        def mean(key: str, runs=runs) -> float:
            return statistics.fmean(run[key] for run in runs)

        pairs = [(seeds[seed], reference[seed]) for seed in sorted(seeds) if seed in reference]
        found[name] = Quality(
            mean("local_share"),
            [run["validation_loss"] for run in runs],
            [run["validation_loss"] - base["validation_loss"] for run, base in pairs] or [math.nan],
            *(mean(key) for key in ("load_cv", "rank_load_cv", "dropped", "rerouted")),
        )
    return found


QUALITY_COLUMNS = {
    "trained_share": "node-local share",
    "loss": "validation loss",
    "perplexity": "perplexity",
    "difference": "to the same gate without locality",
    "by_seed": "seed by seed",
    "load_cv": "load CV, experts",
    "rank_load_cv": "load CV, ranks",
    "dropped": "dropped",
    "rerouted": "rerouted",
}


def training_record(trained: dict[str, Any], topologies: list[Topology]) -> Record:
    """All rows as trained."""
    rows = []
    for topology in topologies:
        found = qualities(trained["results"], topology)
        for name in ROUTINGS:
            if name in found:
                rows.append({"topology": str(topology), "row": name, **found[name].cells()})
    seeds = sorted({result["seed"] for result in trained["results"]})
    return Record(
        theme="locality_training",
        question="Which routing keeps tokens on their node, and what does it cost in validation loss?",
        config={**trained["setup"], "seeds": seeds, "tokens": str(trained["tokens"]), "domains": trained["domains"]},
        command=trained["command"],
        rows=rows,
        columns={"topology": "nodes x ranks", "row": "", **QUALITY_COLUMNS},
        notes=[
            "Text of eight domains, shuffled together: no node reads a mixture of its own.",
            "Node-local share, load and tiers are means over the last 50 steps; validation is without batch placement and "
            "without tiers. Differences are paired by seed, ± their standard error. The paper's gate is compared with "
            "cosine logits without locality.",
            "One process computes what the ranks would: which sample goes to which node, the locality loss of each node, each "
            "rank's tier. The measurement on real ranks has to find the same share.",
            "Rows that change nothing that is computed (no locality loss, no tier) are read off one training.",
            *findings(trained["results"], topologies),
            *trained.get("notes", []),
            *([f"Failed: {len(trained['failed'])} of the trainings."] if trained["failed"] else []),
        ],
        load=trained["load"],
        extra={"decided": trained["decided"], "text_sha256": trained["text_sha256"], "runs": trained["results"]},
    )


def findings(results: list[dict[str, Any]], topologies: list[Topology]) -> list[str]:
    """What the trainings say as a whole: share against loss, how far seeds scatter, whether they are at an end."""
    notes = []
    for topology in topologies:
        found = qualities(results, topology)
        if "none" not in found:
            continue
        steps = [f"{found[n].local_share:.2f} at {found[n].difference:+.3f} (`{n}`)" for n in frontier(found)]
        notes.append(f"{topology}, share against loss, rows that no other beats in both: " + ", ".join(steps) + ".")
        if "hash" in found:
            ahead = statistics.fmean(found["none"].losses) - statistics.fmean(found["hash"].losses)
            notes.append(f"{topology}: `hash` is {ahead:.3f} nats below `none` after so short a training.")
    pairs = [
        quality.differences
        for topology in topologies
        for name, quality in qualities(results, topology).items()
        if ROUTINGS[name].gate in REFERENCE
    ]
    scattered = [statistics.variance(values) for values in pairs if len(values) > 1 and any(values)]
    if scattered:
        scatter = math.sqrt(statistics.fmean(scattered))
        needed = math.ceil((scatter / (LOSS_AIM / 2)) ** 2)
        notes.append(
            f"One paired difference scatters by {scatter:.3f} nats from seed to seed (root mean variance of the rows that train "
            f"by themselves and have their own gate for reference): to know a difference to ± {LOSS_AIM} (two standard errors) takes some {needed} seeds."
        )
    curves = [run["curve"] for run in results if run["routing"] == "none" and run.get("curve")]
    if curves and all(len(curve) > 1 for curve in curves):
        fall = statistics.fmean(curve[-2]["validation_loss"] - curve[-1]["validation_loss"] for curve in curves)
        steps = curves[0][-1]["step"] - curves[0][-2]["step"]
        notes.append(
            f"The trainings are not at their end: over the last {steps} steps `none` still fell by {fall:.3f} nats, the learning "
            "rate falling all the while."
        )
    return notes


def frontier(found: dict[str, Quality]) -> list[str]:
    """Rows with our gate than which none has both a larger share and a lower loss, by share."""
    own = sorted(
        (name for name in found if ROUTINGS[name].gate == ROUTINGS["none"].gate),
        key=lambda name: (-found[name].local_share, found[name].difference),
    )
    kept: list[str] = []
    for name in own:
        if not kept or found[name].difference < found[kept[-1]].difference:
            kept.append(name)
    return kept[::-1]


# ---- measured -------------------------------------------------------------------------------------------------------


def measured_rows(
    chosen: list[Variant],
    links: list[Link],
    measured: dict[str, dict],
    truths: dict[str, float],
    found: dict[str, Quality],
    warmup: int,
    trained_seed_share: dict[str, float],
) -> list[dict[str, Any]]:
    """One row per variant. Where the cross-entropy is not one process's, there is no speed."""
    table = []
    for variant in chosen:
        row: dict[str, Any] = {"variant": variant.name, "upstream": variant.is_upstream}
        if variant.layout != "alone" and variant.routing in found:
            row |= found[variant.routing].cells()
        by_link = [measured[str(link)][variant.name] for link in links]
        if variant.is_checked:
            expected = truths[variant.routing]
            row["loss_difference"] = max(abs(one["loss"][0] - expected) / expected for one in by_link)
        row["correct"] = row.get("loss_difference", 0.0) <= variant.rtol
        table.append(row)
        if not row["correct"]:
            continue
        if variant.layout != "alone":
            row["share"] = statistics.fmean(statistics.fmean(one["share"][warmup:]) for one in by_link)
            row["measured_cv"] = statistics.fmean(statistics.fmean(one["cv"][warmup:]) for one in by_link)
            row["turned"] = statistics.fmean(statistics.fmean(one["turned"][warmup:]) for one in by_link)
            if not variant.is_upstream:
                row["share_of_training"] = trained_seed_share.get(variant.routing)
        for link, one in zip(links, by_link, strict=True):
            row[f"seconds {link}"] = Spread.of(one["seconds"][warmup:])
            row[f"sent {link}"] = statistics.median(one["sent"][warmup:]) / 1e6
    for link in links:
        _compare(table, chosen, str(link), measured[str(link)], warmup)
    return table


def _compare(table: list[dict], chosen: list[Variant], link: str, measured: dict, warmup: int) -> None:
    """Ratios to the fastest baseline and to upstream's fastest: medians of the ratios of steps on the same batch."""
    right = [row for row in table if row["correct"]]
    baselines = {
        "baseline": [row for row in right if row["upstream"] or row["variant"] in ("hash", "switch")],
        "upstream": [row for row in right if row["upstream"]],
        "halved": [row for row in right if row["variant"] == HALVED],
        **{name: [row for row in right if row["variant"] == name] for name in PAPERS},
    }
    for kind, rows in baselines.items():
        best = min(rows, key=lambda row: row[f"seconds {link}"].median, default=None)
        if best is None:
            continue
        base = measured[best["variant"]]["seconds"][warmup:]
        for row in right:
            own = measured[row["variant"]]["seconds"][warmup:]
            row[f"to {kind} {link}"] = statistics.median(a / b for a, b in zip(own, base, strict=True))
            row[f"best {kind} {link}"] = best["variant"]


def best_row(found: dict[str, Quality], measured: list[str], topology: Topology) -> str | None:
    """Of the measured rows with our gate, the one with the largest share at no loss in quality; the cheapest if all cost."""
    own = [name for name in measured if name in found and ROUTINGS[name].gate == ROUTINGS["none"].gate]
    own = [name for name in own if name not in ("none", "all local")]
    free = [name for name in own if found[name].difference <= LOSS_AIM]
    if free:
        return max(free, key=lambda name: found[name].local_share)
    return min(own, key=lambda name: found[name].difference, default=None)


def aimed_row(found: dict[str, Quality], measured: list[str], topology: Topology) -> str | None:
    """Of the measured rows with our gate, the cheapest in quality with the node-local share of the aim, if there is one."""
    own = [name for name in measured if name in found and ROUTINGS[name].gate == ROUTINGS["none"].gate]
    own = [name for name in own if name not in ("none", "all local")]
    near = [name for name in own if found[name].local_share >= AIMS[topology.nodes]]
    return min(near, key=lambda name: found[name].difference, default=None)


def verdicts(table: list[dict], found: dict[str, Quality], topology: Topology, links: list[Link]) -> list[str]:
    """Aim by aim, for the best row at no loss in quality and for the cheapest with the share that was aimed at."""
    right = {row["variant"]: row for row in table if row["correct"]}
    free, near = (pick(found, list(right), topology) for pick in (best_row, aimed_row))
    lines = []
    if free is not None:
        is_free = found[free].difference <= LOSS_AIM
        lines += [
            f"{'Best row at no loss in quality' if is_free else 'Row with the least loss in quality'}: `{free}`."
        ]
        lines += _judged(free, right, found[free], topology, links)
    if near is not None and near != free:
        lines += [f"Cheapest row with the node-local share that is the aim: `{near}`."]
        lines += _judged(near, right, found[near], topology, links)
    elif near is None:
        lines += ["No measured row with our gate has the node-local share that is the aim."]
    for row in right.values():
        trained = row.get("share_of_training")
        if trained is not None and abs(row["share"] - trained) > SHARE_TOLERANCE:
            lines.append(
                f"`{row['variant']}`: measured share {row['share']:.3f}, in training {trained:.3f}: they disagree."
            )
    return lines


def _judged(name: str, right: dict[str, dict], quality: Quality, topology: Topology, links: list[Link]) -> list[str]:
    """One row against the aims."""
    aim, share = AIMS[topology.nodes], right[name]["share"]
    lines = [
        f"Node-local share, aim {aim}: {quality.local_share:.3f} trained (all seeds), {share:.3f} measured: "
        + ("reached." if min(share, quality.local_share) >= aim else "missed."),
        f"Validation loss, aim at most {LOSS_AIM} above the same gate without locality: {quality.difference:+.3f} "
        f"(s.e. {quality.standard_error:.3f}; seed by seed {quality.by_seed}): "
        + ("reached." if quality.difference <= LOSS_AIM else "missed."),
    ]
    for shaped in links:
        link = str(shaped)
        for wire in ("", ", bfloat16 on the wire"):
            mine = right.get(name + wire)
            if mine is None or f"to upstream {link}" not in mine:
                continue
            less = 1 - mine[f"to baseline {link}"]
            text = (
                f"{link}{wire}: {_less(less)} time a step than the fastest of hash, switch and upstream's layouts "
                f"(`{mine[f'best baseline {link}']}`), {_less(1 - mine[f'to upstream {link}'])} than upstream's fastest "
                f"(`{mine[f'best upstream {link}']}`)"
            )
            if wire and f"to halved {link}" in mine:
                text += f", {_less(1 - mine[f'to halved {link}'])} than `{HALVED}`"
            if all(f"to {other} {link}" in mine for other in PAPERS):
                text += ", " + " and ".join(
                    f"{_less(1 - mine[f'to {other} {link}'])} than `{other}`" for other in PAPERS
                )
            is_aimed = link == AIM_LINK and topology.nodes == 2
            reached = "reached" if less >= TIME_AIM else "missed"
            lines.append(text + (f"; aim {100 * TIME_AIM:.0f} %: {reached}." if is_aimed else "."))
        lines += _what_is_in_the_way(right, name, shaped)
    return lines


def noise(table: list[dict], found: dict[str, Quality], links: list[Link]) -> list[str]:
    """What the same work took twice: rows whose placement of experts moved nothing are the same training."""
    right = {row["variant"]: row for row in table if row["correct"]}
    lines = []
    for one, other in itertools.combinations([name for name in right if name in found], 2):
        is_same = (found[one].losses, found[one].local_share) == (found[other].losses, found[other].local_share)
        if is_same and ROUTINGS[one].places_batches == ROUTINGS[other].places_batches:
            ratios = [right[other][f"seconds {link}"].median / right[one][f"seconds {link}"].median for link in links]
            lines.append(
                f"`{one}` and `{other}` came to the same training, and do the same work: the medians' ratio, "
                + ", ".join(f"{ratio:.2f} at {link}" for ratio, link in zip(ratios, links, strict=True))
                + ", is noise."
            )
    return lines


def _less(part: float) -> str:
    return f"{100 * part:.0f} % less" if part >= 0 else f"{-100 * part:.0f} % more"


def _what_is_in_the_way(right: dict[str, dict], name: str, shaped: Link) -> list[str]:
    link = str(shaped)
    parts = [right.get(part) for part in ("all local", "alone")]
    if any(part is None for part in parts) or f"seconds {link}" not in right[name]:
        return []
    limit, alone = (part[f"seconds {link}"].median for part in parts)
    mine = right[name][f"seconds {link}"].median
    base_name = right[name][f"best baseline {link}"]
    base = right[base_name][f"seconds {link}"].median
    if base <= alone:  # nothing to be saved: noise
        return []
    text = (
        f"{link}, what a step is made of: {alone:.2f} s is computation (`alone`); above it are {base - alone:.2f} s with "
        f"`{base_name}`, {mine - alone:.2f} s with `{name}`, {limit - alone:.2f} s with no token leaving its node"
    )
    if shaped.bytes_per_s is not None:
        sent = right["all local"][f"sent {link}"] * 1e6 / shaped.bytes_per_s
        text += (
            f" ({sent:.2f} s of these are bytes on the link; the rest is processor time of the collectives and of exchanges "
            "inside a node, on cores that are busy with the computation of all ranks)"
        )
    saved = max(0.0, (base - limit) / base)
    text += (
        f". Against `{base_name}` routing can save {100 * saved:.0f} % of a step at most"
        if saved
        else f". Against `{base_name}` routing can save nothing"
    )
    return [text + f"; `{name}` takes {_less((base - mine) / base)}."]


def measured_record(
    topology: Topology,
    links: list[Link],
    table: list[dict],
    found: dict[str, Quality],
    trained: dict[str, Any],
    config: dict[str, Any],
    command: str,
    load: dict[str, float],
    raw: dict[str, Any],
) -> Record:
    columns = {
        "variant": "",
        "trained_share": "node-local share, trained (seeds)",
        "share_cell": "measured (seed)",
        "loss": "validation loss",
        "perplexity": "perplexity",
        "difference": "to the same gate without locality",
        "cv_cell": "load CV",
        "turned_cell": "dropped or rerouted",
    }
    for link in links:
        columns |= {
            f"sent_cell {link}": f"MB a node sends a step, {link}",
            f"seconds {link}": f"s/step {link} (quartiles)",
            f"to baseline {link}": "to the best of hash, switch, upstream",
            f"to upstream {link}": "to upstream's best",
        }
    columns["check"] = "loss against one process"
    for row in table:
        if "share" in row:
            beside = row.get("share_of_training")
            row["share_cell"] = f"{row['share']:.3f}" + (f" ({beside:.3f})" if beside is not None else "")
            row["cv_cell"], row["turned_cell"] = f"{row['measured_cv']:.2f}", f"{100 * row['turned']:.1f} %"
        for link in links:
            if f"sent {link}" in row:
                row[f"sent_cell {link}"] = f"{row[f'sent {link}']:.1f}"
        if "loss_difference" in row:
            row["check"] = f"{row['loss_difference']:.1e}" + ("" if row["correct"] else " WRONG, no speed")
    return Record(
        theme=f"locality_{topology}",
        question=f"What does keeping tokens on their node save in bytes and time, on {topology.nodes} nodes of "
        f"{topology.ranks_per_node}, against Hash, Switch and upstream's layouts?",
        config=config,
        command=command,
        rows=table,
        columns=columns,
        notes=[
            *verdicts(table, found, topology, links),
            *noise(table, found, links),
            "Rows without another word: layout `spread` (dense layers sharded in a node and copied over nodes, experts over "
            "all ranks) with our exchange, float32 on the wire. `upstream's sharded`: everything over all ranks, transformers' "
            "flat all_to_all. `upstream's replicated`: a copy of all experts on every node.",
            "`measured (seed)`: the share on real ranks, and in brackets that of the training the checkpoint is from.",
            "`all local` is the physical limit: a capacity tier that lets no token leave its node.",
            "A step is batch placement, forward, backward, router state and optimizer, in training; the router goes on learning "
            f"at {config['learning_rate']}. Checkpoints travelled with experts in eight bits and the rest in bfloat16.",
            "The first step's cross-entropy has to be one process's on the same batch; rows with a tier turn tokens away, which "
            "one process without ranks does not, and are not compared.",
            "Emulated nodes on one machine: the links' rates are real, their latency is not, and all ranks share the machine's "
            f"cores ({config['cores']} here for {topology.world_size} ranks). Compare within a column; below some 5 % is noise.",
            *trained.get("notes", []),
        ],
        load=load,
        extra={"raw": raw},
    )
