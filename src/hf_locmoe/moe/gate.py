# SPDX-License-Identifier: Apache-2.0
"""
The LocMoE gate: grouped average pooling (arXiv 2401.13920, section "Grouped average pooling", eq. 2-4).

Shapes: T tokens, d = hidden_size, n = num_experts.
"""

from __future__ import annotations

import math

import torch

from .routing import Router, cosine_stride


try:
    from .gate_kernels import pool_affinity, pools_in_one_pass, route_pooled
except ImportError:  # no Triton
    pool_affinity = None


class LocMoeGate(Router):
    """
    Expert i's affinity for a token is the mean of the i-th of n contiguous blocks of hidden dimensions (`gate_affinity`
    `"mean"`: the paper), or the cosine between the token and the indicator of that block, times sqrt(d), which has unit
    variance for an isotropic token (`"cosine"`, the affinity of arXiv 2406.00023).

    No parameters. Where n does not divide d, block i is `floor(i d / n) <= j < floor((i + 1) d / n)`, so blocks differ
    by at most one dimension and stay orthogonal; each is divided by its own size.

    `gate_centering` subtracts a running mean of the hidden states first (buffer `hidden_mean`); `gate_rotation` pools in
    a randomly rotated basis, drawn once per layer and stored as n orthonormal rows (buffer `rotation`).
    """

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.affinity_type = config.gate_affinity
        self.uses_centering = config.gate_centering
        self.uses_rotation = config.gate_rotation
        self.centering_momentum = 0.99
        starts = [i * self.hidden_size // self.num_experts for i in range(self.num_experts + 1)]
        self.block_sizes = [end - start for start, end in zip(starts[:-1], starts[1:], strict=True)]
        if self.uses_centering:
            self.register_buffer("hidden_mean", torch.zeros(self.hidden_size, dtype=torch.float32))
            self.register_buffer("hidden_mean_updates", torch.zeros((), dtype=torch.float32))
        if self.uses_rotation:
            self.register_buffer("rotation", torch.zeros(self.num_experts, self.hidden_size, dtype=torch.float32))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, affinity={self.affinity_type}, relu={self.use_relu}"

    def reset_buffers(self, copy) -> None:
        super().reset_buffers(copy)
        if self.uses_centering:
            copy(self.hidden_mean, torch.zeros(self.hidden_size))
            copy(self.hidden_mean_updates, torch.zeros(()))
        if self.uses_rotation:
            generator = torch.Generator().manual_seed(self.layer_idx or 0)
            gaussian = torch.randn(self.hidden_size, self.num_experts, generator=generator, dtype=torch.float64)
            copy(self.rotation, torch.linalg.qr(gaussian).Q.T.float())

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        output_router_stats: bool = False,
        capacity: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if self.num_expert_groups > 1 or not self._pools_in_one_pass(hidden_states):
            return super().forward(hidden_states, input_ids, domain_ids)
        self._refuse_what_is_not_finite(hidden_states)
        num_tokens = hidden_states.shape[0]
        noise = None
        if self.training and self.noise_std > 0:
            noise = self.noise_std * torch.randn(num_tokens, self.num_experts, device=hidden_states.device)
        logits, weights, index, stats = route_pooled(
            hidden_states,
            self._choice_bias(),
            noise,
            self.num_experts,
            self.top_k,
            cosine=self.affinity_type == "cosine",
            relu=self.use_relu,
            norm_topk_prob=self.norm_topk_prob,
            token_mask=token_mask,
            sample_stride=cosine_stride(num_tokens) if output_router_stats else 0,
            capacity=capacity,
        )
        return (logits, weights, index, stats) if output_router_stats else (logits, weights, index)

    def affinity(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        if self._pools_in_one_pass(hidden_states):
            return pool_affinity(hidden_states, self.num_experts, self.affinity_type == "cosine")
        projection, hidden_states = self._project(hidden_states.float())
        if self.affinity_type == "mean":
            return projection / self._norms(projection.device)
        return math.sqrt(self.hidden_size) * _cosine(projection, hidden_states)

    def cosines(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._pools_in_one_pass(hidden_states):
            return pool_affinity(hidden_states, self.num_experts, True) / math.sqrt(self.hidden_size)
        return _cosine(*self._project(hidden_states.float()))

    def _pools_in_one_pass(self, hidden_states: torch.Tensor) -> bool:
        """Whether the kernel serves this gate: plain pooling, on CUDA with Triton."""
        if pool_affinity is None or not hidden_states.is_cuda or hidden_states.dtype == torch.float64:
            return False
        plain = not (self.uses_centering or self.uses_rotation)
        return plain and pools_in_one_pass(self.hidden_size, self.num_experts)

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, d) to the (T, n) products with the unit-norm gate weights, and the (centred) hidden states."""
        if self.uses_centering:
            hidden_states = hidden_states - self.hidden_mean.float()
        if self.uses_rotation:
            return hidden_states @ self.rotation.float().T, hidden_states
        return block_sums(hidden_states, self.block_sizes) / self._norms(hidden_states.device), hidden_states

    def _norms(self, device) -> torch.Tensor | float:
        """The norm of each block's indicator: the square root of its size."""
        if min(self.block_sizes) == max(self.block_sizes):
            return math.sqrt(self.block_sizes[0])
        # made where it is used: a list is copied to the device, and waited for
        starts = torch.arange(self.num_experts + 1, device=device) * self.hidden_size // self.num_experts
        return starts.diff().float().sqrt()

    @torch.no_grad()
    def update_state(self, tokens_per_expert: torch.Tensor, hidden_sum: torch.Tensor | None = None) -> None:
        super().update_state(tokens_per_expert)
        if self.uses_centering and hidden_sum is not None:
            mean = hidden_sum / (tokens_per_expert.sum() / self.top_k).clamp_min(1)
            # plain average over the first updates, exponential after
            rate = (1 / (self.hidden_mean_updates + 1)).clamp_min(1 - self.centering_momentum)
            self.hidden_mean += rate * (mean.to(self.hidden_mean.dtype) - self.hidden_mean)
            self.hidden_mean_updates += 1


def block_sums(hidden_states: torch.Tensor, block_sizes: list[int]) -> torch.Tensor:
    """
    Sums over contiguous blocks of the last dimension.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): Any float dtype.
        block_sizes (`list[int]` of length n): Adds up to d.

    Returns:
        `torch.Tensor` of shape `(T, n)`.
    """
    largest = max(block_sizes)
    if min(block_sizes) == largest:
        return hidden_states.unflatten(-1, (-1, largest)).sum(dim=-1)
    return torch.stack([block.sum(dim=-1) for block in hidden_states.split(block_sizes, dim=-1)], dim=-1)


def _cosine(projection: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    # A hidden state of all zeros (the embedding of a padding token, seen by nobody) has the cosine 0; a clamp from below
    # would give it a gradient that overflows.
    norm = hidden_states.norm(dim=-1, keepdim=True)
    return projection / norm.masked_fill(norm == 0, 1.0)


__all__ = ["LocMoeGate", "block_sums"]
