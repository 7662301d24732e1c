# SPDX-License-Identifier: Apache-2.0
"""
The benchmarks on several GPUs of one host: `--parts overlap nodes step step-quick step-2`, the first three by default.

* `step`: a training step of a model of OLMoE-1B-7B's size on four GPUs, transformers' exchange beside ours;
* `overlap`: the exchange of one MoE layer in a profile: what runs under the computation, what the host waits for, and what the
  device's time is made of, forward and backward;
* `nodes`: emulated nodes: what each plan of the backend moves, and that all of them give the same;
* `step-quick`: `step` with the ways that matter most and one model, in less than two minutes;
* `step-2`: `step` on two GPUs.

Each part has processes and a time limit of its own; one that fails costs only itself, and a rank that fails ends its part.
`--device cpu` runs the same code on gloo at sizes that say nothing about speed, to see whether it runs.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import multigpu_layer, multigpu_nodes, multigpu_step
from benchmarks.record import RESULTS, Load, Record


class Part(NamedTuple):
    """`run(device, world_size, timeout_s)` on so many GPUs, within so many seconds; one record for each question."""

    run: Callable[[str, int, float], list[Record]]
    world_size: int
    timeout_s: float


PARTS = {
    "overlap": Part(multigpu_layer.bench_layer, 4, 80),
    "nodes": Part(multigpu_nodes.bench_nodes, 4, 40),
    "step": Part(multigpu_step.bench_step, 4, 240),
    "step-quick": Part(partial(multigpu_step.bench_step, ways=multigpu_step.QUICK_WAYS), 4, 110),
    "step-2": Part(multigpu_step.bench_step, 2, 240),
}
DEFAULT_PARTS = ["overlap", "nodes", "step"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_multigpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument("--hardware", default="h100", help="the GPU's short name, part of the results' file names")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args(argv)
    needed = max(PARTS[part].world_size for part in args.parts)
    if args.device == "cuda" and torch.cuda.device_count() < needed:
        parser.error(f"these benchmarks need {needed} CUDA devices, and torch finds {torch.cuda.device_count()}")
    failed = []
    for name in args.parts:
        part, started = PARTS[name], time.monotonic()
        try:
            with Load() as load:
                records = part.run(args.device, part.world_size, part.timeout_s)
        except Exception:  # the other parts' results are worth having
            traceback.print_exc()
            failed.append(name)
            continue
        print(f"\n{name}, {time.monotonic() - started:.0f} s", flush=True)
        for record in records:
            record.load = load.result()
            record.command = f"python -m benchmarks.bench_multigpu --parts {name}"
            record.write(f"{part.world_size}x{args.hardware}", args.output)
            print(f"\n{record.question}\n{record.table()}", *record.notes, sep="\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
