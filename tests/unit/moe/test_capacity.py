# SPDX-License-Identifier: Apache-2.0
"""The capacity theorem against Monte Carlo, SciPy and printed values, and the rules against their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from hf_locmoe.moe.capacity import (
    CRITICAL_CONFIDENCE_FACTOR,
    capacity_for_drop_rate,
    critical_capacity,
    effective_capacity_factor,
    expert_capacity,
    min_expert_capacity,
    tail_probability,
)
from tests.tolerances import TOLERANCES


FLOAT64 = TOLERANCES[torch.float64]
NUM_SIGMAS = 4

cosines = st.floats(min_value=0.0, max_value=1.0)
widths = st.sampled_from([2, 3, 8, 64, 255, 768, 4096, 8192])


def scipy_tail_probability(cosine: torch.Tensor, hidden_size: int) -> torch.Tensor:
    """Eq. 8 through the complement I_{1 - x}(b, a), which keeps the digits of the far tail."""
    complement = (1 - cosine.double()) * (1 + cosine.double())
    return torch.as_tensor(special.betainc((hidden_size - 1) / 2, 0.5, complement.numpy()))


class TestTailProbability:
    @pytest.mark.parametrize("hidden_size", [2, 3, 4, 16, 61, 62, 64, 512, 768, 4096, 5120, 16384])
    def test_agrees_with_scipy_from_the_body_to_the_far_tail(self, hidden_size):
        whole = torch.linspace(0, 1, 401, dtype=torch.float64)
        around_the_seam = (torch.linspace(0, 8, 401, dtype=torch.float64) / math.sqrt(hidden_size)).clamp(max=1)
        cosine = torch.cat([whole, around_the_seam])
        expected = scipy_tail_probability(cosine, hidden_size)
        actual = tail_probability(cosine, hidden_size)
        normal = expected > 1e-290
        torch.testing.assert_close(actual[normal], expected[normal], rtol=FLOAT64["rtol"], atol=0)
        assert (actual[~normal] <= 1e-289).all()

    @pytest.mark.parametrize(("hidden_size", "cos_angle"), [(3, 0.5), (16, 0.25), (64, 0.125), (64, 0.3), (256, 0.1)])
    def test_monte_carlo_on_the_sphere(self, hidden_size, cos_angle):
        num_samples = 100_000
        generator = torch.Generator().manual_seed(hidden_size)
        tokens = torch.randn(num_samples, hidden_size, generator=generator)
        gate_weight = torch.randn(hidden_size, generator=generator)
        cosine = torch.nn.functional.cosine_similarity(tokens, gate_weight[None], dim=-1)
        expected = tail_probability(cos_angle, hidden_size).item()
        sigma = math.sqrt(expected * (1 - expected) / num_samples)
        measured = (cosine.abs() >= cos_angle).double().mean().item()
        assert abs(measured - expected) < NUM_SIGMAS * sigma
        one_sided = (cosine >= cos_angle).double().mean().item()
        assert abs(one_sided - expected / 2) < NUM_SIGMAS * sigma

    def test_on_a_circle_and_a_sphere_it_is_elementary(self):
        cosine = torch.linspace(0, 1, 51, dtype=torch.float64)
        torch.testing.assert_close(tail_probability(cosine, 2), 2 / math.pi * cosine.acos(), **FLOAT64)
        torch.testing.assert_close(tail_probability(cosine, 3), 1 - cosine, **FLOAT64)

    @pytest.mark.parametrize("hidden_size", [768, 4096, 5120])
    def test_paper_value_at_one_over_sqrt_d(self, hidden_size):
        assert tail_probability(1 / math.sqrt(hidden_size), hidden_size).item() == pytest.approx(0.3, abs=0.02)

    def test_ends_shape_and_dtype(self):
        assert tail_probability(0, 64).item() == 1 and tail_probability(1, 64).item() == 0
        cosine = torch.full((2, 3, 1), 0.5, dtype=torch.bfloat16, requires_grad=True)
        probability = tail_probability(cosine, 64)
        assert probability.shape == cosine.shape
        assert probability.dtype == torch.float64 and not probability.requires_grad
        assert tail_probability(torch.empty(0), 64).shape == (0,)

    @given(cosines, cosines, widths)
    @settings(max_examples=60, deadline=None)
    def test_falls_with_the_cosine_and_stays_a_probability(self, first, second, hidden_size):
        low, high = sorted([first, second])
        at_low, at_high = tail_probability(torch.tensor([low, high], dtype=torch.float64), hidden_size).tolist()
        assert 0 <= at_high <= at_low * (1 + 1e-11) <= 1 + 1e-10

    @pytest.mark.parametrize("cos_angle", [-1e-9, 1.0001, math.nan, math.inf])
    def test_cosine_outside_its_domain(self, cos_angle):
        with pytest.raises(ValueError, match="`cos_angle` must lie in"):
            tail_probability(torch.tensor([0.1, cos_angle]), 64)

    @pytest.mark.parametrize("hidden_size", [1, 0, -4])
    def test_width_outside_its_domain(self, hidden_size):
        with pytest.raises(ValueError, match=rf"`hidden_size` \({hidden_size}\)"):
            tail_probability(0.1, hidden_size)


class TestMinExpertCapacity:
    @pytest.mark.parametrize(
        ("cos_angle", "hidden_size", "tokens", "printed_to"),
        [(0.03, 5120, 1.97, 0.006), (0.03, 4096, 1.14, 0.005), (0.05, 4096, 46, 0.5), (0.07, 4096, 8560, 5)],
    )
    def test_values_for_16_experts(self, cos_angle, hidden_size, tokens, printed_to):
        assert min_expert_capacity(cos_angle, hidden_size, 16).item() == pytest.approx(tokens, abs=printed_to)

    @pytest.mark.parametrize("hidden_size", [512, 768, 1024, 4096, 8192])
    def test_large_width_forms_up_to_three_deviations(self, hidden_size):
        cosine = torch.linspace(0, 3, 61, dtype=torch.float64) / math.sqrt(hidden_size)
        exact = min_expert_capacity(cosine, hidden_size, 8)
        erfc_ratio = min_expert_capacity(cosine, hidden_size, 8, form="erfc") / exact
        assert erfc_ratio.min() >= 1 - 1e-10
        assert erfc_ratio.max() < (1.015 if hidden_size < 768 else 1.01)
        exp_ratio = min_expert_capacity(cosine, hidden_size, 8, form="exp") / exact
        assert exp_ratio.max() <= 1 + 1e-10
        assert 1 / 4.2 < exp_ratio[-1] < 1 / 4

    def test_forms_are_the_papers_equation(self):
        cosine, hidden_size, num_experts = torch.tensor([0.01, 0.03, 0.06], dtype=torch.float64), 4096, 16
        exponent = cosine**2 * hidden_size / (2 - cosine**2)
        for form, expected in {
            "exact": 1 / (num_experts * scipy_tail_probability(cosine, hidden_size)),
            "erfc": 1 / (num_experts * torch.as_tensor(special.erfc(exponent.sqrt().numpy()))),
            "exp": exponent.exp() / num_experts,
        }.items():
            actual = min_expert_capacity(cosine, hidden_size, num_experts, form=form)
            torch.testing.assert_close(actual, expected, **FLOAT64)

    @given(cosines, cosines, widths, st.integers(1, 64), st.sampled_from(["exact", "erfc", "exp"]))
    @settings(max_examples=60, deadline=None)
    def test_grows_with_the_cosine_and_shrinks_with_the_experts(self, first, second, hidden_size, num_experts, form):
        cosine = torch.tensor(sorted([first, second]), dtype=torch.float64)
        capacity = min_expert_capacity(cosine, hidden_size, num_experts, form=form)
        assert capacity[0] <= capacity[1] * (1 + 1e-11)
        assert not capacity.isnan().any()
        more_experts = min_expert_capacity(cosine, hidden_size, num_experts + 1, form=form)
        assert ((more_experts < capacity) | capacity.isinf()).all()

    def test_a_batch_of_that_many_tokens_holds_one_discriminative_token_per_expert(self):
        """Theorem 1 on the sphere: among 1 / p tokens one is expected in the caps of a gate weight."""
        hidden_size, num_experts, cos_angle, num_trials = 64, 4, 0.2, 400
        num_tokens = round(num_experts * min_expert_capacity(cos_angle, hidden_size, num_experts).item())
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(num_trials * num_tokens, hidden_size, generator=generator)
        gate_weights = torch.eye(num_experts).repeat_interleave(hidden_size // num_experts, dim=1)
        cosine = torch.nn.functional.normalize(tokens, dim=-1) @ torch.nn.functional.normalize(gate_weights, dim=-1).T
        reached = (cosine.abs() >= cos_angle).double().view(num_trials, num_tokens, num_experts).sum(1)
        expected = num_tokens * tail_probability(cos_angle, hidden_size).item()
        sigma = math.sqrt(expected / num_trials)
        assert ((reached.mean(0) - expected).abs() < NUM_SIGMAS * sigma).all()
        assert expected == pytest.approx(1, abs=0.5 / num_tokens * expected + 0.05)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match=r"`form` \('gauss'\)"):
            min_expert_capacity(0.1, 64, 8, form="gauss")
        with pytest.raises(ValueError, match=r"`num_experts` \(0\)"):
            min_expert_capacity(0.1, 64, 0)
        with pytest.raises(ValueError, match="`cos_angle`"):
            min_expert_capacity(-0.1, 64, 8)


class TestExpertCapacity:
    @pytest.mark.parametrize(
        ("num_tokens", "num_experts", "num_experts_per_tok", "factor", "expected"),
        [
            (1024, 8, 1, 1.0, 128),
            (1024, 8, 2, 1.25, 320),
            (1000, 10, 1, 1.1, 110),  # 110.00000000000001 in floating point
            (7, 4, 1, 1.0, 2),
            (1, 8, 1, 1.0, 1),
            (0, 8, 1, 1.0, 0),
            (16, 4, 2, 100.0, 16),  # no expert gets a token twice
        ],
    )
    def test_usual_rule(self, num_tokens, num_experts, num_experts_per_tok, factor, expected):
        assert expert_capacity(num_tokens, num_experts, num_experts_per_tok, factor) == expected

    @given(st.integers(1, 10_000), st.integers(1, 64), st.floats(0.01, 4), st.data())
    def test_inverse(self, num_tokens, num_experts, factor, data):
        num_experts_per_tok = data.draw(st.integers(1, num_experts))
        capacity = expert_capacity(num_tokens, num_experts, num_experts_per_tok, factor)
        mean_load = num_tokens * num_experts_per_tok / num_experts
        effective = effective_capacity_factor(capacity, num_tokens, num_experts, num_experts_per_tok)
        assert effective * mean_load == pytest.approx(capacity)
        assert effective <= factor + 1e-6 + 1 / mean_load
        assert effective >= factor - 1e-6 or capacity == num_tokens

    def test_symbolic_batch_compiles_to_one_graph(self):
        def empty_slots(hidden_states):
            return hidden_states.new_zeros(4, expert_capacity(hidden_states.shape[0], 4, 2, 1.1))

        compiled = torch.compile(empty_slots, fullgraph=True, dynamic=True, backend="eager")
        for num_tokens in (10, 1000, 7):
            assert compiled(torch.zeros(num_tokens, 3)).shape == (4, expert_capacity(num_tokens, 4, 2, 1.1))

    @pytest.mark.parametrize(
        ("arguments", "field"),
        [
            ((-1, 8, 1, 1.0), "num_tokens"),
            ((8, 0, 1, 1.0), "num_experts"),
            ((8, 4, 5, 1.0), "num_experts_per_tok"),
            ((8, 4, 0, 1.0), "num_experts_per_tok"),
            ((8, 4, 1, 0.0), "capacity_factor"),
            ((8, 4, 1, math.nan), "capacity_factor"),
            ((8, 4, 1, math.inf), "capacity_factor"),
        ],
    )
    def test_bad_arguments(self, arguments, field):
        with pytest.raises(ValueError, match=rf"^`{field}` \("):
            expert_capacity(*arguments)

    def test_no_tokens_have_no_factor(self):
        with pytest.raises(ValueError, match="`num_tokens`"):
            effective_capacity_factor(1, 0, 4)


class TestCapacityForDropRate:
    @staticmethod
    def by_search(shares: torch.Tensor, num_tokens: int, drop_rate: float, num_experts_per_tok: int = 1) -> int:
        """The rule as it is written, the least C found by bisection."""
        assignments, num_experts = num_tokens * num_experts_per_tok, shares.numel()
        low, high = 0.0, float(assignments)
        for _ in range(200):
            middle = (low + high) / 2
            overflow = (shares.double() * assignments - middle).clamp(min=0).sum().item()
            low, high = (low, middle) if overflow <= drop_rate * assignments else (middle, high)
        capacity = high * (1 + 2 * math.sqrt((num_experts - 1) / assignments))
        capacity = min(max(capacity, assignments / num_experts), 2 * assignments / num_experts)
        return min(num_tokens, 8 * math.ceil(math.ceil(capacity - 1e-4) / 8))

    @given(st.lists(st.floats(0.01, 1), min_size=1, max_size=16), st.integers(1, 20_000), st.floats(0, 0.3), st.data())
    @settings(deadline=None)
    def test_agrees_with_a_search(self, loads, num_tokens, drop_rate, data):
        shares = torch.tensor(loads, dtype=torch.float64) / sum(loads)
        num_experts_per_tok = data.draw(st.integers(1, len(loads)))
        expected = self.by_search(shares, num_tokens, drop_rate, num_experts_per_tok)
        actual = capacity_for_drop_rate(shares, num_tokens, drop_rate, num_experts_per_tok)
        assert abs(actual - expected) <= 8  # one step of the rounding, where the root falls on a multiple of 8
        assert actual == num_tokens or actual % 8 == 0
        assert actual >= min(num_tokens, num_tokens * num_experts_per_tok / len(loads))

    def test_printed_case(self):
        shares = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.03, 0.02])
        assert capacity_for_drop_rate(shares, 1024, 0.01) == 256  # the factor is clamped at 2
        near = torch.tensor([0.15, 0.14, 0.13, 0.13, 0.12, 0.12, 0.11, 0.10])
        # C_tau: (0.15 + 0.14 - 0.01) / 2 = 0.14 of 4096 = 573.44; margin 1 + 2 sqrt(7 / 4096) = 1.08268; 620.9 -> 624
        assert capacity_for_drop_rate(near, 4096, 0.01) == 624

    def test_measured_drops_keep_to_the_target_on_the_next_batches(self):
        generator = torch.Generator().manual_seed(3)
        shares = torch.tensor([0.18, 0.16, 0.14, 0.12, 0.11, 0.11, 0.10, 0.08])
        num_tokens, drop_rate = 4096, 0.05
        capacity = capacity_for_drop_rate(shares, num_tokens, drop_rate)
        assert capacity < num_tokens * 0.18
        counts = torch.stack(
            [torch.multinomial(shares, num_tokens, True, generator=generator).bincount(minlength=8) for _ in range(50)]
        )
        drops = (counts - capacity).clamp(min=0).sum() / counts.sum()
        assert 0 < drops <= drop_rate

    def test_degenerate_batches(self):
        assert capacity_for_drop_rate(torch.tensor([0.5, 0.5]), 0, 0.01) == 0
        assert capacity_for_drop_rate(torch.tensor([0.5, 0.5]), 1, 0.01) == 1
        assert capacity_for_drop_rate(torch.tensor([1.0]), 100, 0.0) == 100
        assert capacity_for_drop_rate(torch.tensor([1.0, 0.0, 0.0, 0.0]), 1024, 0.0) == 512

    @pytest.mark.parametrize(
        ("shares", "drop_rate", "message"),
        [
            ([0.5, 0.4], 0.01, "sum to 1"),
            ([1.5, -0.5], 0.01, "at least 0"),
            ([math.nan, 0.5], 0.01, "`load_shares`"),
            ([[0.5, 0.5]], 0.01, r"shape \(num_experts,\)"),
            ([0.5, 0.5], 1.0, r"`drop_rate` \(1.0\)"),
            ([0.5, 0.5], -0.1, r"`drop_rate` \(-0.1\)"),
        ],
    )
    def test_bad_arguments(self, shares, drop_rate, message):
        with pytest.raises(ValueError, match=message):
            capacity_for_drop_rate(torch.tensor(shares), 64, drop_rate)


class TestCriticalCapacity:
    def test_factor_is_the_confidence(self):
        assert CRITICAL_CONFIDENCE_FACTOR == pytest.approx(4.6, abs=0.01)
        probability = 1 / 50
        assert (1 - probability) ** (CRITICAL_CONFIDENCE_FACTOR / probability) <= 0.01

    @pytest.mark.parametrize(
        ("min_capacity", "num_tokens", "num_experts", "num_experts_per_tok", "expected"),
        [
            (1.97, 1024, 16, 1, 64),  # the mean load decides
            (45.7, 1024, 16, 1, 211),  # ceil(4.605 * 45.7): the bound decides
            (8559, 1024, 16, 1, 1024),  # the batch decides
            (math.inf, 1024, 16, 1, 1024),
            (0.0, 1024, 16, 2, 128),
            (1.0, 1, 16, 1, 1),
            (1.0, 0, 16, 1, 0),
            (0.0, 10, 4, 4, 10),
        ],
    )
    def test_rule(self, min_capacity, num_tokens, num_experts, num_experts_per_tok, expected):
        assert critical_capacity(min_capacity, num_tokens, num_experts, num_experts_per_tok) == expected
        as_tensor = torch.tensor(min_capacity, dtype=torch.float64)
        assert critical_capacity(as_tensor, num_tokens, num_experts, num_experts_per_tok) == expected

    @pytest.mark.parametrize("min_capacity", [-1.0, math.nan])
    def test_bad_bound(self, min_capacity):
        with pytest.raises(ValueError, match="`min_capacity`"):
            critical_capacity(min_capacity, 64, 8)
