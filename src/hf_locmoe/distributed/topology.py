# SPDX-License-Identifier: Apache-2.0
"""Which rank sits on which node, and which rank holds which expert: data in a table, pure Python.

Legend: a *rank* here is a position in the topology (0 .. num_ranks - 1). For the whole job it is the global rank, for
the topology of a process group it is the rank inside that group, and `global_ranks` leads back. *Nodes* are numbered
in the order in which their first rank comes. *Placement* is the table expert -> rank.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .launch_environment import RANKS_PER_NODE_VARIABLE, node_key, parse_sizes, read_launcher


@dataclass(frozen=True)
class NodeTopology:
    """
    Ranks, nodes and experts of one job or of one process group.

    Args:
        rank_to_node (`tuple[int, ...]`):
            Node of every rank, `num_ranks` entries. Any numbering is accepted and is made dense, in order of
            appearance.
        expert_to_rank (`tuple[int, ...]`, *optional*, defaults to no experts):
            The placement: rank that holds every expert, `num_experts` entries. See [`contiguous_placement`].
        global_ranks (`tuple[int, ...]`, *optional*):
            Global rank of every rank; `0 .. num_ranks - 1` when left out.
        node_names (`tuple[str, ...]`, *optional*):
            A name for each node, for messages and tables; the node's number when left out.

    Raises:
        ValueError: an empty topology, tables of different lengths, or an expert on a rank that does not exist.

    Example:

    ```python
    >>> topology = NodeTopology.from_ranks_per_node(2, num_ranks=4).with_experts(8)
    >>> topology.experts_of_node(1)
    (4, 5, 6, 7)
    ```
    """

    rank_to_node: tuple[int, ...]
    expert_to_rank: tuple[int, ...] = ()
    global_ranks: tuple[int, ...] = ()
    node_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.rank_to_node:
            raise ValueError("`rank_to_node` (()) must name the node of at least one rank: give one entry per rank.")
        numbers: dict[int, int] = {}
        dense = tuple(numbers.setdefault(node, len(numbers)) for node in self.rank_to_node)
        names = tuple(self.node_names) or tuple(str(node) for node in range(len(numbers)))
        ranks = tuple(self.global_ranks) or tuple(range(len(dense)))
        object.__setattr__(self, "rank_to_node", dense)
        object.__setattr__(self, "expert_to_rank", tuple(self.expert_to_rank))
        object.__setattr__(self, "node_names", names)
        object.__setattr__(self, "global_ranks", ranks)
        if len(names) != len(numbers):
            raise ValueError(
                f"`node_names` ({len(names)} entries) must have one entry per node of `rank_to_node` "
                f"({len(numbers)}): give one name per node, in the order of the nodes' first ranks, or leave it out."
            )
        if len(ranks) != len(dense) or len(set(ranks)) != len(ranks):
            raise ValueError(
                f"`global_ranks` ({ranks}) must name {len(dense)} different ranks, one per entry of `rank_to_node`: "
                "give each member once, or leave it out."
            )
        stray = sorted({rank for rank in self.expert_to_rank if not 0 <= rank < len(dense)})
        if stray:
            raise ValueError(
                f"`expert_to_rank` places experts on ranks {stray}, which must be within 0 .. {len(dense) - 1}: "
                "place every expert on a rank of this topology."
            )

    # ---- where a topology comes from -------------------------------------------------------------------------------

    @classmethod
    def from_keys(cls, keys: Sequence[str], names: Mapping[str, str] | None = None) -> NodeTopology:
        """
        Ranks with equal keys share a node.

        Args:
            keys (`Sequence[str]`): one key per rank, as [`node_key`] gives them.
            names (`Mapping[str, str]`, *optional*): key -> name to print; the node's number when left out.
        """
        order = {key: node for node, key in enumerate(dict.fromkeys(keys))}
        return cls(
            rank_to_node=tuple(order[key] for key in keys),
            node_names=tuple(names[key] for key in order) if names else (),
        )

    @classmethod
    def from_ranks_per_node(
        cls, ranks_per_node: int | str | Sequence[int], num_ranks: int | None = None
    ) -> NodeTopology:
        """
        Contiguous ranks by hand: `2`, `"2"`, or an uneven `(4, 2, 2)` / `"4,2,2"`.

        Args:
            ranks_per_node (`int`, `str` or `Sequence[int]`):
                Ranks on each node. One number is repeated until all `num_ranks` ranks have a node; a job smaller than
                one node sits on one.
            num_ranks (`int`, *optional*): ranks of the job. Needed with a single number.

        Raises:
            ValueError: sizes below one, or sizes that do not add up to `num_ranks`.
        """
        sizes = parse_sizes(ranks_per_node, "ranks_per_node")
        if len(sizes) == 1 and num_ranks is not None:
            sizes = (min(sizes[0], num_ranks),)
            if num_ranks % sizes[0]:
                raise ValueError(
                    f"`ranks_per_node` ({sizes[0]}) must divide the number of ranks ({num_ranks}): set it to a "
                    f"divisor of {num_ranks}, or list the nodes one by one, such as "
                    f'"{sizes[0]},{num_ranks % sizes[0]}".'
                )
            sizes = sizes * (num_ranks // sizes[0])
        if num_ranks is not None and sum(sizes) != num_ranks:
            raise ValueError(
                f"`ranks_per_node` ({','.join(map(str, sizes))}) adds up to {sum(sizes)} ranks and must add up to the "
                f"number of ranks ({num_ranks}): change one of the two."
            )
        return cls(rank_to_node=tuple(node for node, size in enumerate(sizes) for _ in range(size)))

    @classmethod
    def from_environment(
        cls, env: Mapping[str, str] | None = None, ranks_per_node: int | str | Sequence[int] | None = None
    ) -> NodeTopology | None:
        """
        The whole job, from the launcher's environment alone.

        In this order: `ranks_per_node`, `LOCMOE_RANKS_PER_NODE`, torchrun (and `accelerate launch`, which runs it),
        SLURM, Open MPI, MVAPICH, Intel MPI / MPICH; with no launcher at all, one rank on one node.

        Returns:
            The topology, or `None` when the environment tells a rank its own node only (uneven nodes under torchrun,
            ranks started by hand): then ask the hosts, [`NodeTopology.from_store`].
        """
        env = os.environ if env is None else env
        launch = read_launcher(env)
        by_hand = ranks_per_node if ranks_per_node is not None else env.get(RANKS_PER_NODE_VARIABLE)
        if by_hand is not None:
            return cls.from_ranks_per_node(by_hand, launch.num_ranks)
        if launch.node_sizes is None:
            return None
        return cls(rank_to_node=launch.rank_to_node())

    @classmethod
    def from_store(
        cls, store, rank: int, num_ranks: int, key: str | None = None, prefix: str = "locmoe/node"
    ) -> NodeTopology:
        """
        Asks the hosts: every rank writes what tells its node apart into the store and reads all the others.

        Args:
            store: anything with `set(key, value)` and a waiting `get(key) -> bytes`: any `torch.distributed` store.
            rank (`int`): this rank.
            num_ranks (`int`): how many ranks call this.
            key (`str`, *optional*): what tells this rank's node apart; [`node_key`] when left out.
            prefix (`str`): where in the store. Two calls on one store need two prefixes.
        """
        store.set(f"{prefix}/{rank}", node_key(rank) if key is None else key)
        keys = [_text(store.get(f"{prefix}/{other}")) for other in range(num_ranks)]
        return cls.from_keys(keys, {key: key.rpartition(":")[2] for key in keys})

    # ---- ranks and nodes -------------------------------------------------------------------------------------------

    @property
    def num_ranks(self) -> int:
        return len(self.rank_to_node)

    @cached_property
    def num_nodes(self) -> int:
        return len(self.node_names)

    @cached_property
    def _node_ranks(self) -> tuple[tuple[int, ...], ...]:
        members: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for rank, node in enumerate(self.rank_to_node):
            members[node].append(rank)
        return tuple(map(tuple, members))

    def node_of_rank(self, rank: int) -> int:
        """Node of a rank."""
        return self.rank_to_node[rank]

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """Ranks of a node, ascending."""
        return self._node_ranks[node]

    @property
    def node_sizes(self) -> tuple[int, ...]:
        """Ranks (= devices) of every node."""
        return tuple(map(len, self._node_ranks))

    @property
    def is_rectangular(self) -> bool:
        """Whether all nodes have the same number of ranks, which the two-level exchange needs."""
        return len(set(self.node_sizes)) == 1

    def same_node(self, rank: int) -> tuple[bool, ...]:
        """For every rank, whether it shares the node of `rank` (itself included); `num_ranks` entries."""
        return tuple(node == self.rank_to_node[rank] for node in self.rank_to_node)

    def describe_rank(self, rank: int) -> str:
        """`rank 3 (node 1)`, by global rank and node name: the words of every message of ours."""
        return f"rank {self.global_ranks[rank]} (node {self.node_names[self.rank_to_node[rank]]})"

    def subset(self, ranks: Iterable[int]) -> NodeTopology:
        """
        The topology of a process group: `ranks` of this topology in the group's order, renumbered from 0. Nodes keep
        their names and `global_ranks` lead back. Experts are not taken along: a group's experts are placed on the
        group.

        Raises:
            ValueError: no rank, a rank twice, or one that is not in this topology.
        """
        ranks = tuple(ranks)
        if not ranks or len(set(ranks)) != len(ranks) or not all(0 <= rank < self.num_ranks for rank in ranks):
            raise ValueError(
                f"`ranks` ({ranks}) must name different ranks within 0 .. {self.num_ranks - 1}, at least one: give "
                "each member of the group once."
            )
        nodes = tuple(self.rank_to_node[rank] for rank in ranks)
        return NodeTopology(
            rank_to_node=nodes,
            global_ranks=tuple(self.global_ranks[rank] for rank in ranks),
            node_names=tuple(self.node_names[node] for node in dict.fromkeys(nodes)),
        )

    # ---- experts ---------------------------------------------------------------------------------------------------

    def with_experts(
        self, num_experts: int, placement: Sequence[int] | None = None, allow_uneven: bool = False
    ) -> NodeTopology:
        """
        The same ranks with experts placed on them.

        Args:
            num_experts (`int`): experts to place.
            placement (`Sequence[int]`, *optional*): table expert -> rank; contiguous when left out.
            allow_uneven (`bool`): whether ranks may hold different numbers of experts, none included.

        Raises:
            ValueError: a table of another length or with unknown ranks, or ranks with different numbers of experts
            without `allow_uneven`.

        Warns when a node holds no expert: none of its tokens can stay on their node.
        """
        if num_experts < 1:
            raise ValueError(f"`num_experts` ({num_experts}) must be at least 1: give the model at least one expert.")
        if placement is None:
            placement = contiguous_placement(num_experts, self.num_ranks)
        if len(placement) != num_experts:
            raise ValueError(
                f"`placement` ({len(placement)} entries) must have one rank per expert (`num_experts` = "
                f"{num_experts}): list the rank of every expert."
            )
        placed = replace(self, expert_to_rank=tuple(placement))
        counts = Counter(placed.expert_to_rank)
        sizes = [counts[rank] for rank in range(self.num_ranks)]
        if len(set(sizes)) > 1 and not allow_uneven:
            if num_experts % self.num_ranks:
                below = num_experts // self.num_ranks * self.num_ranks
                fitting = " or ".join(str(number) for number in (below, below + self.num_ranks) if number)
                way_out = f"set `num_experts` to {fitting}, use a number of ranks that divides it"
            else:
                way_out = "give every rank the same number of experts in `placement`"
            raise ValueError(
                f"`num_experts` ({num_experts}) must be spread evenly over the {self.num_ranks} ranks of the "
                f"expert-parallel group, and ranks would hold {min(sizes)} to {max(sizes)}: {way_out}, or allow an "
                "uneven placement (`allow_uneven=True`)."
            )
        empty = [node for node in range(self.num_nodes) if not placed.experts_of_node(node)]
        if empty:
            warnings.warn(
                f"{len(empty)} of {self.num_nodes} nodes hold no expert (`num_experts` = {num_experts}): their tokens "
                "all go to other nodes, and the locality loss has no effect there. Use at least as many experts as "
                "nodes, or a `placement` that gives every node one.",
                stacklevel=2,
            )
        return placed

    @property
    def num_experts(self) -> int:
        return len(self.expert_to_rank)

    def experts_of_rank(self, rank: int) -> tuple[int, ...]:
        """Experts that a rank holds, ascending."""
        return tuple(expert for expert, owner in enumerate(self.expert_to_rank) if owner == rank)

    def experts_of_node(self, node: int) -> tuple[int, ...]:
        """Experts that a node's ranks hold, ascending."""
        return tuple(expert for expert, owner in enumerate(self.expert_to_rank) if self.rank_to_node[owner] == node)

    def node_local_experts(self, rank: int) -> tuple[bool, ...]:
        """For every expert, whether it lives on the node of `rank`; `num_experts` entries."""
        node = self.rank_to_node[rank]
        return tuple(self.rank_to_node[owner] == node for owner in self.expert_to_rank)


