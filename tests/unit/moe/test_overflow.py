# SPDX-License-Identifier: Apache-2.0
"""Capacity-limited assignment against a slow reference, and the life of a capacity rule."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.moe.capacity import critical_capacity, min_expert_capacity
from hf_locmoe.moe.overflow import CapacityRule, limit_to_capacity, position_in_expert
from hf_locmoe.moe.routing import RouterStat, stable_top_k
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


def limit_slowly(index, weights, logits, capacity, overflow, mask):
    """
    One assignment after the other. Next-best goes in rounds: in each, every token with an unplaced assignment asks for
    the next expert of its list, in the order of the tokens.
    """
    num_tokens, num_experts = logits.shape
    k = index.shape[1]
    taken = [0] * num_experts
    out_index, out_weights = index.tolist(), [[0.0] * k for _ in range(num_tokens)]
    dropped = [[False] * k for _ in range(num_tokens)]
    rerouted = [[False] * k for _ in range(num_tokens)]
    for slot in range(k):
        for token in range(num_tokens):
            if mask is not None and not mask[token]:
                continue
            expert = out_index[token][slot]
            if taken[expert] < capacity:
                taken[expert] += 1
                out_weights[token][slot] = weights[token, slot].item()
            else:
                dropped[token][slot] = True
    if overflow == "next_best":
        probability = logits.softmax(-1)
        for turn in range(num_experts - k):
            for token in range(num_tokens):
                if not any(dropped[token]):
                    continue
                own = set(index[token].tolist())
                others = [e for e in range(num_experts) if e not in own]
                others.sort(key=lambda e: (-logits[token, e].item(), e))
                expert = others[turn]
                if logits[token, expert] == -math.inf or taken[expert] >= capacity:
                    continue
                slot = dropped[token].index(True)
                taken[expert] += 1
                out_index[token][slot] = expert
                out_weights[token][slot] = probability[token, expert].item()
                dropped[token][slot], rerouted[token][slot] = False, True
    return out_index, out_weights, dropped, rerouted


def check_against_slow(index, weights, logits, capacity, overflow, mask):
    actual = limit_to_capacity(index, weights, logits, capacity, overflow, mask)
    expected = limit_slowly(index, weights, logits, capacity, overflow, mask)
    assert actual.top_k_index.tolist() == expected[0]
    assert_close(actual.top_k_weights, torch.tensor(expected[1]))
    assert actual.dropped.tolist() == expected[2]
    assert actual.rerouted.tolist() == expected[3]
    used = actual.top_k_index[actual.top_k_weights != 0]
    assert used.bincount(minlength=logits.shape[1]).max() <= capacity if used.numel() else True
    return actual


def route(num_tokens, num_experts, k, seed, skew=0.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    logits[:, 0] += skew
    index = stable_top_k(logits, k)
    return index, logits.softmax(-1).gather(-1, index), logits


@settings(max_examples=100)
@given(
    num_tokens=st.integers(1, 24),
    num_experts=st.integers(1, 6),
    k=st.integers(1, 3),
    capacity=st.integers(1, 12),
    overflow=st.sampled_from(["drop", "next_best"]),
    padded=st.booleans(),
    skew=st.sampled_from([0.0, 2.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_against_the_slow_reference(num_tokens, num_experts, k, capacity, overflow, padded, skew, seed):
    index, weights, logits = route(num_tokens, num_experts, min(k, num_experts), seed, skew)
    mask = torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) > 0.4 if padded else None
    check_against_slow(index, weights, logits, capacity, overflow, mask)


def test_all_on_one_expert():
    index, weights, logits = route(10, 4, 1, seed=0, skew=100.0)
    dropping = check_against_slow(index, weights, logits, 3, "drop", None)
    assert dropping.dropped.flatten().tolist() == [False] * 3 + [True] * 7
    assert torch.equal(dropping.top_k_index, index)  # dropped assignments keep an expert id in range
    rerouting = check_against_slow(index, weights, logits, 3, "next_best", None)
    assert rerouting.rerouted.sum() == 7
    assert not rerouting.dropped.any()


def test_one_token_fits():
    index, weights, logits = route(1, 4, 2, seed=0)
    result = check_against_slow(index, weights, logits, 1, "drop", None)
    assert not result.dropped.any()


def test_first_choices_go_before_second_ones():
    index = torch.tensor([[1, 0], [0, 1]])
    result = limit_to_capacity(index, torch.tensor([[0.6, 0.4], [0.7, 0.3]]), torch.zeros(2, 3), 1)
    assert result.dropped.tolist() == [[False, True], [False, True]]


def test_padding_takes_no_room_and_has_no_weight():
    index, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    mask = torch.tensor([False, False, True, True])
    result = limit_to_capacity(index, weights, torch.zeros(4, 2), 2, "drop", mask)
    assert result.top_k_weights.flatten().tolist() == [0, 0, 1, 1]
    assert not result.dropped.any()


@pytest.mark.parametrize("overflow", ["drop", "next_best"])
def test_next_best_stays_in_the_tokens_domain(overflow):
    logits = torch.randn(12, 6)
    logits[:, 3:] = float("-inf")
    index = stable_top_k(logits, 1)
    result = check_against_slow(index, logits.softmax(-1).gather(-1, index), logits, 2, overflow, None)
    assert (result.top_k_index < 3).all()


def test_weights_keep_their_gradient_and_dropped_ones_have_none():
    index, weights, logits = route(10, 4, 1, seed=0, skew=100.0)
    weights.requires_grad_()
    limit_to_capacity(index, weights, logits, 3).top_k_weights.sum().backward()
    assert weights.grad.flatten().tolist() == [1.0] * 3 + [0.0] * 7


@given(st.lists(st.integers(0, 5), max_size=40))
def test_position_in_expert(ids):
    expected = [ids[:i].count(expert) for i, expert in enumerate(ids)]
    assert position_in_expert(torch.tensor(ids, dtype=torch.int64), 5).tolist() == expected


def statistics(cosine=0.0, tokens=(25, 25, 25, 25), dropped=0):
    stats = torch.zeros(len(RouterStat), 4)
    stats[RouterStat.TOKENS] = torch.tensor(tokens, dtype=torch.float32)
    stats[RouterStat.COS_QUANTILE_SUM] = cosine * sum(tokens) / 4
    stats[RouterStat.DROPPED, 0] = dropped
    return stats


class TestRule:
    def rule(self, **overrides):
        rule = CapacityRule(tiny_config(**overrides))
        rule.reset_buffers(lambda buffer, value: buffer.copy_(value))
        return rule

    def test_dropless_never_limits(self):
        rule = self.rule(capacity_at_eval=True)
        assert rule.train().capacity(100) is None
        assert rule.eval().capacity(100) is None
        assert not rule.state_dict()

    def test_factor(self):
        rule = self.rule(capacity_mode="factor", expert_capacity_factor=1.25).train()
        assert rule.capacity(100) == 32  # ceil(100 * 1.25 / 4)
        assert rule.capacity(1) == 1
        assert rule.capacity(0) is None
        two = self.rule(capacity_mode="factor", expert_capacity_factor=1.25, num_experts_per_tok=2).train()
        assert two.capacity(100) == 63

    def test_a_generous_factor_asks_for_no_more_than_the_batch_has(self):
        assert self.rule(capacity_mode="factor", expert_capacity_factor=100.0).train().capacity(10) == 10

    def test_evaluation_is_dropless_unless_asked(self):
        factor = dict(capacity_mode="factor", expert_capacity_factor=1.0)
        assert self.rule(**factor).eval().capacity(100) is None
        assert self.rule(**factor, capacity_at_eval=True).eval().capacity(100) == 25


class TestCriticalCapacity:
    STEPS = 3

    def rule(self, **overrides):
        rule = CapacityRule(
            tiny_config(capacity_mode="critical", critical_capacity_steps=self.STEPS, hidden_size=1024, **overrides)
        )
        rule.reset_buffers(lambda buffer, value: buffer.copy_(value))
        return rule.train()

    def test_it_measures_then_limits(self):
        rule = self.rule()
        cosines = [0.05, 0.07, 0.09]
        for cosine in cosines:
            assert rule.measures_cosines
            assert rule.capacity(1000) is None
            rule.update_state(statistics(cosine))
        assert not rule.measures_cosines
        assert_close(rule.cos_angle, torch.tensor(0.07))
        bound = min_expert_capacity(rule.cos_angle, 1024, 4)
        assert rule.capacity(64) == critical_capacity(bound, 64, 4)
        assert 16 < rule.capacity(64) < 64
        assert rule.capacity(1000) == 250  # the mean load is above the bound
        before = rule.cos_angle.clone()
        rule.update_state(statistics(0.5))
        assert torch.equal(rule.cos_angle, before)

    def test_no_negative_cosine_and_no_empty_step_breaks_it(self):
        rule = self.rule()
        rule.update_state(statistics(tokens=(0, 0, 0, 0)))
        assert rule.steps == 0
        for _ in range(self.STEPS):
            rule.update_state(statistics(-0.2))
        assert rule.capacity(100) == 25

    def test_a_large_cosine_is_clamped_to_the_batch(self):
        rule = self.rule()
        for _ in range(self.STEPS):
            rule.update_state(statistics(0.9))
        assert rule.capacity(100) == 100

    def test_the_guard_raises_the_capacity_where_too_much_is_dropped(self):
        rule = self.rule(critical_max_drop_rate=0.05)
        for _ in range(self.STEPS):
            rule.update_state(statistics(0.0))
        skewed = (400, 300, 200, 100)
        rule.update_state(statistics(tokens=skewed, dropped=49))
        assert rule.capacity(1000) == 250
        rule.update_state(statistics(tokens=skewed, dropped=51))
        raised = rule.capacity(1000)
        assert sum(max(0, load - raised) for load in skewed) <= 0.01 * 1000
        rule.update_state(statistics(dropped=100))  # a balanced step asks for less: the capacity never goes back
        assert rule.capacity(1000) == raised

    def test_two_experts_a_token(self):
        rule = self.rule(num_experts_per_tok=2)
        for _ in range(self.STEPS):
            stats = statistics(tokens=(50, 50, 50, 50))
            stats[RouterStat.COS_QUANTILE_SUM] = 0.06 * 100 / 4  # 200 assignments are 100 tokens
            rule.update_state(stats)
        assert_close(rule.cos_angle, torch.tensor(0.06))
        assert rule.capacity(1000) == 500

    def test_saved_and_loaded(self, tmp_path):
        model = tiny_model(capacity_mode="critical", critical_capacity_steps=2)
        for step in range(2):
            model.update_router_state(torch.stack([statistics(0.2), statistics(0.3)]))
        capacities = [block.capacity_rule.train().capacity(40) for block in model.sparse_blocks]
        assert None not in capacities
        assert capacities[0] < capacities[1]
        model.save_pretrained(tmp_path)
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
        assert [block.capacity_rule.capacity(40) for block in loaded.sparse_blocks] == capacities
        fresh = tiny_model(capacity_mode="critical", critical_capacity_steps=2).train()
        assert [block.capacity_rule.capacity(40) for block in fresh.sparse_blocks] == [None, None]
        fresh.load_state_dict(model.state_dict())
        assert [block.capacity_rule.capacity(40) for block in fresh.sparse_blocks] == capacities

    def test_a_checkpoint_without_measurements_starts_measuring(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        model = LocMoeForCausalLM.from_pretrained(tmp_path, capacity_mode="critical").train()
        assert all(block.capacity_rule.measures_cosines for block in model.sparse_blocks)
        assert model(random_ids(), labels=random_ids()).loss.isfinite()

    def test_copies_and_pickles(self):
        rule = self.rule()
        for _ in range(self.STEPS):
            rule.update_state(statistics(0.07))
        for other in (copy.deepcopy(rule), pickle.loads(pickle.dumps(rule))):
            assert other.capacity(60) == rule.capacity(60)
            other.load_state_dict({**rule.state_dict(), "cos_angle": torch.tensor(0.5)})
            assert other.capacity(60) == 60
            assert rule.capacity(60) < 60

    def test_measured_over_training_steps_of_a_model(self):
        model = tiny_model(capacity_mode="critical", critical_capacity_steps=2, num_experts_per_tok=2).train()
        ids = random_ids(4, 16)
        for _ in range(2):
            outputs = model(ids, labels=ids)
            assert not outputs.router_stats[:, RouterStat.DROPPED].any()
            model.update_router_state(outputs.router_stats)
        for layer, block in enumerate(model.sparse_blocks):
            expected = outputs.router_stats[layer, RouterStat.COS_QUANTILE_SUM].sum() / 64
            assert_close(block.capacity_rule.cos_angle, expected)
            assert block.capacity_rule.capacity(64) is not None
        assert model(ids, labels=ids).loss.isfinite()


def test_wrong_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"`router_stats` has 1 layers and the model 2 MoE layers"):
        tiny_model().update_router_state(statistics()[None])
