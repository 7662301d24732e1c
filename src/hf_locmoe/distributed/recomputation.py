# SPDX-License-Identifier: Apache-2.0
"""
The routing of a layer whose backward is under way, for the forward that activation checkpointing runs again in it.

A recomputed router may break a tie in another way and bring other token counts, which autograd refuses on one rank
while the others wait. So the plan of the first forward is used again, and its sizes need no second exchange and host
read.

    backward of one layer     combine' ── offer ──> experts' ── recompute: take ──> dispatch' ── withdraw
"""

from __future__ import annotations

import torch

from .dispatch import DispatchPlan


class Recomputation:
    """
    Keeps one plan between the start of a layer's backward and its dispatch's backward, and gives it to a forward that
    runs in between, in the same backward pass. A forward that comes earlier (of a branch beside the experts) finds
    nothing and plans anew.
    """

    def __init__(self) -> None:
        self._offer: tuple[int, DispatchPlan] | None = None

    def offer(self, plan: DispatchPlan) -> None:
        self._offer = (_backward_id(), plan)

    def withdraw(self) -> None:
        self._offer = None

    def take(self, top_k_index: torch.Tensor) -> DispatchPlan | None:
        """The plan of the forward that is recomputed, or `None` where this forward is no recomputation."""
        offer, self._offer = self._offer, None
        if offer is None or offer[0] != _backward_id() or offer[1].top_k_index.shape != top_k_index.shape:
            return None
        return offer[1]


def _backward_id() -> int:
    """
    Number of the backward pass that this code runs in, -1 outside of one.

    torch has no public name for it; `torch/utils/checkpoint.py` tells recomputations apart by the same call.
    """
    return torch._C._current_graph_task_id()
