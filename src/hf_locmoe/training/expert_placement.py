# SPDX-License-Identifier: Apache-2.0
"""
Which node holds which expert: decided per layer from where the tokens that go there are computed.

Shapes: L MoE layers, n experts, N nodes.
"""

from __future__ import annotations

import numpy as np

from .placement import balanced_assignment


LEAST_GAIN = 0.01  # of the node-local share, below which moving experts is not worth its bytes


def place_experts(
    mass: np.ndarray, slots_per_node: int, current: np.ndarray | None = None, least_gain: float = LEAST_GAIN
) -> np.ndarray:
    """
    The node of each expert that keeps the most assignments on their node, with equally many experts on every node.

    Args:
        mass (`np.ndarray` of shape `(n, N)`): Assignments of each expert by the node that computed the token.
        slots_per_node (`int`): Experts that a node holds.
        current (`np.ndarray` of shape `(n,)`, *optional*): Where they are; contiguous if not given.
        least_gain (`float`): Share of all assignments that a new placement has to bring home, or nothing moves.

    Returns:
        `np.ndarray` of shape `(n,)`, int64.
    """
    mass = np.asarray(mass, dtype=np.float64)
    num_experts, num_nodes = mass.shape
    if current is None:
        current = np.arange(num_experts) // slots_per_node
    total, experts = mass.sum(), np.arange(num_experts)
    if total == 0:
        return current
    shares = mass / total
    best = balanced_assignment(
        # of two equal placements the one that moves less
        shares + 1e-9 * (np.arange(num_nodes) == current[:, None]),
        [slots_per_node] * num_nodes,
    )
    gain = shares[experts, best].sum() - shares[experts, current].sum()
    return best if gain >= least_gain else current


__all__ = ["LEAST_GAIN", "place_experts"]
