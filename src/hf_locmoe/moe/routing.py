# SPDX-License-Identifier: Apache-2.0
"""
From affinities to experts: what all gates share.

Shapes: T tokens (batch and sequence flattened), d = hidden_size, n = num_experts, k = num_experts_per_tok,
S = len(RouterStat).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import nn


try:
    from .router_kernels import count_limited, route_sums, top_k_of_router
except ImportError:  # no Triton
    count_limited = route_sums = top_k_of_router = None

NUM_COSINE_SAMPLES = 1024  # tokens a layer and forward of which the token-gate cosine is taken


class RouterStat(IntEnum):
    """Rows of a layer's router statistics. Each is a sum over tokens, so micro-batches and ranks add up."""

    PROB_SUM = 0  # softmax probability of each expert; the differentiable row
    TOKENS = 1  # assignments (a token counts k times), before any capacity; after `PROB_SUM`, for a slice of both
    DROPPED = 2  # assignments that found their expert full and were dropped to the residual, by the expert wanted
    REROUTED = 3  # assignments that found their expert full and went to another one, by the expert wanted
    ENTROPY_SUM = 4  # entropy of the token's distribution in nats, by its first expert
    COS_SUM = 5  # cosine of the token with the gate weight of its first expert, by that expert
    COS_QUANTILE_SUM = 6  # num_tokens / n times the quantile of those cosines (`critical_capacity_quantile`)


