# SPDX-License-Identifier: Apache-2.0
"""Which routing a plan is for, which layout it recommends, and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import OlmoeConfig

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.layouts import ModelSize
from hf_locmoe.distributed.step_time import Machine
from hf_locmoe.distributed.step_traffic import Workload
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.plan.choice import make_plan, routing_of
from hf_locmoe.plan.table import format_plan


SIZE = ModelSize(10**8, 10**9, 8, 64, 1, 1024, num_layers=8)
MACHINE = Machine(1e14, 1e10, 1e11)


def plan(config=None, size=SIZE, nodes=4, tokens=4096, machine=MACHINE, **options):
    job = NodeTopology.from_ranks_per_node(8, 8 * nodes)
    return make_plan(config or OlmoeConfig(), size, job, machine, Workload(tokens), **options)


@pytest.mark.parametrize(
    "config, expected",
    [
        (OlmoeConfig(), "switch"),
        (LocMoeConfig(), "locmoe"),
        (LocMoeConfig(balance_bias_update_rate=0.01), "locmoe-balanced"),
        (LocMoeConfig(gate_type="hash"), "hash"),
        (LocMoeConfig(gate_type="switch"), "switch"),
    ],
)
def test_the_routing_is_the_configs(config, expected):
    assert routing_of(config) == expected
    assert plan(config).best.routing.name == expected


def test_a_given_share_is_locmoes_whatever_the_config_has():
    found = plan(OlmoeConfig(), local_share=0.8)
    assert (found.best.routing.name, found.best.routing.local_share) == ("locmoe", 0.8)
    assert plan(LocMoeConfig(balance_bias_update_rate=0.01), local_share=0.8).best.routing.name == "locmoe-balanced"


def test_few_tokens_spread_the_experts_many_keep_them_inside():
    assert plan(tokens=512).best.layout == "spread"
    assert plan(tokens=65536).best.layout == "replicated"
    turn = next(one for one in plan().break_evens if one.quantity == "tokens_per_rank").turns[0]
    assert (plan(tokens=round(turn[0] * 0.95)).best.layout, plan(tokens=round(turn[0] * 1.05)).best.layout) == (
        "spread",
        "replicated",
    )


def test_what_does_not_fit_is_not_recommended_and_said():
    free = plan(tokens=65536)
    needs = {step.layout: step.cost.bytes_memory for step in free.choices}
    tight = plan(tokens=65536, machine=replace(MACHINE, memory_bytes=needs["replicated"] - 1))
    assert tight.best.layout == "spread"
    assert "does not fit" in tight.reason
    nothing = plan(machine=replace(MACHINE, memory_bytes=1.0))
    assert nothing.best.layout == "sharded"
    assert "no layout fits" in nothing.reason
    assert nothing.warnings == ["No layout fits into 1 B a device: use more devices."]


def test_the_reason_says_by_what_the_others_are_slower():
    assert "more for weights and gradients" in plan(tokens=512).reason
    assert '"spread" takes' in plan(tokens=65536).reason
    assert "more for tokens" in plan(tokens=65536).reason
    assert plan(nodes=1).reason == "it is the only layout for these nodes."


def test_an_arrangement_that_cannot_be_built_is_shown_and_never_recommended():
    found = plan(size=replace(SIZE, num_experts=2), nodes=8)
    assert "one copy" in {step.layout for step in found.steps}
    assert "one copy" not in {step.layout for step in found.choices}
    assert "one copy" in format_plan(found)


def test_json_has_no_infinity():
    content = json.loads(plan().to_json(), parse_constant=lambda name: pytest.fail(name))
    assert content["machine"]["memory_bytes"] is None
    assert content["recommended"]["step_s"] == plan().best.step_s
    assert len(content["steps"]) == 12
