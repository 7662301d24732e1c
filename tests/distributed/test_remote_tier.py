# SPDX-License-Identifier: Apache-2.0
"""The ceiling on what leaves a node, on two ranks that are two nodes: it holds for the rows that are sent."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed import expert_parallel
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

NUM_TOKENS = 2 * 11


def rows_sent(factor, num_experts, top_k, padded, capacity_mode):
    rank = torch.distributed.get_rank()
    LocMoePlugin(layout="spread", slices="1", inter_node_capacity_factor=factor).activate()
    spread_every_model()
    torch.manual_seed(0)
    config = LocMoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_experts=num_experts, num_experts_per_tok=top_k, capacity_mode=capacity_mode,
        expert_capacity_factor=0.5, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).train()
    homes = torch.tensor([*expert_parallel_layers(model)[0].node_of_expert, rank])
    counts, plan_dispatch = [], expert_parallel.plan_dispatch

    def counted(top_k_index, *args):
        counts.append(int((homes[top_k_index] != rank).sum()))
        return plan_dispatch(top_k_index, *args)

    expert_parallel.plan_dispatch = counted
    ids = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones_like(ids)
    if padded:
        mask[:, 6:] = 0
    outputs = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    outputs.loss.backward()
    return counts


@pytest.mark.parametrize("capacity_mode", ["dropless", "factor"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (2, 2)])
@pytest.mark.parametrize("factor", [0.0, 0.3])
def test_no_more_rows_leave_the_node_than_the_ceiling(factor, num_experts, top_k, padded, capacity_mode):
    arguments = (factor, num_experts, top_k, padded, capacity_mode)
    ranks = run_ranks(rows_sent, 2, *arguments, env={"LOCMOE_RANKS_PER_NODE": "1"})
    ceiling = math.ceil(factor * NUM_TOKENS * top_k / 2)
    assert all(len(counts) == 2 for counts in ranks)
    assert max(max(counts) for counts in ranks) <= ceiling
