# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.distributed.cost_model import MEASURED_BYTES, PlanCost, PlanTable, measure


def table(**costs):
    return PlanTable({plan: PlanCost(*cost) for plan, cost in costs.items()})


def test_the_line_through_two_measurements():
    cost = PlanCost.fit({1000: 3e-3, 2000: 5e-3})
    assert cost.alpha_s == pytest.approx(1e-3)
    assert cost.beta_s_per_byte == pytest.approx(2e-6)
    assert cost.seconds(4000) == pytest.approx(9e-3)


def test_a_measurement_gone_wrong_gives_no_negative_cost():
    cost = PlanCost.fit({1000: 5e-3, 2000: 3e-3})
    assert cost.beta_s_per_byte == 0
    assert cost.seconds(10**9) == 5e-3


def test_few_messages_where_latency_counts_few_bytes_where_rate_does():
    plans = table(flat=(10e-3, 1e-9), two_level=(2e-3, 3e-9))
    assert plans.choose(1000) == "two_level"
    assert plans.choose(100_000_000) == "flat"


def test_sizes_that_differ_between_ranks_need_a_plan_that_always_wins():
    assert table(flat=(10e-3, 1e-9), two_level=(2e-3, 30e-9)).choose(None) == "flat"
    assert table(flat=(10e-3, 1e-9), two_level=(2e-3, 1e-9)).choose(None) == "two_level"


@given(
    flat=st.tuples(st.floats(1e-6, 1), st.floats(0, 1e-6)),
    other=st.tuples(st.floats(1e-6, 1), st.floats(0, 1e-6)),
    size=st.one_of(st.none(), st.integers(0, 10**9)),
)
def test_nothing_slower_than_flat_is_ever_chosen(flat, other, size):
    plans = table(flat=flat, two_level=other)
    if plans.choose(size) != "flat":
        for num_bytes in MEASURED_BYTES if size is None else (size,):
            assert plans.costs["two_level"].seconds(num_bytes) < plans.costs["flat"].seconds(num_bytes)


def test_what_is_handed_out_is_what_was_measured():
    plans = table(flat=(1.1e-3, 2.3e-9), tp_domain=(7e-4, 1e-9))
    assert PlanTable.from_json(plans.to_json()) == plans


def test_plans_are_measured_in_turn_flat_at_its_best_and_others_at_their_worst():
    calls = []

    def run(plan, num_bytes):
        calls.append(plan)
        slow_once = 100.0 if len(calls) in (5, 6) else 0.0
        return (1.0 if plan == "flat" else 0.5) + num_bytes * 1e-6 + slow_once

    seconds = measure(("flat", "two_level"), run)
    small, large = MEASURED_BYTES
    assert seconds["flat"] == {size: pytest.approx(1.0 + size * 1e-6) for size in MEASURED_BYTES}
    assert seconds["two_level"][small] == pytest.approx(100.5 + small * 1e-6)
    assert seconds["two_level"][large] == pytest.approx(0.5 + large * 1e-6)
    assert calls[:6] == ["flat", "two_level"] * 3