def contiguous_placement(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """
    Experts to ranks in order, numbers per rank differing by at most one; with fewer experts than ranks they are
    spread, so that as many nodes as possible hold one. Entry `e` is `e * num_ranks // num_experts`.
    """
    return tuple(expert * num_ranks // num_experts for expert in range(num_experts))


def format_topology(topology: NodeTopology) -> str:
    """The table that `locmoe topology` prints: a line per rank with its node and experts, and what is odd about it."""
    rows = [("node", "rank", "experts")]
    for node in range(topology.num_nodes):
        for rank in topology.ranks_of_node(node):
            experts = _ranges(topology.experts_of_rank(rank)) or "-"
            rows.append((topology.node_names[node], str(topology.global_ranks[rank]), experts))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2])) for row in rows]
    sizes = topology.node_sizes
    ranks_a_node = str(sizes[0]) if topology.is_rectangular else f"{min(sizes)} to {max(sizes)}"
    head = f"{topology.num_ranks} ranks on {topology.num_nodes} nodes, {ranks_a_node} ranks a node"
    if topology.num_experts:
        per_rank = [len(topology.experts_of_rank(rank)) for rank in range(topology.num_ranks)]
        spread = str(per_rank[0]) if len(set(per_rank)) == 1 else f"{min(per_rank)} to {max(per_rank)}"
        head += f", {topology.num_experts} experts, {spread} a rank"
    notes = []
    if not topology.is_rectangular:
        notes.append("Nodes differ in size: the backend's exchanges are flat.")
    empty = [topology.node_names[node] for node in range(topology.num_nodes) if not topology.experts_of_node(node)]
    if topology.num_experts and empty:
        notes.append(f"No expert on node {', '.join(empty)}: no token of theirs can stay on its node.")
    return "\n".join([head, "", *lines, *([""] if notes else []), *notes])


