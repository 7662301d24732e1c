# SPDX-License-Identifier: Apache-2.0
"""The all-to-all in several steps, each a plain exchange among fewer ranks, for real ranks and for played ones.

A plan is a generator: it yields what this rank is to exchange with whom, is sent back what arrived, and leaves the
result in `output`. Who carries the steps out (a thread, a stream, a test that plays 256 ranks in one process) is not
its business.

Legend: N nodes of M ranks; (i, j) is rank j of node i; a *chunk* (i, j) -> (k, l) is what the one sends to the other;
*counts* are rows, entries of dimension 0.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from .topology import NodeTopology


@dataclass(frozen=True)
class Exchange:
    """
    One step of a plan on one rank: an all-to-all or an all-gather.

    Args:
        where (`str`): among whom: `"group"` (all ranks), `"node"` (this node's ranks, ascending), `"across"` (the
            ranks with this rank's place on every node, by node), `"domain"` (the ranks that hold the same tokens).
        send (`torch.Tensor`): rows for the others, in the order of their ranks there; for an all-gather this rank's
            rows.
        receive (`torch.Tensor`): where the arriving rows go.
        send_counts, receive_counts (`list[int]`, *optional*): rows to and from each; equal numbers when left out.
        gather (`bool`): whether this is an all-gather.
    """

    where: str
    send: torch.Tensor
    receive: torch.Tensor
    send_counts: list[int] | None = None
    receive_counts: list[int] | None = None
    gather: bool = False


Plan = Generator[Exchange, None, None]


def two_level_plan(
    topology: NodeTopology,
    rank: int,
    output: torch.Tensor,
    input: torch.Tensor,
    output_counts: Sequence[int] | None,
    input_counts: Sequence[int] | None,
) -> Plan:
    """
    Inside the node by destination place, then between nodes: messages between nodes fall by the ranks per node, bytes
    there stay, bytes inside rise. After LocMoE, arXiv 2401.13920, whose exchange goes through groups as well.

    Step 1, (i, j) -> (i, l): all chunks (i, j) -> (k, l), every k. Step 2, (i, l) -> (k, l): all chunks
    (i, j) -> (k, l), every j. With uneven splits a step 0 inside the node tells the relay (i, l) how many rows it will
    get for every k.

    Args:
        topology ([`NodeTopology`]): the group's ranks; nodes of equal size.
        rank (`int`): this rank in it.
        output, input (`torch.Tensor`): contiguous, rows by rank.
        output_counts, input_counts (`Sequence[int]`, *optional*): rows from and to each rank; left out, all are equal,
            on all ranks alike.
    """
    grid = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]
    num_nodes, node_size = len(grid), len(grid[0])
    even = input_counts is None or output_counts is None
    if even:
        count = input.shape[0] // topology.num_ranks
        input_counts = output_counts = [count] * topology.num_ranks
    assert input_counts is not None and output_counts is not None

    # for each place l, for each node k: rows (here) -> (k, l)
    outgoing = [[input_counts[grid[k][place]] for k in range(num_nodes)] for place in range(node_size)]
    if even:
        # for each place j, for each node k: rows (this node, j) -> (k, this place)
        relayed = outgoing
    else:
        # the host's numbers, wherever the rows are
        numbers = torch.tensor(outgoing, dtype=torch.int64, device="cpu").flatten()
        arriving = torch.empty_like(numbers)
        yield Exchange("node", numbers, arriving)
        relayed = arriving.view(node_size, num_nodes).tolist()

    chunks = input.split(list(input_counts))
    send = torch.cat([chunks[grid[k][place]] for place in range(node_size) for k in range(num_nodes)])
    relay_counts = [sum(row) for row in relayed]
    relay = input.new_empty((sum(relay_counts), *input.shape[1:]))
    yield Exchange("node", send, relay, [sum(row) for row in outgoing], relay_counts)

    pieces = relay.split([count for row in relayed for count in row])
    send = torch.cat([pieces[place * num_nodes + k] for k in range(num_nodes) for place in range(node_size)])
    across_counts = [sum(row[k] for row in relayed) for k in range(num_nodes)]
    arrival_counts = [sum(output_counts[source] for source in node) for node in grid]
    by_node = [source for node in grid for source in node]
    in_order = by_node == list(range(topology.num_ranks))
    receive = output if in_order else torch.empty_like(output)
    yield Exchange("across", send, receive, across_counts, arrival_counts)
    if not in_order:
        arrived = dict(zip(by_node, receive.split([output_counts[source] for source in by_node])))
        torch.cat([arrived[source] for source in range(topology.num_ranks)], out=output)


def domain_plan(
    domain_size: int,
    domain_rank: int,
    num_ranks: int,
    output: torch.Tensor,
    input: torch.Tensor,
    output_counts: Sequence[int] | None,
    input_counts: Sequence[int] | None,
) -> Plan:
    """
    The group-wise exchange of LocMoE (arXiv 2401.13920): ranks of a tensor-parallel domain hold the same tokens, so
    each sends its share of every chunk through its own group, and an all-gather inside the domain completes them.
    Bytes through the group fall by the size of the domain.

    Needs the same `input` on all ranks of the domain, and splits that are equal there.

    Args:
        domain_size, domain_rank (`int`): ranks that hold these tokens, and which of them this is.
        num_ranks (`int`): ranks of the group. The others as in [`two_level_plan`].
    """
    if input_counts is None or output_counts is None:
        input_counts = output_counts = [input.shape[0] // num_ranks] * num_ranks

    def share(count: int, part: int) -> tuple[int, int]:
        return count * part // domain_size, count * (part + 1) // domain_size

    def share_size(count: int, part: int) -> int:
        start, stop = share(count, part)
        return stop - start

    bounds = [share(count, domain_rank) for count in input_counts]
    send = torch.cat(
        [chunk[start:stop] for chunk, (start, stop) in zip(input.split(list(input_counts)), bounds, strict=True)]
    )
    shares = [[share_size(count, part) for count in output_counts] for part in range(domain_size)]
    # All-gather wants equal parts: the shares differ by a row per chunk at most.
    padded = max(map(sum, shares))
    part = input.new_zeros((padded, *input.shape[1:]))
    receive_counts = shares[domain_rank]
    yield Exchange(
        "group", send, part[: sum(receive_counts)], [stop - start for start, stop in bounds], receive_counts
    )
    parts = input.new_empty((domain_size * padded, *input.shape[1:]))
    yield Exchange("domain", part, parts, gather=True)
    pieces = [
        part[: sum(counts)].split(counts) for part, counts in zip(parts.split(padded or 1), shares, strict=False)
    ]
    if padded:
        torch.cat([pieces[part][source] for source in range(num_ranks) for part in range(domain_size)], out=output)
