# SPDX-License-Identifier: Apache-2.0
"""What a profile of a GPU says about communication: how much of it lies under computation, what the host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType


Interval = tuple[float, float]


class DeviceProfile(NamedTuple):
    """
    Attributes:
        kernels (`list`): name, start and end in microseconds, of each kernel on the device.
        host_waits (`int`): calls that made the host wait for a stream.
        copies_to_host (`int`): copies from the device to the host.
    """

    kernels: list[tuple[str, float, float]]
    host_waits: int
    copies_to_host: int


def profiled(run: Callable[[], Any]) -> DeviceProfile:
    """Runs `run` under torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize()
    kernels, host_waits, copies_to_host = [], 0, 0
    for event in profiler.events():
        if event.device_type != DeviceType.CUDA:
            host_waits += event.name in ("cudaStreamSynchronize", "cudaEventSynchronize")
        elif event.name.startswith("Memcpy DtoH"):
            copies_to_host += 1
        elif not (event.is_user_annotation or event.name.startswith(("Memcpy", "Memset", "nccl:"))):
            kernels.append((event.name, event.time_range.start, event.time_range.end))
    return DeviceProfile(kernels, host_waits, copies_to_host)


def overlap(profile: DeviceProfile, collective: str = "") -> dict[str, float]:
    """
    Of NCCL's kernels whose name contains `collective` (all of them if not given): `nccl_ms` of device time, and the `share`
    of it in which a computing kernel ran as well; `compute_ms` of computation.
    """
    nccl = [(start, end) for name, start, end in profile.kernels if name.startswith("ncclDev") and collective in name]
    compute = [(start, end) for name, start, end in profile.kernels if not name.startswith("ncclDev")]
    nccl, compute = merged(nccl), merged(compute)
    total = length(nccl)
    return {
        "nccl_ms": total / 1e3,
        "compute_ms": length(compute) / 1e3,
        "share": length(common(nccl, compute)) / total if total else float("nan"),
    }


def merged(intervals: list[Interval]) -> list[Interval]:
    """The same time in intervals that do not touch, in order."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def common(first: list[Interval], second: list[Interval]) -> list[Interval]:
    """The time that is in both; each is merged."""
    result, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start < end:
            result.append((start, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return result


def length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


__all__ = ["DeviceProfile", "common", "length", "merged", "overlap", "profiled"]
