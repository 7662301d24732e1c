# SPDX-License-Identifier: Apache-2.0
"""The fast paths inside the experts, the block and the model: the same results as plain torch, no host synchronisation."""

from unittest import mock

import pytest
import torch

from hf_locmoe.layers_locmoe import LocMoeSparseMoeBlock
from hf_locmoe.moe import experts as experts_module
from hf_locmoe.moe import gate, routing
from hf_locmoe.moe.experts import LocMoeExperts, LocMoeGatedExperts
from hf_locmoe.moe.overflow import limit_to_capacity
from tests.tiny_models import gradients, random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


pytestmark = pytest.mark.gpu
SHAPE = dict(num_experts=8, moe_intermediate_size=40, num_experts_per_tok=3)


def make_experts(gated):
    torch.manual_seed(0)
    config = tiny_config(hidden_act="silu" if gated else "gelu", **SHAPE)
    experts = (LocMoeGatedExperts if gated else LocMoeExperts)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.cuda()


def run(experts, implementation, x, index, weights, capacity=None):
    experts.config._experts_implementation, experts.expert_capacity = implementation, capacity
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(x, index, weights)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, [x, weights, *experts.parameters()], direction)]


def assert_close_by_scale(actual, expected, dtype):
    for fast, slow in zip(actual, expected):
        scale = slow.abs().max().clamp_min(1e-6)
        assert_close(fast.to(slow.dtype) / scale, slow / scale, dtype)


def route(case, num_tokens=77):
    logits = torch.randn(num_tokens, SHAPE["num_experts"], device="cuda")
    if case == "few experts":
        logits[:, 3:] -= 20
    index = routing.stable_top_k(logits, SHAPE["num_experts_per_tok"])
    return index, logits.softmax(-1).gather(-1, index), logits


@pytest.fixture
def _poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_poisoned_memory")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("case", ["random", "few experts"])
@pytest.mark.parametrize("capacity", [None, 77 * 3, 20])
@pytest.mark.parametrize("gated", [False, True])
def test_experts_agree_with_the_loop_in_float64(gated, capacity, case, autocast):
    index, weights, logits = route(case)
    if capacity is not None:
        index, weights, _, _ = limit_to_capacity(index, weights, logits, capacity)
    x = torch.randn(77, 32, device="cuda").bfloat16()
    experts, weights = make_experts(gated).bfloat16(), weights.bfloat16()
    expected = run(experts.double(), "eager", x.double(), index, weights.double())
    if capacity is not None:  # what was dropped has no gradient here
        expected[2] = expected[2] * (weights != 0)
    experts = experts.float() if autocast else experts.bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        assert experts_module._can_fuse(experts, x, torch.bfloat16)
        actual = run(experts, "capacity_bmm", x, index, weights, capacity)
    assert all(grad.is_contiguous() for grad in actual[3:])
    assert_close_by_scale(actual, expected, torch.bfloat16)


@pytest.mark.usefixtures("_poisoned_memory")
def test_assignments_to_experts_of_other_ranks_contribute_nothing():
    experts = make_experts(True).bfloat16()
    index, weights, _ = route("random")
    weights, elsewhere = weights.bfloat16(), torch.rand(index.shape, device="cuda") > 0.5
    x = torch.randn(77, 32, device="cuda").bfloat16()
    index, weights = index.masked_fill(elsewhere, SHAPE["num_experts"]), weights.masked_fill(elsewhere, 0)
    expected = run(experts.double(), "eager", x.double(), index, weights.double())
    actual = run(experts.bfloat16(), "capacity_bmm", x, index, weights)
    assert_close_by_scale(actual, expected, torch.bfloat16)


