# SPDX-License-Identifier: Apache-2.0
"""Grouped average pooling against equations 2-4, and what was added to it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.moe.gate import LocMoeGate, block_sums
from tests.tiny_models import tiny_config, tiny_model
from tests.tolerances import assert_close


def make_gate(layer_idx=0, **overrides):
    gate = LocMoeGate(tiny_config(**overrides), layer_idx)
    gate.reset_buffers(lambda buffer, value: buffer.copy_(value))
    return gate.eval()


def gate_weights(hidden_size, num_experts):
    """The paper's w_i, one row an expert: n/d on the i-th block of d/n dimensions, 0 elsewhere."""
    weights = torch.zeros(num_experts, hidden_size)
    for i in range(num_experts):
        block = slice(i * hidden_size // num_experts, (i + 1) * hidden_size // num_experts)
        weights[i, block] = num_experts / hidden_size
    return weights


def test_the_papers_gate_is_equations_2_to_4():
    gate = make_gate(gate_affinity="mean", gate_relu=True)
    x = torch.randn(50, 32)
    logits, weight, index = gate(x)
    expected = (x @ gate_weights(32, 4).T).relu()
    assert_close(logits, expected)
    best = expected.softmax(-1).max(-1)
    has_positive = (expected > 0).any(-1)
    assert torch.equal(index[has_positive, 0], best.indices[has_positive])
    assert_close(weight[:, 0], best.values)
    assert (weight.dtype, index.dtype) == (torch.float32, torch.int64)


def test_noise_in_training_alone():
    gate = make_gate(gate_affinity="mean", gate_noise_std=0.5)
    x = torch.randn(2000, 32)
    clean = gate(x)[0]
    assert torch.equal(clean, gate(x)[0])
    noise = gate.train()(x)[0] - clean
    assert abs(noise.std().item() - 0.5) < 0.02
    assert abs(noise.mean().item()) < 0.02


def test_the_cosine_affinity_is_the_cosine_in_units_of_its_spread():
    gate = make_gate(gate_affinity="cosine")
    x = 7 * torch.randn(40, 32)
    expected = torch.nn.functional.cosine_similarity(x[:, None], gate_weights(32, 4)[None], dim=-1)
    assert_close(gate(x)[0], math.sqrt(32) * expected)
    assert_close(gate.cosines(x), expected)
    assert_close(gate(100 * x)[0], gate(x)[0])


def test_cosine_logits_of_isotropic_tokens_have_unit_variance():
    gate = make_gate(hidden_size=256, num_attention_heads=8, num_experts=8)
    assert abs(gate(torch.randn(4000, 256))[0].std().item() - 1) < 0.02


@pytest.mark.parametrize("affinity", ["mean", "cosine"])
@pytest.mark.parametrize(("hidden_size", "num_experts"), [(32, 5), (32, 7), (30, 4), (32, 31), (32, 32)])
def test_a_hidden_size_that_is_not_divisible(affinity, hidden_size, num_experts):
    gate = make_gate(
        hidden_size=hidden_size, num_attention_heads=2, head_dim=8, num_experts=num_experts, gate_affinity=affinity
    )
    assert sum(gate.block_sizes) == hidden_size
    assert max(gate.block_sizes) - min(gate.block_sizes) <= 1
    x = torch.randn(20, hidden_size)
    blocks = x.split(gate.block_sizes, dim=-1)
    if affinity == "mean":
        expected = torch.stack([block.mean(-1) for block in blocks], dim=-1)
    else:
        parts = [block.sum(-1) / math.sqrt(block.shape[-1]) for block in blocks]
        expected = math.sqrt(hidden_size) * torch.stack(parts, dim=-1) / x.norm(dim=-1, keepdim=True)
    assert_close(gate(x)[0], expected)


@given(st.integers(1, 40), st.data())
def test_block_sums_are_the_product_with_indicators(hidden_size, data):
    num_experts = data.draw(st.integers(1, hidden_size))
    starts = [i * hidden_size // num_experts for i in range(num_experts + 1)]
    sizes = [end - start for start, end in zip(starts[:-1], starts[1:])]
    x = torch.randn(3, hidden_size, dtype=torch.float64)
    indicators = torch.block_diag(*[torch.ones(1, size, dtype=torch.float64) for size in sizes])
    assert_close(block_sums(x, sizes), x @ indicators.T)


def test_a_token_of_zeros_has_finite_logits_and_gradient():
    gate = make_gate()
    x = torch.zeros(2, 32, requires_grad=True)
    logits, weight, index = gate(x)
    assert torch.equal(logits, torch.zeros(2, 4))
    assert index.flatten().tolist() == [0, 0]
    weight.sum().backward()
    assert x.grad.abs().max() < 10  # far from overflow: the norm before the router multiplies it by 1,000


def test_all_zero_logits_after_the_relu_still_go_to_the_best_expert():
    gate = make_gate(gate_affinity="mean", gate_relu=True)
    x = -torch.ones(1, 32)
    x[0, 16:24] = -0.5  # the block of expert 2 is the least negative
    logits, weight, index = gate(x)
    assert torch.equal(logits, torch.zeros(1, 4))
    assert index.item() == 2
    assert_close(weight, torch.full((1, 1), 0.25))


class TestFloat32:
    @pytest.mark.parametrize("affinity", ["mean", "cosine"])
    def test_bfloat16_tokens_are_routed_in_float32(self, affinity):
        gate = make_gate(gate_affinity=affinity)
        x = torch.randn(200, 32).bfloat16()
        logits, weight, index = gate(x)
        wide_logits, wide_weight, wide_index = gate(x.float())
        assert logits.dtype == weight.dtype == torch.float32
        assert torch.equal(logits, wide_logits)
        assert torch.equal(weight, wide_weight)
        assert torch.equal(index, wide_index)

    def test_autocast_changes_nothing(self):
        gate = make_gate(gate_rotation=True)
        x = torch.randn(200, 32)
        plain = gate(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = gate(x)
        for a, b in zip(plain, under_autocast):
            assert torch.equal(a, b)


class TestCentering:
    def test_two_outlier_dimensions_are_cured(self):
        torch.manual_seed(0)
        tokens = torch.randn(4096, 64)
        tokens[:, 3] += 20
        tokens[:, 50] -= 20
        shape = dict(hidden_size=64, num_experts=8)
        plain, centred = make_gate(**shape), make_gate(**shape, gate_centering=True)

        def max_share(gate):
            return gate(tokens)[2].flatten().bincount(minlength=8).max().item() / len(tokens)

        assert max_share(plain) > 0.6
        centred.update_state(torch.full((8,), len(tokens) / 8), tokens.sum(0))
        assert max_share(centred) < 0.2
        assert_close(centred.hidden_mean, tokens.mean(0))

    def test_the_running_mean_is_an_average_first_and_exponential_later(self):
        gate = make_gate(gate_centering=True)
        gate.centering_momentum = 0.75
        means = torch.randn(6, 32)
        for mean in means:
            gate.update_state(torch.full((4,), 10.0), 40 * mean)
        expected = means[:4].mean(0)
        for mean in means[4:]:
            expected = 0.75 * expected + 0.25 * mean
        assert_close(gate.hidden_mean, expected)

    def test_assignments_are_not_tokens_with_two_experts_a_token(self):
        gate = make_gate(gate_centering=True, num_experts_per_tok=2)
        gate.update_state(torch.full((4,), 10.0), torch.full((32,), 20.0))  # 40 assignments of 20 tokens
        assert_close(gate.hidden_mean, torch.ones(32))


class TestRotation:
    def test_it_is_a_rotation_of_pooling(self):
        gate = make_gate(gate_rotation=True)
        assert_close(gate.rotation @ gate.rotation.T, torch.eye(4))
        x = torch.randn(30, 32)
        assert_close(gate.cosines(x), torch.nn.functional.normalize(x, dim=-1) @ gate.rotation.T)

    def test_each_layer_has_its_own_and_always_the_same(self):
        first, again, other = (make_gate(layer, gate_rotation=True).rotation for layer in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)

    def test_it_is_stored_and_reloaded(self, tmp_path):
        model = tiny_model(gate_rotation=True)
        with torch.no_grad():
            for block in model.sparse_blocks:
                block.gate.rotation.neg_()  # unlike what any initialisation would give
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        for block, other in zip(model.sparse_blocks, loaded.sparse_blocks, strict=True):
            assert torch.equal(block.gate.rotation, other.gate.rotation)


def test_the_gate_has_no_parameters():
    assert not list(make_gate(gate_centering=True, gate_rotation=True).parameters())


def test_gradient_reaches_the_tokens_through_the_weight():
    gate = make_gate(gate_affinity="mean").double()
    x = torch.randn(5, 32, requires_grad=True)
    weight, index = gate(x)[1:]
    (grad,) = torch.autograd.grad(weight.sum(), x)
    probability = (x @ gate_weights(32, 4).T).softmax(-1)
    (expected,) = torch.autograd.grad(probability.gather(-1, index).sum(), x)
    assert_close(grad, expected)
