# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine against `reference.py`: rows, outputs, gradients, adjointness, fixed shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from hf_locmoe.distributed.dispatch import Capacity, Peers, combine, dispatch, plan_dispatch
from hf_locmoe.distributed.exchange import Exchange, finish, make_route, start
from hf_locmoe.distributed.overlap import run_sliced
from hf_locmoe.distributed.reference import reference_combine, reference_dispatch
from hf_locmoe.distributed.topology import NodeTopology
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


HIDDEN = 5

# ---- one process: the route -----------------------------------------------------------------------------------------


@given(
    num_rows=st.integers(0, 9), width=st.integers(1, 3), num_destinations=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_route_sorts_copies_by_destination_and_finds_them_again(num_rows, width, num_destinations, seed):
    generator = torch.Generator().manual_seed(seed)
    destination = torch.randint(num_destinations + 1, (num_rows, width), generator=generator)
    expected = [
        row
        for to in range(num_destinations)
        for row in range(num_rows)
        for slot in range(width)
        if destination[row, slot] == to
    ]
    sizes = [int((destination == to).sum()) for to in range(num_destinations)]
    route = make_route(destination, sizes, sizes)
    assert (route.copy_of_row // width).tolist() == expected
    for row in range(num_rows):
        for slot in range(width):
            place = int(route.row_of_copy[row, slot])
            if destination[row, slot] == num_destinations:
                assert place == -1
            else:
                assert route.copy_of_row[place] == row * width + slot


def test_route_of_fixed_size_drops_the_last_rows_and_pads():
    destination = torch.tensor([[0], [1], [0], [0], [2]])
    route = make_route(destination, [2, 2], [2, 2], room=torch.tensor([2, 2]))
    assert route.copy_of_row.tolist() == [0, 2, 1, -1]
    assert route.row_of_copy.flatten().tolist() == [0, 2, 1, -1, -1]


@pytest.mark.parametrize("padded", [False, True])
def test_spread_and_collect_are_adjoint(padded):
    destination = torch.tensor([[0, 3], [1, 2], [3, 3], [2, 0]])
    sizes = [3, 1, 1] if padded else [2, 1, 2]
    route = make_route(destination, sizes, sizes, room=torch.tensor(sizes) if padded else None)
    x = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    spread, _ = finish(out := Exchange(route), start(out, x))
    y = torch.randn_like(spread, requires_grad=True)
    collected, _ = finish(back := Exchange(route, back=True), start(back, y))
    torch.testing.assert_close((spread * y).sum(), (x * collected).sum(), **TOLERANCES[torch.float64])
    # The backward of each is the other.
    torch.testing.assert_close(torch.autograd.grad(spread, x, y)[0], collected, **TOLERANCES[torch.float64])
    torch.testing.assert_close(torch.autograd.grad(collected, y, x)[0], spread, **TOLERANCES[torch.float64])


# ---- several processes ----------------------------------------------------------------------------------------------


def make_tokens(num_ranks, num_tokens, num_top_k, num_experts, routing, dtype=torch.float64):
    """Tokens, experts and weights of every rank, the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    states, index, weights = [], [], []
    for rank in range(num_ranks):
        size = num_tokens[rank % len(num_tokens)]
        states.append(torch.randn(size, HIDDEN, generator=generator, dtype=dtype))
        weights.append(torch.rand(size, num_top_k, generator=generator, dtype=dtype))
        choice = torch.rand(size, num_experts, generator=generator).argsort(1)[:, :num_top_k]
        if routing == "one expert":
            choice[:, 0] = num_experts - 1
            choice[:, 1:] = num_experts  # dropped
        elif routing == "dropped":
            choice[torch.rand(choice.shape, generator=generator) < 0.4] = num_experts
        elif routing == "same node":
            choice = torch.arange(num_top_k).expand_as(choice).clone()
        index.append(choice)
    return states, index, weights


def make_peers(ranks_per_node, num_experts, placement=None):
    world, rank = dist.get_world_size(), dist.get_rank()
    topology = NodeTopology.from_ranks_per_node(ranks_per_node, world).with_experts(num_experts, placement, True)
    node_ranks = topology.ranks_of_node(topology.node_of_rank(rank))
    node_group = dist.new_group(list(node_ranks), use_local_synchronization=True) if len(node_ranks) > 1 else None
    return Peers(topology, rank, dist.group.WORLD, node_group)


def experts_of(peers, scale):
    """Expert e computes `scale[e] * tanh(x)`; sums over a row's experts, of which there may be one."""
    mine = torch.tensor([*peers.topology.experts_of_rank(peers.rank), 0])

    def experts(tokens, expert_ids, weights, num_pairs):
        of_nobody = expert_ids >= peers.num_local_experts
        assert (~of_nobody).sum() <= num_pairs
        factor = (scale[mine[expert_ids]] * weights).masked_fill(of_nobody, 0.0)
        return factor.sum(1, keepdim=True) * torch.tanh(tokens)

    return experts


def reference(states, index, weights, scale, expert_to_rank):
    """Outputs of all ranks and gradients of states, weights and scale, in one process."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*states, *weights, scale)]
    states, weights, scale = leaves[: len(states)], leaves[len(states) : -1], leaves[-1]
    arrived = reference_dispatch(states, index, expert_to_rank)
    outputs = [[scale[pair.expert] * torch.tanh(row) for row, pair in zip(*at)] for at in arrived]
    combined = reference_combine(outputs, [pairs for _, pairs in arrived], states, weights)
    sum((output * torch.cos(output.detach())).sum() for output in combined).backward()
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return [output.detach() for output in combined], grads[: len(states)], grads[len(states) : -1], grads[-1], arrived


def check_against_reference(peers, fan_out, num_slices, tokens, dtype=torch.float64, wire_dtype=None):
    states, index, weights = tokens
    rank = peers.rank
    scale = torch.linspace(0.5, 2.0, peers.num_experts, dtype=dtype)
    outputs, states_grad, weights_grad, scale_grad, arrived = reference(
        states, index, weights, scale, peers.topology.expert_to_rank
    )
    tolerance = TOLERANCES[wire_dtype or dtype]
    for by_pair in (True, False):
        x = states[rank].clone().requires_grad_()
        w = weights[rank].clone().requires_grad_()
        s = scale.clone().requires_grad_()
        plan = plan_dispatch(index[rank], peers, fan_out, num_slices)
        output = run_sliced(x, w, plan, peers, experts_of(peers, s), wire_dtype, by_pair=by_pair)
        (output * torch.cos(output.detach())).sum().backward()
        own_scale_grad = s.grad if s.grad is not None else torch.zeros_like(s)
        dist.all_reduce(own_scale_grad)
        torch.testing.assert_close(output.detach(), outputs[rank], **tolerance)
        torch.testing.assert_close(x.grad, states_grad[rank], **tolerance)
        torch.testing.assert_close(w.grad, weights_grad[rank], **tolerance)
        torch.testing.assert_close(own_scale_grad, scale_grad, **tolerance)
    # The rows that the experts see are the pairs of the reference, in some order.
    rows, counts, metadata = dispatch(states[rank], index[rank], weights[rank], peers, fan_out)
    mine = peers.topology.experts_of_rank(rank)
    got = sorted((mine[e], *row.tolist()) for e, row in zip(metadata.expert_ids.flatten().tolist(), rows))
    expected = sorted((pair.expert, *row.tolist()) for row, pair in zip(*arrived[rank]))
    assert got == expected
    assert counts.tolist() == [sum(pair.expert == e for pair in arrived[rank][1]) for e in mine]
    # <D x, y> = <x, D^T y>, summed over the ranks.
    y = torch.randn(rows.shape, dtype=dtype)
    products = torch.stack([(rows * y).sum(), (states[rank] * combine(y, metadata)).sum()])
    dist.all_reduce(products)
    torch.testing.assert_close(products[0], products[1], **TOLERANCES[dtype])


CASES = [  # tokens per rank, k, experts, routing
    ((7, 5), 1, 8, "random"),
    ((6, 9, 0), 2, 8, "random"),
    ((5,), 3, 8, "dropped"),
    ((11, 1), 4, 4, "random"),
    ((4, 0), 2, 8, "one expert"),
    ((8,), 2, 8, "same node"),
    ((0,), 2, 4, "random"),
]


def compare_all(ranks_per_node):
    world = dist.get_world_size()
    for num_experts in (4, 8):
        peers = make_peers(ranks_per_node, num_experts)
        for num_tokens, num_top_k, experts, routing in CASES:
            if experts == num_experts:
                tokens = make_tokens(world, num_tokens, num_top_k, num_experts, routing)
                for fan_out in ("rank", "node"):
                    for num_slices in (1, 3):
                        check_against_reference(peers, fan_out, num_slices, tokens)


def compare_odd_groups():
    world = dist.get_world_size()
    # More nodes than experts, uneven placement, experts out of order.
    for ranks_per_node, placement in ((1, (2, 0)), (2, (3, 0, 3, 1, 3)), ((3, 1), (1, 3, 0, 2, 1, 0))):
        peers = make_peers(ranks_per_node, len(placement), placement)
        for num_top_k in (1, 2):
            tokens = make_tokens(world, (6, 3), num_top_k, len(placement), "random")
            for fan_out in ("rank", "node"):
                check_against_reference(peers, fan_out, 2, tokens)


def compare_bfloat16_wire():
    peers = make_peers(2, 8)
    for num_tokens in ((16, 9), (1, 0)):  # a lone row's columns begin where no float32 may
        tokens = make_tokens(dist.get_world_size(), num_tokens, 3, 8, "random", torch.float32)
        for fan_out in ("rank", "node"):
            check_wire(peers, fan_out, tokens)


def check_wire(peers, fan_out, tokens):
    states, index, weights = tokens
    scale = torch.linspace(0.5, 2.0, peers.num_experts)
    outputs, states_grad, weights_grad, *_ = reference(states, index, weights, scale, peers.topology.expert_to_rank)
    x = states[peers.rank].clone().requires_grad_()
    w = weights[peers.rank].clone().requires_grad_()
    plan = plan_dispatch(index[peers.rank], peers, fan_out, 2)
    output = run_sliced(x, w, plan, peers, experts_of(peers, scale), torch.bfloat16)
    (output * torch.cos(output.detach())).sum().backward()
    assert output.dtype == x.grad.dtype == w.grad.dtype == torch.float32
    tolerance = TOLERANCES[torch.bfloat16]
    torch.testing.assert_close(output.detach(), outputs[peers.rank], **tolerance)
    torch.testing.assert_close(x.grad, states_grad[peers.rank], **tolerance)
    torch.testing.assert_close(w.grad, weights_grad[peers.rank], **tolerance)
    # What stays exact: weights and ids are no bfloat16 numbers under way.
    _, _, metadata = dispatch(
        states[peers.rank], index[peers.rank], weights[peers.rank], peers, fan_out, None, torch.bfloat16
    )
    everybody = torch.cat(weights).flatten()
    assert torch.isin(metadata.weights, everybody).all()


def compare_fixed_shapes():
    world, num_experts = dist.get_world_size(), 8
    peers = make_peers(2, num_experts)
    for num_top_k in (1, 2):
        states, index, weights = make_tokens(world, (12, 7), num_top_k, num_experts, "random")
        rank = peers.rank
        # Room enough: the dropless result.
        scale = torch.linspace(0.5, 2.0, num_experts, dtype=torch.float64)
        outputs, states_grad, weights_grad, *_ = reference(
            states, index, weights, scale, peers.topology.expert_to_rank
        )
        for by_pair in (True, False):
            x, w = states[rank].clone().requires_grad_(), weights[rank].clone().requires_grad_()
            plan = plan_dispatch(index[rank], peers, "rank", 2, Capacity(24, 24))
            output = run_sliced(x, w, plan, peers, experts_of(peers, scale), by_pair=by_pair)
            (output * torch.cos(output.detach())).sum().backward()
            torch.testing.assert_close(output.detach(), outputs[rank], **TOLERANCES[torch.float64])
            torch.testing.assert_close(x.grad, states_grad[rank], **TOLERANCES[torch.float64])
            torch.testing.assert_close(w.grad, weights_grad[rank], **TOLERANCES[torch.float64])
        # Little room: each rank keeps the first tokens for each rank, by hand.
        capacity = Capacity(node_local=3, remote=2)
        kept = []
        for source, ids in enumerate(index):
            ids, room = ids.clone(), {}
            for token in range(len(ids)):
                owners = [peers.topology.expert_to_rank[e] for e in ids[token].tolist()]
                for owner in dict.fromkeys(owners):
                    near = peers.topology.node_of_rank(owner) == peers.topology.node_of_rank(source)
                    room[owner] = room.get(owner, 3 if near else 2) - 1
                    if room[owner] < 0:
                        ids[token, [o == owner for o in owners]] = num_experts
            kept.append(ids)
        outputs, *_ = reference(states, kept, weights, scale, peers.topology.expert_to_rank)
        plan = plan_dispatch(index[rank], peers, "rank", 1, capacity)
        output = run_sliced(states[rank], weights[rank], plan, peers, experts_of(peers, scale))
        torch.testing.assert_close(output, outputs[rank], **TOLERANCES[torch.float64])
        assert (kept[rank] == num_experts).any()  # the case is one where something was dropped
        # Room for a third of the pairs on each rank: those of the first rows that arrive, by source and token.
        kept, left = [ids.clone() for ids in index], [12] * peers.num_ranks
        for ids in kept:
            for token, slot in itertools.product(range(len(ids)), range(ids.size(1))):
                owner = peers.topology.expert_to_rank[ids[token, slot]]
                left[owner] -= 1
                if left[owner] < 0 and ids.size(1) > 1:
                    ids[token, slot] = num_experts
        outputs, *_ = reference(states, kept, weights, scale, peers.topology.expert_to_rank)
        plan = plan_dispatch(index[rank], peers, "rank", 1, Capacity(24, 24, pairs=12))
        for by_pair in (True, False):
            output = run_sliced(states[rank], weights[rank], plan, peers, experts_of(peers, scale), by_pair=by_pair)
            torch.testing.assert_close(output, outputs[rank], **TOLERANCES[torch.float64])


def count_rows_between_nodes():
    """Rows sent to the other node for top-2 tokens whose two experts are both there: fan-out "node" halves them."""
    peers = make_peers(2, 8)
    index = torch.tensor([[4, 6]] * 5 if peers.rank < 2 else [[0, 2]] * 5)
    sent = {}
    for fan_out in ("rank", "node"):
        (part,) = plan_dispatch(index, peers, fan_out).slices
        sent[fan_out] = sum(
            size for size, near in zip(part.send_sizes, peers.topology.same_node(peers.rank)) if not near
        )
    return sent


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_four_ranks_equal_the_reference(ranks_per_node):
    run_ranks(compare_all, 4, ranks_per_node)


@pytest.mark.multiprocess
def test_two_ranks_equal_the_reference():
    run_ranks(compare_all, 2, 1)


@pytest.mark.multiprocess
def test_uneven_nodes_and_placements_equal_the_reference():
    run_ranks(compare_odd_groups, 4)


@pytest.mark.multiprocess
def test_bfloat16_on_the_wire_sums_in_float32():
    run_ranks(compare_bfloat16_wire, 4)


@pytest.mark.multiprocess
def test_fixed_shapes_drop_what_has_no_room():
    run_ranks(compare_fixed_shapes, 4)


@pytest.mark.multiprocess
def test_one_copy_per_node_crosses():
    assert run_ranks(count_rows_between_nodes, 4) == [{"rank": 10, "node": 5}] * 4
