# SPDX-License-Identifier: Apache-2.0
"""How long is a training step on several nodes, and how many bytes cross between them, in each layout?

`python -m benchmarks.bench_step` builds the emulated cluster, trains the same model on the same text in every layout, and
writes `results/step_*.{json,md}`. All layouts live in the same processes and take turns step by step, so that whatever
else the machine does hits them alike; who goes first rotates. Before a speed is printed, every layout's losses must
agree with those of one process that trains on the whole batch, over the first steps, warm-up included.

Bytes are those of the nodes' own interfaces; seconds are the slowest rank's, between two barriers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks import workload
from benchmarks.cluster import Cluster, Counters, Link, run_on_nodes
from benchmarks.gloo_device import share_gloo_device
from benchmarks.record import Load, Record, Spread
from benchmarks.step_variants import DEFAULT_VARIANTS, VARIANTS, Setup, Variant, build
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers


# After more steps rounding has grown through the router's choices: a token between two experts goes to the other one.
CHECKED_STEPS = 10
UNSHAPED = "unshaped"

ROUTING_NOTES = {
    "olmoe": [
        "transformers pools its load-balancing loss over layers, so it does not keep a layer from collapsing: within ten "
        "steps all tokens of a layer go to one rank here. That rank computes for all, and each exchange fills one direction "
        "of the link only. `locmoe-hash` is the same model with an even load."
    ],
    "locmoe-hash": [
        "Routing by a balanced hash of the token id: even load, half of the tokens on their own node, every step alike."
    ],
}


def one_process_losses(setup: Setup) -> list[float]:
    """The truth: one process takes the same steps on the whole batch, in the parts that router losses are taken over."""
    model = build(setup)
    optimizer = workload.optimizer_for(model, setup.lr)
    losses = []
    for batch in setup.batches():
        total = 0.0
        parts = batch.chunk(setup.world_size if setup.losses_per_rank else 1)
        for part in parts:
            loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def worker(setup: Setup, variants: list[Variant], output: Path) -> None:
    """One rank: all variants, taking turns. Rank 0 writes what was measured."""
    torch.set_num_threads(1)
    _keep_priority()
    share_gloo_device()  # or the threads of all variants' groups take time from each
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank, rounds = dist.get_rank(), setup.batches()
    models = {variant.name: build(setup, variant) for variant in variants}
    optimizers = {name: workload.optimizer_for(model, setup.lr) for name, model in models.items()}
    seconds = {name: [] for name in models}
    sent = {name: [] for name in models}
    losses = {name: [] for name in models}

    for index, batch in enumerate(rounds):
        part = batch.chunk(setup.world_size)[rank]
        first = index % len(variants)
        for variant in variants[first:] + variants[:first]:
            model, optimizer = models[variant.name], optimizers[variant.name]
            dist.barrier()
            before, started = Counters.read(), time.perf_counter()
            loss = model(input_ids=part, labels=part).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            elapsed = time.perf_counter() - started
            dist.barrier()
            sent[variant.name].append((Counters.read() - before).tx_bytes)
            seconds[variant.name].append(elapsed)
            losses[variant.name].append(loss.item())

    mine = {"seconds": seconds, "sent": sent, "losses": losses}
    everyone = [None] * setup.world_size
    dist.all_gather_object(everyone, mine)
    if rank == 0:
        merged = {name: _merge(name, everyone, setup) for name in models}
        for name, model in models.items():
            chosen = {layer.choices for layer in expert_parallel_layers(model)}
            merged[name]["fan_out_and_slices"] = sorted(map(list, chosen - {None}))
        output.write_text(json.dumps(merged))
    dist.barrier()
    dist.destroy_process_group()


def _keep_priority() -> None:
    """Make a nice value count against other sessions, too: a kernel that groups by session weighs it inside one only, and
    every rank has a session of its own."""
    autogroup = Path("/proc/self/autogroup")
    if autogroup.exists() and os.nice(0) < 0:
        autogroup.write_text(str(os.nice(0)))


def _merge(name: str, everyone: list[dict], setup: Setup) -> dict[str, list[float]]:
    """Per step: the slowest rank's seconds, the busiest node's bytes, the mean loss."""

    def per_step(key):
        return list(zip(*(rank[key][name] for rank in everyone), strict=True))

    # the ranks of a node read the same interface a moment apart: the first rank of each node speaks for it
    return {
        "seconds": [max(step) for step in per_step("seconds")],
        "sent": [max(step[:: setup.ranks_per_node]) for step in per_step("sent")],
        "losses": [statistics.fmean(step) for step in per_step("losses")],
    }


def measure(setup: Setup, variants: list[Variant], links: list[Link]) -> dict[str, dict]:
    """Per link and variant what `_merge` gives; the cluster is built once and its links reshaped."""
    measured = {}
    with tempfile.TemporaryDirectory() as scratch, Cluster(setup.nodes, links[0]) as cluster:
        for link in links:
            cluster.shape(link)
            output = Path(scratch, "measured.json")
            command = [sys.executable, *"-m torch.distributed.run -m benchmarks.bench_step --worker".split(), output]
            command += ["--variants", *(variant.name for variant in variants), "--setup"]
            command.append(json.dumps(dataclasses.asdict(setup)))
            result = run_on_nodes(cluster, list(map(str, command)), setup.ranks_per_node, timeout_s=3600)
            if result.status:
                raise RuntimeError(f"the run at {link} failed with status {result.status}:\n{result.text()}")
            measured[str(link)] = json.loads(output.read_text())
    return measured


def largest_difference(trajectories: list[list[float]], truth: list[float]) -> float:
    """Largest relative difference of the losses over the steps that are checked; NaN where a loss is NaN."""
    losses, expected = torch.tensor(trajectories)[:, :CHECKED_STEPS], torch.tensor(truth)[:CHECKED_STEPS]
    return ((losses - expected) / expected).abs().max().item()


def rows(setup: Setup, variants: list[Variant], links: list[Link], measured: dict, truth: list[float]) -> list[dict]:
    """One row per variant; a variant whose losses differ from the truth gets no speed."""
    table = []
    for variant in variants:
        row = {"variant": variant.name, "layout": variant.layout, "exchange": variant.exchange}
        table.append(row)
        if variant.is_layout:
            losses = [measured[str(link)][variant.name]["losses"] for link in links]
            row["loss_difference"] = largest_difference(losses, truth)
        row["correct"] = row.get("loss_difference", 0.0) <= variant.rtol
        if not row["correct"]:
            continue
        for link in links:
            one = measured[str(link)][variant.name]
            row[f"seconds {link}"] = Spread.of(one["seconds"][setup.warmup :])
            row[f"sent {link}"] = statistics.median(one["sent"][setup.warmup :]) / 1e6
            if link.bytes_per_s:
                row[f"wire {link}"] = row[f"sent {link}"] * 1e6 / link.bytes_per_s
    for link in links:
        _compare_with_upstream(setup, variants, table, str(link), measured[str(link)])
    return table


def _compare_with_upstream(
    setup: Setup, variants: list[Variant], table: list[dict], link: str, measured: dict
) -> None:
    """Ratio to the fastest upstream layout at this link: the median of the ratios of steps on the same batch."""
    upstream = {variant.name for variant in variants if variant.upstream}
    right = [row for row in table if row["correct"]]
    best = min(
        (row for row in right if row["variant"] in upstream),
        key=lambda row: row[f"seconds {link}"].median,
        default=None,
    )
    if best is None:
        return
    base = measured[best["variant"]]["seconds"][setup.warmup :]
    for row in right:
        own = measured[row["variant"]]["seconds"][setup.warmup :]
        row[f"ratio {link}"] = statistics.median(a / b for a, b in zip(own, base, strict=True))


def verdicts(links: list[Link], variants: list[Variant], table: list[dict]) -> list[str]:
    """Per link and dtype on the wire, our fastest way beside upstream's fastest layout: time and bytes."""
    by_name = {row["variant"]: row for row in table if row["correct"]}
    lines = []
    for link in map(str, links):

        def fastest(names: list[str], link: str = link) -> str | None:
            known = [name for name in names if name in by_name]
            return min(known, key=lambda name: by_name[name][f"seconds {link}"].median, default=None)

        best = fastest([variant.name for variant in variants if variant.upstream])
        for dtype in ("float32", "bfloat16"):
            ours = [v.name for v in variants if v.is_layout and not v.upstream and v.wire_dtype == dtype]
            own = fastest(ours)
            if best is None or own is None:
                continue
            bytes_ratio = by_name[own][f"sent {link}"] / by_name[best][f"sent {link}"]
            lines.append(
                f"{link}, {dtype} on the wire: `{own}` takes {by_name[own][f'ratio {link}']:.2f} of the time of "
                f"upstream's fastest, `{best}`, and sends {bytes_ratio:.2f} of its bytes."
            )
    return lines


