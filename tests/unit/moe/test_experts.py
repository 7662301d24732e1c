# SPDX-License-Identifier: Apache-2.0
"""Every experts implementation against the eager loop, and the eager loop against equation 1."""

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_locmoe.moe.experts import LocMoeExperts, LocMoeGatedExperts
from hf_locmoe.moe.overflow import limit_to_capacity
from hf_locmoe.moe.routing import stable_top_k
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


FAST = ["batched_mm", "grouped_mm", "capacity_bmm"]


def make_experts(gated, dtype=torch.float32, implementation="eager", **overrides):
    torch.manual_seed(0)
    config = tiny_config(hidden_act="silu" if gated else "gelu", **overrides)
    config._experts_implementation = implementation
    experts = (LocMoeGatedExperts if gated else LocMoeExperts)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return experts.to(dtype)


def switch_to(experts, implementation):
    experts.config._experts_implementation = implementation


def run(experts, implementation, x, index, weights, capacity=None):
    """Output and the gradients of tokens, weights and parameters."""
    experts.config._experts_implementation = implementation
    experts.expert_capacity = capacity
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    output = experts(x, index, weights)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    grads = torch.autograd.grad((output * direction).sum(), [x, weights, *experts.parameters()])
    return {"output": output.detach(), **{f"grad {i}": grad for i, grad in enumerate(grads)}}


def route(case, num_tokens, num_experts, k):
    torch.manual_seed(2)
    logits = torch.randn(num_tokens, num_experts)
    if case == "all on one":
        logits[:, 1] += 6
    elif case == "empty experts":
        logits[:, ::2] -= 6
    index = stable_top_k(logits, k)
    return index, logits.softmax(-1).gather(-1, index), logits


def test_eager_is_equation_1():
    experts = make_experts(gated=False)
    x = torch.randn(9, 32)
    index, weights, _ = route("random", 9, 4, 2)
    expected = torch.zeros(9, 32)
    for m in range(9):
        for i, r in zip(index[m], weights[m]):
            expected[m] += r * experts.down_proj[i] @ torch.nn.functional.gelu(experts.up_proj[i] @ x[m])
    assert_close(experts(x, index, weights), expected)


