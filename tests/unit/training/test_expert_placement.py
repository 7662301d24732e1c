# SPDX-License-Identifier: Apache-2.0
"""Which node and which rank gets which expert."""

import itertools

import numpy as np
import pytest

from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.training.expert_placement import expert_ranks, place_experts


def test_the_best_of_all_placements():
    draw = np.random.default_rng(0)
    for slots in ([3, 3], [2, 4]):
        mass = draw.integers(0, 50, (6, 2)).astype(float)
        placed = place_experts(mass, slots)
        kept = [mass[range(6), nodes].sum() for nodes in set(itertools.permutations(np.repeat([0, 1], slots)))]
        assert mass[range(6), placed].sum() == max(kept)
        assert np.bincount(placed).tolist() == slots


def test_nothing_moves_for_a_gain_below_the_least_and_without_statistics():
    current = np.array([0, 1, 0, 1])
    mass = np.array([[50.0, 50.0]] * 4)
    mass[0] = [49.0, 51.0]
    assert (place_experts(mass, 2, current) == current).all()
    assert (place_experts(np.zeros((4, 2)), 2, current) == current).all()


def test_experts_stay_on_their_rank_and_newcomers_even_the_load_out():
    topology = NodeTopology.from_ranks_per_node(2, 4).with_experts(8)  # E0 E1 | E2 E3 || E4 E5 | E6 E7
    node = np.array([1, 0, 1, 0, 0, 1, 0, 1])
    load = np.array([9.0, 5.0, 1.0, 1.0, 2.0, 1.0, 8.0, 6.0])
    # node 0 keeps E1 on rank 0 and E3 on rank 1; E6 goes to rank 1, which has less, E4 to what is left
    assert expert_ranks(node, load, topology) == (2, 0, 3, 1, 0, 2, 1, 3)
    assert expert_ranks(np.array([0, 0, 0, 0, 1, 1, 1, 1]), load, topology) == topology.expert_to_rank


@pytest.mark.parametrize("seed", range(5))
def test_every_rank_keeps_its_number_of_experts(seed):
    draw = np.random.default_rng(seed)
    topology = NodeTopology.from_ranks_per_node("4,2,2", 8).with_experts(16)
    node = draw.permutation(np.repeat([0, 1, 2], [8, 4, 4]))
    placed = expert_ranks(node, draw.random(16), topology)
    assert np.bincount(placed).tolist() == [2] * 8
    assert [topology.node_of_rank(rank) for rank in placed] == node.tolist()
