# SPDX-License-Identifier: Apache-2.0
"""The router losses as pure functions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.moe.losses import load_balancing_loss, locality_loss
from tests.tolerances import assert_close


LOCAL = torch.tensor([True, True, False, False, False, False])


def test_load_balancing_is_equation_5():
    prob_sum, tokens = torch.tensor([6.0, 3.0, 1.0]), torch.tensor([7.0, 2.0, 1.0])
    expected = 3 * (0.7 * 0.6 + 0.2 * 0.3 + 0.1 * 0.1)
    assert_close(load_balancing_loss(prob_sum, tokens, torch.tensor(10.0)), torch.tensor(expected))


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_k_and_collapse_is_n(k):
    n, num_tokens = 4, torch.tensor(40.0)
    balanced = load_balancing_loss(torch.full((n,), 40 / n), torch.full((n,), 40.0 * k / n), num_tokens)
    assert_close(balanced, torch.tensor(float(k)))
    collapsed = torch.tensor([40.0, 0, 0, 0])
    assert_close(load_balancing_loss(collapsed, collapsed, num_tokens), torch.tensor(float(n)))


def test_load_balancing_is_taken_per_layer():
    """Four layers, each collapsed on another expert: balanced when pooled, collapsed each."""
    counts = 10 * torch.eye(4)
    per_layer = load_balancing_loss(counts, counts, torch.full((4,), 10.0))
    assert_close(per_layer, torch.full((4,), 4.0))
    assert_close(load_balancing_loss(counts.sum(0), counts.sum(0), torch.tensor(40.0)), torch.tensor(1.0))


def test_the_gradient_flows_through_the_probabilities_alone():
    prob_sum = torch.tensor([6.0, 3.0, 1.0], requires_grad=True)
    tokens = torch.tensor([7.0, 2.0, 1.0], requires_grad=True)
    load_balancing_loss(prob_sum, tokens, torch.tensor(10.0)).backward()
    assert_close(prob_sum.grad, 3 * torch.tensor([0.7, 0.2, 0.1]) / 10)
    assert tokens.grad is None


def test_locality_is_the_divergence_of_equation_6():
    share = torch.tensor([0.3, 0.1, 0.2, 0.2, 0.1, 0.1], dtype=torch.float64)
    target = torch.tensor([0.45, 0.45, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    expected = torch.nn.functional.kl_div(target.log(), share, reduction="sum")
    assert_close(locality_loss(50 * share, torch.tensor(50.0), LOCAL), expected)


def test_locality_is_exactly_zero_on_one_node_and_on_a_node_without_experts():
    prob_sum = torch.rand(6, requires_grad=True)
    for near in (torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)):
        loss = locality_loss(prob_sum, torch.tensor(3.0), near)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, prob_sum)
        assert not grad.any()


def test_no_tokens_give_zero():
    zero = torch.zeros(6)
    assert locality_loss(zero, torch.tensor(0.0), LOCAL).item() == 0.0
    assert load_balancing_loss(zero, zero, torch.tensor(0.0)).item() == 0.0


@given(
    logits=st.lists(st.floats(-200, 200), min_size=6, max_size=6),
    remote_share=st.floats(1e-4, 0.9),
    num_local=st.integers(1, 5),
)
def test_locality_is_finite_and_bounded(logits, remote_share, num_local):
    near = torch.arange(6) < num_local
    share = torch.tensor(logits, dtype=torch.float32).softmax(-1).requires_grad_()
    loss = locality_loss(10 * share, torch.tensor(10.0), near, remote_share)
    bound = max(math.log((6 - num_local) / remote_share), math.log(num_local / (1 - remote_share)))
    assert -1e-5 <= loss.item() <= bound + 1e-4
    (grad,) = torch.autograd.grad(loss, share)
    assert torch.isfinite(grad).all()


def test_an_expert_that_no_token_can_reach_gives_a_finite_gradient():
    logits = torch.tensor([1.0, 2.0, 0.5, float("-inf"), float("-inf"), float("-inf")], requires_grad=True)
    loss = locality_loss(logits.softmax(-1), torch.tensor(1.0), LOCAL)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(grad[:3]).all()


def test_it_stops_pulling_at_the_target_share():
    """The divergence along (share of the node's experts) has its minimum, zero, where the remote share is the target."""
    target = 0.2

    def loss(local_share):
        share = torch.where(LOCAL, local_share / 2, (1 - local_share) / 4)
        return locality_loss(share, torch.tensor(1.0), LOCAL, target)

    at_target = torch.tensor(1 - target, requires_grad=True)
    value = loss(at_target)
    (slope,) = torch.autograd.grad(value, at_target)
    assert_close(value, torch.tensor(0.0))
    assert_close(slope, torch.tensor(0.0))
    assert loss(torch.tensor(0.5)) > loss(torch.tensor(0.7)) > 0
    assert loss(torch.tensor(0.95)) > 0


def test_locality_is_taken_per_layer_with_a_placement_per_layer():
    share = torch.rand(3, 6).softmax(-1)
    near = torch.stack([LOCAL, ~LOCAL, LOCAL.roll(2)])
    together = locality_loss(share * 8, torch.full((3,), 8.0), near)
    one_by_one = [locality_loss(share[i] * 8, torch.tensor(8.0), near[i]) for i in range(3)]
    assert_close(together, torch.stack(one_by_one))


def test_gradient_descent_on_the_locality_loss_makes_tokens_local():
    logits = torch.zeros(20, 6, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=20.0)
    for _ in range(200):
        optimizer.zero_grad()
        locality_loss(logits.softmax(-1).sum(0), torch.tensor(20.0), LOCAL, 0.1).backward()
        optimizer.step()
    local_share = logits.softmax(-1)[:, :2].sum(-1).mean().item()
    assert abs(local_share - 0.9) < 0.01
