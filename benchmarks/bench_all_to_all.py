# SPDX-License-Identifier: Apache-2.0
"""How long does an all-to-all take under each plan of the backend "locmoe", against gloo's own, and what does it send?

`python -m benchmarks.bench_all_to_all` builds the emulated cluster and makes the same exchange through gloo and through the
backend's plans, in the same processes, taking turns. Before a speed is printed, every exchange must move every number to its
place. Messages and bytes between nodes are the backend's own counters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.cluster import Cluster, Link, run_on_nodes
from benchmarks.record import Load, Record, Spread


UNSHAPED = "unshaped"
GLOO = "gloo"
PLANS = ("flat", "two_level", "auto")
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22)


@dataclass(frozen=True)
class Setup:
    nodes: int = 2
    ranks_per_node: int = 2
    warmup: int = 2
    repeats: int = 15

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def worker(setup: Setup, output: Path) -> None:
    """One rank: all variants and sizes, taking turns. Rank 0 writes what was measured."""
    from hf_locmoe.distributed.backend import LocMoeBackendOptions, group_counters

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    groups = {GLOO: dist.new_group(backend="gloo")}
    for plan in PLANS:
        groups[plan] = dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(plan=plan))
    seconds: dict[str, dict[int, list[float]]] = {name: {size: [] for size in SIZES} for name in groups}
    moved: dict[str, dict[int, tuple[int, int]]] = {name: {} for name in groups}
    is_right = dict.fromkeys(groups, True)
    rank, size = dist.get_rank(), dist.get_world_size()
    for num_bytes in SIZES:
        count = num_bytes // 4 // size
        source = torch.arange(size).repeat_interleave(count) + 1000 * rank
        source = source.to(torch.int32)
        truth = (torch.arange(size) * 1000 + rank).repeat_interleave(count).to(torch.int32)
        for step in range(setup.warmup + setup.repeats):
            names = list(groups)
            for name in names[step % len(names) :] + names[: step % len(names)]:
                result = torch.empty_like(source)
                before = None if name == GLOO else group_counters(groups[name])
                dist.barrier()
                started = time.perf_counter()
                dist.all_to_all_single(result, source, group=groups[name])
                elapsed = time.perf_counter() - started
                is_right[name] &= torch.equal(result, truth)
                if step >= setup.warmup:
                    seconds[name][num_bytes].append(elapsed)
                    if before is not None:
                        sent = (group_counters(groups[name]) - before)["all_to_all_single"]
                        moved[name][num_bytes] = (sent.messages_inter_node, sent.bytes_inter_node)
    overhead = host_overhead()
    everyone: list = [None] * size
    dist.all_gather_object(everyone, {"seconds": seconds, "is_right": is_right})
    if rank == 0:
        slowest = {
            name: {
                num_bytes: [max(step) for step in zip(*(other["seconds"][name][num_bytes] for other in everyone))]
                for num_bytes in SIZES
            }
            for name in groups
        }
        right = {name: all(other["is_right"][name] for other in everyone) for name in groups}
        result = {"seconds": slowest, "moved": moved, "is_right": right, "overhead_s": overhead}
        output.write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def host_overhead(calls: int = 2000, repeats: int = 7) -> float:
    """Seconds that a call takes longer through the backend: groups of this rank alone, so that nothing travels."""
    rank = [dist.get_rank()]
    tensor, result = torch.zeros(4), torch.zeros(4)
    times: dict[str, list[float]] = {GLOO: [], "locmoe": []}
    groups = {name: dist.new_group(rank, backend=name, use_local_synchronization=True) for name in times}
    for _ in range(repeats):
        for name, group in groups.items():
            started = time.perf_counter()
            for _ in range(calls):
                dist.all_to_all_single(result, tensor, group=group)
            times[name].append((time.perf_counter() - started) / calls)
    # the fastest of each: ranks that share cores wait for them, and that is not the backend's time
    return min(times["locmoe"]) - min(times[GLOO])


def measure(setup: Setup, links: list[Link]) -> dict[str, dict]:
    """Per link what the ranks measured; the cluster is built once and its links reshaped."""
    measured = {}
    with tempfile.TemporaryDirectory() as scratch, Cluster(setup.nodes, links[0]) as cluster:
        for link in links:
            cluster.shape(link)
            output = Path(scratch, "measured.json")
            command = [sys.executable, *"-m torch.distributed.run -m benchmarks.bench_all_to_all --worker".split()]
            command += [str(output), "--setup", json.dumps(asdict(setup))]
            result = run_on_nodes(cluster, command, setup.ranks_per_node, timeout_s=600)
            if result.status:
                raise RuntimeError(f"the run at {link} failed with status {result.status}:\n{result.text()}")
            measured[str(link)] = json.loads(output.read_text())
    return measured


def table(links: list[Link], measured: dict[str, dict]) -> list[dict]:
    rows = []
    for num_bytes in SIZES:
        for name in (GLOO, *PLANS):
            row: dict = {"bytes": num_bytes, "variant": name}
            for link in links:
                of_link = measured[str(link)]
                if not of_link["is_right"][name]:
                    continue
                times = of_link["seconds"][name][str(num_bytes)]
                baseline = of_link["seconds"][GLOO][str(num_bytes)]
                row[f"ms {link}"] = Spread.of([1e3 * seconds for seconds in times])
                row[f"ratio {link}"] = Spread.of([mine / theirs for mine, theirs in zip(times, baseline)])
                if name != GLOO:
                    row[f"messages {link}"], row["sent"] = of_link["moved"][name][str(num_bytes)]
            rows.append(row)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_all_to_all", description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=[UNSHAPED, "200mbit"])
    for option in fields(Setup):
        parser.add_argument(f"--{option.name}", type=int, default=option.default)
    parser.add_argument("--hardware", default=f"emulated-{os.cpu_count()}core", help="part of the results' file name")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setup", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(Setup(**json.loads(args.setup)), args.worker)
        return 0
    setup = Setup(**{option.name: getattr(args, option.name) for option in fields(Setup)})
    links = [Link(None if rate == UNSHAPED else rate) for rate in args.links]
    with Load() as load:
        measured = measure(setup, links)
    columns = {"bytes": "bytes a rank sends", "variant": "", "sent": "of it between nodes"}
    for link in links:
        columns |= {f"messages {link}": "messages", f"ms {link}": f"ms {link} (quartiles)"}
        columns |= {f"ratio {link}": "to gloo (quartiles)"}
    overhead_us = statistics.median(1e6 * of_link["overhead_s"] for of_link in measured.values())
    record = Record(
        theme="all_to_all",
        question=__doc__.splitlines()[0],
        config={**asdict(setup), "links": [str(link) for link in links]},
        command=" ".join(["python -m benchmarks.bench_all_to_all", *(argv if argv is not None else sys.argv[1:])]),
        rows=table(links, measured),
        columns=columns,
        notes=[
            "Synchronous exchanges of equal parts between barriers; the time is the slowest rank's. Messages and bytes are"
            " one rank's between nodes: one message there means two levels.",
            f"A call through the backend costs {overhead_us:.1f} µs of the host's time more than gloo's own.",
            "Emulated nodes on one machine: a message between nodes costs hardly more than one inside, which is what two"
            " levels would save. Compare within a line.",
        ],
        load=load.result(),
        extra={"raw": measured},
    )
    print(record.table())
    if not args.dry:
        print(record.write(args.hardware))
    return 0 if all(right for of_link in measured.values() for right in of_link["is_right"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