def test_gated_eager_is_swiglu():
    experts = make_experts(gated=True)
    x = torch.randn(9, 32)
    index, weights, _ = route("random", 9, 4, 2)
    expected = torch.zeros(9, 32)
    for m in range(9):
        for i, r in zip(index[m], weights[m]):
            gate, up = (experts.gate_up_proj[i] @ x[m]).chunk(2)
            expected[m] += r * experts.down_proj[i] @ (torch.nn.functional.silu(gate) * up)
    assert_close(experts(x, index, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", ["random", "all on one", "empty experts"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("implementation", FAST)
def test_forward_and_gradients_agree_with_eager(implementation, gated, case, dtype):
    if implementation == "grouped_mm" and dtype == torch.float64:
        pytest.skip("torch has no grouped_mm in float64")
    experts = make_experts(gated, torch.float64)
    x = torch.randn(23, 32, dtype=torch.float64)
    index, weights, _ = route(case, 23, 4, 2)
    expected = run(experts, "eager", x.to(dtype).double(), index, weights.to(dtype).double())
    experts = experts.to(dtype)
    if dtype == torch.bfloat16:  # the reference has the rounded parameters
        expected = run(experts.double(), "eager", x.to(dtype).double(), index, weights.to(dtype).double())
        experts = experts.to(dtype)
    capacity = 23 if implementation == "capacity_bmm" else None
    actual = run(experts, implementation, x.to(dtype), index, weights.to(dtype), capacity)
    for name in expected:
        scale = expected[name].abs().max()
        assert_close(actual[name].double() / scale, expected[name] / scale, dtype)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(
    "num_tokens, num_experts, width, k", [(1, 3, 20, 1), (7, 5, 36, 3), (16, 1, 12, 1), (5, 8, 4, 8)]
)
def test_odd_sizes(implementation, num_tokens, num_experts, width, k):
    experts = make_experts(False, num_experts=num_experts, moe_intermediate_size=width, num_experts_per_tok=k)
    x = torch.randn(num_tokens, 32)
    index, weights, _ = route("random", num_tokens, num_experts, k)
    expected = run(experts, "eager", x, index, weights)
    actual = run(experts, implementation, x, index, weights, num_tokens)
    for name in expected:
        assert_close(actual[name], expected[name])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("overflow", ["drop", "next_best"])
@pytest.mark.parametrize("capacity", [1, 3, 6, 23])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity_bmm_is_eager_on_limited_assignments(gated, overflow, capacity, padded):
    experts = make_experts(gated)
    x = torch.randn(23, 32)
    mask = torch.arange(23) > 4 if padded else None
    index, weights, logits = route("random", 23, 4, 2)
    index, weights, dropped, _ = limit_to_capacity(index, weights, logits, capacity, overflow, mask)
    expected = run(experts, "eager", x, index, weights)
    actual = run(experts, "capacity_bmm", x, index, weights, capacity)
    kept = weights != 0  # a dropped assignment has weight 0 for good, and no use for its gradient
    for grads in (expected, actual):
        grads["grad 1"] = grads["grad 1"] * kept
    for name in expected:
        assert_close(actual[name], expected[name])


def test_capacity_bmm_without_a_capacity_is_dropless():
    experts = make_experts(False)
    x = torch.randn(11, 32)
    index, weights, _ = route("all on one", 11, 4, 1)
    assert_close(run(experts, "capacity_bmm", x, index, weights), run(experts, "eager", x, index, weights))


@pytest.mark.parametrize("implementation", ["eager", *FAST])
def test_no_token(implementation):
    experts = make_experts(False)
    switch_to(experts, implementation)
    experts.expert_capacity = 0 if implementation == "capacity_bmm" else None
    empty = torch.empty(0, 2, dtype=torch.int64)
    assert experts(torch.empty(0, 32), empty, torch.empty(0, 2)).shape == (0, 32)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("gated", [False, True])
def test_compiled_as_one_graph_with_its_backward(implementation, gated):
    experts = make_experts(gated, implementation=implementation)
    experts.expert_capacity = 9 if implementation == "capacity_bmm" else None
    x = torch.randn(16, 32)
    index, weights, logits = route("random", 16, 4, 1)
    if implementation == "capacity_bmm":
        index, weights, *_ = limit_to_capacity(index, weights, logits, 9)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    results = []
    for module in (experts, compiled):
        experts.zero_grad()
        output = module(x, index, weights)
        output.square().sum().backward()
        results.append([output.detach(), *[parameter.grad.clone() for parameter in experts.parameters()]])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("implementation", FAST)
def test_chosen_through_the_model(implementation):
    ids = random_ids()
    model = tiny_model()
    expected = model(ids).logits
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    assert_close(model(ids).logits, expected)


def test_every_implementation_that_is_tested_is_registered():
    assert set(FAST) <= set(ALL_EXPERTS_FUNCTIONS.valid_keys())


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="grouped_mm"):
        tiny_model().set_experts_implementation("no_such_thing")


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_a_model_with_a_capacity_gives_the_same_with_every_implementation(overflow):
    settings = dict(
        capacity_mode="factor", expert_capacity_factor=0.6, capacity_overflow=overflow, num_experts_per_tok=2
    )
    ids = random_ids(3, 10)
    results = {}
    for implementation in ("eager", *FAST):
        model = tiny_model(**settings).train()
        model.set_experts_implementation(implementation)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        grads = [parameter.grad for parameter in model.parameters()]
        results[implementation] = [outputs.loss.detach(), outputs.router_stats, *grads]
    for implementation in FAST:
        assert_close(results[implementation], results["eager"])
