# SPDX-License-Identifier: Apache-2.0
"""The scope of router statistics in one process; over ranks: tests/distributed/test_router_losses.py."""

import dataclasses

import pytest
import torch

from hf_locmoe.distributed.router_scope import RouterScope
from hf_locmoe.moe.routing import RouterStat
from tests.tiny_models import random_ids, tiny_model
from tests.tolerances import assert_close


def test_one_process_has_its_own_sums_and_no_work():
    scope, sums = RouterScope(), torch.randn(2, 3, requires_grad=True)
    over_all, over_node = scope.reduce(sums)
    assert over_all is sums
    assert over_node is sums
    assert scope.num_ranks == 1
    assert scope.node_local_experts is None


def test_it_is_replaced_and_not_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RouterScope().num_nodes = 2


@pytest.mark.parametrize("scope", ["global", "micro_batch"])
def test_a_models_losses_are_means_over_layers_with_a_placement_each(scope):
    near = torch.tensor([[True, False, False, False], [False, False, True, True]])
    model = tiny_model(router_loss_scope=scope).train()
    ids = random_ids()
    stats = model(ids, labels=ids).router_stats
    both = []
    for layer in range(2):
        model.model.router_scope = RouterScope(node_local_experts=near[layer])
        both.append(model.router_losses(stats[layer : layer + 1]))
    model.model.router_scope = RouterScope(node_local_experts=near)
    aux, locality = model.router_losses(stats)
    assert_close(aux, (both[0][0] + both[1][0]) / 2)
    assert_close(locality, (both[0][1] + both[1][1]) / 2)
    assert locality > 0


def test_without_a_placement_the_locality_loss_is_exactly_zero():
    model, ids = tiny_model(locality_loss_coef=100.0).train(), random_ids()
    with_coefficient = model(ids, labels=ids)
    assert with_coefficient.locality_loss.item() == 0.0
    model.config.locality_loss_coef = 0.0
    assert torch.equal(model(ids, labels=ids).loss, with_coefficient.loss)


def test_statistics_may_be_sums_over_micro_batches():
    """The losses are functions of sums: of two micro-batches added up they are those of the whole batch."""
    model = tiny_model().train()
    ids = random_ids(4, 10)
    whole = model(ids).router_stats
    parts = model(ids[:2]).router_stats + model(ids[2:]).router_stats
    assert_close(parts[:, : RouterStat.ENTROPY_SUM], whole[:, : RouterStat.ENTROPY_SUM])
    assert_close(model.router_losses(parts), model.router_losses(whole))
