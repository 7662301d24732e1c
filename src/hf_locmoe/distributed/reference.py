# SPDX-License-Identifier: Apache-2.0
"""
Dispatch and combine written down as they are meant, in one process: slow, differentiable, and what tests compare with.

Shape legend: one list entry per rank; T_r tokens of rank r, d hidden size, k experts per token, R_r rows at rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """Where a row comes from: slot `slot` of token `token` of rank `rank`, which chose expert `expert`."""

    rank: int
    token: int
    slot: int
    expert: int


def reference_dispatch(
    hidden_states: Sequence[torch.Tensor], top_k_index: Sequence[torch.Tensor], expert_to_rank: Sequence[int]
) -> list[tuple[list[torch.Tensor], list[Pair]]]:
    """
    One row for every (token, expert) pair at the expert's rank.

    Args:
        hidden_states: `(T_r, d)` of every rank.
        top_k_index: `(T_r, k)` of every rank; an id past the last expert is a dropped assignment.
        expert_to_rank: rank of every expert.

    Returns:
        for every rank its rows, each of shape `(d,)`, and where each comes from.
    """
    arrived: list[tuple[list[torch.Tensor], list[Pair]]] = [([], []) for _ in hidden_states]
    for rank, (states, index) in enumerate(zip(hidden_states, top_k_index, strict=True)):
        for token, experts in enumerate(index.tolist()):
            for slot, expert in enumerate(experts):
                if expert < len(expert_to_rank):
                    rows, pairs = arrived[expert_to_rank[expert]]
                    rows.append(states[token])
                    pairs.append(Pair(rank, token, slot, expert))
    return arrived


def reference_combine(
    outputs: Sequence[Sequence[torch.Tensor]],
    pairs: Sequence[Sequence[Pair]],
    hidden_states: Sequence[torch.Tensor],
    top_k_weights: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """
    Every pair's output, times its weight, added at its token.

    Args:
        outputs: rows of every rank, each of shape `(d,)`, as the experts made them.
        pairs: where each comes from, as [`reference_dispatch`] says.
        hidden_states: `(T_r, d)` of every rank, for the shapes.
        top_k_weights: `(T_r, k)` of every rank.

    Returns:
        `(T_r, d)` of every rank.
    """
    combined = [[torch.zeros_like(row) for row in states] for states in hidden_states]
    for rows, origins in zip(outputs, pairs, strict=True):
        for row, pair in zip(rows, origins, strict=True):
            weight = top_k_weights[pair.rank][pair.token, pair.slot]
            combined[pair.rank][pair.token] = combined[pair.rank][pair.token] + weight * row
    return [torch.stack(rows) if rows else states * 0 for rows, states in zip(combined, hidden_states, strict=True)]
