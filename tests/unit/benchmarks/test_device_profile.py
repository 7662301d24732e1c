# SPDX-License-Identifier: Apache-2.0
"""The share of communication under computation, from intervals drawn by hand and at random."""

import math

import torch

from benchmarks.device_profile import DeviceProfile, common, length, merged, overlap


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
