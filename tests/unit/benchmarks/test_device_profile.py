# SPDX-License-Identifier: Apache-2.0
"""What a profile says, from intervals drawn by hand and at random."""

import math

import pytest
import torch

from benchmarks.device_profile import (
    OTHER,
    DeviceProfile,
    by_kind,
    common,
    heaviest,
    length,
    merged,
    overlap,
    together,
)


def test_merged_intervals():
    assert merged([]) == []
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert merged([(0, 10), (1, 2)]) == [(0, 10)]


def test_common_time_is_what_counting_finds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        drawn = torch.randint(0, 60, (2, 6, 2), generator=generator).sort(dim=2).values.tolist()
        first, second = (merged([(start, end) for start, end in part]) for part in drawn)
        inside = [[any(start <= t < end for start, end in part) for t in range(60)] for part in (first, second)]
        assert length(common(first, second)) == sum(map(all, zip(*inside)))


def test_share_under_computation():
    kernels = [
        ("ncclDevKernel_SendRecv(args)", 0.0, 10.0),
        ("ncclDevKernel_AllGather_RING_LL(args)", 20.0, 24.0),
        ("gemm", 4.0, 8.0),
        ("elementwise", 6.0, 9.0),
        ("gemm", 30.0, 40.0),
    ]
    profile = DeviceProfile(kernels, 0, 0)
    assert overlap(profile, "SendRecv") == {"nccl_ms": 0.01, "compute_ms": 0.015, "share": 0.5}
    assert overlap(profile)["share"] == 5.0 / 14.0
    assert math.isnan(overlap(profile, "ReduceScatter")["share"])


def test_time_by_kind_of_kernel():
    kernels = [
        ("_gather_kernel", 0.0, 1000.0),
        ("void at::native::vectorized_gather_kernel<16, long>(char*, ...)", 1000.0, 3000.0),
        ("_combine_kernel", 3000.0, 4000.0),
        ("ncclDevKernel_SendRecv(args)", 3500.0, 6000.0),
        ("void cutlass::device_kernel<GemmUniversal>(args)", 8000.0, 9000.0),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<>(args)", 9000.0, 9500.0),
        ("void at::native::indexing_backward_kernel_stride_1<>(args)", 9500.0, 9600.0),
        ("void at::native::vectorized_elementwise_kernel<4, mul>(args)", 9600.0, 10000.0),
        ("_gather_kernel", 10000.0, 10500.0),
    ]
    profile = DeviceProfile(kernels, 1, 2)
    assert {kind: ms for kind, ms in by_kind(profile).items() if ms} == {
        "exchange": 2.5,
        "row gathers": 1.5,
        "row sums": 1.0,
        "layout, counts": 0.5,
        "products": 1.0,
        "torch's gathers, scatters": pytest.approx(2.1),
        OTHER: pytest.approx(0.4),
        "busy": 8.5,
        "idle": 2.0,
    }
    assert heaviest(profile, 1) == [("ncclDevKernel_SendRecv(args)", 2.5, 1)]
    assert ("_gather_kernel", 1.5, 2) in heaviest(profile, 9)
    assert together(profile, profile) == DeviceProfile(kernels * 2, 2, 4)
