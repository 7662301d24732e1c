# SPDX-License-Identifier: Apache-2.0
"""LoRA of attention and experts over NCCL: the gradients of one process on one of the GPUs."""

from __future__ import annotations

import pytest

from tests.distributed.adapter_runs import compare_gradients


peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]

SLICED, ROOMY = dict(slices="2"), dict(slices="2", capacity_factor=8.0, max_tokens_per_rank=40)
ON_TWO = [
    dict(layout="spread", plugin=SLICED, checkpointing=False),
    dict(layout="replicated"),
    dict(layout="sharded", plugin=ROOMY, target="experts"),
    dict(layout="sharded", tp_size=2),
]
ON_FOUR = [
    *ON_TWO,
    dict(layout="sharded", plugin=dict(ep_size=2)),
    dict(layout="spread", plugin=dict(ep_size=2, backend="none"), checkpointing=True),
    dict(layout="replicated", tp_size=2, target="attention"),
]


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("family", ["locmoe", "mixtral"])
def test_two_gpus(family):
    compare_gradients(2, ON_TWO, device="cuda", family=family)


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("family", ["locmoe", "qwen3_moe"])
def test_four_gpus(family):
    compare_gradients(4, ON_FOUR, device="cuda", family=family)
