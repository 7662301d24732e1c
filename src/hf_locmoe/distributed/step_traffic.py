# SPDX-License-Identifier: Apache-2.0
"""
What one optimizer step of a layout sends, counted from sizes alone: bytes between nodes, bytes inside, and rounds.

Legend: p = ranks of a group, N = nodes, M = ranks of a node, k = experts a token goes to, q = share of the assignments
that stay on their node. Bytes are those that one node sends; rounds follow each other on every rank.

Rings and pairwise exchanges are counted as in Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication
Operations in MPICH" (2005): all-gather and reduce-scatter `p - 1` rounds and `(p - 1) / p` of the bytes, all-reduce
twice that, all-to-all `p - 1` rounds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .layouts import ModelSize


@dataclass(frozen=True)
class Traffic:
    """
    Args:
        bytes_inter_node (`float`): bytes that one node sends to others.
        bytes_intra_node (`float`): bytes that the ranks of one node send to each other.
        rounds_inter_node (`float`): messages between nodes that follow each other.
        rounds_intra_node (`float`): messages inside a node that follow each other.
    """

    bytes_inter_node: float = 0.0
    bytes_intra_node: float = 0.0
    rounds_inter_node: float = 0.0
    rounds_intra_node: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.bytes_inter_node + other.bytes_inter_node,
            self.bytes_intra_node + other.bytes_intra_node,
            self.rounds_inter_node + other.rounds_inter_node,
            self.rounds_intra_node + other.rounds_intra_node,
        )


@dataclass(frozen=True)
class Workload:
    """
    What a rank does in an optimizer step, and in which numbers.

    Args:
        tokens_per_rank (`int`): tokens of one rank in one micro-batch.
        accumulation_steps (`int`): micro-batches a step.
        checkpointing (`bool`): whether activations are recomputed.
        bytes_per_element (`int`): of parameters and gradients, and of tokens under way unless they have their own.
        wire_bytes_per_element (`int`, *optional*): of tokens under way, such as 2 for `wire_dtype="bfloat16"`.
        state_bytes_per_parameter (`int`): memory of a parameter; 16 for float32 with Adam.
        reduce_scatter_passes (`int`): 1; 2 for gloo, whose reduce-scatter sends as much as an all-reduce.
    """

    tokens_per_rank: int
    accumulation_steps: int = 1
    checkpointing: bool = False
    bytes_per_element: int = 4
    wire_bytes_per_element: int | None = None
    state_bytes_per_parameter: int = 16
    reduce_scatter_passes: int = 1

    @property
    def wire_bytes(self) -> int:
        return self.wire_bytes_per_element or self.bytes_per_element

    @property
    def transfers(self) -> int:
        """Exchanges of a layer and micro-batch: out and back, forward and backward; out once more when recomputed."""
        return 5 if self.checkpointing else 4


@dataclass(frozen=True)
class Span:
    """
    Where the ranks of one group sit; all groups of a kind alike.

    Args:
        num_ranks (`int`): ranks of the group.
        num_nodes (`int`): nodes that they sit on.
        ranks_on_node (`int`): of them, on one node; the most where nodes differ.
    """

    num_ranks: int = 1
    num_nodes: int = 1
    ranks_on_node: int = 1

    @classmethod
    def of(cls, nodes: list[int]) -> Span:
        """From the node of each of its ranks."""
        counts = Counter(nodes)
        return cls(len(nodes), len(counts), max(counts.values()))


@dataclass(frozen=True)
class LayoutGroups:
    """
    The groups that a layout communicates in.

    Args:
        layout (`str`): which.
        num_nodes (`int`): nodes of the job.
        ranks_per_node (`int`): ranks of a node; the most where nodes differ.
        dense_shards (`Span`): ranks that share one copy of the dense layers.
        dense_replicas (`Span`): ranks that hold the same shard of the dense layers.
        expert_shards (`Span`): ranks that share one expert.
        expert_replicas (`Span`): ranks that hold the same expert, or shard of one.
        expert_parallel (`Span`): ranks that hold one set of all experts, between which tokens travel.
        nodes_with_experts (`int`, *optional*):
            of its nodes, how many hold any; all when left out. Else the ranks of a node share the node's experts.
    """

    layout: str
    num_nodes: int
    ranks_per_node: int
    dense_shards: Span
    dense_replicas: Span
    expert_shards: Span
    expert_replicas: Span
    expert_parallel: Span
    nodes_with_experts: int | None = None

    @property
    def expert_nodes(self) -> int:
        """Nodes of an expert-parallel group that hold experts."""
        return self.nodes_with_experts or self.expert_parallel.num_nodes

    @property
    def expert_ranks(self) -> int:
        """Ranks of an expert-parallel group that hold experts."""
        return self.expert_parallel.num_ranks * self.expert_nodes // self.expert_parallel.num_nodes

    @property
    def expert_parts(self) -> int:
        """Parts that the experts of a group are in, each computed at its own pace: ranks, or nodes that share theirs."""
        return self.expert_ranks if self.nodes_with_experts is None else self.expert_nodes

    def local_share(self, of_router: float | None, size: ModelSize) -> float:
        """
        Share of the assignments that stay on their node, on nodes that have experts: the router's, but at least one part
        in `expert_nodes`, which uniform routing keeps, and no more than a node has experts for the k of a token.
        """
        most = size.num_experts / self.expert_nodes / max(size.num_experts_per_tok, 1)
        return max(1 / self.expert_nodes, min(of_router or 0.0, most))

    def mean_local_share(self, of_router: float | None, size: ModelSize) -> float:
        """The same over all nodes: on one without experts nothing stays. Uniform routing gives one part in `num_nodes`."""
        return self.local_share(of_router, size) * self.expert_nodes / self.expert_parallel.num_nodes

    def busiest_direction(self, of_router: float | None, size: ModelSize, busiest_node: float = 1.0) -> float:
        """
        Tokens in the busiest direction of a node's link during an exchange, as a multiple of a node's own tokens: the
        exchange ends when that direction has ended.

        Where all nodes have experts that is `1 - q`, times the load of the busiest node. Otherwise those that have
        some take in the tokens of the others as well, `nodes / nodes with experts - q`, and the others send all of
        theirs.

        Args:
            of_router (`float`, *optional*), size (`ModelSize`): as in [`LayoutGroups.local_share`].
            busiest_node (`float`): load of the busiest node over the mean of the nodes with experts.
        """
        nodes, holders = self.expert_parallel.num_nodes, self.expert_nodes
        incoming = busiest_node * (nodes / holders - self.local_share(of_router, size))
        return incoming if nodes == holders else max(incoming, 1.0)


def ring(num_bytes: float, span: Span, groups_on_node: float, passes: float, calls: float = 1) -> Traffic:
    """
    `passes` times around a ring, in which every rank passes on `(p - 1) / p` of the bytes.

    Args:
        num_bytes (`float`): of the whole, in all calls together.
        span (`Span`): the ring.
        groups_on_node (`float`): such rings that one node takes part in.
        passes (`float`): 1 for an all-gather or a reduce-scatter, 2 for an all-reduce.
        calls (`float`): collectives that the bytes are cut into.
    """
    crosses = span.num_nodes > 1
    volume = num_bytes * passes * groups_on_node * (span.num_ranks - 1) / span.num_ranks
    rounds = passes * calls * (span.num_ranks - 1)
    return Traffic(
        volume if crosses else 0.0,
        volume * (span.ranks_on_node - crosses),
        rounds if crosses else 0.0,
        0.0 if crosses else rounds,
    )


def parameter_traffic(groups: LayoutGroups, size: ModelSize, work: Workload) -> Traffic:
    """
    Weights and gradients of a step: each shard is gathered in every forward and again in every backward, but for the
    head, which transformers keeps from one to the other; gradients are reduced over the shards and the replicas once.
    """
    gathers = work.accumulation_steps

    def traffic(parameters: float, shards: Span, replicas: Span, gathers: int, calls: int) -> Traffic:
        num_bytes = parameters * work.bytes_per_element
        passes = gathers + work.reduce_scatter_passes
        return ring(num_bytes, shards, groups.ranks_per_node / shards.ranks_on_node, passes, calls) + ring(
            num_bytes / shards.num_ranks, replicas, groups.ranks_per_node / replicas.ranks_on_node, 2, calls
        )

    dense = (groups.dense_shards, groups.dense_replicas)
    experts_of_rank = size.expert_parameters / groups.expert_ranks
    return (
        traffic(size.dense_parameters - size.kept_parameters, *dense, 2 * gathers, size.num_layers)
        + traffic(size.kept_parameters, *dense, gathers, 1)
        + traffic(experts_of_rank, groups.expert_shards, groups.expert_replicas, 2 * gathers, size.num_moe_layers)
    )


def token_traffic(
    groups: LayoutGroups,
    size: ModelSize,
    work: Workload,
    local_share: float | None,
    picks_neighbours: bool = False,
) -> Traffic:
    """
    Tokens of a step to their experts and back, by fan-out "node": a token crosses once for every other node that has one
    of its experts and is handed on inside that node; inside its own node it goes once to every rank that has one.

    Args:
        local_share (`float`, *optional*): the router's, see [`LayoutGroups.local_share`]; uniform when left out.
        picks_neighbours (`bool`):
            whether a token's experts follow each other, as our hash gate's do, so that they often share a place.
    """
    span, top_k = groups.expert_parallel, size.num_experts_per_tok
    if span.num_ranks == 1 or not size.num_moe_layers:
        return Traffic()
    local_share = groups.mean_local_share(local_share, size)
    other_nodes = groups.expert_nodes - 1 or 1
    on_node = span.ranks_on_node

    def copies(share: float, places: int) -> float:
        """Places that get a token, if `share` of its k different experts are on one of them."""
        if picks_neighbours:
            experts_of_place = share / places * size.num_experts
            return places * min((experts_of_place + top_k - 1) / size.num_experts, 1.0)
        missed = 1.0
        for drawn in range(top_k):  # experts are drawn without putting them back
            missed *= max(1 - share / places * size.num_experts / (size.num_experts - drawn), 0.0)
        return places * (1 - missed)

    crossing = copies(1 - local_share, other_nodes)
    handed_on = copies(1 - local_share, other_nodes * on_node) - crossing
    inside = copies(local_share, on_node) * (on_node - 1) / on_node
    exchanges = size.num_moe_layers * work.accumulation_steps * work.transfers
    bytes_of_all = exchanges * groups.ranks_per_node * work.tokens_per_rank * size.hidden_size * work.wire_bytes
    return Traffic(
        bytes_of_all * crossing,
        bytes_of_all * (handed_on + inside),
        exchanges * (span.num_ranks - on_node),
        exchanges * (on_node - 1),
    )
