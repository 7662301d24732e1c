# SPDX-License-Identifier: Apache-2.0
"""What keeps tokens on their node, what does it cost in quality, and what does it save in time?

    python -m benchmarks.bench_locality

trains every row of the table (`--parts train`: on all GPUs, or on the CPU) and measures the trained routers on the emulated
cluster (`--parts measure`: real ranks, shaped links, the interfaces' own counters). The halves can run on different machines:
the first leaves everything the second needs in the folder `--trained`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.locality_data import load, prepare
from benchmarks.locality_jobs import Plan, devices, pack, run_jobs, write_results
from benchmarks.locality_rows import ROUTINGS, Setup, Topology, jobs
from benchmarks.record import Load, commit, hardware, versions


MEASURED = (
    "hash",
    "switch",
    "paper: loss",
    "none",
    "batches + experts",
    "loss + batches",
    "loss + batches + experts",
    "loss + batches + experts + tiers",
    "loss 0.1 + batches",
    "loss 0.1 to the aim + batches",
    "all local",
)
TRAINED = "locality_trained.json"


def train_part(args: argparse.Namespace, started_s: float) -> int:
    """Trains all rows for all seeds and topologies; leaves `locality_trained.json` and the measured rows' checkpoints."""
    setup = Setup(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Setup)})
    if not args.data.exists():
        prepare(args.data, setup.vocab_size)
    topologies = [Topology.parse(text) for text in args.topologies]
    todo = jobs([ROUTINGS[name] for name in args.rows], topologies, args.seeds)
    args.trained.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="locality-"))
    plan = Plan(
        data=args.data,
        scratch=scratch,
        saved_seed=args.seeds[0],
        saved_rows=MEASURED,
        workers_per_device=args.workers or (12 if devices() != ["cpu"] else 1),
        finish_s=started_s + args.budget_s if args.budget_s else math.inf,
        deadline_s=started_s + 1.4 * args.budget_s if args.budget_s else math.inf,
    )
    with Load() as busy:
        results, failed, decided = run_jobs(todo, setup, plan)
    parts = load(args.data, setup.sequence_length)
    about = {
        "command": "python -m benchmarks.bench_locality " + " ".join(sys.argv[1:]),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "load": busy.result(),
        "setup": dataclasses.asdict(setup) | {"steps": decided["steps"]},
        "decided": decided,
        "tokens": {part: sequences.input_ids.numel() for part, sequences in parts.items()},
        "domains": parts["train"].domains,
        "text_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "seconds": round(time.monotonic() - started_s, 1),
    }
    write_results(args.trained / TRAINED, {**about, "failed": failed, "results": results})
    pack(scratch, args.trained)
    shutil.rmtree(scratch)
    for text in failed:
        print(text, file=sys.stderr)
    print(f"{len(results)} rows, {len(failed)} failed, {time.monotonic() - started_s:.0f} s: {args.trained}")
    return 1 if failed else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_locality", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["train", "measure"], choices=["train", "measure"])
    parser.add_argument("--rows", nargs="+", default=list(ROUTINGS), choices=list(ROUTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--topologies", nargs="+", default=["2x2", "4x1"])
    parser.add_argument(
        "--data", type=Path, default=Path(".cache/locality_tokens.xz"), help="token file, made if missing"
    )
    parser.add_argument("--trained", type=Path, default=Path("runs/locality"), help="folder between the two parts")
    parser.add_argument(
        "--workers", type=int, help="trainings at the same time on each device (12 on a GPU, 1 on the CPU)"
    )
    parser.add_argument(
        "--budget-s", type=float, help="seconds for the training part; fewer steps where they do not fit"
    )
    for field in dataclasses.fields(Setup):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    started_s = time.monotonic()
    args = parse(argv)
    status = 0
    if "train" in args.parts:
        status = train_part(args, started_s)
    return status


if __name__ == "__main__":
    sys.exit(main())
