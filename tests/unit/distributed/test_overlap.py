# SPDX-License-Identifier: Apache-2.0
"""What "auto" decides, from sizes and rates alone, and the room that fixed shapes get."""

from __future__ import annotations

import pytest
import torch

from hf_locmoe.distributed.dispatch import Capacity, Peers
from hf_locmoe.distributed.expert_parallel import fixed_capacity
from hf_locmoe.distributed.overlap import CostModel, _copies_per_token
from hf_locmoe.distributed.topology import NodeTopology


def make_peers(ranks_per_node, num_ranks, rank=0):
    return Peers(NodeTopology.from_ranks_per_node(ranks_per_node, num_ranks).with_experts(num_ranks), rank, None)


def cost(latency_s=1e-5, node_local=1e10, remote=1e8, flops=1e12, overlap=1.0):
    return CostModel(latency_s, node_local, remote, flops, overlap)


# 4096 tokens of 4 KiB, half of them to other nodes: 0.17 s of transfer there and back at 1e8 bytes a second
SIZES = dict(num_tokens=4096, row_bytes=4096, num_top_k=1, peers=make_peers(2, 4))


def test_slices_where_transfer_and_computation_are_alike():
    assert cost().choose_slices(row_flops=4e7, **SIZES) == 4


def test_one_slice_where_there_is_little_to_hide():
    assert cost().choose_slices(row_flops=1e5, **SIZES) == 1  # nothing to hide the transfer under
    assert cost(remote=1e12, node_local=1e12).choose_slices(row_flops=4e7, **SIZES) == 1  # no transfer
    assert cost(latency_s=0.1).choose_slices(row_flops=4e7, **SIZES) == 1  # an exchange costs more than it hides
    assert cost(overlap=0.05).choose_slices(row_flops=4e7, **SIZES) == 1  # the two take each other's time
    assert cost().choose_slices(row_flops=4e7, **(SIZES | dict(num_tokens=0))) == 1


def test_the_slices_chosen_are_the_fastest_as_predicted():
    """0.168 s of transfer each way, 0.02 s of computation in forward and 0.04 s in backward, all of it hidden or half."""

    def predicted_s(num_slices, overlap):
        hidden_s = overlap * (1 - 1 / num_slices) * (0.02 + 0.04)
        return 2 * 0.168 + 3 * 0.02 - hidden_s + 8 * num_slices * 1e-3

    row_flops = 0.02e12 / 4096
    seconds = {num_slices: predicted_s(num_slices, 1.0) for num_slices in (1, 2, 3, 4)}
    assert min(seconds, key=seconds.get) == cost(latency_s=1e-3).choose_slices(row_flops=row_flops, **SIZES) == 3
    seconds = {num_slices: predicted_s(num_slices, 0.5) for num_slices in (1, 2, 3, 4)}
    # 2 would be the fastest, but not by enough
    assert min(seconds, key=seconds.get) == 2
    assert seconds[2] > 0.97 * seconds[1]
    assert cost(latency_s=1e-3, overlap=0.5).choose_slices(row_flops=row_flops, **SIZES) == 1


def test_more_latency_never_asks_for_more_slices():
    chosen = [cost(latency_s=latency_s).choose_slices(row_flops=4e7, **SIZES) for latency_s in (0, 1e-3, 1e-2, 1e-1)]
    assert chosen == sorted(chosen, reverse=True)
    assert len(set(chosen)) > 1


def test_fan_out_by_node_pays_on_slow_links_and_many_experts_only():
    peers = make_peers(4, 8)
    assert cost().choose_fan_out(4, peers) == "node"
    assert cost(remote=1e10).choose_fan_out(4, peers) == "rank"
    assert cost(node_local=1e8, remote=1e8).choose_fan_out(8, peers) == "rank"


@pytest.mark.parametrize("ranks_per_node, num_ranks", [(2, 4), (4, 8), (1, 4)])
@pytest.mark.parametrize("num_top_k", [1, 2, 4])
def test_expected_copies_agree_with_counting(ranks_per_node, num_ranks, num_top_k):
    peers = make_peers(ranks_per_node, num_ranks)
    generator = torch.Generator().manual_seed(0)
    owner = torch.randint(num_ranks, (20000, num_top_k), generator=generator)
    node = owner // ranks_per_node
    other_nodes = [n for n in range(num_ranks // ranks_per_node) if n != 0]
    remote_ranks = sum((owner == r).any(1).double().mean() for r in range(ranks_per_node, num_ranks))
    remote_nodes = sum((node == n).any(1).double().mean() for n in other_nodes)
    assert _copies_per_token(num_top_k, peers, "rank")[0] == pytest.approx(float(remote_ranks), rel=0.03)
    assert _copies_per_token(num_top_k, peers, "node")[0] == pytest.approx(float(remote_nodes), rel=0.03)


def test_every_rank_decides_alike_on_uneven_nodes():
    answers = {
        (
            cost().choose_fan_out(4, make_peers("3,1", 4, rank)),
            cost().choose_slices(4096, 4096, 2, 4e7, make_peers("3,1", 4, rank)),
        )
        for rank in range(4)
    }
    assert len(answers) == 1


def test_room_has_two_tiers():
    topology = NodeTopology.from_ranks_per_node(2, 8)
    # 800 assignments, uniform: 100 for every rank; a quarter stays on the node.
    assert fixed_capacity(800, 1.0, None, topology) == Capacity(node_local=100, remote=100)
    assert fixed_capacity(800, 1.25, 0.1, topology) == Capacity(node_local=450, remote=17)
    assert fixed_capacity(800, 100.0, None, topology) == Capacity(node_local=800, remote=800)
    assert fixed_capacity(800, 1.0, None, NodeTopology((0, 0))) == Capacity(node_local=400, remote=0)
