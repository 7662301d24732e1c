# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.cli import main
from hf_locmoe.distributed.topology import NodeTopology, contiguous_placement, format_topology


def test_even_nodes_by_hand():
    topology = NodeTopology.from_ranks_per_node(2, num_ranks=6)
    assert topology.rank_to_node == (0, 0, 1, 1, 2, 2)
    assert topology.num_nodes == 3
    assert topology.node_of_rank(3) == 1
    assert topology.ranks_of_node(2) == (4, 5)
    assert topology.is_rectangular
    assert topology.same_node(3) == (False, False, True, True, False, False)


@pytest.mark.parametrize("sizes", ["4,2,2", (4, 2, 2)])
def test_uneven_nodes_by_hand(sizes):
    topology = NodeTopology.from_ranks_per_node(sizes, num_ranks=8)
    assert topology.node_sizes == (4, 2, 2)
    assert not topology.is_rectangular
    assert topology.ranks_of_node(1) == (4, 5)


def test_a_job_smaller_than_one_node_sits_on_one():
    assert NodeTopology.from_ranks_per_node(8, num_ranks=2).rank_to_node == (0, 0)


@pytest.mark.parametrize(
    "sizes, num_ranks, words",
    [
        (3, 8, r"`ranks_per_node` \(3\) must divide the number of ranks \(8\)"),
        ("4,2", 8, r"`ranks_per_node` \(4,2\) adds up to 6 ranks and must add up to the number of ranks \(8\)"),
        ("4,x", 8, r"`ranks_per_node` \(4,x\) must be a positive number of ranks"),
        (0, 8, r"`ranks_per_node` \(0\) must be a positive number"),
    ],
)
def test_wrong_sizes_are_named(sizes, num_ranks, words):
    with pytest.raises(ValueError, match=words):
        NodeTopology.from_ranks_per_node(sizes, num_ranks=num_ranks)


def test_nodes_are_numbered_by_appearance():
    topology = NodeTopology(rank_to_node=(7, 3, 7, 3))
    assert topology.rank_to_node == (0, 1, 0, 1)
    assert topology.ranks_of_node(0) == (0, 2)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"rank_to_node": ()}, "`rank_to_node`"),
        ({"rank_to_node": (0, 1), "node_names": ("a",)}, "`node_names`"),
        ({"rank_to_node": (0, 1), "global_ranks": (3, 3)}, "`global_ranks`"),
        ({"rank_to_node": (0, 1), "expert_to_rank": (0, 2)}, r"`expert_to_rank` places experts on ranks \[2\]"),
    ],
)
def test_inconsistent_tables_are_named(fields, words):
    with pytest.raises(ValueError, match=words):
        NodeTopology(**fields)


class FakeStore(dict):
    def set(self, key, value):
        self[key] = value.encode()

    def get(self, key):
        return self[key]


def test_asking_the_hosts():
    store = FakeStore()
    keys = ["host:b1/1:alpha", "host:b2/1:beta", "host:b1/1:alpha"]
    for rank in (1, 2):
        store.set(f"locmoe/node/{rank}", keys[rank])
    topology = NodeTopology.from_store(store, 0, 3, key=keys[0])
    assert topology.rank_to_node == (0, 1, 0)
    assert topology.describe_rank(1) == "rank 1 (node beta)"


def test_subset_keeps_names_and_global_ranks():
    topology = NodeTopology.from_ranks_per_node(2, num_ranks=6).with_experts(6).subset((5, 2, 3))
    assert topology.rank_to_node == (0, 1, 1)
    assert topology.global_ranks == (5, 2, 3)
    assert topology.describe_rank(0) == "rank 5 (node 2)"
    assert topology.num_experts == 0
    assert topology.subset((2, 0)).global_ranks == (3, 5)
    with pytest.raises(ValueError, match="`ranks`"):
        topology.subset((0, 3))


def test_experts_of_ranks_and_nodes():
    topology = NodeTopology.from_ranks_per_node(2, num_ranks=4).with_experts(8)
    assert topology.experts_of_rank(1) == (2, 3)
    assert topology.experts_of_node(1) == (4, 5, 6, 7)
    assert topology.node_local_experts(3) == (False,) * 4 + (True,) * 4


def test_a_permuted_placement():
    topology = NodeTopology.from_ranks_per_node(1, num_ranks=2).with_experts(4, placement=(1, 0, 0, 1))
    assert topology.experts_of_rank(0) == (1, 2)
    assert topology.node_local_experts(0) == (False, True, True, False)


def test_experts_that_do_not_divide():
    topology = NodeTopology.from_ranks_per_node(2, num_ranks=4)
    with pytest.raises(ValueError, match=r"`num_experts` \(10\).*4 ranks.*2 to 3.*set `num_experts` to 8 or 12"):
        topology.with_experts(10)
    with pytest.raises(ValueError, match="give every rank the same number of experts in `placement`"):
        topology.with_experts(4, placement=(0, 0, 1, 2))
    uneven = topology.with_experts(10, allow_uneven=True)
    assert sorted(len(uneven.experts_of_rank(rank)) for rank in range(4)) == [2, 2, 3, 3]


