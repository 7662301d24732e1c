# SPDX-License-Identifier: Apache-2.0
"""The plans with all their ranks played in one process, against the plain definition of an all-to-all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_locmoe.distributed.exchange_plans import Exchange, domain_plan, two_level_plan
from hf_locmoe.distributed.topology import NodeTopology


def play(plans, members):
    """
    Runs the plans of all ranks in step.

    Args:
        plans: one generator per rank.
        members: `members(rank, where)` -> ranks of that exchange, in their order.

    Returns:
        One list of the exchanges that were made per rank.
    """
    made = [[] for _ in plans]
    while True:
        steps = [next(plan, None) for plan in plans]
        if all(step is None for step in steps):
            return made
        assert all(isinstance(step, Exchange) for step in steps), "ranks made different numbers of exchanges"
        assert len({step.where for step in steps}) == 1, "ranks are at different exchanges"
        for rank, step in enumerate(steps):
            made[rank].append(step)
            peers = members(rank, step.where)
            place = peers.index(rank)
            if step.gather:
                step.receive.copy_(torch.cat([steps[peer].send for peer in peers]))
                continue
            parts = []
            for position, peer in enumerate(peers):
                sent = steps[peer]
                counts = sent.send_counts or [sent.send.shape[0] // len(peers)] * len(peers)
                part = sent.send.split(counts)[place]
                if step.receive_counts:
                    assert part.shape[0] == step.receive_counts[position], f"rank {rank} does not get what it expects"
                parts.append(part)
            step.receive.copy_(torch.cat(parts))


def node_members(topology):
    nodes = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]

    def members(rank, where):
        node = nodes[topology.node_of_rank(rank)]
        if where == "node":
            return list(node)
        assert where == "across"
        return [ranks[node.index(rank)] for ranks in nodes]

    return members


def rows_of(rank, counts):
    """What a rank sends: every row tells its sender and its place there."""
    return rank * 10_000 + torch.arange(sum(counts[rank]), dtype=torch.float64).unsqueeze(1)


def definition(counts, rank):
    """What a rank gets, by the definition of an all-to-all."""
    parts = []
    for source, row in enumerate(counts):
        start = source * 10_000 + sum(row[:rank])
        parts.append(torch.arange(start, start + row[rank], dtype=torch.float64))
    return torch.cat(parts).unsqueeze(1)


def empty_output(rank, counts):
    return torch.full((sum(row[rank] for row in counts), 1), -1.0, dtype=torch.float64)


def run_two_level(topology, counts, even):
    num_ranks = topology.num_ranks
    outputs, plans = [], []
    for rank in range(num_ranks):
        outputs.append(empty_output(rank, counts))
        splits = (None, None) if even else ([row[rank] for row in counts], counts[rank])
        plans.append(two_level_plan(topology, rank, outputs[rank], rows_of(rank, counts), *splits))
    made = play(plans, node_members(topology))
    for rank in range(num_ranks):
        assert torch.equal(outputs[rank], definition(counts, rank))
    return made


@settings(max_examples=40)
@given(data=st.data(), num_nodes=st.integers(1, 4), node_size=st.integers(1, 4))
def test_two_level_moves_every_row_home(data, num_nodes, node_size):
    ranks = data.draw(st.permutations(range(num_nodes * node_size)))
    topology = NodeTopology(rank_to_node=[rank % num_nodes for rank in ranks])
    row = st.lists(st.integers(0, 3), min_size=topology.num_ranks, max_size=topology.num_ranks)
    counts = data.draw(st.lists(row, min_size=topology.num_ranks, max_size=topology.num_ranks))
    run_two_level(topology, counts, even=False)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_two_level_with_equal_splits_needs_no_metadata(rows):
    topology = NodeTopology(rank_to_node=(0, 1, 0, 1, 1, 0))
    made = run_two_level(topology, [[rows] * 6] * 6, even=True)
    assert [step.where for step in made[0]] == ["node", "across"]


@pytest.mark.parametrize("even", [True, False])
def test_two_level_on_256_ranks(even):
    topology = NodeTopology.from_ranks_per_node(8, num_ranks=256)
    generator = torch.Generator().manual_seed(0)
    counts = [[1] * 256] * 256 if even else torch.randint(0, 3, (256, 256), generator=generator).tolist()
    made = run_two_level(topology, counts, even)
    # messages between nodes: one per other node, where the flat exchange sends one per rank there
    across = [step for step in made[0] if step.where == "across"]
    assert len(across) == 1
    assert len(across[0].send_counts) == 32


@settings(max_examples=40)
@given(data=st.data(), domain_size=st.integers(1, 4), num_ranks=st.integers(1, 5), even=st.booleans())
def test_a_domain_gets_everything_and_sends_it_once(data, domain_size, num_ranks, even):
    """Ranks (d, r): place d in its domain, place r in its group. All d hold the same tokens."""
    row = st.lists(st.integers(0, 5), min_size=num_ranks, max_size=num_ranks)
    counts = data.draw(st.lists(row, min_size=num_ranks, max_size=num_ranks))
    if even:
        counts = [[data.draw(st.integers(0, 5))] * num_ranks] * num_ranks
    outputs, plans = [], []
    for domain_rank in range(domain_size):
        for rank in range(num_ranks):
            outputs.append(empty_output(rank, counts))
            splits = (None, None) if even else ([row[rank] for row in counts], counts[rank])
            source = rows_of(rank, counts)
            plans.append(domain_plan(domain_size, domain_rank, num_ranks, outputs[-1], source, *splits))

    def members(rank, where):
        if where == "group":
            first = rank // num_ranks * num_ranks
            return list(range(first, first + num_ranks))
        assert where == "domain"
        return list(range(rank % num_ranks, domain_size * num_ranks, num_ranks))

    made = play(plans, members)
    for position, output in enumerate(outputs):
        assert torch.equal(output, definition(counts, position % num_ranks))
    sent = sum(step.send.shape[0] for steps in made for step in steps if step.where == "group")
    assert sent == sum(map(sum, counts))
