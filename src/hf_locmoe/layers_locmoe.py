# SPDX-License-Identifier: Apache-2.0
"""
One layer of the LocMoE decoder: rotary attention, and a dense feed-forward network or a mixture of experts.

Shapes: B = batch size, Q = sequence length, T = B * Q, d = hidden_size, n = num_experts, k = num_experts_per_tok,
S = len(RouterStat).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .configuration_locmoe import LocMoeConfig
from .moe.baseline_gates import HashGate, SwitchGate
from .moe.experts import LocMoeExperts, LocMoeGatedExperts, limits_assignments, without_adapters
from .moe.gate import LocMoeGate
from .moe.overflow import CapacityRule, RemoteTier, limit_to_capacity
from .moe.routing import Router, router_statistics
from .norm_locmoe import LocMoeRMSNorm
from .rotary_locmoe import apply_rotary


GATES: dict[str, type[Router]] = {"locmoe": LocMoeGate, "switch": SwitchGate, "hash": HashGate}


class LocMoeMLP(nn.Module):
    """A dense feed-forward network with the experts' activation, gated or not."""

    def __init__(self, config: LocMoeConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False) if config.gated_mlp else None
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * up
        return self.down_proj(inner)


class LocMoeSparseMoeBlock(nn.Module):
    """Gate, capacity, experts; `forward` returns the (B, Q, d) output and, if asked, the layer's statistics."""

    def __init__(self, config: LocMoeConfig, layer_idx: int):
        super().__init__()
        self.gate = GATES[config.gate_type](config, layer_idx)
        self.capacity_rule = CapacityRule(config)
        self.capacity_overflow = config.capacity_overflow
        self.remote_tier: RemoteTier | None = None  # a run's, set where the experts are on several nodes
        self.experts = (LocMoeGatedExperts if config.gated_mlp else LocMoeExperts)(config)
        self.shared_experts = None
        if config.num_shared_experts:
            self.shared_experts = LocMoeMLP(config, config.num_shared_experts * config.moe_intermediate_size)

    def limit_experts(self, num_tokens: int, only_changes: bool = False) -> tuple[int | None, bool, bool]:
        """
        Tells the experts what they take of a batch.

        Args:
            num_tokens (`int`): T.
            only_changes (`bool`, *optional*, defaults to `False`): Not where they know it already. Under activation
                checkpointing the compiler refuses to write to a module; without it, reading what is there would bind a
                graph to one number of tokens.

        Returns:
            The capacity, whether what is over it is dropped and nothing else, and whether the experts do that themselves.
        """
        capacity = self.capacity_rule.capacity(num_tokens)
        # what overflows is dropped: its number follows from the assignments, and "capacity_bmm" drops it by itself
        has_tier = self.remote_tier is not None and self.training
        drops = capacity is not None and self.capacity_overflow == "drop" and not has_tier
        experts = without_adapters(self.experts)
        limits_itself = limits_assignments(experts)
        limits = capacity, not (drops and limits_itself)
        if not only_changes or (experts.expert_capacity, experts.assignments_are_limited) != limits:
            experts.expert_capacity, experts.assignments_are_limited = limits
        return capacity, drops, limits_itself

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        output_router_stats: bool = False,
        is_checkpointed: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        tokens = hidden_states.flatten(0, 1)
        input_ids, domain_ids, token_mask = (
            None if ids is None else ids.flatten() for ids in (input_ids, domain_ids, token_mask)
        )
        remote_tier = self.remote_tier if self.training else None
        capacity, drops, limits_itself = self.limit_experts(tokens.shape[0], is_checkpointed)
        drops_over = capacity if drops else None
        logits, weights, wanted, *summed = self.gate(
            tokens, input_ids, domain_ids, token_mask, output_router_stats, drops_over
        )
        index, dropped, rerouted = wanted, None, None
        if drops and limits_itself:
            if token_mask is not None:  # padding takes no room
                index = index.masked_fill(~token_mask.unsqueeze(-1), self.gate.num_experts)
        elif capacity is not None or remote_tier is not None:
            index, weights, dropped, rerouted = limit_to_capacity(
                wanted, weights, logits, capacity, self.capacity_overflow, token_mask, remote_tier
            )
        statistics: tuple[torch.Tensor, ...] = ()
        if output_router_stats:  # before the experts, the last of which nothing has to be computed again for
            quantile = self.capacity_rule.quantile if self.capacity_rule.measures_cosines else None
            if drops:
                dropped = rerouted = None
            statistics = (
                router_statistics(
                    self.gate,
                    tokens,
                    logits,
                    wanted,
                    token_mask,
                    dropped,
                    rerouted,
                    quantile,
                    *summed,
                    capacity=drops_over,
                ),
            )
            if getattr(self.gate, "uses_centering", False):
                with torch.no_grad():
                    counted = tokens.float() if token_mask is None else tokens.float() * token_mask.unsqueeze(-1)
                    statistics = (*statistics, counted.sum(dim=0))
        if not limits_itself:  # the kernels of "capacity_bmm" take weights as they are
            weights = weights.to(tokens.dtype)
        output = self.experts(tokens, index, weights)
        if self.shared_experts is not None:
            output = output + self.shared_experts(tokens)
        return output.view_as(hidden_states), *statistics


class LocMoeAttention(nn.Module):
    """Grouped-query attention with rotary positions; q/k norm over a head or over the projection, clipping on request."""

    def __init__(self, config: LocMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            self.q_norm = LocMoeRMSNorm(self.head_dim if per_head else query_size, eps=config.rms_norm_eps)
            self.k_norm = LocMoeRMSNorm(self.head_dim if per_head else key_value_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        per_head = (*input_shape, -1, self.head_dim)
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.qk_norm == "full":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.clip_qkv is not None:
            clip = self.config.clip_qkv
            query, key, value = (states.clamp(-clip, clip) for states in (query, key, value))
        query, key, value = query.view(per_head), key.view(per_head), value.view(per_head)
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        query, key = apply_rotary(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class LocMoeDecoderLayer(GradientCheckpointingLayer):
    """
    Attention and feed-forward. `forward` returns the hidden states, and from a MoE layer that was asked for statistics a
    tuple `(hidden_states, router_stats)` or `(hidden_states, router_stats, router_hidden_sum)`: they are outputs of the
    layer, so activation checkpointing of either kind neither loses their gradient nor counts them twice.
    """

    def __init__(self, config: LocMoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LocMoeAttention(config, layer_idx)
        self.is_sparse = layer_idx in config.sparse_layers
        self.mlp = (
            LocMoeSparseMoeBlock(config, layer_idx) if self.is_sparse else LocMoeMLP(config, config.intermediate_size)
        )
        self.input_layernorm = LocMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LocMoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        input_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        output_router_stats: bool = False,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        normed = self.post_attention_layernorm(hidden_states)
        if not self.is_sparse:
            return hidden_states + self.mlp(normed)
        output, *statistics = self.mlp(
            normed,
            input_ids,
            domain_ids,
            token_mask,
            output_router_stats,
            self.gradient_checkpointing and self.training,
        )
        hidden_states = hidden_states + output
        return (hidden_states, *statistics) if statistics else hidden_states


__all__ = ["LocMoeAttention", "LocMoeDecoderLayer", "LocMoeMLP", "LocMoeSparseMoeBlock"]
