# SPDX-License-Identifier: Apache-2.0
"""The single-GPU benchmarks: `--parts block gate model mixtral compiled inference`, all by default; `--quick` in less time."""

from __future__ import annotations

import argparse
import time
import traceback
from pathlib import Path

import torch

from benchmarks.gpu_block import bench_block
from benchmarks.gpu_gate import bench_gate
from benchmarks.gpu_inference import bench_inference
from benchmarks.gpu_model import bench_compiled, bench_mixtral, bench_model
from benchmarks.record import RESULTS


PARTS = {
    "block": bench_block,
    "gate": bench_gate,
    "model": bench_model,
    "mixtral": bench_mixtral,
    "compiled": bench_compiled,
    "inference": bench_inference,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="the rows that aims are about, and no others")
    parser.add_argument("--hardware", default="h100", help="the results' short name of this machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("these benchmarks need a CUDA device, and torch finds none")
    failed = []
    for part in args.parts:
        started = time.monotonic()
        try:
            record = PARTS[part](quick=args.quick)
        except Exception:  # the other parts' results are worth having
            traceback.print_exc()
            failed.append(part)
            continue
        record.write(args.hardware, args.output)
        print(f"\n{part}, {time.monotonic() - started:.0f} s\n{record.table()}\n", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
