# SPDX-License-Identifier: Apache-2.0
"""What the hooks keep of training and evaluation forwards, and that they go away."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from hf_locmoe.training.output_tap import OutputTap


class _Routing(nn.Module):
    """Returns its input as statistics, in training or when asked."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.config = type("Config", (), {"output_router_stats": None})()

    def forward(self, values, output_router_stats=None):
        stats = values * self.weight if (self.training or output_router_stats) else None
        return ModelOutput(last_hidden_state=values, **({} if stats is None else {"router_stats": stats}))


class _Owner:
    pass


@pytest.fixture
def tapped():
    model, owner = _Routing(), _Owner()
    tap = OutputTap(("router_stats", "absent"), in_evaluation=True)
    tap.attach(model, owner)
    return model, tap, owner


def test_training_forwards_add_up_without_their_graph(tapped):
    model, tap, _ = tapped
    for value in (1.0, 2.0):
        model(torch.full((3,), value))
    kept, num_forwards = tap.take_training()
    assert (kept["router_stats"].tolist(), num_forwards) == ([3.0] * 3, 2)
    assert not kept["router_stats"].requires_grad
    assert list(kept) == ["router_stats"]
    assert tap.take_training() == ({}, 0)


def test_a_training_forward_without_gradient_is_no_step(tapped):
    model, tap, _ = tapped
    with torch.no_grad():
        model(torch.ones(3))
    assert tap.take_training() == ({}, 0)


def test_of_evaluation_the_newest_counts_and_training_knows_nothing_of_it(tapped):
    model, tap, _ = tapped
    model.eval()
    for value in (1.0, 2.0):
        output = model(torch.full((3,), value))
    assert "router_stats" not in output
    assert tap.take_evaluation()["router_stats"].tolist() == [2.0] * 3
    assert tap.take_evaluation() == {}
    assert tap.take_training() == ({}, 0)


@pytest.mark.parametrize("by_config", [False, True])
def test_what_the_caller_asked_for_stays_in_the_output(tapped, by_config):
    model, tap, _ = tapped
    model.eval()
    model.config.output_router_stats = True if by_config else None
    output = model(torch.ones(3), output_router_stats=True)
    assert output["router_stats"] is not None
    assert tap.take_evaluation()["router_stats"].tolist() == [1.0] * 3


def test_every_tap_sees_the_evaluation(tapped):
    model, tap, _ = tapped
    other_owner, other = _Owner(), OutputTap(("router_stats",), in_evaluation=True)
    other.attach(model, other_owner)
    output = model.eval()(torch.ones(3))
    assert "router_stats" not in output
    assert tap.take_evaluation().keys() == other.take_evaluation().keys() == {"router_stats"}


def test_a_training_tap_asks_nothing_of_evaluation():
    model, owner = _Routing(), _Owner()
    tap = OutputTap(("router_stats",), in_evaluation=False)
    tap.attach(model, owner)
    model.eval()(torch.ones(3))
    assert len(model._forward_pre_hooks) == 0
    assert tap.take_evaluation() == {}


def test_hooks_go_with_their_owner():
    model, owner = _Routing(), _Owner()
    OutputTap(("router_stats",), in_evaluation=True).attach(model, owner)
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    del owner
    gc.collect()
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0


def test_a_hooked_model_can_be_copied_and_pickled(tapped):
    model, _, _ = tapped
    copy.deepcopy(model)(torch.ones(3))
    tap = OutputTap(("router_stats",), in_evaluation=True)
    assert pickle.loads(pickle.dumps(tap)).names == ("router_stats",)
