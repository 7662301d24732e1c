# SPDX-License-Identifier: Apache-2.0
"""
Dispatch and combine: tokens to the ranks of their experts, weighted outputs back.

Shape legend: T tokens of this rank, d hidden size, k experts per token, n experts, P ranks of the expert-parallel
group, M ranks of it on one node, R rows a rank's experts get, s experts of each row.

A token travels once per destination, not once per expert. What a destination is, is the *fan-out*:

    "rank": every rank with one of the token's experts gets a copy.
    "node": every *other node* with one of them gets one copy, at the rank of the first of these experts, which hands
            it on to the others inside the node; ranks of the token's own node get theirs directly. On the way back
            the weighted outputs are summed inside the node first, so one row per node returns.

Example: token t on rank 0 picks experts on ranks 1, 2 and 3; ranks 0, 1 are node A, ranks 2, 3 node B.

    fan-out "rank"   0 -> 1   0 -> 2   0 -> 3          two copies cross the nodes, two rows return
    fan-out "node"   0 -> 1   0 -> 2   2 -> 3          one copy crosses, one row returns: y2 + y3, summed on rank 2

Every hop is a linear exchange (`exchange.py`); dispatch is their product D, combine its transpose.

What arrives is one row for all of the token's experts on this rank. Experts that gather their rows and sum over a token's
choices in passes of their own take it as it is (s = k); for the others one more hop on this rank copies it for each of them
(s = 1).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

from ..permute.rows import count, first_slots, lay_out
from .backend import label_calls
from .exchange import Exchange, Route, finish, make_route, start
from .exchange_clock import ExchangeClock
from .topology import NodeTopology


FanOut = Literal["rank", "node"]


class Peers:
    """
    The expert-parallel group seen from one rank: who holds which expert, and who shares a node, as tables on a device.

    Args:
        topology (`NodeTopology`): of the group, with its experts placed.
        rank (`int`): this rank in the group.
        group (`ProcessGroup`): the expert-parallel group.
        node_group (`ProcessGroup`, *optional*):
            the members of `group` on this rank's node. Needed by fan-out "node" where the node has several.
        device (`torch.device`): where the tables live.
        label (`str`, *optional*): the layer, for the backend's errors.
        clock ([`ExchangeClock`], *optional*): times the exchanges.
    """

    def __init__(
        self,
        topology: NodeTopology,
        rank: int,
        group: Any,
        node_group: Any = None,
        device: Any = "cpu",
        label: str | None = None,
        clock: ExchangeClock | None = None,
    ) -> None:
        self.topology, self.rank, self.group, self.node_group = topology, rank, group, node_group
        self.label, self.clock = label, clock
        self.num_ranks = topology.num_ranks
        self.num_experts = topology.num_experts
        self.num_local_experts = len(topology.experts_of_rank(rank))
        self.node_ranks = topology.ranks_of_node(topology.node_of_rank(rank))
        self.ranks_per_node = max(topology.node_sizes)

        def table(values) -> torch.Tensor:
            return torch.tensor(list(values), device=device)

        # The entry behind the last expert or rank stands for "none": an assignment that was dropped.
        self.expert_to_rank = table([*topology.expert_to_rank, self.num_ranks])
        local = {expert: index for index, expert in enumerate(topology.experts_of_rank(rank))}
        self.expert_to_local = table(local.get(expert, len(local)) for expert in range(self.num_experts + 1))
        self.local_experts = table(local).long()
        same_node = topology.same_node(rank)
        self.same_node = table(same_node)
        # Fan-out "node": own-node ranks are a destination each, another node is one destination.
        self.rank_to_bucket = table(
            [
                peer if same_node[peer] else self.num_ranks + 1 + topology.node_of_rank(peer)
                for peer in range(self.num_ranks)
            ]
            + [self.num_ranks]
        )
        inside = [topology.ranks_of_node(topology.node_of_rank(peer)).index(peer) for peer in range(self.num_ranks)]
        self.index_in_node = table([*inside, 0])
        # Where a copy is handed on to: the index in this node of a rank, or none.
        self.rank_to_hand_on = table(
            [inside[peer] if same_node[peer] else len(self.node_ranks) for peer in range(self.num_ranks)]
            + [len(self.node_ranks)]
        )


class Capacity(NamedTuple):
    """
    Fixed shapes: rows that one rank may send to each rank, the same on every rank and in every step.

    `node_local` rows to every rank of its own node and `remote` rows to every other. Two tiers, because one size for
    both would allow each rank only its share of local tokens and so undo what locality gains. `pairs`: (token, expert)
    pairs that a rank computes; one for each expert of each arriving row when left out.
    """

    node_local: int
    remote: int
    pairs: int | None = None


class Slice(NamedTuple):
    """What the host knows of one slice: its tokens and the sizes of its hops."""

    tokens: slice
    row_of_copy: torch.Tensor  # (T_slice, k) and its inverse, see `Route`: the way to the ranks
    copy_of_row: torch.Tensor
    send_sizes: list[int]
    recv_sizes: list[int]
    hand_on_sizes: list[int]
    handed_sizes: list[int]
    num_pairs: int  # (row, local expert) pairs, with a capacity the room for them
    recv_counts: torch.Tensor | None = None  # (P,) `recv_sizes` on the device, without a capacity


class DispatchPlan(NamedTuple):
    """Everything a layer needs to exchange its tokens, and to do it again when a checkpoint recomputes."""

    top_k_index: torch.Tensor
    fan_out: FanOut
    slices: list[Slice]
    is_padded: bool


def plan_dispatch(
    top_k_index: torch.Tensor,
    peers: Peers,
    fan_out: FanOut = "rank",
    num_slices: int = 1,
    capacity: Capacity | None = None,
) -> DispatchPlan:
    """
    Decides where every token goes, and tells the others how many rows come.

    Dropless, this takes one small all-to-all and one host read of the sizes, for all slices together. With
    `capacity` it takes neither.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, k)`, int64): experts of each token; `num_experts` = dropped.
        peers (`Peers`): the group.
        fan_out (`str`): see the head of this file; the same on all ranks.
        num_slices (`int`): parts to cut the tokens into; the same on all ranks.
        capacity (`Capacity`, *optional*): fixed shapes; fan-out "rank" only.
    """
    num_tokens, num_top_k = top_k_index.shape
    bounds = [num_tokens * part // num_slices for part in range(num_slices + 1)]
    tokens = [slice(*bound) for bound in zip(bounds, bounds[1:], strict=False)]
    owner = peers.expert_to_rank[top_k_index]
    is_first_of_rank, _ = _first_occurrence(owner)
    if capacity is not None:
        if fan_out != "rank":
            raise ValueError(
                f'`fan_out` ("{fan_out}") must be "rank" with a capacity, whose shapes are fixed: leave it on "auto".'
            )
        node_local, remote = (-(-rows // num_slices) for rows in (capacity.node_local, capacity.remote))
        sizes = [node_local if is_near else remote for is_near in peers.topology.same_node(peers.rank)]
        num_rows = sum(sizes)
        num_pairs = num_rows * num_top_k
        if capacity.pairs is not None and num_top_k > 1:
            num_pairs = min(num_pairs, -(-capacity.pairs // num_slices))
        room = torch.where(peers.same_node, node_local, remote)
        destination = owner.masked_fill(~is_first_of_rank, peers.num_ranks)
        ways = [lay_out(destination[part], peers.num_ranks, room, num_rows) for part in tokens]
        slices = [Slice(part, *way, sizes, sizes, [], [], num_pairs) for part, way in zip(tokens, ways, strict=True)]
        return DispatchPlan(top_k_index, fan_out, slices, True)

    # What every rank needs to know of our tokens, one row of numbers per (rank, slice).
    part_of_token = torch.cat(
        [owner.new_full((part.stop - part.start, 1), index) for index, part in enumerate(tokens)]
    )
    num_keys, width = num_slices * (peers.num_ranks + 1), peers.ranks_per_node
    key = part_of_token * (peers.num_ranks + 1)

    def per_rank(values: torch.Tensor, columns: int = 1) -> torch.Tensor:
        """(T, k) of key * columns + column -> counts of shape (P, num_slices, columns)"""
        counts = count(values, num_keys * columns).view(num_slices, peers.num_ranks + 1, columns)
        return counts[:, : peers.num_ranks].transpose(0, 1)

    if fan_out == "rank":
        destination = owner.masked_fill(~is_first_of_rank, peers.num_ranks)
        numbers = [per_rank(key + destination)]
    else:
        is_first, first = _first_occurrence(peers.rank_to_bucket[owner])
        entry = owner.gather(1, first)
        destination = owner.masked_fill(~is_first, peers.num_ranks)
        hands_on = entry.masked_fill(~is_first_of_rank, peers.num_ranks)
        is_handed = owner.masked_fill(~is_first_of_rank, peers.num_ranks)
        numbers = [
            per_rank(key + destination),
            per_rank((key + hands_on) * width + peers.index_in_node[owner], width),
            per_rank((key + is_handed) * width + peers.index_in_node[entry], width),
        ]
    if num_top_k > 1:
        numbers.append(per_rank(key + owner))
    # before the host waits: what follows it has the less to start
    ways = [lay_out(destination[part], peers.num_ranks) for part in tokens]
    sent = torch.cat(numbers, dim=2).contiguous()
    received = torch.empty_like(sent)
    label_calls(peers.group, peers.label)
    mark = None if peers.clock is None else peers.clock.start(peers.group)
    with nullcontext() if mark is None else mark.waits():
        dist.all_to_all_single(received, sent, group=peers.group)
    summed = received[:, :, 1:].sum(0)
    # The one host sync of the layer.
    on_host = torch.cat([sent[:, :, 0].reshape(-1), received[:, :, 0].reshape(-1), summed.reshape(-1)]).tolist()
    num_sizes = peers.num_ranks * num_slices
    send, recv, rest = on_host[:num_sizes], on_host[num_sizes : 2 * num_sizes], on_host[2 * num_sizes :]
    num_rest, on_node = summed.size(1), len(peers.node_ranks)
    slices = []
    for index, (part, (row_of_copy, copy_of_row)) in enumerate(zip(tokens, ways, strict=True)):
        send_sizes, recv_sizes = send[index::num_slices], recv[index::num_slices]
        own = rest[index * num_rest : (index + 1) * num_rest]
        hand_on, handed = (own[:on_node], own[width : width + on_node]) if fan_out == "node" else ([], [])
        num_pairs = own[-1] if num_top_k > 1 else sum(recv_sizes)
        slices.append(
            Slice(
                part,
                row_of_copy,
                copy_of_row[: sum(send_sizes)],
                send_sizes,
                recv_sizes,
                hand_on,
                handed,
                num_pairs,
                recv_counts=received[:, index, 0],
            )
        )
    return DispatchPlan(top_k_index, fan_out, slices, False)


def _first_occurrence(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, k) -> whether each slot is the first of its row with its value, and the slot that is, both (T, k)."""
    first = first_slots(values)
    return first == torch.arange(values.size(1), device=values.device), first


@dataclass
class DispatchMetadata:
    """
    What the experts need besides the tokens, and what combine needs to find the way back.

    Attributes:
        expert_ids (`torch.Tensor` of shape `(R, s)`, int64): local experts of each row; `num_local_experts` = none.
        weights (`torch.Tensor` of shape `(R, s)`): their routing weights, the receiver applies them.
        num_pairs (`int`): how many of the ids name an expert; with fixed shapes at most.
    """

    peers: Peers
    plan: DispatchPlan
    part: Slice
    wire_dtype: torch.dtype | None
    recomputation: Any = None
    expert_ids: torch.Tensor = None
    weights: torch.Tensor = None
    num_pairs: int = 0
    link: torch.Tensor = None
    hops: list[Route] = field(default_factory=list)  # in the order of the way out
    exchange: Exchange = None
    ticket: torch.Tensor = None


def start_dispatch(
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    plan: DispatchPlan,
    index: int,
    peers: Peers,
    wire_dtype: torch.dtype | None = None,
    recomputation: Any = None,
) -> DispatchMetadata:
    """
    Sends the tokens of slice `index` off. Finish with [`finish_dispatch`].

    Args:
        hidden_states (`torch.Tensor` of shape `(T_slice, d)`): the slice's tokens.
        top_k_weights (`torch.Tensor` of shape `(T_slice, k)`): their routing weights.
        wire_dtype (`torch.dtype`, *optional*): dtype of tokens and outputs under way; sums are in float32.
        recomputation (`Recomputation`, *optional*): gets the plan while the slice's backward runs.
    """
    part = plan.slices[index]
    metadata = DispatchMetadata(peers, plan, part, wire_dtype, recomputation)
    ways = part.row_of_copy, part.copy_of_row
    route = Route(*ways, part.send_sizes, part.recv_sizes, peers.group, plan.is_padded)
    metadata.hops.append(route)
    withdraw = recomputation.withdraw if recomputation is not None else None
    metadata.exchange = Exchange(
        route, wire_dtype=wire_dtype, on_backward=withdraw, label=peers.label, clock=peers.clock
    )
    # Ids travel less `num_experts`, so that a padding row, all zeros, names no expert.
    ids = (plan.top_k_index[part.tokens] - peers.num_experts).to(torch.int32)
    metadata.ticket = start(metadata.exchange, hidden_states, top_k_weights, ids)
    return metadata


def finish_dispatch(metadata: DispatchMetadata, by_pair: bool = True) -> torch.Tensor:
    """
    Waits for a slice's tokens, hands them on inside the node and completes the metadata for the experts and [`start_combine`].

    Args:
        by_pair (`bool`):
            whether a row is copied for every local expert that it chose, for experts that would else gather it k times.

    Returns:
        tokens of shape `(R, d)`: one row per (token, local expert) pair, or per token with `by_pair=False`.
    """
    peers, plan, part = metadata.peers, metadata.plan, metadata.part
    tokens, weights, ids, link = finish(metadata.exchange, metadata.ticket)
    ids = ids.long() + peers.num_experts
    metadata.exchange = metadata.ticket = None
    if plan.fan_out == "node" and len(peers.node_ranks) > 1:
        targets = peers.rank_to_hand_on[peers.expert_to_rank[ids]]
        # Rows from this node came straight to the rank of their expert: they are not handed on again.
        is_direct = peers.same_node.repeat_interleave(part.recv_counts, output_size=tokens.size(0)).unsqueeze(1)
        none = len(peers.node_ranks)
        targets = targets.masked_fill(is_direct & (targets != peers.index_in_node[peers.rank]), none)
        is_first, _ = _first_occurrence(targets)
        targets = targets.masked_fill(~is_first, none)
        route = make_route(targets, part.hand_on_sizes, part.handed_sizes, peers.node_group)
        metadata.hops.append(route)
        exchange = Exchange(route, wire_dtype=metadata.wire_dtype, label=peers.label, clock=peers.clock)
        ticket = start(exchange, tokens, weights, ids.to(torch.int32), after=link)
        tokens, weights, ids, link = finish(exchange, ticket)
        ids = ids.long()
    local = peers.expert_to_local[ids]
    none, num_pairs = peers.num_local_experts, part.num_pairs
    if by_pair and local.size(1) > 1:
        room = local.new_full((1,), num_pairs) if plan.is_padded else None
        route = make_route((local == none).long(), [num_pairs], [num_pairs], room=room)
        metadata.hops.append(route)
        exchange = Exchange(route)
        tokens, link = finish(exchange, start(exchange, tokens, after=link))
        # a pair is a copy, and a copy's number that of its id and weight; -1 is the one appended
        local = torch.nn.functional.pad(local.view(-1, 1), (0, 0, 0, 1), value=none)
        weights = torch.nn.functional.pad(weights.reshape(-1, 1), (0, 0, 0, 1))
        pair = route.copy_of_row % local.size(0)
        local, weights = local.index_select(0, pair), weights.index_select(0, pair)
    elif plan.is_padded and num_pairs < local.numel():
        # the same pairs have room as in a route
        has_no_room = (local != none).view(-1).cumsum(0).view_as(local) > num_pairs
        local = local.masked_fill(has_no_room, none)
    metadata.expert_ids, metadata.weights, metadata.num_pairs, metadata.link = local, weights, num_pairs, link
    return tokens


def start_combine(expert_output: torch.Tensor, metadata: DispatchMetadata) -> DispatchMetadata:
    """
    Sums the weighted outputs on this rank and inside the node, and sends them back.

    Args:
        expert_output (`torch.Tensor` of shape `(R, d)`): the weighted output of each row of [`finish_dispatch`].
    """
    link, peers = metadata.link, metadata.peers
    for hop in reversed(metadata.hops[1:]):
        exchange = Exchange(hop, back=True, wire_dtype=metadata.wire_dtype, label=peers.label, clock=peers.clock)
        expert_output, link = finish(exchange, start(exchange, expert_output, after=link))
    offer = partial(metadata.recomputation.offer, metadata.plan) if metadata.recomputation is not None else None
    metadata.exchange = Exchange(
        metadata.hops[0],
        back=True,
        wire_dtype=metadata.wire_dtype,
        on_backward=offer,
        label=peers.label,
        clock=peers.clock,
    )
    metadata.ticket = start(metadata.exchange, expert_output, after=link)
    return metadata


def finish_combine(metadata: DispatchMetadata) -> torch.Tensor:
    """Waits for the outputs of a slice: (T_slice, d), zero for a token whose assignments were all dropped."""
    output, _ = finish(metadata.exchange, metadata.ticket)
    metadata.exchange = metadata.ticket = metadata.link = None
    return output


def dispatch(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    peers: Peers,
    fan_out: FanOut = "rank",
    capacity: Capacity | None = None,
    wire_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, DispatchMetadata]:
    """
    Tokens to their experts, in one piece.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): this rank's tokens.
        top_k_index (`torch.Tensor` of shape `(T, k)`, int64): their experts; `num_experts` = dropped.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): their routing weights.
        peers, fan_out, capacity, wire_dtype: see [`plan_dispatch`] and [`start_dispatch`].

    Returns:
        tokens `(R, d)`, one row per (token, local expert) pair, tokens per local expert `(num_local_experts,)`, and the
        metadata for [`combine`].
    """
    plan = plan_dispatch(top_k_index, peers, fan_out, 1, capacity)
    metadata = start_dispatch(hidden_states, top_k_weights, plan, 0, peers, wire_dtype)
    tokens = finish_dispatch(metadata)
    counts = count(metadata.expert_ids, peers.num_local_experts + 1)[: peers.num_local_experts]
    return tokens, counts, metadata


def combine(expert_output: torch.Tensor, metadata: DispatchMetadata) -> torch.Tensor:
    """Weighted expert outputs `(R, d)` back to the tokens' ranks and summed per token: `(T, d)`."""
    return finish_combine(start_combine(expert_output, metadata))