def describe_job(
    num_ranks: int | None = None,
    ranks_per_node: int | str | None = None,
    num_experts: int | None = None,
    ep_size: int | None = None,
    placement: Sequence[int] | None = None,
) -> str:
    """
    The text of `locmoe topology`: the whole job, or one table for every expert-parallel group.

    Args:
        num_ranks (`int`, *optional*): ranks of the job; the launcher's when left out.
        ranks_per_node (`int` or `str`, *optional*): see [`NodeTopology.from_ranks_per_node`]; the launcher's when left
            out.
        num_experts (`int`, *optional*): experts to place.
        ep_size (`int`, *optional*): consecutive ranks that share one copy of the experts; all when left out.
        placement (`Sequence[int]`, *optional*): table expert -> rank of its group.

    Raises:
        ValueError: a shape that does not fit, or one that the environment does not tell.
    """
    by_hand = ranks_per_node if ranks_per_node is not None else os.environ.get(RANKS_PER_NODE_VARIABLE)
    if num_ranks is not None or ranks_per_node is not None:
        topology = NodeTopology.from_ranks_per_node(by_hand or num_ranks or 1, num_ranks)
    else:
        known = NodeTopology.from_environment()
        if known is None:
            raise ValueError(
                "`ranks_per_node` (None) cannot be told from this process's environment: give the number of ranks and "
                f"the ranks of a node, or set `{RANKS_PER_NODE_VARIABLE}`."
            )
        topology = known
    ep_size = ep_size or topology.num_ranks
    if topology.num_ranks % ep_size:
        raise ValueError(
            f"`ep_size` ({ep_size}) must divide the number of ranks ({topology.num_ranks}): set it to a divisor of "
            f"{topology.num_ranks}."
        )
    groups = [topology.subset(range(first, first + ep_size)) for first in range(0, topology.num_ranks, ep_size)]
    if num_experts is not None:
        with warnings.catch_warnings():
            # the table says it
            warnings.simplefilter("ignore")
            groups = [group.with_experts(num_experts, placement, allow_uneven=True) for group in groups]
    return "\n\n".join(map(format_topology, groups))


def _ranges(numbers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> `0-2, 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
