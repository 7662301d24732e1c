# SPDX-License-Identifier: Apache-2.0
"""
The router losses (arXiv 2401.13920, eq. 5-7), as pure functions of summed statistics.

Every argument may have leading dimensions, one per layer for example, and the losses keep them: they are taken per layer,
never over layers pooled, where layers collapsed on different experts would look balanced.
"""

from __future__ import annotations

import torch


def load_balancing_loss(
    router_prob_sum: torch.Tensor, tokens_per_expert: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """
    `n * sum_i f_i P_i` (eq. 5, as in Switch Transformer; without the factor alpha). 1 when balanced at top-1. With k
    experts a token, f adds up to k, as in transformers' MoE models, and the balanced value is k.

    Args:
        router_prob_sum (`torch.Tensor` of shape `(..., n)`): Sum over tokens of the softmax probabilities.
        tokens_per_expert (`torch.Tensor` of shape `(..., n)`): Assignments. No gradient flows through them.
        num_tokens (`torch.Tensor` of shape `(...)`): Number of tokens summed over.

    Returns:
        `torch.Tensor` of shape `(...)`, float32; 0 where there are no tokens.
    """
    num_tokens = num_tokens.clamp_min(1).unsqueeze(-1)
    fraction = tokens_per_expert.detach() / num_tokens
    return router_prob_sum.shape[-1] * (fraction * (router_prob_sum / num_tokens)).sum(dim=-1)


def locality_loss(
    router_prob_sum: torch.Tensor,
    num_tokens: torch.Tensor,
    node_local_experts: torch.Tensor,
    remote_share: float = 0.1,
) -> torch.Tensor:
    """
    `KL(D_c || D_l)` (eq. 6; without the factor mu).

    D_c is the node's mean softmax. The paper's D_l has all mass on the node's own experts, where the divergence is
    infinite; here it is `1 - remote_share` spread over the node's experts and `remote_share` over the others, so the loss
    is at most `log(num_remote / remote_share)` and stops pulling once the remote share is reached.

    Args:
        router_prob_sum (`torch.Tensor` of shape `(..., n)`): Sum over the node's tokens of the softmax probabilities.
        num_tokens (`torch.Tensor` of shape `(...)`): Number of tokens summed over.
        node_local_experts (`torch.Tensor` of shape `(n,)` or `(..., n)`): Boolean, the experts that live on the node.
        remote_share (`float`): Between 0 and 1.

    Returns:
        `torch.Tensor` of shape `(...)`, float32. Exactly 0 where all experts are local (one node), where none is (a node
        without experts has nothing to pull to) and where there are no tokens.
    """
    num_experts = router_prob_sum.shape[-1]
    local = node_local_experts.to(router_prob_sum.dtype)
    num_local = local.sum(dim=-1, keepdim=True)
    localized = torch.where(
        node_local_experts,
        (1 - remote_share) / num_local.clamp_min(1),
        remote_share / (num_experts - num_local).clamp_min(1),
    )
    current = router_prob_sum / num_tokens.clamp_min(1).unsqueeze(-1)
    # clamped so that an expert no token can reach (probability 0) gives 0 and a finite gradient
    log_ratio = current.clamp_min(torch.finfo(current.dtype).tiny).log() - localized.log()
    divergence = (current * log_ratio).sum(dim=-1)
    has_choice = ((num_local > 0) & (num_local < num_experts)).squeeze(-1) & (num_tokens > 0)
    return torch.where(has_choice, divergence, torch.zeros_like(divergence))


__all__ = ["load_balancing_loss", "locality_loss"]
