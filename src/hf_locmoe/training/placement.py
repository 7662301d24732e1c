# SPDX-License-Identifier: Apache-2.0
"""
Dealing things to nodes under equal counts: samples of a batch by the tokens that would stay, experts by the tokens that come.

Shapes: S things, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def balanced_assignment(scores: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """
    The assignment of things to nodes with the greatest total score under fixed counts: a transportation problem, solved
    exactly by moving things along the cheapest chains of nodes from a full one to one with room.

    Starts with everything where it scores best; every chain after that moves one thing off a node that has too many and
    costs the least that such a move can, which keeps the assignment the best one for its own counts. Deterministic: ties go
    to the lower node and the lower thing.

    Args:
        scores (`np.ndarray` of shape `(S, N)`): Gain of thing s on node v. Equal on all ranks that have to agree.
        counts (`Sequence[int]` of length N): Things that each node takes; they add up to S.

    Returns:
        `np.ndarray` of shape `(S,)`, int64: the node of each thing.

    Raises:
        ValueError: `counts` that do not add up to S, scores that are not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    num_things, num_nodes = scores.shape
    wanted = np.asarray(counts, dtype=np.int64)
    if wanted.shape != (num_nodes,) or wanted.sum() != num_things or (wanted < 0).any():
        raise ValueError(f"`counts` ({list(counts)}) must be {num_nodes} numbers that add up to {num_things}.")
    if not np.isfinite(scores).all():
        raise ValueError("`scores` hold NaN or infinite values: nothing can be compared with them.")
    node = scores.argmax(axis=1) if num_things else np.zeros(0, dtype=np.int64)
    held = np.bincount(node, minlength=num_nodes)
    # cost[u, v]: the least that a thing on u loses by moving to v, and which thing that is
    cost = np.full((num_nodes, num_nodes), np.inf)
    mover = np.full((num_nodes, num_nodes), -1)

    def refresh(u: int) -> None:
        things = np.flatnonzero(node == u)
        if len(things) == 0:
            cost[u], mover[u] = np.inf, -1
            return
        loss = scores[things, u, None] - scores[things]
        best = loss.argmin(axis=0)
        cost[u], mover[u] = loss[best, np.arange(num_nodes)], things[best]
        cost[u, u] = np.inf

    for u in range(num_nodes):
        refresh(u)
    while (held > wanted).any():
        path = _cheapest_chain(cost, held > wanted, held < wanted)
        moves = [(mover[u, v], v) for u, v in zip(path, path[1:])]
        for thing, v in moves:
            node[thing] = v
        held[path[0]] -= 1
        held[path[-1]] += 1
        for u in path:
            refresh(u)
    return node.astype(np.int64)


def _cheapest_chain(cost: np.ndarray, full: np.ndarray, has_room: np.ndarray) -> list[int]:
    """Bellman-Ford over the nodes: the cheapest path from any full one to any with room; costs may be negative."""
    num_nodes = len(cost)
    distance = np.where(full, 0.0, np.inf)
    before = np.full(num_nodes, -1)
    for _ in range(num_nodes - 1):
        through = distance[:, None] + cost
        best = through.argmin(axis=0)
        reached = through[best, np.arange(num_nodes)]
        better = reached < distance - 1e-12
        if not better.any():
            break
        distance = np.where(better, reached, distance)
        before = np.where(better, best, before)
    node = int(np.where(has_room, distance, np.inf).argmin())
    path = [node]
    while before[node] >= 0:
        node = int(before[node])
        path.append(node)
    return path[::-1]


__all__ = ["balanced_assignment"]
