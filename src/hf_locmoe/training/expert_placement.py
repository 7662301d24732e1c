# SPDX-License-Identifier: Apache-2.0
"""
Which node holds which expert: decided per layer from where the tokens that go there are computed.
`distributed/expert_move.py` moves them.

Shapes: L MoE layers, n experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..distributed.topology import NodeTopology
from .placement import balanced_assignment


LEAST_GAIN = 0.01  # of the node-local share, below which moving experts is not worth its bytes


def place_experts(
    mass: np.ndarray,
    slots_per_node: int | Sequence[int],
    current: np.ndarray | None = None,
    least_gain: float = LEAST_GAIN,
) -> np.ndarray:
    """
    The node of each expert that keeps the most assignments on their node, with as many experts on a node as before.

    Args:
        mass (`np.ndarray` of shape `(n, N)`): Assignments of each expert by the node that computed the token.
        slots_per_node (`int` or one a node): Experts that a node holds.
        current (`np.ndarray` of shape `(n,)`, *optional*): Where they are; contiguous if not given.
        least_gain (`float`): Share of all assignments that a new placement has to bring home, or nothing moves.

    Returns:
        `np.ndarray` of shape `(n,)`, int64.
    """
    mass = np.asarray(mass, dtype=np.float64)
    num_experts, num_nodes = mass.shape
    slots = [slots_per_node] * num_nodes if isinstance(slots_per_node, int) else list(slots_per_node)
    if current is None:
        current = np.repeat(np.arange(num_nodes), slots)
    total, experts = mass.sum(), np.arange(num_experts)
    if total == 0:
        return current
    shares = mass / total
    best = balanced_assignment(
        # of two equal placements the one that moves less
        shares + 1e-9 * (np.arange(num_nodes) == current[:, None]),
        slots,
    )
    gain = shares[experts, best].sum() - shares[experts, current].sum()
    return best if gain >= least_gain else current


def expert_ranks(node: np.ndarray, load: np.ndarray, topology: NodeTopology) -> tuple[int, ...]:
    """
    The rank of each expert on the node it was given: where it is if that is right, else on the rank of its node that has
    room and the least load, the heaviest expert first.

    Args:
        node (`np.ndarray` of shape `(n,)`): Node of each expert; as many on a node as now.
        load (`np.ndarray` of shape `(n,)`): Assignments of each expert.
        topology ([`NodeTopology`]): With the experts where they are.

    Returns:
        `tuple[int, ...]` of length n: A rank of the topology for each expert, equally many as now on each.
    """
    now = topology.expert_to_rank
    rank = [owner if topology.node_of_rank(owner) == home else -1 for owner, home in zip(now, node)]
    room = {peer: now.count(peer) - rank.count(peer) for peer in range(topology.num_ranks)}
    held = {peer: sum(load[expert] for expert, owner in enumerate(rank) if owner == peer) for peer in room}
    newcomers = [expert for expert, owner in enumerate(rank) if owner < 0]
    for expert in sorted(newcomers, key=lambda expert: (-load[expert], expert)):
        free = [peer for peer in topology.ranks_of_node(int(node[expert])) if room[peer]]
        chosen = min(free, key=lambda peer: (held[peer], peer))
        rank[expert], room[chosen], held[chosen] = chosen, room[chosen] - 1, held[chosen] + load[expert]
    return tuple(rank)


__all__ = ["LEAST_GAIN", "expert_ranks", "place_experts"]
