# SPDX-License-Identifier: Apache-2.0
"""
Every Triton kernel against plain torch, forward and backward, on random inputs of odd sizes.

On a CUDA device, or anywhere under Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/unit/moe/test_kernels.py`.
"""

import itertools
import math
import os

import pytest
import torch
import torch.utils.checkpoint

from hf_locmoe.layers_locmoe import LocMoeSparseMoeBlock
from hf_locmoe.moe import experts as experts_module
from hf_locmoe.moe import gate as gate_module
from hf_locmoe.moe import overflow, routing
from hf_locmoe.moe.experts import _rows_by_capacity
from hf_locmoe.moe.gate import LocMoeGate, _cosine, block_sums
from tests.tiny_models import tiny_config
from tests.tolerances import assert_close


pytest.importorskip("triton", reason="the kernels need Triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a CUDA device, or TRITON_INTERPRET=1 set from the start", allow_module_level=True)

from hf_locmoe.moe import gate_kernels, kernels, router_kernels
from hf_locmoe.permute import layout_kernels, row_kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What is not written shows: new memory holds NaN, as far as torch fills it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def compare(fast, slow, inputs, dtype):
    """Outputs and gradients of two functions of the same leaves; the reference in float64, errors by the greatest value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = fast(*leaves), slow(*exact)
    direction = torch.randn(expected.shape, dtype=torch.float64, device=expected.device).to(output.dtype)
    grads = torch.autograd.grad(output, leaves, direction)
    references = torch.autograd.grad(expected, exact, direction.double())
    for actual, wanted in zip((output, *grads), (expected, *references)):
        scale = wanted.detach().abs().max().clamp_min(1e-6)
        assert_close(actual.detach().double() / scale, wanted.detach() / scale, dtype)


def layout(num_tokens, num_experts, k, capacity):
    index = torch.rand(num_tokens, num_experts, device=DEVICE).topk(k).indices
    index[::3] = index[:1].clone()  # uneven loads, experts without a token
    if capacity is None:
        row_of_choice, choice_of_row, _ = layout_kernels.rows_by_expert(index, num_experts)
    else:
        weights = torch.ones(index.shape, device=DEVICE)
        row_of_choice, choice_of_row = layout_kernels.rows_by_capacity(index, weights, num_experts, capacity)
    return row_of_choice, choice_of_row


LAYOUTS = [(7, 3, 1, None), (13, 5, 3, None), (13, 5, 3, 4), (9, 4, 2, 20), (1, 1, 1, 1)]


@pytest.mark.parametrize("num_tokens, num_experts, k, capacity", LAYOUTS)
def test_layouts_are_inverse(num_tokens, num_experts, k, capacity):
    row_of_choice, choice_of_row = layout(num_tokens, num_experts, k, capacity)
    rows = row_of_choice.flatten()
    placed = rows >= 0
    choices = torch.arange(rows.numel(), device=DEVICE)
    assert torch.equal(choice_of_row[rows[placed]], choices[placed])
    assert (choice_of_row >= 0).sum() == placed.sum()


@pytest.mark.parametrize(
    "num_tokens, num_experts, k", [(1, 64, 8), (9, 5, 2), (301, 3, 1), (257, 16, 4), (40, 128, 8)]
)
def test_layouts_are_a_stable_sorts(num_tokens, num_experts, k, monkeypatch):
    """One program and many, with assignments of weight 0 and to experts of other ranks."""
    monkeypatch.setattr(layout_kernels, "_SPAN", 64)
    monkeypatch.setattr(layout_kernels, "_TILE", 256)
    monkeypatch.setattr(layout_kernels, "_MAX_PROGRAMS", 8)
    index = torch.randint(0, num_experts + 1, (num_tokens, k), device=DEVICE)
    index[::3] = index[:1].clone()
    weights = (torch.rand(index.shape, device=DEVICE) > 0.3).float()

    ids, order = index.flatten().sort(stable=True)
    placed = ids < num_experts
    row_of_choice, choice_of_row, offsets = layout_kernels.rows_by_expert(index, num_experts)
    assert torch.equal(choice_of_row, order.masked_fill(~placed, -1))
    rows = torch.arange(ids.numel(), device=DEVICE).masked_fill(~placed, -1)
    assert torch.equal(row_of_choice.flatten(), torch.empty_like(rows).scatter_(0, order, rows))
    assert torch.equal(offsets.long(), torch.bincount(ids, minlength=num_experts + 1)[:-1].cumsum(0))

    for capacity, limited in itertools.product((1, 7, num_tokens * k), (weights, None)):
        actual = layout_kernels.rows_by_capacity(index, limited, num_experts, capacity)
        with monkeypatch.context() as patch:
            patch.setattr(overflow, "rank_in_expert", None)
            expected = _rows_by_capacity(index, limited, num_experts, capacity)
        assert all(torch.equal(fast, slow) for fast, slow in zip(actual, expected))

        # the same without the rows that are empty
        row_of_choice, choice_of_row, offsets = layout_kernels.rows_by_expert(index, num_experts, limited, capacity)
        taken = expected[1] >= 0
        assert torch.equal(offsets.long(), taken.view(num_experts, capacity).sum(1).cumsum(0))
        assert choice_of_row.shape == (min(num_tokens * k, num_experts * capacity),)
        assert torch.equal(choice_of_row[: taken.sum()], expected[1][taken])
        assert (choice_of_row[taken.sum() :] == -1).all()
        places = (taken.cumsum(0) - 1)[expected[0].clamp_min(0)]
        assert torch.equal(row_of_choice, torch.where(expected[0] >= 0, places, -1))

    counted = index < num_experts
    for slots_first in (False, True):
        sequence = index.T.flatten() if slots_first else index.flatten()
        earlier = torch.tril((sequence[:, None] == sequence[None, :]).long(), -1).sum(1)
        earlier = earlier.view(k, num_tokens).T if slots_first else earlier.view_as(index)
        rank = layout_kernels.rank_in_expert(index, num_experts, slots_first)
        assert torch.equal(rank[counted], earlier[counted])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1030])
@pytest.mark.parametrize("num_tokens, num_experts, k, capacity", LAYOUTS)
def test_gather_and_combine(num_tokens, num_experts, k, capacity, width, dtype):
    row_of_choice, choice_of_row = layout(num_tokens, num_experts, k, capacity)

    def padded(x):
        return torch.cat([x, torch.zeros_like(x[:1])])

    tokens = torch.randn(num_tokens, width, device=DEVICE, dtype=dtype)
    compare(
        lambda x: row_kernels.gather_rows(x, choice_of_row, row_of_choice),
        lambda x: padded(x)[choice_of_row // k],
        [tokens],
        dtype,
    )
    rows = torch.randn(choice_of_row.shape[0], width, device=DEVICE, dtype=dtype)
    compare(
        lambda x: row_kernels.combine_rows(x, row_of_choice, choice_of_row),
        lambda x: padded(x)[row_of_choice].sum(1),
        [rows],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [3, 1100])
def test_weighted_activation(width, activation, gated, dtype):
    _, choice_of_row = layout(6, 4, 2, 4)
    function = ACTIVATIONS[activation]

    def reference(inner, weights):
        weight = torch.cat([weights.flatten(), weights.new_zeros(1)])[choice_of_row, None]
        if gated:
            return function(inner[:, :width]) * inner[:, width:] * weight
        return function(inner) * weight

    inner = torch.randn(choice_of_row.shape[0], 2 * width if gated else width, device=DEVICE, dtype=dtype)
    weights = torch.rand(6, 2, device=DEVICE, dtype=dtype)
    compare(
        lambda x, w: kernels.weighted_activation(x, w, choice_of_row, activation, gated),
        reference,
        [inner, weights],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize(
    "num_tokens, hidden_size, num_experts",
    [(5, 24, 3), (3, 20, 8), (6, 64, 16), (4, 37, 5), (2, 30, 30), (9, 16, 1), (3, 7168, 256), (2, 2000, 48)],
)
def test_pooling(num_tokens, hidden_size, num_experts, cosine, dtype):
    hidden_states = torch.randn(num_tokens, hidden_size, device=DEVICE, dtype=dtype)
    hidden_states[0] = 0
    sizes = [(i + 1) * hidden_size // num_experts - i * hidden_size // num_experts for i in range(num_experts)]
    norms = torch.tensor(sizes, dtype=torch.float64, device=DEVICE).sqrt()

    def reference(x):
        projection = block_sums(x, sizes) / norms
        return math.sqrt(hidden_size) * _cosine(projection, x) if cosine else projection / norms

    compare(lambda x: gate_kernels.pool_affinity(x, num_experts, cosine), reference, [hidden_states], dtype)


@pytest.mark.parametrize("num_tokens, num_experts, k", [(5, 3, 1), (700, 16, 2), (3, 64, 8), (33, 7, 7), (4, 256, 3)])
def test_top_k_breaks_ties_by_the_lower_index(num_tokens, num_experts, k):
    values = torch.randn(num_tokens, num_experts, device=DEVICE).round(decimals=1)
    expected = values.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(router_kernels.top_k_of_router(values, k), expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_tokens, num_experts, k", [(5, 3, 1), (700, 16, 2), (3, 64, 8), (4, 256, 3)])
def test_sums_and_counts(num_tokens, num_experts, k, masked):
    logits = torch.randn(num_tokens, num_experts, device=DEVICE)
    logits[:, 1:][torch.rand(num_tokens, num_experts - 1, device=DEVICE) > 0.8] = -float("inf")
    index = logits.topk(k).indices
    mask = torch.rand(num_tokens, device=DEVICE) > 0.4 if masked else None
    compare(
        lambda x: router_kernels.route_sums(x, index, mask)[0],
        lambda x: routing._plain_sums(x, index, mask)[0],
        [logits],
        torch.float32,
    )
    assert_close(router_kernels.route_sums(logits, index, mask), torch.stack(routing._plain_sums(logits, index, mask)))
    dropped = torch.rand(num_tokens, k, device=DEVICE) > 0.5
    rerouted = ~dropped & (torch.rand(num_tokens, k, device=DEVICE) > 0.5)
    arguments = (index, mask, dropped, rerouted, num_experts)
    assert_close(router_kernels.count_limited(*arguments), torch.stack(routing._plain_counts(*arguments)))


# one tile and many, blocks of one size and of two, narrower than a load and starting inside one, more experts than fit
ROUTES = [
    (5, 24, 3, 1),
    (37, 64, 16, 2),
    (21, 48, 5, 2),
    (9, 37, 5, 5),
    (4, 30, 30, 3),
    (6, 2000, 48, 1),
    (3, 2560, 96, 4),
    (35, 640, 24, 1),
    (2, 3072, 256, 8),
    (7, 16, 1, 1),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["cosine", "mean", "papers", "scaled"])
@pytest.mark.parametrize("num_tokens, hidden_size, num_experts, k", ROUTES)
def test_gate_in_one_pass(num_tokens, hidden_size, num_experts, k, form, dtype, monkeypatch):
    """Logits, choice, weights, statistics and the gradient of all three, with a bias, a mask and noise."""
    monkeypatch.setattr(routing, "NUM_COSINE_SAMPLES", 8)
    monkeypatch.setattr(gate_kernels, "_PROGRAMS", 4)
    monkeypatch.setattr(gate_kernels, "_LAUNCHES", ((num_experts, 128, 4),))
    torch.manual_seed(0)
    cosine, relu, noisy, scaled = form in ("cosine", "scaled"), form == "papers", form != "mean", form == "scaled"
    settings = dict(num_experts=num_experts, num_experts_per_tok=k, gate_affinity="cosine" if cosine else "mean")
    config = tiny_config(
        hidden_size=hidden_size,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        gate_relu=relu,
        norm_topk_prob=scaled,
        **settings,
    )
    gate = LocMoeGate(config).to(DEVICE).eval()
    gate.e_score_correction_bias.copy_(torch.randint(-1, 2, (num_experts,)) / 4)
    # whole numbers, whose sums are exact in any order: ties are ties, and go to the lower expert
    x = torch.randint(-3, 4, (num_tokens, hidden_size), device=DEVICE).to(dtype)
    x[0] = 0
    mask = torch.rand(num_tokens, device=DEVICE) > 0.3
    noise = torch.randint(-2, 3, (num_tokens, num_experts), device=DEVICE) / 64 if noisy else None
    stride = routing.cosine_stride(num_tokens)
    directions = [torch.randn(num_tokens, num_experts, device=DEVICE), torch.randn(num_tokens, k, device=DEVICE)]
    directions.append(torch.randn(len(routing.RouterStat), num_experts, device=DEVICE))

    def fast(x):
        return gate_kernels.route_pooled(
            x, gate.e_score_correction_bias, noise, num_experts, k, cosine, relu, scaled, mask, stride, 1
        )

    def plain(x):
        monkeypatch.setattr(gate_module, "pool_affinity", None)
        for name in ("route_sums", "top_k_of_router", "count_limited"):
            monkeypatch.setattr(routing, name, None)
        if noisy:
            gate.train()
            gate.noise_std = 1.0
            monkeypatch.setattr(torch, "randn_like", lambda affinity: noise)
        logits, weights, index = gate(x)
        return logits, weights, index, routing.router_statistics(gate, x, logits, index, mask, capacity=1)

    results = []
    for route in (fast, plain):
        leaf = x.detach().requires_grad_()
        logits, weights, index, stats = route(leaf)
        loss = [(y * direction).sum() for y, direction in zip((logits, weights, stats), directions)]
        grads = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in (*loss, sum(loss))]
        results.append((logits.detach(), weights.detach(), index, stats.detach(), grads))
    for actual, expected in zip(results[0][:4], results[1][:4]):
        assert_close(actual, expected)
    # one scale: the gradient of a lone weight scaled to one is 0, but for rounding
    scale = max(grad.float().abs().max() for grad in results[1][4])
    for actual, expected in zip(results[0][4], results[1][4]):
        assert_close(actual.float() / scale, expected.float() / scale, dtype)


@pytest.mark.parametrize("num_experts", [1, 16, 48, 49, 128, 129, 256, 8192])
def test_warps_that_are_there_together_fit_the_registers(num_experts):
    registers, warps = gate_kernels._launch_of(num_experts)
    assert registers == gate_kernels._forward_layout(8192, num_experts)["maxnreg"]
    of_multiprocessor, rest = divmod(warps, 132)
    assert rest == 0 and of_multiprocessor * 32 * registers <= 65536 < (of_multiprocessor + 2) * 32 * registers


def test_many_partial_sums_and_the_same_bits_every_time(monkeypatch):
    monkeypatch.setattr(gate_kernels, "_LAUNCHES", ((6, 128, 70),))  # spans of 5 tokens
    monkeypatch.setattr(gate_kernels, "_TILE", 64)  # several steps of adding partial sums, several windows of experts
    x, bias = torch.randn(300, 48, device=DEVICE), torch.zeros(6, device=DEVICE)
    runs = [gate_kernels.route_pooled(x, bias, None, 6, 2, True, False, False, None, 1) for _ in range(2)]
    assert torch.equal(runs[0][3], runs[1][3])
    logits, _, index, stats = runs[0]
    expected = torch.stack(routing._plain_sums(logits, index, None))
    rows = [routing.RouterStat.PROB_SUM, routing.RouterStat.TOKENS, routing.RouterStat.ENTROPY_SUM]
    assert_close(stats[rows], expected)


def test_saved_tensors_are_unpacked_once():
    """Activation checkpointing refuses to unpack them again."""
    row_of_choice, choice_of_row = layout(9, 4, 2, None)
    weights = torch.rand(9, 2, device=DEVICE).requires_grad_()

    def run(x):
        rows = row_kernels.gather_rows(x, choice_of_row, row_of_choice)
        rows = kernels.weighted_activation(rows, weights, choice_of_row, "silu", False)
        bias = torch.zeros(4, device=DEVICE)
        logits, _, index, stats = gate_kernels.route_pooled(x, bias, None, 4, 1, True, False, False, None, 1)
        losses = stats[0].square().sum() + router_kernels.route_sums(logits, index, None)[0].square().sum()
        return row_kernels.combine_rows(rows, row_of_choice, choice_of_row).sum() + losses

    x = torch.randn(9, 8, device=DEVICE).requires_grad_()
    expected = torch.autograd.grad(run(x), [x, weights])
    actual = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False), [x, weights])
    assert_close(actual, expected)


def test_no_tokens():
    none, no_choice = torch.empty(0, 8, device=DEVICE), torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    assert row_kernels.gather_rows(none, no_choice.flatten(), no_choice).shape == (0, 8)
    assert row_kernels.combine_rows(none, no_choice, no_choice.flatten()).shape == (0, 8)
    assert gate_kernels.pool_affinity(none, 4, True).shape == (0, 4)
    assert not gate_kernels.route_pooled(none, none[0:0], None, 4, 2, True, False, False, None, 1)[3].any()
    assert not router_kernels.route_sums(none, no_choice, None).any()
    assert not router_kernels.count_limited(no_choice, None, no_choice.bool(), no_choice.bool(), 8).any()


@pytest.mark.parametrize("capacity", [1.0, None])
def test_checkpointing_does_not_repeat_the_last_projection(capacity, monkeypatch):
    """The same outputs and gradients, with one product by expert more and not two."""
    if capacity is None and DEVICE == "cpu":
        pytest.skip("the grouped product takes bfloat16, to which the interpreter does not round")
    monkeypatch.setattr(experts_module, "_kernels_run_on", lambda _: True)
    limited = {} if capacity is None else dict(capacity_mode="factor", expert_capacity_factor=capacity)
    config = tiny_config(gated_mlp=True, hidden_act="silu", num_experts_per_tok=2, **limited)
    config._experts_implementation = "capacity_bmm"
    torch.manual_seed(0)
    block = LocMoeSparseMoeBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block = block.to(DEVICE, torch.float32 if capacity else torch.bfloat16).train()
    x = torch.randn(2, 11, 32, device=DEVICE, dtype=block.experts.down_proj.dtype)
    products = []
    by_expert = experts_module._by_expert
    monkeypatch.setattr(experts_module, "_by_expert", lambda *args: products.append(1) or by_expert(*args))

    def step(checkpointed):
        products.clear()
        y = x.clone().requires_grad_()
        if checkpointed:
            run = torch.utils.checkpoint.checkpoint(block, y, output_router_stats=True, use_reentrant=False)
        else:
            run = block(y, output_router_stats=True)
        output, stats = run
        loss = (output * x.roll(1)).sum() + stats[0].square().sum()
        grads = torch.autograd.grad(loss, [y, *block.parameters()])
        return len(products), [output.detach(), stats.detach(), *grads]

    (once, expected), (again, actual) = step(False), step(True)
    assert again == once + 1
    for fast, slow in zip(actual, expected):
        assert_close(fast, slow)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "factor, overflow_rule", [(0.4, "drop"), (1.0, "drop"), (1.6, "drop"), (0.4, "next_best"), (1.6, "next_best")]
)
def test_block_limits_as_the_reference(factor, padded, overflow_rule, monkeypatch):
    """
    Experts that drop by themselves beside limited assignments and a loop over experts: output, statistics, gradients. With
    more room than assignments the rows are grouped, here by a loop, since torch's product takes bfloat16 alone.
    """
    config = tiny_config(
        num_experts=5,
        num_experts_per_tok=2,
        gated_mlp=True,
        hidden_act="silu",
        capacity_mode="factor",
        expert_capacity_factor=factor,
        capacity_overflow=overflow_rule,
    )
    torch.manual_seed(0)
    block = LocMoeSparseMoeBlock(config, 0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block = block.to(DEVICE).train()
    x = torch.randn(3, 9, 32, device=DEVICE)
    x[:, ::2] = x[:1, :1] + 0.1 * x[:, ::2]  # uneven loads
    mask = torch.rand(3, 9, device=DEVICE) > 0.3 if padded else None
    monkeypatch.setattr(experts_module, "_can_group", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", _grouped_by_a_loop)

    def step(implementation):
        config._experts_implementation = implementation
        monkeypatch.setattr(experts_module, "_kernels_run_on", lambda _: implementation == "capacity_bmm")
        y = x.clone().requires_grad_()
        output, stats = block(y, token_mask=mask, output_router_stats=True)
        loss = (output * x.roll(1)).sum() + stats[0].square().sum()
        return [output.detach(), stats.detach(), *torch.autograd.grad(loss, [y, *block.parameters()])]

    actual, expected = step("capacity_bmm"), step("eager")
    assert factor > 0.4 or expected[1][routing.RouterStat.DROPPED].sum() > 0
    for fast, slow in zip(actual, expected):
        assert_close(fast, slow)


def _grouped_by_a_loop(rows, other, offs):
    """`torch.nn.functional.grouped_mm`; what belongs to no group is left poisoned."""
    bounds = [0, *offs.tolist()]
    spans = list(zip(bounds, bounds[1:]))
    if other.dim() == 2:
        return torch.stack([rows[:, start:end] @ other[start:end] for start, end in spans])
    output = rows.new_full((rows.shape[0], other.shape[2]), float("nan"))
    for (start, end), weight in zip(spans, other, strict=True):
        output[start:end] = rows[start:end] @ weight
    return output


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2,), (3,), (0, 1, 2), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("capacity", [None, 3])
def test_experts_in_one_function_are_the_operators(capacity, frozen, monkeypatch):
    """The eager form beside the one that the compiler takes, whatever needs a gradient: tokens, weights, projections."""
    config = tiny_config(num_experts=5, num_experts_per_tok=2, gated_mlp=True, hidden_act="silu")
    config._experts_implementation = "capacity_bmm"
    experts = experts_module.LocMoeGatedExperts(config).to(DEVICE)
    monkeypatch.setattr(experts_module, "_kernels_run_on", lambda _: True)
    monkeypatch.setattr(experts_module, "_can_group", lambda *_: True)
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", _grouped_by_a_loop)
    experts.expert_capacity = capacity
    tokens, weights = torch.randn(11, 32, device=DEVICE), torch.rand(11, 2, device=DEVICE)
    index = torch.rand(11, 5, device=DEVICE).topk(2).indices
    leaves = [tokens, weights, experts.gate_up_proj, experts.down_proj]
    for place, leaf in enumerate(leaves):
        torch.nn.init.normal_(leaf) if place > 1 else None
        leaf.requires_grad_(place not in frozen)
    direction = torch.randn(11, 32, device=DEVICE)
    results = []
    for as_operators in (False, True):
        monkeypatch.setattr(experts_module, "needs_operator", lambda _, answer=as_operators: answer)
        output = experts(tokens, index, weights)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        results.append([output.detach(), *torch.autograd.grad(output, wanted, direction)])
    for fast, slow in zip(*results):
        assert not fast.isnan().any()
        assert_close(fast, slow)
