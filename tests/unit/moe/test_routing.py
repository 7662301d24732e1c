# SPDX-License-Identifier: Apache-2.0
"""Choice of experts, groups, balance bias, and statistics against naive counting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.moe.baseline_gates import SwitchGate
from hf_locmoe.moe.gate import LocMoeGate
from hf_locmoe.moe.routing import (
    NUM_COSINE_SAMPLES,
    RouterStat,
    domain_mask,
    limit_groups,
    router_statistics,
    stable_top_k,
)
from tests.tiny_models import tiny_config, tiny_model
from tests.tolerances import assert_close


def make_gate(gate_class=LocMoeGate, **overrides):
    torch.manual_seed(0)
    gate = gate_class(tiny_config(**overrides), 3)
    gate.reset_buffers(lambda buffer, value: buffer.copy_(value))
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    return gate.eval()


class TestTopK:
    def test_ties_go_to_the_lower_expert(self):
        values = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 5.0, 0.0, 0.0]])
        assert stable_top_k(values, 1).tolist() == [[1], [0], [2]]
        assert stable_top_k(values, 3).tolist() == [[1, 2, 3], [0, 1, 2], [2, 0, 1]]

    @given(st.integers(1, 8), st.integers(0, 10_000))
    def test_agrees_with_sorted(self, k, seed):
        values = torch.randint(0, 4, (6, 8), generator=torch.Generator().manual_seed(seed)).float()
        expected = [sorted(range(8), key=lambda e: (-row[e], e))[:k] for row in values.tolist()]
        assert stable_top_k(values, k).tolist() == expected

    @pytest.mark.gpu
    @pytest.mark.parametrize("k", [1, 2, 5])
    def test_ties_are_broken_alike_on_every_device(self, k):
        values = torch.randint(0, 3, (5000, 64)).float()
        assert torch.equal(stable_top_k(values.cuda(), k).cpu(), stable_top_k(values, k))

    def test_an_expert_is_chosen_once(self):
        gate = make_gate(num_experts_per_tok=4)
        index = gate(torch.randn(50, 32))[2]
        assert all(sorted(row) == [0, 1, 2, 3] for row in index.tolist())


class TestWeights:
    def test_they_are_the_softmax_over_all_experts(self):
        gate = make_gate(num_experts_per_tok=2)
        logits, weights, index = gate(torch.randn(20, 32))
        assert_close(weights, logits.softmax(-1).gather(-1, index))

    def test_norm_topk_prob_makes_them_sum_to_one(self):
        gate = make_gate(num_experts_per_tok=3, norm_topk_prob=True)
        logits, weights, index = gate(torch.randn(20, 32))
        assert_close(weights.sum(-1), torch.ones(20))
        kept = logits.softmax(-1).gather(-1, index)
        assert_close(weights, kept / kept.sum(-1, keepdim=True))


class TestGroups:
    @given(
        groups=st.sampled_from([2, 3, 4, 6]),
        size=st.integers(1, 4),
        topk_group=st.integers(1, 3),
        data=st.data(),
    )
    def test_a_token_reaches_at_most_topk_group_groups(self, groups, size, topk_group, data):
        topk_group = min(topk_group, groups)
        k = data.draw(st.integers(1, topk_group * size))
        preference = torch.randn(30, groups * size, generator=torch.Generator().manual_seed(groups * size + k))
        limited = limit_groups(preference, groups, topk_group)
        index = stable_top_k(limited, k)
        assert torch.isfinite(limited.gather(-1, index)).all()
        reached = [len({expert // size for expert in row}) for row in index.tolist()]
        assert max(reached) <= topk_group

    def test_deepseeks_rule_scores_a_group_by_its_best_expert(self):
        preference = torch.tensor([[0.9, -5.0, 0.5, 0.5, 0.8, 0.7]])  # groups of two: best experts 0.9, 0.5, 0.8
        assert stable_top_k(limit_groups(preference, 3, 2), 3).tolist() == [[0, 4, 5]]

    def test_the_first_level_of_two_pools_over_the_larger_groups(self):
        gate = make_gate(num_experts=8, num_expert_groups=2, gate_affinity="mean")
        x = torch.randn(100, 32)
        larger = make_gate(num_experts=2, gate_affinity="mean")
        assert torch.equal(gate(x)[2] // 4, larger(x)[2])

    @pytest.mark.parametrize("gate_class", [LocMoeGate, SwitchGate])
    def test_domain_ids_choose_the_group(self, gate_class):
        gate = make_gate(gate_class, num_experts=8, num_expert_groups=4, num_experts_per_tok=2)
        domain_ids = torch.randint(0, 4, (50,))
        logits, weights, index = gate(torch.randn(50, 32), None, domain_ids)
        assert torch.equal(index // 2, domain_ids[:, None].expand(50, 2))
        assert_close(weights.sum(-1), torch.ones(50))
        inside = domain_mask(domain_ids, 8, 4)
        assert torch.isneginf(logits[~inside]).all()
        assert torch.isfinite(logits[inside]).all()

    def test_domain_ids_mean_nothing_with_one_group(self):
        gate, x = make_gate(), torch.randn(10, 32)
        assert torch.equal(gate(x, None, torch.zeros(10, dtype=torch.int64))[0], gate(x)[0])

    def test_more_experts_a_token_than_a_domain_has_is_refused(self):
        gate = make_gate(num_experts=8, num_expert_groups=4, topk_group=2, num_experts_per_tok=3)
        assert gate(torch.randn(5, 32))[2].shape == (5, 3)
        with pytest.raises(ValueError, match=r"`num_experts_per_tok` \(3\).*`domain_ids`.*`num_expert_groups`"):
            gate(torch.randn(5, 32), None, torch.zeros(5, dtype=torch.int64))


class TestBalanceBias:
    def test_it_chooses_and_does_not_weigh(self):
        gate, x = make_gate(balance_bias_update_rate=0.1), torch.randn(40, 32)
        plain = gate(x)
        gate.e_score_correction_bias[2] = 100.0
        logits, weights, index = gate(x)
        assert torch.equal(logits, plain[0])
        assert (index == 2).all()
        assert_close(weights, logits.softmax(-1)[:, 2:3])

    def test_repeated_updates_cut_the_loads_spread(self):
        gate = make_gate(num_experts=8, hidden_size=64, balance_bias_update_rate=0.02)
        generator = torch.Generator().manual_seed(0)
        common = 0.5 * torch.randn(64, generator=generator)

        def load():
            tokens = common + torch.randn(2048, 64, generator=generator)
            return gate(tokens)[2].flatten().bincount(minlength=8).float()

        def spread():
            counts = sum(load() for _ in range(4))
            return (counts.std(correction=0) / counts.mean()).item()

        before = spread()
        for _ in range(120):
            gate.update_state(load())
        assert before > 0.3
        assert spread() < before / 4

    def test_it_does_not_drift(self):
        gate = make_gate(balance_bias_update_rate=0.5)
        for _ in range(10):
            gate.update_state(torch.tensor([9.0, 1.0, 1.0, 1.0]))
        assert_close(gate.e_score_correction_bias.sum(), torch.tensor(0.0))
        assert gate.e_score_correction_bias[0] < gate.e_score_correction_bias[1]

    def test_zero_rate_leaves_it_alone(self):
        gate = make_gate()
        gate.update_state(torch.tensor([9.0, 1.0, 1.0, 1.0]))
        assert not gate.e_score_correction_bias.any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_is_saved_and_loaded_in_float32(self, tmp_path, dtype):
        model = tiny_model(balance_bias_update_rate=0.01)
        for block in model.sparse_blocks:
            block.gate.e_score_correction_bias.copy_(torch.tensor([0.1234567, -0.01, 0.02, -0.1334567]))
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
        for block, other in zip(model.sparse_blocks, loaded.sparse_blocks, strict=True):
            assert torch.equal(block.gate.e_score_correction_bias, other.gate.e_score_correction_bias)


class TestNonFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_the_check_stops_with_the_layers_number_and_the_way_out(self, value):
        gate = make_gate(router_check_finite=True)
        x = torch.randn(4, 32)
        gate(x)
        x[2, 5] = value
        with pytest.raises(ValueError, match=r"layer 3 .*NaN or infinite.*`router_check_finite"):
            gate(x)

    def test_without_the_check_nothing_is_raised(self):
        x = torch.full((4, 32), float("nan"))
        make_gate()(x)


def naive_statistics(logits, index, mask, cosines, dropped=None, rerouted=None, stride=1):
    num_tokens, num_experts = logits.shape
    rows = torch.zeros(len(RouterStat), num_experts, dtype=torch.float64)
    counted, sampled = 0, []
    for token in range(num_tokens):
        if not mask[token]:
            continue
        counted += 1
        probability = logits[token].double().softmax(-1)
        rows[RouterStat.PROB_SUM] += probability
        first = index[token, 0]
        rows[RouterStat.ENTROPY_SUM, first] -= sum(p * math.log(p) for p in probability.tolist() if p > 0)
        if token % stride == 0:
            sampled.append((first, cosines[token, first].double()))
        for slot, expert in enumerate(index[token]):
            rows[RouterStat.TOKENS, expert] += 1
            if dropped is not None:
                rows[RouterStat.DROPPED, expert] += dropped[token, slot]
                rows[RouterStat.REROUTED, expert] += rerouted[token, slot]
    for first, cosine in sampled:
        rows[RouterStat.COS_SUM, first] += cosine * counted / len(sampled)
    quantile = torch.stack([cosine for _, cosine in sampled]).quantile(0.75)
    rows[RouterStat.COS_QUANTILE_SUM] = quantile * counted / num_experts
    return rows


class TestStatistics:
    @pytest.mark.parametrize("k", [1, 3])
    @pytest.mark.parametrize("padded", [False, True])
    def test_against_naive_counting(self, k, padded):
        gate = make_gate(num_experts=5, num_experts_per_tok=k)
        x = torch.randn(70, 32)
        logits, _, index = gate(x)
        mask = torch.rand(70) > 0.3 if padded else torch.ones(70, dtype=torch.bool)
        dropped, rerouted = torch.rand(70, k) > 0.7, torch.rand(70, k) > 0.8
        actual = router_statistics(gate, x, logits, index, mask if padded else None, dropped, rerouted, 0.75)
        expected = naive_statistics(logits, index, mask, gate.cosines(x), dropped, rerouted)
        assert actual.dtype == torch.float32
        assert_close(actual, expected, torch.float32)

    @pytest.mark.parametrize("gate_class", [LocMoeGate, SwitchGate])
    def test_autocast_changes_nothing(self, gate_class):
        gate = make_gate(gate_class, gate_rotation=gate_class is LocMoeGate)
        x = torch.randn(900, 32)
        logits, _, index = gate(x)
        mask = torch.arange(900) < 700
        plain = router_statistics(gate, x, logits, index, mask, cos_quantile=0.5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(router_statistics(gate, x, logits, index, mask, cos_quantile=0.5), plain)

    def test_long_batches_sample_their_cosines(self):
        gate = make_gate()
        x = torch.randn(2 * NUM_COSINE_SAMPLES + 10, 32)
        logits, _, index = gate(x)
        mask = torch.ones(len(x), dtype=torch.bool)
        expected = naive_statistics(logits, index, mask, gate.cosines(x), stride=3)
        actual = router_statistics(gate, x, logits, index, None, cos_quantile=0.75)
        assert_close(actual, expected, torch.float32)

    def test_without_a_quantile_its_row_is_zero(self):
        gate, x = make_gate(), torch.randn(10, 32)
        logits, _, index = gate(x)
        assert not router_statistics(gate, x, logits, index, None)[RouterStat.COS_QUANTILE_SUM].any()

    @pytest.mark.parametrize("num_tokens", [0, 3])
    def test_no_token_counts(self, num_tokens):
        gate, x = make_gate(), torch.randn(num_tokens, 32)
        logits, _, index = gate(x)
        mask = torch.zeros(num_tokens, dtype=torch.bool)
        assert not router_statistics(gate, x, logits, index, mask, cos_quantile=0.5).any()

    def test_padding_is_as_though_it_were_not_there(self):
        gate, x = make_gate(), torch.randn(6, 32)
        logits, _, index = gate(x)
        whole = router_statistics(gate, x[:4], logits[:4], index[:4], None)
        mask = torch.tensor([True] * 4 + [False] * 2)
        assert_close(router_statistics(gate, x, logits, index, mask), whole)

    def test_only_the_probabilities_carry_a_gradient(self):
        gate, x = make_gate(), torch.randn(10, 32, requires_grad=True)
        logits, _, index = gate(x)
        stats = router_statistics(gate, x, logits, index, None, cos_quantile=0.5)
        (grad,) = torch.autograd.grad(stats[RouterStat.PROB_SUM, 0], x, retain_graph=True)
        assert grad.abs().sum() > 0
        rest = torch.cat([stats[: RouterStat.PROB_SUM], stats[RouterStat.PROB_SUM + 1 :]])
        (grad,) = torch.autograd.grad(rest.sum(), x)
        assert not grad.any()