class Router(nn.Module):
    """
    Base of the gates. A gate gives an affinity for each token and expert; the base makes logits, a top-k choice and
    weights of it, in float32 whatever the model's dtype, also under autocast.

    G = ReLU(affinity + noise) if `gate_relu` (arXiv 2401.13920, eq. 2), else affinity + noise; the weight of a chosen
    expert is softmax(G) (eq. 3-4). The choice itself is made before the ReLU, where the paper leaves ties among
    all-zero logits open, and ties go to the lower expert.
    """

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_experts = config.num_experts
        self.hidden_size = config.hidden_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.use_relu = config.gate_relu
        self.noise_std = config.gate_noise_std
        self.num_expert_groups = config.num_expert_groups
        self.topk_group = config.topk_group
        self.balance_bias_update_rate = config.balance_bias_update_rate
        self.check_finite = config.router_check_finite
        # (n,) added to the preference in training, set by a run that steers tokens to their node's experts
        self.node_bias: torch.Tensor | None = None
        self.register_buffer("e_score_correction_bias", torch.zeros(self.num_experts, dtype=torch.float32))

    def affinity(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None) -> torch.Tensor:
        """(T, d) hidden states of any float dtype to (T, n) affinities, computed in float32."""
        raise NotImplementedError

    def cosines(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(T, d) hidden states to the (T, n) float32 cosines with the gate weights."""
        raise NotImplementedError

    def reset_buffers(self, copy) -> None:
        """Write initial buffer values with `copy(buffer, value)`; called when weights are initialised."""
        copy(self.e_score_correction_bias, torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        domain_ids: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        output_router_stats: bool = False,
        capacity: int | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(T, d)`): Tokens.
            input_ids (`torch.Tensor` of shape `(T,)`, *optional*): Token ids; the hash gate needs them.
            domain_ids (`torch.Tensor` of shape `(T,)`, *optional*): The expert group of each token (two-level routing).
            token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token counts in no statistic.
            output_router_stats (`bool`): Whether there will be statistics of this forward.
            capacity (`int`, *optional*): Assignments an expert takes, where the rest is dropped; the statistics hold how many.

        Returns:
            Router logits `(T, n)` float32 (-inf for experts outside a token's domain), routing weights `(T, k)` float32
            and expert indices `(T, k)` int64, the best expert first. If asked for statistics, a gate that sums them in
            the same pass returns them too: `(S, n)`, for [`router_statistics`] to complete.
        """
        self._refuse_what_is_not_finite(hidden_states)
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            affinity = self.affinity(hidden_states, input_ids)
            if self.training and self.noise_std > 0:
                affinity = affinity + self.noise_std * torch.randn_like(affinity)
            allowed = domain_mask(domain_ids, self.num_experts, self.num_expert_groups, self.top_k)
            if allowed is not None:
                affinity = affinity.masked_fill(~allowed, float("-inf"))
            logits = affinity.relu().masked_fill(affinity.isneginf(), float("-inf")) if self.use_relu else affinity

            preference = (affinity + self._choice_bias()).detach()
            if self.num_expert_groups > 1 and allowed is None:
                preference = limit_groups(preference, self.num_expert_groups, self.topk_group)
            index = stable_top_k(preference, self.top_k)
            weights = logits.softmax(dim=-1).gather(-1, index)
            if self.norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        return logits, weights, index

    def _choice_bias(self) -> torch.Tensor:
        """(n,) float32, what is added to the affinities for the choice alone."""
        bias = self.e_score_correction_bias.float()
        return bias + self.node_bias if self.training and self.node_bias is not None else bias

    def _refuse_what_is_not_finite(self, hidden_states: torch.Tensor) -> None:
        if self.check_finite and not torch.compiler.is_compiling() and not torch.isfinite(hidden_states).all():
            raise ValueError(
                f"The hidden states that reach the router of layer {self.layer_idx} hold NaN or infinite values. Lower "
                f"the learning rate or check the data; `router_check_finite=False` turns this check off."
            )

    @torch.no_grad()
    def update_state(self, tokens_per_expert: torch.Tensor, hidden_sum: torch.Tensor | None = None) -> None:
        """
        Once per optimizer step, with the sums over its micro-batches and all ranks.

        Args:
            tokens_per_expert (`torch.Tensor` of shape `(n,)`): Assignments; the balance bias moves by
                `balance_bias_update_rate` towards the experts that had fewer than their share (arXiv 2408.15664).
            hidden_sum (`torch.Tensor` of shape `(d,)`, *optional*): Sum of the hidden states, for gates that centre.
        """
        if self.balance_bias_update_rate > 0:
            violation = tokens_per_expert.mean() - tokens_per_expert
            step = self.balance_bias_update_rate * violation.sign()
            # the logits see differences only: without the mean, the bias would drift
            self.e_score_correction_bias += (step - step.mean()).to(self.e_score_correction_bias.dtype)


def domain_mask(
    domain_ids: torch.Tensor | None, num_experts: int, num_groups: int, top_k: int = 1
) -> torch.Tensor | None:
    """(T,) domain ids to the (T, n) boolean mask of the experts in each token's group; None where there is no choice."""
    if domain_ids is None or num_groups == 1:
        return None
    group_size = num_experts // num_groups
    if top_k > group_size:
        raise ValueError(
            f"`num_experts_per_tok` ({top_k}) must be at most the {group_size} experts of a group where the batch has "
            f"`domain_ids`, which take a token to one of the `num_expert_groups` ({num_groups}): leave `domain_ids` out, "
            f"or lower `num_experts_per_tok` or `num_expert_groups`."
        )
    group_of_expert = torch.arange(num_experts, device=domain_ids.device) // group_size
    return group_of_expert == domain_ids.unsqueeze(-1)


def limit_groups(preference: torch.Tensor, num_groups: int, topk_group: int) -> torch.Tensor:
    """
    Keeps the preferences inside each token's best `topk_group` groups and sets the others to -inf.

    With `topk_group` 1 this is the first level of two-level routing, and a group's score is the mean over its experts:
    for grouped average pooling exactly the pooling over `num_groups` larger groups. With more it is the group-limited
    top-k of DeepSeek-V2, where a group's score is that of its best expert.

    Args:
        preference (`torch.Tensor` of shape `(T, n)`): Larger is better.

    Returns:
        `torch.Tensor` of shape `(T, n)`.
    """
    by_group = preference.unflatten(-1, (num_groups, -1))
    score = by_group.mean(dim=-1) if topk_group == 1 else by_group.amax(dim=-1)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, stable_top_k(score, topk_group), True)
    return by_group.masked_fill(~chosen.unsqueeze(-1), float("-inf")).flatten(-2)


