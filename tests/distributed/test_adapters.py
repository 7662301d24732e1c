# SPDX-License-Identifier: Apache-2.0
"""
LoRA of attention and of experts on a model that is spread: the gradients, the training and the files of one process, in every
layout.
"""

from __future__ import annotations

import functools

import pytest
import torch

from hf_locmoe.distributed.expert_move import move_experts, placements_of
from hf_locmoe.distributed.layouts import LAYOUTS
from tests.distributed.adapter_runs import (
    TARGETS,
    compare_gradients,
    lora_config,
    losses_of_training,
    whole,
    with_lora,
)
from tests.distributed.test_accelerator import prepared, train
from tests.harness import run_ranks
from tests.tolerances import assert_close


peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.multiprocess

TWO_BY_TWO = {"LOCMOE_RANKS_PER_NODE": "2"}
ONE_EACH = {"LOCMOE_RANKS_PER_NODE": "1"}


# ---- training -------------------------------------------------------------------------------------------------------


def train_in(layouts, target):
    return [train(wrap=functools.partial(with_lora, target=target), layout=layout) for layout in layouts]


@pytest.mark.parametrize(
    ("world", "target"),
    [
        (4, "both"),
        pytest.param(2, "both", marks=pytest.mark.slow),
        pytest.param(4, "attention", marks=pytest.mark.slow),
        pytest.param(4, "experts", marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_as_one_process(world, target):
    [(alone, weights)] = run_ranks(train_in, 1, ["sharded"], target)[0]
    runs = run_ranks(train_in, world, LAYOUTS, target, env={"LOCMOE_RANKS_PER_NODE": str(world // 2)})[0]
    for steps, trained in runs:
        assert_close(steps, alone, torch.float32)
        assert trained.keys() == {name for name in weights if "lora_" in name}
        # Adam's first steps are the sign of the gradient, whatever its size: rounding shows in weights of no consequence
        assert all((weight - weights[name]).abs().mean() < 1e-4 for name, weight in trained.items())


SLICED, ROOMY = dict(slices="2"), dict(slices="2", capacity_factor=8.0, max_tokens_per_rank=40)
VARIANTS = [
    dict(layout="spread", plugin=SLICED, checkpointing=False),
    dict(layout="sharded", plugin=dict(ep_size=2)),  # copies of an expert that shard it among each other
    dict(layout="replicated", tp_size=2),
    dict(layout="spread", plugin=ROOMY, target="experts", checkpointing=False),
]
MORE_VARIANTS = [
    *(dict(layout=layout, checkpointing=kind) for layout in LAYOUTS for kind in (False, True)),
    *(dict(layout=layout, plugin=SLICED, target=target) for layout in LAYOUTS for target in TARGETS),
    *(dict(layout=layout, plugin=dict(ep_size=2), target="experts") for layout in LAYOUTS),
    *(dict(layout=layout, tp_size=2, target=target) for layout in LAYOUTS for target in TARGETS),
    dict(layout="spread", tp_size=2, plugin=SLICED, checkpointing=False),
    *(dict(layout=layout, plugin=ROOMY, checkpointing=kind) for layout in LAYOUTS for kind in (None, True)),
]


@pytest.mark.parametrize(
    ("family", "variants"),
    [
        ("locmoe", VARIANTS),
        *(
            pytest.param(family, VARIANTS + MORE_VARIANTS, marks=pytest.mark.slow, id=f"{family}-all")
            for family in ("locmoe", "gated", "olmoe", "mixtral", "qwen3_moe")
        ),
    ],
)
def test_gradients_are_those_of_one_process(family, variants):
    compare_gradients(4, [dict(run, family=family) for run in variants])


@pytest.mark.slow
@pytest.mark.many_ranks
@pytest.mark.parametrize("ranks_per_node", ["4", "2"])
def test_gradients_on_eight_ranks(ranks_per_node):
    """Copies of an expert on every node, shards of one within a node and over nodes, and eight ranks with one expert each."""
    choices = dict(), dict(plugin=dict(ep_size=2)), dict(tp_size=2), dict(plugin=SLICED, checkpointing=False)
    runs = [dict(layout=layout, **choice) for layout in LAYOUTS for choice in choices]
    compare_gradients(8, runs, ranks_per_node, num_experts=8, batch=8)


def first_values():
    """Of adapters as PEFT initialises them, with the random numbers that building the model has left."""
    accelerator, model, *_ = prepared(
        wrap=lambda model: peft.get_peft_model(model, lora_config(model, "both", init_lora_weights=True))
    )
    inner = accelerator.unwrap_model(model)
    return {name: whole(value) for name, value in inner.named_parameters() if "lora_" in name}


def test_adapters_begin_as_on_one_process():
    alone = run_ranks(first_values, 1)[0]
    for values in run_ranks(first_values, 2, env=ONE_EACH):
        assert values.keys() == alone.keys()
        assert all(torch.equal(value, alone[name]) for name, value in values.items())


def train_while_experts_move(moves):
    accelerator, model, optimizer, loader = prepared(wrap=with_lora, layout="spread")
    draw, losses = torch.Generator().manual_seed(3), []
    for loss in losses_of_training(accelerator, model, optimizer, loader):
        losses.append(loss)
        if moves and accelerator.sync_gradients:
            tables = [
                tuple(table[expert] for expert in torch.randperm(4, generator=draw).tolist())
                for table in placements_of(model)
            ]
            move_experts(model, tables, optimizer)
    return losses


@pytest.mark.slow
def test_adapted_experts_may_move():
    stays = run_ranks(train_while_experts_move, 4, False, env=TWO_BY_TWO)[0]
    moves = run_ranks(train_while_experts_move, 4, True, env=TWO_BY_TWO)[0]
    assert_close(moves, stays, torch.float32)
