# SPDX-License-Identifier: Apache-2.0
"""The golden class of `test_golden.py` over NCCL: the trajectory of one process on one of the GPUs."""

from __future__ import annotations

import os

import pytest

from tests.distributed.golden_runs import Member, train_all
from tests.distributed.test_golden import assert_golden, members, parts
from tests.harness import run_ranks


pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]


def train_with_truths(members: list[Member], device: str):
    """On the same ranks: the truths, which every rank computes for itself, and the members."""
    truths = list(dict.fromkeys(member.truth for member in members))
    os.environ.pop("LOCMOE_PLAN", None)
    return truths, train_all(truths, device), train_all(members, device)


def run(members: list[Member], device: str = "cuda") -> None:
    truths, expected, results = run_ranks(
        train_with_truths, members[0].ranks, members, device, device=device, timeout_s=200
    )[0]
    by_truth = dict(zip(truths, expected, strict=True))
    for member, result in zip(members, results, strict=True):
        assert_golden(member, result, by_truth[member.truth])


@pytest.mark.multigpu(2)
def test_two_gpus():
    on_two_nodes = dict(ranks=2, nodes=2)
    run(
        [
            Member(**on_two_nodes, layout="sharded", plan="none", slices=2),
            Member(**on_two_nodes, layout="replicated", checkpointing=True),
            Member(**on_two_nodes, layout="spread", plan="auto", slices=2, accumulation=4, locality=True),
            Member(ranks=2, layout="sharded", tp_size=2, slices=2),
        ]
    )


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("part", parts(members(2, ranks=4, nodes=2), 4))
def test_any_two_choices_over_four_gpus(part):
    run(part)


@pytest.mark.multigpu(4)
def test_copies_of_experts_and_locality_over_four_gpus():
    on_two_nodes = dict(ranks=4, nodes=2)
    run(
        [
            Member(**on_two_nodes, layout="sharded", ep_size=2, slices=2, checkpointing=True),
            Member(**on_two_nodes, layout="spread", ep_size=2, plan="auto"),
            Member(**on_two_nodes, layout="spread", plan="two_level", slices=2, fan_out="node", locality=True),
        ]
    )
    run([Member(ranks=4, nodes=4, layout="spread", slices="auto", accumulation=4, locality=True)])
