# SPDX-License-Identifier: Apache-2.0
"""
Over which tokens the router losses are taken: router statistics summed over ranks, with gradients.

The load-balancing statistics of a step are those of all ranks; the locality loss compares a node's tokens with the node's
experts. Both come from one all-reduce of a few floats a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks whose gradient is the sum over ranks: every rank's loss depends on every rank's term."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class RouterScope:
    """
    Which ranks share their router statistics, and which experts are near.

    Args:
        group (`ProcessGroup`, *optional*): The ranks; the default group if not given, this process alone where
            torch.distributed is not initialised.
        num_nodes (`int`, defaults to 1): Nodes that the group spans.
        node (`int`, defaults to 0): The node of this rank, below `num_nodes`.
        node_local_experts (`torch.Tensor`, *optional*): Boolean of shape `(num_experts,)` or `(num_moe_layers,
            num_experts)`, the experts that live on this rank's node. Not given: all of them.
        locality_scale (`torch.Tensor`, *optional*): Float32 of shape `(num_moe_layers,)`, the weight of each layer's locality
            loss at present, a tensor that is written in place. Not given: 1.
    """

    group: dist.ProcessGroup | None = None
    num_nodes: int = 1
    node: int = 0
    node_local_experts: torch.Tensor | None = None
    locality_scale: torch.Tensor | None = None

    @property
    def num_ranks(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return dist.get_world_size(self.group)

    def reduce(self, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            sums (`torch.Tensor`, any shape): This rank's sums over its tokens.

        Returns:
            The sums over all ranks of the group, and over those of this rank's node. A rank's gradient through either is
            the sum of all ranks' gradients.
        """
        if self.num_ranks == 1:
            return sums, sums
        by_node = torch.nn.functional.pad(
            sums.unsqueeze(0), [0, 0] * sums.dim() + [self.node, self.num_nodes - 1 - self.node]
        )
        by_node = _AllReduceSum.apply(by_node, self.group)
        return by_node.sum(dim=0), by_node[self.node]


__all__ = ["RouterScope"]