def test_a_node_without_experts_warns_with_the_numbers_and_goes_on():
    topology = NodeTopology.from_ranks_per_node(1, num_ranks=4)
    with pytest.warns(UserWarning, match=r"2 of 4 nodes hold no expert \(`num_experts` = 2\)"):
        topology = topology.with_experts(2, allow_uneven=True)
    empty = [node for node in range(4) if not topology.experts_of_node(node)]
    assert len(empty) == 2
    assert not any(topology.node_local_experts(topology.ranks_of_node(empty[0])[0]))


def test_fewer_experts_than_ranks_are_spread_over_the_nodes(recwarn):
    topology = NodeTopology.from_ranks_per_node(4, num_ranks=8).with_experts(2, allow_uneven=True)
    assert [topology.experts_of_node(node) for node in range(2)] == [(0,), (1,)]
    assert not recwarn.list


@pytest.mark.parametrize("placement", [(0, 1), (0, 1, 2, 9)])
def test_a_wrong_placement_is_refused(placement):
    with pytest.raises(ValueError):
        NodeTopology.from_ranks_per_node(2, num_ranks=4).with_experts(4, placement=placement)


@given(num_experts=st.integers(1, 300), num_ranks=st.integers(1, 64))
def test_contiguous_placement_is_ordered_and_even(num_experts, num_ranks):
    placement = contiguous_placement(num_experts, num_ranks)
    assert list(placement) == sorted(placement)
    counts = Counter(placement)
    sizes = [counts[rank] for rank in range(num_ranks)]
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == num_experts


@given(data=st.data(), nodes=st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_every_rank_and_expert_is_somewhere_once(data, nodes):
    num_ranks = len(nodes)
    placement = data.draw(st.lists(st.integers(0, num_ranks - 1), min_size=1, max_size=40))
    topology = NodeTopology(rank_to_node=nodes, expert_to_rank=placement)
    ranks = [rank for node in range(topology.num_nodes) for rank in topology.ranks_of_node(node)]
    assert sorted(ranks) == list(range(num_ranks))
    assert sum(topology.node_sizes) == num_ranks
    for table in (
        [topology.experts_of_node(node) for node in range(topology.num_nodes)],
        [topology.experts_of_rank(rank) for rank in range(num_ranks)],
    ):
        assert sorted(expert for experts in table for expert in experts) == list(range(len(placement)))
    for rank in range(num_ranks):
        local = {expert for expert, near in enumerate(topology.node_local_experts(rank)) if near}
        assert local == set(topology.experts_of_node(topology.node_of_rank(rank)))
    # Two ranks share a node in the group exactly if they do in the job.
    members = data.draw(st.permutations(range(num_ranks)))[: data.draw(st.integers(1, num_ranks))]
    group = topology.subset(members)
    for position, rank in enumerate(members):
        assert group.same_node(position) == tuple(topology.same_node(rank)[other] for other in members)


def test_the_printed_table():
    text = format_topology(NodeTopology.from_ranks_per_node("2,1").with_experts(6))
    assert text.splitlines()[0] == "3 ranks on 2 nodes, 1 to 2 ranks a node, 6 experts, 2 a rank"
    assert "0        0  0-1" in text
    assert "1        2  4-5" in text
    assert "exchanges are flat" in text


def test_256_ranks_are_quick_to_lay_out():
    topology = NodeTopology.from_ranks_per_node(8, num_ranks=256).with_experts(512)
    assert topology.experts_of_node(31) == tuple(range(496, 512))
    assert len(format_topology(topology).splitlines()) == 2 + 1 + 256


def test_the_command_line(capsys):
    options = ["--ranks", "8", "--ranks-per-node", "2", "--experts", "8", "--ep-size", "4"]
    assert main(["topology", *options]) == 0
    first, second = capsys.readouterr().out.split("\n\n4 ranks")
    assert first.startswith("4 ranks on 2 nodes, 2 ranks a node, 8 experts, 2 a rank")
    assert "3        7  6-7" in second
    assert main(["topology", *options, "--placement", "3,3,2,2,1,1,0,0"]) == 0
    assert "3        7  0-1" in capsys.readouterr().out


def test_the_command_line_tells_what_does_not_fit(capsys, monkeypatch):
    assert main(["topology", "--ranks", "8", "--ep-size", "3"]) == 1
    assert "`ep_size` (3) must divide the number of ranks (8)" in capsys.readouterr().err
    assert main(["topology", "--ranks", "4", "--ranks-per-node", "1", "--experts", "2"]) == 0
    assert "No expert on node 1, 3" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["topology"]) == 1
    assert "cannot be told from this process's environment" in capsys.readouterr().err
