# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism "locmoe" on transformers' own models: every run equals one process in losses, logits, gradients and
parameters after two steps."""

from __future__ import annotations

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from hf_locmoe.distributed.backend import group_topology
from hf_locmoe.distributed.expert_parallel import (
    ExpertParallelOptions,
    LocMoeEP,
    current_expert_parallel_options,
    expert_parallel_options,
)
from tests.distributed.expert_parallel_runs import Variant, batches, compare, full_model, sharded_model, tiny_config
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


pytestmark = pytest.mark.multiprocess

EP4 = dict(fsdp_size=4, ep_size=4)
SLICED = dict(slices=2, fan_out="node")
PLAIN = dict(slices=1, fan_out="rank")


def compare_all(variants):
    for variant in variants:
        try:
            compare(variant, TOLERANCES[torch.float32])
        except AssertionError as error:
            raise AssertionError(f"{variant}: {error}") from error


@pytest.mark.parametrize(
    "variants",
    [
        pytest.param(
            [
                Variant(EP4, SLICED),
                Variant(EP4, SLICED, family="locmoe"),
                Variant(EP4, PLAIN, family="mixtral", experts="eager"),
                Variant(EP4, dict(slices="auto"), family="qwen3"),
            ],
            id="ep4",
        ),
        pytest.param(
            [
                Variant(dict(fsdp_size=2, tp_size=2, ep_size=4), SLICED, family="mixtral"),
                Variant(dict(fsdp_size=4, ep_size=2), SLICED, experts="eager", one_expert=True),
                Variant(dict(dp_replicate_size=2, fsdp_size=2, ep_size=2), PLAIN, family="qwen3"),
            ],
            id="other meshes",
        ),
        pytest.param(
            [
                Variant(EP4, SLICED, checkpointing=False, accumulation=2, lengths=(7, 3)),
                Variant(EP4, SLICED, checkpointing=True, one_expert=True),
                Variant(EP4, SLICED, num_experts=8, num_experts_per_tok=3, checkpointing=False, experts="eager"),
            ],
            id="checkpointing and accumulation",
        ),
    ],
)
def test_four_ranks_on_two_nodes_equal_one_process(variants):
    run_ranks(compare_all, 4, variants, env={"LOCMOE_RANKS_PER_NODE": "2"})


def test_two_ranks_on_two_nodes_equal_one_process():
    mesh = dict(fsdp_size=2, ep_size=2)
    variants = [Variant(mesh, SLICED), Variant(mesh, PLAIN, one_expert=True, experts="eager", num_experts_per_tok=1)]
    run_ranks(compare_all, 2, variants, env={"LOCMOE_RANKS_PER_NODE": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("ranks_per_node", ["1", "2", "3,1", "4"])
@pytest.mark.parametrize("family", ["locmoe", "olmoe", "mixtral", "qwen3"])
def test_every_family_top_k_and_topology_equals_one_process(family, ranks_per_node):
    variants = [
        Variant(mesh, options, family=family, num_experts=8, num_experts_per_tok=top_k, lengths=(5, 9, 2))
        for top_k in (1, 4)
        for mesh in (EP4, dict(fsdp_size=2, tp_size=2, ep_size=4))
        for options in (PLAIN, SLICED)
    ]
    run_ranks(compare_all, 4, variants, env={"LOCMOE_RANKS_PER_NODE": ranks_per_node}, timeout_s=240)


# ---- beyond float32 training ----------------------------------------------------------------------------------------


def low_precision():
    bfloat16 = {name: 2 * value for name, value in TOLERANCES[torch.bfloat16].items()}
    compare(Variant(EP4, dict(SLICED, wire_dtype="bfloat16"), steps=1), bfloat16)
    compare(Variant(EP4, SLICED, autocast=True, steps=1), bfloat16)


def test_bfloat16_wire_and_autocast_are_within_bfloat16_of_one_process():
    run_ranks(low_precision, 4, env={"LOCMOE_RANKS_PER_NODE": "2"})


def fixed_shapes():
    # Room for everything: the dropless result. Slices and an idle expert included.
    options = dict(slices=2, capacity_factor=8.0, max_tokens_per_rank=14)
    compare(Variant(EP4, options, one_expert=True, experts="eager"), TOLERANCES[torch.float32])
    compare(Variant(EP4, dict(options, slices=1), lengths=(7, 3), checkpointing=True), TOLERANCES[torch.float32])
    # Little room: training drops, evaluation does not.
    variant = Variant(EP4, dict(slices=1, capacity_factor=0.5, max_tokens_per_rank=14))
    truth = full_model(variant)
    model = sharded_model(variant, truth)
    input_ids = batches(variant, 4, 0)[dist.get_rank()]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, truth(input_ids).logits, **TOLERANCES[torch.float32])
    model.train()
    assert not torch.allclose(model(input_ids).logits, truth(input_ids).logits, atol=1e-3)
    with pytest.raises(ValueError, match="max_tokens_per_rank"):
        model(torch.cat([input_ids, input_ids], dim=1))


def test_fixed_shapes_equal_one_process_where_there_is_room():
    run_ranks(fixed_shapes, 4, env={"LOCMOE_RANKS_PER_NODE": "2"})


def generate():
    variant = Variant(EP4, SLICED)
    truth = full_model(variant).eval()
    model = sharded_model(variant, truth).eval()
    # Prompts of other lengths on other ranks, and a rank that has one row only.
    prompt = batches(variant, 4, 0)[dist.get_rank()][: 1 + dist.get_rank() % 2, : 3 + dist.get_rank()]
    arguments = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert torch.equal(model.generate(prompt, **arguments), truth.generate(prompt, **arguments))
    return True


def test_generation_with_uneven_prompts_equals_one_process():
    assert run_ranks(generate, 4, env={"LOCMOE_RANKS_PER_NODE": "2"}) == [True] * 4


# ---- a rank without a token of its own ------------------------------------------------------------------------------


def without_tokens(options):
    """Outputs and gradients of rank 0, whose tokens are the only ones, and the gradients of the experts of both ranks."""
    layer, _ = one_layer(options)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.mul_(0.25)  # to the square root of the width: gradients about 1
    rank = dist.get_rank()
    torch.manual_seed(0)
    tokens, weights, index = torch.randn(7, 16), torch.rand(7, 2), torch.rand(7, 4).argsort(1)[:, :2]
    kept = 7 if rank == 0 else 0
    leaves = [tokens[:kept].clone().requires_grad_(), weights[:kept].clone().requires_grad_()]
    output = layer(leaves[0], index[:kept], leaves[1])
    output.square().sum().backward()
    layer.experts.eval()
    with torch.no_grad():
        evaluated = layer(leaves[0], index[:kept], leaves[1])
    torch.testing.assert_close(evaluated, output, **TOLERANCES[torch.float32])
    assert output.shape == (kept, 16)
    # the truth: the experts of both ranks in one place
    whole = OlmoeExperts(layer.experts.config)
    for name, parameter in layer.experts.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(parts, parameter.detach())
        setattr(whole, name, torch.nn.Parameter(torch.cat(parts)))
    truth = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
    expected = whole(truth[0], index, truth[1])
    expected.square().sum().backward()
    for got, wanted in zip([output, *(leaf.grad for leaf in leaves)], [expected, *(leaf.grad for leaf in truth)]):
        torch.testing.assert_close(got, wanted[:kept], **TOLERANCES[torch.float32])
    for name, parameter in layer.experts.named_parameters():
        wanted = whole.get_parameter(name).grad.chunk(2)[rank]
        torch.testing.assert_close(parameter.grad, wanted, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("options", [SLICED, PLAIN], ids=["sliced", "plain"])
def test_a_rank_without_a_token_of_its_own(options):
    run_ranks(without_tokens, 2, options, env={"LOCMOE_RANKS_PER_NODE": "1"})


# ---- recomputation --------------------------------------------------------------------------------------------------


def recompute_with_other_routing():
    """A gate that answers differently when a checkpoint runs it again: ties broken in another way, made certain."""
    variant = Variant(EP4, SLICED, checkpointing=False, steps=1)
    model = sharded_model(variant, full_model(variant))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    calls = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda module, inputs, output: flip_when_recomputed(calls, module, output))
    input_ids = batches(variant, 4, 0)[dist.get_rank()]
    loss = model(input_ids, labels=input_ids).loss
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges:
        loss.backward()
    assert set(calls.values()) == {2}
    assert all(torch.isfinite(p.grad.to_local()).all() for p in model.parameters() if p.grad is not None)
    return exchanges.call_count


def flip_when_recomputed(calls, module, output):
    calls[module] = calls.get(module, 0) + 1
    logits, weights, index = output
    return (logits, weights, index if calls[module] == 1 else (index + 1) % 4)


def test_recomputation_uses_the_first_routing_and_sends_nothing_back():
    # In each of two layers: two slices of two hops, for the combine's backward, the recomputed dispatch and its backward.
    # No counts, and no outputs that nobody needs.
    expected = 2 * (2 * 2) * 3
    assert run_ranks(recompute_with_other_routing, 4, env={"LOCMOE_RANKS_PER_NODE": "2"}) == [expected] * 4


# ---- compilation ----------------------------------------------------------------------------------------------------


def one_layer(options, device="cpu", implementation="grouped_mm"):
    """One rank's experts behind the implementation, and a function of it: output and gradients on this rank's tokens."""
    world, rank = dist.get_world_size(), dist.get_rank()
    config = tiny_config("olmoe")
    config._experts_implementation = implementation
    experts = OlmoeExperts(config)
    torch.manual_seed(rank)
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, torch.nn.Parameter(torch.randn(4 // world, *parameter.shape[1:]).to(device)))
    experts.num_experts, experts._is_expert_parallel = 4 // world, True
    mesh = dist.init_device_mesh(device, (world, 1), mesh_dim_names=("ep", "tp"))
    with expert_parallel_options(**options):
        layer = LocMoeEP(experts, mesh["ep"], mesh["tp"])
    tokens, weights = (draw.to(device).requires_grad_() for draw in (torch.randn(7, 16), torch.rand(7, 2)))
    index = torch.rand(7, 4).argsort(1)[:, :2].to(device)

    def run(call):
        leaves = [tokens, weights, *experts.parameters()]
        output = call(tokens, index, weights)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    return layer, run


def compile_layer(options, fullgraph):
    layer, run = one_layer(options)
    compiled = torch.compile(lambda *arguments: layer(*arguments), backend="aot_eager", fullgraph=fullgraph)
    for got, expected in zip(run(compiled), run(layer)):
        torch.testing.assert_close(got, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    "options, fullgraph",
    [(dict(slices=2, capacity_factor=4.0, max_tokens_per_rank=7), True), (SLICED, False)],
    ids=["fixed shapes", "dropless"],
)
def test_fixed_shapes_compile_to_one_graph_and_dropless_runs_beside_the_graph(options, fullgraph):
    run_ranks(compile_layer, 2, options, fullgraph, env={"LOCMOE_RANKS_PER_NODE": "1"})


def layers_of_other_runs():
    """Nodes and plan of layers that one process makes over the same ranks, as its environment changes; their groups."""
    found, groups = [], []
    for ranks_per_node, plan in (("2", "flat"), ("1", "flat"), ("1", "auto"), ("2", "flat")):
        os.environ.update(LOCMOE_RANKS_PER_NODE=ranks_per_node, LOCMOE_PLAN=plan)
        layer, _ = one_layer(dict(backend="locmoe"))
        group = layer.resources.group
        found.append((layer.peers.topology.num_nodes, group_topology(group).num_nodes, group._plan))
        groups.append(group)
    return found, [groups.index(group) for group in groups]


def test_a_later_model_of_the_process_has_its_own_nodes_and_plan():
    """The mesh's group is the default group for all of them."""
    expected = [(1, 1, "flat"), (2, 2, "flat"), (2, 2, "auto"), (1, 1, "flat")]
    assert run_ranks(layers_of_other_runs, 2) == [(expected, [0, 1, 2, 0])] * 2


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, field",
    [
        (dict(slices=0), "slices"),
        (dict(fan_out="tree"), "fan_out"),
        (dict(wire_dtype="int8"), "wire_dtype"),
        (dict(capacity_factor=1.0), "max_tokens_per_rank"),
        (dict(capacity_factor=0.0, max_tokens_per_rank=4), "capacity_factor"),
        (dict(capacity_factor=1.0, max_tokens_per_rank=4, fan_out="node"), "fan_out"),
        (dict(capacity_factor=1.0, max_tokens_per_rank=4, remote_share=1.5), "remote_share"),
    ],
)
def test_options_name_what_is_wrong(options, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        ExpertParallelOptions(**options)


def test_options_come_from_the_environment_and_nest():
    env = {"LOCMOE_SLICES": "3", "LOCMOE_FAN_OUT": "node", "LOCMOE_WIRE_DTYPE": "bfloat16", "LOCMOE_REMOTE_SHARE": ""}
    assert ExpertParallelOptions.from_environment(env) == ExpertParallelOptions(3, "node", "bfloat16")
    with pytest.raises(ValueError, match="LOCMOE_SLICES"):
        ExpertParallelOptions.from_environment({"LOCMOE_SLICES": "two"})
    with expert_parallel_options(slices=2):
        with expert_parallel_options(fan_out="rank"):
            assert current_expert_parallel_options() == ExpertParallelOptions(2, "rank")
        assert current_expert_parallel_options() == ExpertParallelOptions(2)
    assert current_expert_parallel_options() == ExpertParallelOptions()
