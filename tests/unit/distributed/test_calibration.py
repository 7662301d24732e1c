# SPDX-License-Identifier: Apache-2.0
"""What is measured of a machine: alone, with ranks on one node, with ranks on two. How fast it is, is not asserted."""

from __future__ import annotations

import math

import pytest
import torch

from hf_locmoe.distributed import calibration
from hf_locmoe.distributed.calibration import Calibration, calibrate
from hf_locmoe.distributed.overlap import _Timing
from tests.harness import run_ranks


def test_one_process_measures_its_device_only():
    found = calibrate()
    assert math.isfinite(found.product_flops_per_s) and found.product_flops_per_s > 0
    assert found == Calibration(found.product_flops_per_s)


def test_operations_are_those_of_a_product(monkeypatch):
    monkeypatch.setattr(calibration, "_measure", lambda work, device: _Timing(0.5, 0.6, 1.0))
    monkeypatch.setattr(calibration, "_side", lambda device: 100)
    assert calibrate(torch.bfloat16).product_flops_per_s == 2 * 100**3 / 0.5


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks_per_node, has_inter, has_intra", [("1", True, False), ("2", False, True)])
def test_ranks_measure_the_links_they_have_and_agree(ranks_per_node, has_inter, has_intra):
    env = {"LOCMOE_RANKS_PER_NODE": ranks_per_node, "TORCHELASTIC_RUN_ID": "test"}
    first, second = run_ranks(calibrate, 2, env=env, init=False)  # the group is made, and taken down
    assert (first.is_first_rank, second.is_first_rank) == (True, False)
    assert first.product_flops_per_s == second.product_flops_per_s
    assert (first.inter_bytes_per_s, first.intra_bytes_per_s) == (second.inter_bytes_per_s, second.intra_bytes_per_s)
    assert (first.inter_bytes_per_s is not None, first.intra_bytes_per_s is not None) == (has_inter, has_intra)
    assert first.latency_s == second.latency_s > 0
    assert first.is_gloo


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_accelerator_is_measured_where_there_is_one(dtype, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert calibration._device_of_rank() == torch.device("cuda", 0)
    assert 0 < calibrate(dtype).product_flops_per_s < math.inf
