# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU: device events around the work, medians of repeats, graphs where launches would dominate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import Spread


def timed_ms(run: Callable[[], Any], repeats: int = 20, warmup: int = 3) -> Spread:
    """Milliseconds of one call, by device events."""
    for _ in range(warmup):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return Spread.of([start.elapsed_time(end) for start, end in pairs])


def timed_graph_us(runs: list[Callable[[], Any]], repeats: int = 20) -> Spread:
    """
    Microseconds of one of `runs`, which do the same on different data: one graph of them all, replayed. Where they cannot
    be captured, the time between device events, launches included.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for run in runs:
                run()
    except RuntimeError as error:
        print(f"not captured: {error}"[:300], flush=True)
        torch.cuda.synchronize()
        return _scaled(timed_ms(lambda: [run() for run in runs], repeats), 1000 / len(runs))
    return _scaled(timed_ms(graph.replay, repeats), 1000 / len(runs))


def launch_us(run: Callable[[], Any], repeats: int = 50) -> Spread:
    """Microseconds that the host takes for one call, with nothing before it on the device."""
    times = []
    for _ in range(repeats + 3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e6)
    torch.cuda.synchronize()
    return Spread.of(times[3:])


def _scaled(spread: Spread, factor: float) -> Spread:
    values = (spread.median, spread.q1, spread.q3, spread.lowest, spread.highest)
    return Spread(spread.count, *(value * factor for value in values))


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, those read and those written."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (timed_ms(lambda: target.copy_(source)).median / 1000)


def matmul_rate() -> float:
    """Floating-point operations a second of a large bfloat16 product of random matrices."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (timed_ms(lambda: a @ b).median / 1000)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is expected."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


__all__ = ["copy_bandwidth", "launch_us", "matmul_rate", "relative_error", "timed_graph_us", "timed_ms"]