@pytest.mark.parametrize(
    "capacity", [{}, *(dict(capacity_mode="factor", expert_capacity_factor=factor) for factor in (0.8, 1.25))]
)
@pytest.mark.parametrize("num_experts, top_k", [(8, 1), (5, 2)])
@pytest.mark.parametrize("affinity", ["cosine", "mean"])
def test_block_agrees_with_plain_torch_and_never_waits(affinity, num_experts, top_k, capacity):
    config = tiny_config(num_experts=num_experts, num_experts_per_tok=top_k, gate_affinity=affinity, **capacity)
    config._experts_implementation = "capacity_bmm"
    torch.manual_seed(0)
    block = LocMoeSparseMoeBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block = block.cuda().train()
    block.experts.to(torch.bfloat16)
    x = torch.randn(3, 50, 32, device="cuda").bfloat16().requires_grad_()
    mask = torch.rand(3, 50, device="cuda") > 0.2

    def step():
        output, stats, *_ = block(x, token_mask=mask, output_router_stats=True)
        loss = output.square().sum() + stats[0].square().sum()
        return [output.detach(), stats.detach(), *torch.autograd.grad(loss, [x, *block.parameters()])]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with (
        mock.patch.object(experts_module, "_kernels_run_on", return_value=False),
        mock.patch.object(routing, "route_sums", None),
        mock.patch.object(routing, "top_k_of_router", None),
        mock.patch.object(gate, "pool_affinity", None),
    ):
        expected = step()
    assert_close_by_scale(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "hidden_size, num_experts, top_k",
    [(2560, 16, 1), (2560, 24, 1), (2048, 64, 8), (2048, 128, 8), (4096, 256, 8), (2000, 48, 2), (2560, 96, 1)],
)
def test_gate_agrees_with_plain_torch_and_never_waits(hidden_size, num_experts, top_k, masked):
    torch.manual_seed(0)
    config = tiny_config(hidden_size=hidden_size, num_experts=num_experts, num_experts_per_tok=top_k)
    router = gate.LocMoeGate(config).cuda().train()
    # whole numbers, whose sums are exact in any order: a tie is one on both sides
    x = torch.randint(-3, 4, (1500, hidden_size), device="cuda").bfloat16().requires_grad_()
    mask = torch.rand(1500, device="cuda") > 0.2 if masked else None
    directions = [torch.randn(1500, top_k, device="cuda"), torch.randn(num_experts, device="cuda")]

    def step():
        logits, weights, index, *summed = router(x, token_mask=mask, output_router_stats=True)
        assert bool(summed) == (gate.pool_affinity is not None)
        stats = routing.router_statistics(router, x, logits, index, mask, summed=summed[0] if summed else None)
        (grad,) = torch.autograd.grad([weights, stats[routing.RouterStat.PROB_SUM]], [x], directions)
        return [index, logits.detach(), weights.detach(), stats.detach(), grad]

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        index, *actual = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with (
        mock.patch.object(routing, "route_sums", None),
        mock.patch.object(routing, "top_k_of_router", None),
        mock.patch.object(gate, "pool_affinity", None),
    ):
        expected_index, *expected = step()
    assert torch.equal(index, expected_index)
    assert_close_by_scale(actual[:-1], expected[:-1], torch.float32)
    assert_close_by_scale(actual[-1:], expected[-1:], torch.bfloat16)


@pytest.mark.parametrize("factor", [None, 0.8, 1.25])
def test_a_training_step_never_waits(factor):
    limited = {} if factor is None else dict(capacity_mode="factor", expert_capacity_factor=factor)
    model = tiny_model(gated_mlp=True, hidden_act="silu", num_experts_per_tok=2, **limited).cuda().bfloat16().train()
    model.set_experts_implementation("capacity_bmm")
    ids = random_ids().cuda()

    def step():
        outputs = model(ids, labels=ids, use_cache=False)
        outputs.loss.backward()
        model.update_router_state(outputs.router_stats)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.parametrize(
    "capacity, dtype",
    [
        ({}, torch.bfloat16),  # grouped products take bfloat16 alone
        (dict(capacity_mode="factor", expert_capacity_factor=1.0), torch.bfloat16),
        (dict(capacity_mode="factor", expert_capacity_factor=1.0), torch.float32),
        (dict(capacity_mode="factor", expert_capacity_factor=1.25), torch.bfloat16),
    ],
)
def test_compiled_without_a_graph_break(capacity, dtype):
    torch.compiler.reset()
    model = tiny_model(gated_mlp=True, hidden_act="silu", num_experts_per_tok=2, **capacity).cuda().to(dtype).train()
    model.set_experts_implementation("capacity_bmm")
    ids = random_ids().cuda()
    # the compiler leaves out roundings to bfloat16 between operations that it fuses; here it is to make eager mode's
    compiled = torch.compile(model, fullgraph=True, options={"emulate_precision_casts": True})
    with mock.patch.object(experts_module, "_fused_forward", wraps=experts_module._fused_forward) as fused:
        model(ids)
    assert fused.call_count == model.config.num_hidden_layers
    results = []
    for run_model in (model, compiled):
        model.zero_grad()
        loss = run_model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *gradients(model).values()])
    assert_close_by_scale(results[1], results[0], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [{}, dict(capacity_mode="factor", expert_capacity_factor=1.0)])
def test_layers_compiled_under_activation_checkpointing(capacity):
    torch.compiler.reset()
    ids, results = random_ids().cuda(), []
    for compiled in (False, True):
        model = tiny_model(gated_mlp=True, hidden_act="silu", num_experts_per_tok=2, **capacity)
        model = model.cuda().bfloat16().train()
        model.set_experts_implementation("capacity_bmm")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiled:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, options={"emulate_precision_casts": True})
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *gradients(model).values()])
    assert_close_by_scale(results[1], results[0], torch.bfloat16)
