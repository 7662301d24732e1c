# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from hf_locmoe.training.affinity import MAX_BUCKETS, PRIOR_COUNT, AffinityTable


def drawn(num_tokens, num_layers, num_experts, num_nodes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    keys = torch.randint(0, 7, (num_tokens,), generator=draw)
    experts = torch.randint(0, num_experts, (num_tokens, num_layers, 2), generator=draw)
    return keys, experts, torch.randint(0, num_nodes, (num_tokens,), generator=draw)


def test_counts_and_shares_against_loops():
    table, on_node = AffinityTable(3, 7, 4, 2, decay=0.5), torch.zeros(3, 4, 2, dtype=torch.bool)
    assert table.is_empty
    for layer in range(3):
        for expert in range(4):
            on_node[layer, expert, (expert + layer) % 2] = True
    counts, mass = torch.zeros(3, 7, 4), torch.zeros(3, 4, 2)
    for seed in range(2):
        keys, experts, nodes = drawn(11, 3, 4, 2, seed)
        table.update(keys, experts, nodes)
        counts, mass = counts * 0.5, mass * 0.5
        for token in range(11):
            for layer in range(3):
                for expert in experts[token, layer]:
                    counts[layer, keys[token], expert] += 1
                    mass[layer, expert, nodes[token]] += 1
    torch.testing.assert_close(table.counts, counts)
    torch.testing.assert_close(table.expert_node_mass, mass)
    expected = torch.zeros(7, 2)
    for key in range(7):
        for node in range(2):
            for layer in range(3):
                here = counts[layer, key, on_node[layer, :, node]].sum()
                expected[key, node] += (here + PRIOR_COUNT / 2) / (counts[layer, key].sum() + PRIOR_COUNT) / 3
    torch.testing.assert_close(table.node_shares(on_node), expected)
    samples, mask = torch.tensor([[0, 1, 1], [5, 6, 0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    by_sample = torch.stack([expected[0] + expected[1], expected[5] + expected[6] + expected[0]])
    torch.testing.assert_close(table.node_scores(samples, on_node, mask), by_sample)


def test_a_large_vocabulary_shares_buckets_and_an_unseen_key_says_nothing():
    table = AffinityTable(1, 100_000, 4, 2)
    assert table.counts.shape == (1, MAX_BUCKETS, 4)
    table.update(torch.tensor([MAX_BUCKETS + 3]), torch.tensor([[[2]]]), torch.tensor([1]))
    on_node = torch.tensor([[[True, False], [True, False], [False, True], [False, True]]])
    scores = table.node_scores(torch.tensor([[3], [4]]), on_node)
    assert scores[0, 1] > scores[0, 0]
    assert scores[1].tolist() == [0.5, 0.5]


def test_state_of_another_number_of_nodes_is_taken_where_it_fits():
    table, other = AffinityTable(2, 7, 4, 2), AffinityTable(2, 7, 4, 4)
    table.update(*drawn(9, 2, 4, 2))
    other.load_state_dict(table.state_dict())
    assert torch.equal(other.counts, table.counts)
    assert not other.expert_node_mass.any()