def chosen_slices(measured: dict) -> str:
    """What "auto" came to, by link and variant."""
    return "; ".join(
        f"{link}: {name} {', '.join(f'{fan_out} {slices}' for fan_out, slices in one['fan_out_and_slices'])}"
        for link, variants in measured.items()
        for name, one in variants.items()
        if one["fan_out_and_slices"]
    )


def report(
    setup: Setup,
    links: list[Link],
    variants: list[Variant],
    table: list[dict],
    load: Load,
    truth: list[float],
    measured: dict,
    command: str,
) -> Record:
    columns = {"variant": "", "layout": "layout", "exchange": "expert exchange", "sent_mb": "MB a node sends a step"}
    for link in links:
        columns |= {f"seconds {link}": f"s/step {link} (quartiles)", f"ratio {link}": "to best upstream"}
        columns |= {f"wire {link}": "of it, s for the bytes alone"} if link.bytes_per_s else {}
    columns["loss_difference"] = "largest loss difference to one process"
    for row in table:
        if row["correct"]:
            row["sent_mb"] = f"{row[f'sent {links[0]}']:.1f}"
        if "loss_difference" in row:
            row["loss_difference"] = f"{row['loss_difference']:.1e}" + ("" if row["correct"] else " WRONG, no speed")
    return Record(
        theme=f"step_{setup.architecture}_top{setup.num_experts_per_tok}",
        question=__doc__.splitlines()[0],
        config={**dataclasses.asdict(setup), "links": [str(link) for link in links]},
        command=command,
        rows=table,
        columns=columns,
        notes=[
            *verdicts(links, variants, table),
            *ROUTING_NOTES.get(setup.architecture, []),
            f"Fan-out and slices that were chosen: {chosen_slices(measured)}.",
            "What is left of a step after the bytes and what `alone` takes: weights and gradients exchanged inside a node, "
            "and waiting for the busiest rank and the busier direction of the link.",
            "Emulated nodes on one machine: the links' rates are real, their latency is not, and all ranks share the "
            "machine's cores. Compare within a column only; differences below some 5 % are noise.",
            "'s for the bytes alone' is bytes over rate: what the link would take if nothing else took time.",
            "Frames are counted: a shaped link splits what an unshaped one counts in one piece, so its headers add 5 %.",
            "gloo's reduce_scatter sends as much as an all_reduce, so the bytes of sharded layouts are higher than "
            "NCCL's would be.",
        ],
        load=load.result(),
        extra={"raw": {"truth": truth, **measured}},
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=[UNSHAPED, "1gbit", "200mbit"])
    parser.add_argument("--variants", nargs="+", default=DEFAULT_VARIANTS, choices=list(VARIANTS))
    for field in dataclasses.fields(Setup):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--hardware", default=f"emulated-{os.cpu_count()}core", help="part of the results' file name")
    parser.add_argument("--output", type=Path, help="directory of the results (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setup", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        setup = Setup(**json.loads(args.setup))
        worker(setup, [VARIANTS[name] for name in args.variants], args.worker)
        return 0

    # so that the cluster is removed after a SIGTERM as it is after Ctrl-C
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    setup = Setup(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setup)})
    variants = [VARIANTS[name] for name in args.variants]
    links = [Link(None if rate == UNSHAPED else rate) for rate in args.links]
    truth = one_process_losses(setup)
    with Load() as load:
        measured = measure(setup, variants, links)
    table = rows(setup, variants, links, measured, truth)
    command = " ".join(["python -m benchmarks.bench_step", *(argv if argv is not None else sys.argv[1:])])
    record = report(setup, links, variants, table, load, truth, measured, command)
    print(record.table())
    if not args.dry:
        print(record.write(args.hardware, **({"directory": args.output} if args.output else {})))
    return 0 if all(row["correct"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