def stable_top_k(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest of the last dimension, the largest first; ties go to the lower index on every device."""
    if k == 1:
        return values.argmax(dim=-1, keepdim=True)
    if top_k_of_router is not None and values.is_cuda and values.dtype == torch.float32 and values.dim() == 2:
        return top_k_of_router(values, k)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def router_statistics(
    gate: Router,
    hidden_states: torch.Tensor,
    router_logits: torch.Tensor,
    top_k_index: torch.Tensor,
    token_mask: torch.Tensor | None,
    dropped: torch.Tensor | None = None,
    rerouted: torch.Tensor | None = None,
    cos_quantile: float | None = None,
    summed: torch.Tensor | None = None,
    *,
    capacity: int | None = None,
) -> torch.Tensor:
    """
    One layer's statistics for one forward.

    Args:
        gate ([`Router`]): Gives the token-gate cosines, on at most `NUM_COSINE_SAMPLES` evenly spaced tokens.
        hidden_states (`torch.Tensor` of shape `(T, d)`): What the gate saw.
        router_logits (`torch.Tensor` of shape `(T, n)`): Float32.
        top_k_index (`torch.Tensor` of shape `(T, k)`): The experts wanted, before any capacity.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token is padding, which counts nowhere.
        dropped, rerouted (`torch.Tensor` of shape `(T, k)`, *optional*): Boolean, see [`RouterStat`]; both or none.
        cos_quantile (`float`, *optional*): Quantile of the cosines to record.
        summed (`torch.Tensor` of shape `(S, n)`, *optional*): What the gate summed as it routed: all but the quantile and
            what `dropped` and `rerouted` say.
        capacity (`int`, *optional*): In the place of `dropped` and `rerouted`, where each expert drops what is over it.

    Returns:
        `torch.Tensor` of shape `(S, n)`, float32. Only `PROB_SUM` carries a gradient.
    """
    if summed is not None and dropped is None and cos_quantile is None:
        return summed
    on_kernels = route_sums is not None and router_logits.is_cuda
    # sums over thousands of tokens, some of them as products with a matrix, which autocast would make in half precision
    with torch.autocast(device_type=hidden_states.device.type, enabled=False):
        if summed is None:
            sums = route_sums if on_kernels else _plain_sums
            prob_sum, tokens, entropy_sum = sums(router_logits, top_k_index, token_mask)
        else:
            prob_sum, tokens, num_dropped, num_rerouted, entropy_sum, cos_sum, cos_quantile_sum = summed
        with torch.no_grad():
            if summed is None:
                num_dropped = num_rerouted = torch.zeros_like(tokens)
                if capacity is not None:
                    num_dropped = (tokens - capacity).clamp_min(0)
            if dropped is not None:
                count = count_limited if on_kernels else _plain_counts
                num_dropped, num_rerouted = count(top_k_index, token_mask, dropped, rerouted, gate.num_experts)
            if summed is None or cos_quantile is not None:
                cos_sum, cos_quantile_sum = _cosine_rows(gate, hidden_states, top_k_index, token_mask, cos_quantile)
        return torch.stack([prob_sum, tokens, num_dropped, num_rerouted, entropy_sum, cos_sum, cos_quantile_sum])


def _plain_sums(router_logits, top_k_index, token_mask):
    """`PROB_SUM`, `TOKENS` and `ENTROPY_SUM`."""
    probabilities = router_logits.softmax(dim=-1)
    prob_sum = probabilities.sum(dim=0) if token_mask is None else token_mask.to(probabilities.dtype) @ probabilities
    with torch.no_grad():
        one_hot = _counted_one_hot(top_k_index, token_mask, router_logits.shape[-1]).to(probabilities.dtype)
        entropy = -torch.special.xlogy(probabilities, probabilities).sum(dim=-1)
        return prob_sum, one_hot.sum(dim=(0, 1)), entropy @ one_hot[:, 0]


def _plain_counts(top_k_index, token_mask, dropped, rerouted, num_experts):
    """`DROPPED` and `REROUTED`."""
    one_hot = _counted_one_hot(top_k_index, token_mask, num_experts)
    return [(one_hot * flags.unsqueeze(-1)).sum(dim=(0, 1)) for flags in (dropped, rerouted)]


def _counted_one_hot(top_k_index, token_mask, num_experts):
    """(T, k, n) float32, 0 where a token does not count."""
    one_hot = torch.nn.functional.one_hot(top_k_index, num_experts).float()
    return one_hot if token_mask is None else one_hot * token_mask[:, None, None]


def cosine_stride(num_tokens: int) -> int:
    """Every how many tokens the token-gate cosine is taken."""
    return -(-num_tokens // NUM_COSINE_SAMPLES)


def _cosine_rows(gate, hidden_states, top_k_index, token_mask, cos_quantile):
    (num_tokens, _), num_experts = hidden_states.shape, gate.num_experts
    if num_tokens == 0:
        return [torch.zeros(num_experts, device=hidden_states.device)] * 2
    stride = cosine_stride(num_tokens)
    first = top_k_index[::stride, :1]
    cosine = gate.cosines(hidden_states[::stride]).gather(-1, first).squeeze(-1)
    counts = torch.ones_like(cosine) if token_mask is None else token_mask[::stride].to(cosine.dtype)
    num_counted = num_tokens if token_mask is None else token_mask.sum()
    cos_sum = torch.nn.functional.one_hot(first.squeeze(-1), num_experts).to(cosine.dtype).T @ (cosine * counts)
    cos_sum = cos_sum * (num_counted / counts.sum().clamp_min(1))
    if cos_quantile is None:
        return [cos_sum, torch.zeros_like(cos_sum)]
    counted = torch.where(counts > 0, cosine, torch.nan)
    quantile = counted.nanquantile(cos_quantile).nan_to_num(0.0)
    return [cos_sum, (quantile * num_counted / num_experts).expand(num_experts)]


__all__ = [
    "NUM_COSINE_SAMPLES",
    "Router",
    "RouterStat",
    "cosine_stride",
    "limit_groups",
    "router_statistics",
    "stable_top_k",
]
