# SPDX-License-Identifier: Apache-2.0
"""What keeps tokens on their node, what does it cost in quality, and what does it save in time?

    python -m benchmarks.bench_locality

trains every row of the table (`--parts train`: on all GPUs, or on the CPU) and measures the trained routers on the emulated
cluster (`--parts measure`: real ranks, shaped links, the interfaces' own counters). The halves can run on different machines:
the first leaves everything the second needs in the folder `--trained`. `--parts report` writes the tables again from the raw
measurements in the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.cluster import Link
from benchmarks.locality_data import load, prepare
from benchmarks.locality_jobs import Plan, devices, pack, run_jobs, unpack, write_results
from benchmarks.locality_measure import LEARNING_RATE, TEXT_SEED, Variant, measure, truth, variants, worker
from benchmarks.locality_report import measured_record, measured_rows, qualities, training_record
from benchmarks.locality_rows import ROUTINGS, Setup, Topology, jobs
from benchmarks.record import RESULTS, Load, Record, commit, hardware, versions


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
WIRE_ROWS = ("hash", "loss + batches + experts + tiers", "all local")
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
    found = {
        "command": command_of(sys.argv[1:]),
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "date": str(datetime.datetime.now(datetime.timezone.utc).date()),
        "load": busy.result(),
        "setup": dataclasses.asdict(setup) | {"steps": decided["steps"]},
        "decided": decided,
        "tokens": {part: sequences.input_ids.numel() for part, sequences in parts.items()},
        "domains": parts["train"].domains,
        "text_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest(),
        "seconds": round(time.monotonic() - started_s, 1),
    }
    write_results(args.trained / TRAINED, {**found, "failed": failed, "results": results})
    pack(scratch, args.trained)
    shutil.rmtree(scratch)
    for text in failed:
        print(text, file=sys.stderr)
    print(f"{len(results)} rows, {len(failed)} failed, {time.monotonic() - started_s:.0f} s: {args.trained}")
    return 1 if failed else 0


def command_of(argv: list[str], module: str = "benchmarks.bench_locality") -> str:
    """How to ask again: the arguments, absolute paths by their last name."""
    named = [Path(argument).name if argument.startswith("/") else argument for argument in argv]
    return shlex.join(["python", "-m", module, *named])


def measure_part(args: argparse.Namespace, argv: list[str]) -> int:
    """Measures the trained rows on the emulated cluster and writes the tables; with `--dry`, prints them."""
    trained = json.loads((args.trained / TRAINED).read_text())
    topologies = [Topology.parse(text) for text in args.topologies]
    links = [Link(rate) for rate in args.links]
    command = command_of(argv)
    where = {"directory": args.output} if args.output else {}
    record = training_record(trained, topologies)
    print(record.table())
    if not args.dry:
        print(record.write(args.trained_on, **where, about=about(trained)))
    runs = unpack(args.trained)
    is_right = True
    for topology in topologies:
        kept = [name for name in MEASURED if name in args.rows and f"{topology} {name}" in runs]
        chosen = variants(kept, [name for name in kept if name in args.wire_rows])
        setup = Setup(**runs[f"{topology} {kept[0]}"]["setup"])
        part = load(args.data, setup.sequence_length)["train"]
        first = part.input_ids[part.batches(setup.sequences, 1, TEXT_SEED)[0]].long()
        truths = {name: truth(runs[f"{topology} {name}"], ROUTINGS[name], first) for name in kept}
        with Load() as busy:
            measured = measure(topology, chosen, links, args.trained, args.data, args.warmup, args.repeats)
        config = {
            **dataclasses.asdict(setup),
            "nodes": topology.nodes,
            "ranks_per_node": topology.ranks_per_node,
            "links": [str(link) for link in links],
            "warmup": args.warmup,
            "repeats": args.repeats,
            "learning_rate": LEARNING_RATE,
            "trained_at": trained["commit"],
            "cores": os.cpu_count(),
        }
        raw = {"truth": truths, **measured}
        record = tables(topology, config, raw, trained, command, busy.result(), args.seeds[0])
        print(record.table(), *record.notes, sep="\n")
        is_right = is_right and all(row["correct"] for row in record.rows)
        if not args.dry:
            print(record.write(args.hardware, **where))
    return 0 if is_right else 1


def tables(
    topology: Topology, config: dict, raw: dict, trained: dict, command: str, load_: dict, saved_seed: int
) -> Record:
    """What a topology's record says of its raw measurements."""
    links = [Link(rate) for rate in config["links"]]
    kept = list(raw["truth"])
    found = qualities(trained["results"], topology)
    halved = [name for name in kept if Variant(name, wire_dtype="bfloat16").name in raw[str(links[0])]]
    chosen = variants(kept, halved)
    shares = {
        result["routing"]: result["local_share"]
        for result in trained["results"]
        if result["topology"] == str(topology) and result["seed"] == saved_seed
    }
    rows = measured_rows(chosen, links, raw, raw["truth"], found, config["warmup"], shares)
    return measured_record(topology, links, rows, found, trained, config, command, load_, raw)


def report_part(args: argparse.Namespace) -> int:
    """Writes the tables again from the raw measurements of the newest results: nothing is measured."""
    trained = json.loads((args.trained / TRAINED).read_text())
    where = args.output or RESULTS
    topologies = [Topology.parse(text) for text in args.topologies]
    record = training_record(trained, topologies)
    print(record.write(args.trained_on, where, about=about(trained)))
    for topology in topologies:
        path = max(where.glob(f"locality_{topology}_{args.hardware}_*.json"))
        old = json.loads(path.read_text())
        raw = old["extra"]["raw"]
        record = tables(topology, old["config"], raw, trained, old["command"], old["load"], args.seeds[0])
        print(record.write(args.hardware, where, about=about(old)))
    return 0


def about(record: dict) -> dict:
    """When and where something was found."""
    return {key: record[key] for key in ("date", "commit", "hardware", "versions")}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_locality", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["train", "measure"], choices=["train", "measure", "report"])
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
    parser.add_argument("--links", nargs="+", default=["200mbit", "1gbit"])
    parser.add_argument(
        "--wire-rows", nargs="+", default=WIRE_ROWS, help="rows measured with bfloat16 on the wire, too"
    )
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--hardware", default=f"emulated-{os.cpu_count()}core", help="part of the results' file name")
    parser.add_argument("--trained-on", default="h100", help="part of the file name of what was trained")
    parser.add_argument("--output", type=Path, help="directory of the results (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="measuring part: print, write nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    for field in dataclasses.fields(Setup):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    started_s = time.monotonic()
    args = parse(argv)
    if args.worker:
        worker(json.loads(args.job), args.worker)
        return 0
    # so that the cluster is removed after a SIGTERM as it is after Ctrl-C
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    status = 0
    if "train" in args.parts:
        status = train_part(args, started_s)
    if "measure" in args.parts and not status:
        status = measure_part(args, argv if argv is not None else sys.argv[1:])
    if "report" in args.parts and not status:
        status = report_part(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
