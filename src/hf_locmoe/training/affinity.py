# SPDX-License-Identifier: Apache-2.0
"""
Which experts a token id goes to, learned while training: what batch and expert placement decide by.

Shapes: m tokens of a sample, L = MoE layers, n = num_experts, k = num_experts_per_tok, N = nodes, V = buckets of keys (token
ids, or domains).
"""

from __future__ import annotations

from typing import Any

import torch


MAX_BUCKETS = 4096  # keys beyond share buckets: a few MB at any vocabulary
PRIOR_COUNT = 1.0  # tokens' worth of an even spread in every bucket: a key that was hardly seen says nothing


class AffinityTable:
    """
    Exponentially averaged counts of where tokens go, on the CPU. Every rank updates it with the same tokens, so it is the
    same on all ranks.

    Args:
        num_layers (`int`): L.
        num_keys (`int`): Token ids (the vocabulary) or domains.
        num_experts (`int`): n.
        num_nodes (`int`): N.
        decay (`float`, defaults to 0.98): Weight that an update leaves to the ones before: 1 / (1 - decay) steps of memory.

    Attributes:
        counts (`torch.Tensor` of shape `(L, V, n)`): Assignments by key and expert.
        expert_node_mass (`torch.Tensor` of shape `(L, n, N)`): Assignments by expert and the node that computed the token.
    """

    def __init__(self, num_layers: int, num_keys: int, num_experts: int, num_nodes: int, decay: float = 0.98):
        self.num_buckets = min(num_keys, MAX_BUCKETS)
        self.decay = decay
        self.counts = torch.zeros(num_layers, self.num_buckets, num_experts)
        self.expert_node_mass = torch.zeros(num_layers, num_experts, num_nodes)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was seen yet, so that every score is the same."""
        return not bool(self.expert_node_mass.any())

    @property
    def num_nodes(self) -> int:
        return self.expert_node_mass.shape[-1]

    def update(self, keys: torch.Tensor, experts: torch.Tensor, node_of_token: torch.Tensor) -> None:
        """
        Adds the tokens of an optimizer step, or a sample of them.

        Args:
            keys (`torch.Tensor` of shape `(m,)`): Int64, token ids or domains.
            experts (`torch.Tensor` of shape `(m, L, k)`): Int64, the experts of each token in each layer.
            node_of_token (`torch.Tensor` of shape `(m,)`): Int64, the node that computed it.
        """
        num_layers, num_buckets, num_experts = self.counts.shape
        bucket = (keys % num_buckets).view(-1, 1, 1)
        layer = torch.arange(num_layers).view(1, -1, 1)
        ones = torch.ones(experts.numel())
        self.counts *= self.decay
        place = (layer * num_buckets + bucket) * num_experts + experts
        self.counts.view(-1).index_add_(0, place.flatten(), ones)
        self.expert_node_mass *= self.decay
        place = (layer * num_experts + experts) * self.num_nodes + node_of_token.view(-1, 1, 1)
        self.expert_node_mass.view(-1).index_add_(0, place.flatten(), ones)

    def node_shares(self, on_node: torch.Tensor) -> torch.Tensor:
        """
        Share of a key's assignments that each node's experts take, mean over layers.

        Args:
            on_node (`torch.Tensor` of shape `(L, n, N)`): Whether a token computed on that node finds the expert there.

        Returns:
            `torch.Tensor` of shape `(V, N)`, float32; near the even share for a key hardly seen.
        """
        on_node = on_node.float()
        even = on_node.mean(dim=1, keepdim=True)  # (L, 1, N)
        total = self.counts.sum(dim=-1, keepdim=True)
        # long rows from short ones: this way round the product takes half the time
        by_node = torch.bmm(on_node.transpose(1, 2).contiguous(), self.counts.transpose(1, 2)).transpose(1, 2)
        return ((by_node + PRIOR_COUNT * even) / (total + PRIOR_COUNT)).mean(dim=0)

    def node_scores(
        self,
        keys: torch.Tensor,
        on_node: torch.Tensor,
        mask: torch.Tensor | None = None,
        shares: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        How much of each sample would stay on each node.

        Args:
            keys (`torch.Tensor` of shape `(S, Q)`): Int64, the samples' token ids; `(S, 1)` for domains.
            on_node (`torch.Tensor` of shape `(L, n, N)`): See [`AffinityTable.node_shares`].
            mask (`torch.Tensor` of shape `(S, Q)`, *optional*): False or 0 where a token is padding.
            shares (`torch.Tensor` of shape `(V, N)`, *optional*): `node_shares(on_node)`, where the caller has it already.

        Returns:
            `torch.Tensor` of shape `(S, N)`, float32: expected node-local assignments of a layer, in tokens.
        """
        shares = self.node_shares(on_node) if shares is None else shares
        shares = shares[keys % self.num_buckets]
        return shares.sum(dim=1) if mask is None else (shares * mask.unsqueeze(-1).to(shares.dtype)).sum(dim=1)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"counts": self.counts.clone(), "expert_node_mass": self.expert_node_mass.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what fits: of another number of nodes, the keys' experts are still right."""
        if state["counts"].shape == self.counts.shape:
            self.counts.copy_(state["counts"])
        if state["expert_node_mass"].shape == self.expert_node_mass.shape:
            self.expert_node_mass.copy_(state["expert_node_mass"])


__all__ = ["AffinityTable"]
