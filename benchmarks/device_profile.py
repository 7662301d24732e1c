# SPDX-License-Identifier: Apache-2.0
"""What a profile of a GPU says: how much communication lies under computation, what kinds of kernels take the time, what the
host waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType


Interval = tuple[float, float]

# Kinds of kernels by their names, the first that fits; ours begin with an underscore.
KINDS: dict[str, tuple[str, ...]] = {
    "exchange": ("ncclDev",),
    "row gathers": ("^_gather_kernel",),
    "row sums": ("^_combine_kernel",),
    "activation": ("^_activate",),
    "layout, counts": ("^_count_kernel", "^_place_kernel", "^_first_kernel", "sort", "scan", "histogram", "histc"),
    "products": ("gemm", "cutlass", "nvjet", "xmma"),
    "torch's gathers, scatters": ("index", "gather", "scatter"),
}
OTHER = "elementwise, sums, copies"


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


def kind_of(name: str) -> str:
    """Which of [`KINDS`] a kernel is, or [`OTHER`]."""
    lower = name.lower()
    for kind, patterns in KINDS.items():
        if any(name.startswith(text[1:]) if text[0] == "^" else text.lower() in lower for text in patterns):
            return kind
    return OTHER


def by_kind(profile: DeviceProfile) -> dict[str, float]:
    """Milliseconds on the device of each kind of kernel; those of all together, and those in which the device had no kernel."""
    found = dict.fromkeys([*KINDS, OTHER], 0.0)
    for name, start, end in profile.kernels:
        found[kind_of(name)] += (end - start) / 1e3
    busy = merged([(start, end) for _, start, end in profile.kernels])
    found["busy"] = length(busy) / 1e3
    found["idle"] = (busy[-1][1] - busy[0][0]) / 1e3 - found["busy"] if busy else 0.0
    return found


def heaviest(profile: DeviceProfile, number: int) -> list[tuple[str, float, int]]:
    """Of the kernels that take most time, by name: the name's beginning, milliseconds, how many."""
    per_name: dict[str, list[float]] = {}
    for name, start, end in profile.kernels:
        per_name.setdefault(name, []).append((end - start) / 1e3)
    sums = [(name[:120], sum(each), len(each)) for name, each in per_name.items()]
    return sorted(sums, key=lambda entry: -entry[1])[:number]


def together(first: DeviceProfile, second: DeviceProfile) -> DeviceProfile:
    """What two profiles saw, of times that do not overlap."""
    return DeviceProfile(
        first.kernels + second.kernels,
        first.host_waits + second.host_waits,
        first.copies_to_host + second.copies_to_host,
    )


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


__all__ = [
    "KINDS",
    "OTHER",
    "DeviceProfile",
    "by_kind",
    "common",
    "heaviest",
    "kind_of",
    "length",
    "merged",
    "overlap",
    "profiled",
    "together",
]
