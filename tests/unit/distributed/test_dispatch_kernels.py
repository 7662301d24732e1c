# SPDX-License-Identifier: Apache-2.0
"""
Dispatch and combine with rows moved by the kernels, under Triton's interpreter: `TRITON_INTERPRET=1 pytest ...`. Against plain
torch, forward and backward; on CUDA see `test_dispatch_cuda.py`.
"""

from __future__ import annotations

import itertools
import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from hf_locmoe.distributed.dispatch import Capacity, Peers, plan_dispatch
from hf_locmoe.distributed.expert_parallel import LocMoeEP, expert_parallel_options
from hf_locmoe.distributed.overlap import run_sliced
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.moe import experts as experts_module
from hf_locmoe.permute import rows as rows_module
from tests.distributed.expert_parallel_runs import tiny_config
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


pytest.importorskip("triton", reason="the kernels need Triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 set from the start", allow_module_level=True)

pytestmark = pytest.mark.multiprocess

HIDDEN, NUM_EXPERTS = 9, 4


def assert_all_close(got, expected, what, dtype=torch.float32):
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, truth, **TOLERANCES[dtype], msg=lambda text: f"{what}: {text}")


def compare_dispatch(ranks_per_node):
    world, rank = dist.get_world_size(), dist.get_rank()
    topology = NodeTopology.from_ranks_per_node(ranks_per_node, world).with_experts(NUM_EXPERTS)
    node_ranks = topology.ranks_of_node(topology.node_of_rank(rank))
    node_group = dist.new_group(list(node_ranks), use_local_synchronization=True) if len(node_ranks) > 1 else None
    peers = Peers(topology, rank, dist.group.WORLD, node_group)
    factors = torch.linspace(0.5, 2.0, peers.num_local_experts + 1)
    factors[-1] = 0

    def experts(tokens, expert_ids, weights, num_pairs):
        return tokens.tanh() * (factors[expert_ids] * weights).sum(1, keepdim=True)

    def run(top_k, num_tokens, fan_out, num_slices, capacity, wire_dtype, by_pair):
        generator = torch.Generator().manual_seed(rank)
        tokens = torch.randn(num_tokens, HIDDEN, generator=generator, requires_grad=True)
        weights = torch.rand(num_tokens, top_k, generator=generator, requires_grad=True)
        index = torch.rand(num_tokens, NUM_EXPERTS + 1, generator=generator).argsort(1)[:, :top_k]  # some are dropped
        plan = plan_dispatch(index, peers, fan_out, num_slices, capacity)
        output = run_sliced(tokens, weights, plan, peers, experts, wire_dtype, by_pair=by_pair)
        return [output.detach(), *torch.autograd.grad(output.sin().sum(), (tokens, weights))]

    sizes = [(1, 7), (3, 5 + 3 * rank), (2, 0 if rank == 0 else 6)]
    ways = [("rank", 1, None), ("rank", 3, None), ("node", 2, None), ("rank", 2, Capacity(3, 2, 7))]
    for (top_k, num_tokens), way, wire_dtype in itertools.product(sizes, ways, (None, torch.float16)):
        for by_pair in (True, False):
            case = top_k, num_tokens, *way, wire_dtype, by_pair
            expected = run(*case)
            with patch.object(rows_module, "_kernels_run_on", lambda _: True):
                got = run(*case)
            # what travels is rounded from sums in another order
            assert_all_close(got, expected, case, wire_dtype or torch.float32)


@pytest.mark.parametrize("ranks, ranks_per_node", [(2, 1), (4, 2)])
def test_kernels_bring_the_same_rows(ranks, ranks_per_node):
    run_ranks(compare_dispatch, ranks, ranks_per_node)


def compare_layer(options, tokens_of_rank, checkpointed=False):
    """Transformers' experts, on the kernels with choices and in plain torch with one row per pair."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config = tiny_config("olmoe", NUM_EXPERTS)
    experts = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(rank)
    for name, parameter in list(experts.named_parameters()):
        values = torch.randn(NUM_EXPERTS // world, *parameter.shape[1:], generator=generator) / 4
        setattr(experts, name, torch.nn.Parameter(values))
    experts.num_experts, experts._is_expert_parallel = NUM_EXPERTS // world, True
    mesh = dist.init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))
    with expert_parallel_options(**options):
        layer = LocMoeEP(experts, mesh["ep"], mesh["tp"])
    num_tokens = tokens_of_rank[rank]
    tokens = torch.randn(num_tokens, 16, generator=generator, requires_grad=True)
    weights = torch.rand(num_tokens, 2, generator=generator, requires_grad=True)
    index = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :2]

    def run(implementation):
        config._experts_implementation = implementation
        if checkpointed:
            output = torch.utils.checkpoint.checkpoint(layer, tokens, index, weights, use_reentrant=False)
        else:
            output = layer(tokens, index, weights)
        leaves = [tokens, weights, *experts.parameters()]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    expected = run("grouped_mm")
    rows_seen = []
    fused = experts_module._fused_forward

    def spy(self, hidden_states, top_k_index, *args):
        rows_seen.append((len(hidden_states), top_k_index.size(1), args[-1]))
        return fused(self, hidden_states, top_k_index, *args)

    with (
        patch.object(rows_module, "_kernels_run_on", lambda _: True),
        patch.object(
            experts_module, "_can_fuse", lambda *_: True
        ),  # float32, which torch's grouped product takes here
        patch.object(experts_module, "_compute_dtype", lambda *_: torch.bfloat16),  # asked of what is below, too
        patch.object(experts_module, "_fused_forward", spy_in_float32(spy)),
    ):
        got = run("capacity_bmm")
    scales = [truth.abs().max().clamp_min(1e-6) if truth.numel() else 1.0 for truth in expected]
    scaled = [[value / scale for value, scale in zip(values, scales)] for values in (got, expected)]
    assert_all_close(*scaled, options, getattr(torch, options.get("wire_dtype", "float32")))
    return rows_seen


def spy_in_float32(spy):
    return lambda self, states, index, weights, capacity, dtype, *rest: spy(
        self, states, index, weights, capacity, torch.float32, *rest
    )


LAYERS = {
    "one slice": (dict(slices=1), (7, 5)),
    "slices by node": (dict(slices=2, fan_out="node"), (7, 5)),
    "fixed shapes with room": (dict(slices=1, capacity_factor=4.0, max_tokens_per_rank=7), (7, 5)),
    "nothing arrives from one": (dict(slices=2), (7, 0)),
    "nothing at all": (dict(slices=1), (0, 0)),
    "half on the wire": (dict(slices=1, wire_dtype="float16"), (7, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_experts_take_the_rows_with_their_choices(case):
    options, tokens_of_rank = LAYERS[case]
    for rows_seen in run_ranks(compare_layer, 2, options, tokens_of_rank, env={"LOCMOE_RANKS_PER_NODE": "1"}):
        assert rows_seen
        assert all(slots == 2 for _, slots, _ in rows_seen)  # a row, not a pair


def test_the_recomputation_of_a_checkpoint():
    run_ranks(compare_layer, 2, dict(slices=2), (7, 5), True, env={"LOCMOE_RANKS_PER_NODE": "1"})
