# SPDX-License-Identifier: Apache-2.0
"""
The experts, through transformers' experts interface, and one more implementation of it for capacity-limited batches.

Shapes: T tokens, d = hidden_size, f = moe_intermediate_size, n = num_experts, k = num_experts_per_tok, C = capacity.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .overflow import position_in_expert


@use_experts_implementation(has_gate=False)
class LocMoeExperts(nn.Module):
    """
    `W_out[i] act(W_in[i] x)` (arXiv 2401.13920, eq. 1): `up_proj` (n, f, d) and `down_proj` (n, d, f).

    `forward(hidden_states (T, d), top_k_index (T, k), top_k_weights (T, k)) -> (T, d)`. An assignment that was dropped has
    weight 0. `expert_capacity` is set by the block before each call and read by `"capacity_bmm"` alone.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.moe_intermediate_size, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.moe_intermediate_size))
        self.act_fn = ACT2FN[config.hidden_act]
        self.expert_capacity: int | None = None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return _loop_over_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert, tokens: self.act_fn(tokens @ self.up_proj[expert].T) @ self.down_proj[expert].T,
        )


@use_experts_implementation
class LocMoeGatedExperts(nn.Module):
    """
    Gated experts, `W_out[i] (act(W_gate[i] x) * W_in[i] x)`: `gate_up_proj` (n, 2 f, d), gate rows first, and `down_proj`
    (n, d, f). Otherwise as [`LocMoeExperts`].
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = ACT2FN[config.hidden_act]
        self.expert_capacity: int | None = None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return _loop_over_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda expert, tokens: self._apply_gate(tokens @ self.gate_up_proj[expert].T) @ self.down_proj[expert].T,
        )


def _loop_over_experts(hidden_states, top_k_index, top_k_weights, num_experts, run_expert):
    """The reference: one expert after the other, on the tokens that chose it. Ids of `num_experts` and more are skipped."""
    output = torch.zeros_like(hidden_states)
    for expert in range(num_experts):
        token, slot = torch.where(top_k_index == expert)
        if token.numel():
            weighted = run_expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, weighted.to(output.dtype))
    return output


def capacity_bmm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Experts implementation `"capacity_bmm"`: the tokens are laid out as `[n, C, d]` and each projection is one batched
    matrix product. Shapes depend on the number of tokens alone, so nothing is read back to the host.

    Uses `self.expert_capacity`; without one (a dropless batch, or a model that knows no capacity) it is `"grouped_mm"`.
    Assignments of weight 0 take no room, and those past the capacity of their expert contribute nothing: the caller
    limits them first (`moe.overflow.limit_to_capacity`).
    """
    capacity = getattr(self, "expert_capacity", None)
    if capacity is None:
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    if self.has_bias or self.is_transposed or self.has_post_expert_norm:
        raise ValueError(
            "`experts_implementation` ('capacity_bmm') serves experts without biases, transposed weights or post-norm: "
            "use 'grouped_mm' for this model."
        )
    (num_tokens, top_k), num_experts, hidden_size = top_k_index.shape, self.num_experts, hidden_states.shape[-1]
    # first choices before second ones, as in `limit_to_capacity`
    expert = torch.where((top_k_weights != 0) & (top_k_index < num_experts), top_k_index, num_experts).T.reshape(-1)
    position = position_in_expert(expert, num_experts)
    fits = (expert < num_experts) & (position < capacity)
    spare = num_experts * capacity  # index of the row of zeros
    slot = torch.where(fits, expert * capacity + position, spare)

    token = torch.arange(num_tokens, device=slot.device).repeat(top_k)
    token_of_slot = torch.full((spare + 1,), num_tokens, device=slot.device).scatter_(0, slot, token)[:-1]
    rows = _with_zero_row(hidden_states)[token_of_slot].view(num_experts, capacity, hidden_size)
    up_weight = self.gate_up_proj if self.has_gate else self.up_proj
    inner = torch.bmm(rows.to(up_weight.dtype), up_weight.transpose(1, 2))
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    outer = torch.bmm(inner, self.down_proj.transpose(1, 2)).flatten(0, 1)
    weighted = _with_zero_row(outer)[slot].view(top_k, num_tokens, hidden_size) * top_k_weights.T.unsqueeze(-1)
    return weighted.sum(dim=0).to(hidden_states.dtype)


def _with_zero_row(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, 1))


__all__ = ["LocMoeExperts", "LocMoeGatedExperts", "capacity_bmm_experts_forward"]
