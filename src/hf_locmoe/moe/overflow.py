# SPDX-License-Identifier: Apache-2.0
"""
Expert capacity in a batch: which assignments fit, and where the others go.

Shapes: T tokens, n = num_experts, k = num_experts_per_tok, A = T * k assignments.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from .capacity import (
    capacity_for_drop_rate,
    critical_capacity,
    expert_capacity,
    min_expert_capacity,
)
from .routing import RouterStat, stable_top_k


try:
    from ..permute.layout_kernels import rank_in_expert
except ImportError:  # no Triton
    rank_in_expert = None


class CapacityAssignment(NamedTuple):
    """`top_k_index` (T, k), `top_k_weights` (T, k) and which assignments were `dropped` or `rerouted` (T, k) boolean."""

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    dropped: torch.Tensor
    rerouted: torch.Tensor


def position_in_expert(expert_ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """
    How many earlier assignments went to the same expert. No host synchronisation.

    Args:
        expert_ids (`torch.Tensor` of shape `(A,)`): Int64 in [0, num_experts]; `num_experts` stands for none.

    Returns:
        `torch.Tensor` of shape `(A,)`, int64; without meaning for those of none.
    """
    if rank_in_expert is not None and expert_ids.is_cuda:
        return rank_in_expert(expert_ids.unsqueeze(-1), num_experts, False).squeeze(-1)
    # a radix sort takes time by the width of its keys
    sorted_ids, order = expert_ids.to(torch.int32).sort(stable=True)
    starts = torch.searchsorted(sorted_ids, torch.arange(num_experts + 1, device=expert_ids.device))
    rank = torch.arange(expert_ids.shape[0], device=expert_ids.device) - starts[sorted_ids]
    return torch.empty_like(rank).scatter_(0, order, rank)


def _position_of_choice(top_k_index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """As [`position_in_expert`] for (T, k) assignments, all first choices before the second ones."""
    if rank_in_expert is not None and top_k_index.is_cuda:
        return rank_in_expert(top_k_index, num_experts, True)
    return position_in_expert(top_k_index.T.reshape(-1), num_experts).view(top_k_index.T.shape).T


class RemoteTier:
    """
    A hard ceiling on what leaves a rank's node: of a batch of T tokens at most `ceil(factor * T * k * (n - n_local) / n)`
    assignments go to experts of other nodes, `factor` times what uniform routing sends there.

    Those keep their expert that gain most by it: the assignments with the largest logit above the token's best node-local
    expert. Training only; ties go to the earlier token. No host synchronisation: the ceiling follows from shapes.

    Args:
        node_local_experts (`torch.Tensor` of shape `(n,)`): Boolean, the experts of this rank's node.
        factor (`float`): Of uniform routing's remote assignments.
    """

    def __init__(self, node_local_experts: torch.Tensor, factor: float):
        self.factor = factor
        self.place(node_local_experts)

    def place(self, node_local_experts: torch.Tensor) -> None:
        """Takes over where the experts are now."""
        self.node_local_experts = node_local_experts
        self.num_experts = len(node_local_experts)
        self.num_remote = self.num_experts - int(node_local_experts.sum())

    def ceiling(self, num_tokens: int, top_k: int) -> int:
        """Assignments that may leave the node."""
        # whole numbers first: a share such as 1 - 54/63 is not exact, and the ceiling would be one too high
        num_assignments = num_tokens * top_k
        return min(num_assignments, math.ceil(self.factor * (num_assignments * self.num_remote) / self.num_experts))

    def overflow(
        self, top_k_index: torch.Tensor, router_logits: torch.Tensor, token_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            top_k_index (`torch.Tensor` of shape `(T, k)`): Int64.
            router_logits (`torch.Tensor` of shape `(T, n)`): Preferences.
            token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token is padding.

        Returns:
            `torch.Tensor` of shape `(T, k)`, boolean: the remote assignments over the ceiling.
        """
        is_remote = ~self.node_local_experts[top_k_index]
        if token_mask is not None:
            is_remote = is_remote & token_mask.unsqueeze(-1)
        logits = router_logits.detach()
        best_local = logits.masked_fill(~self.node_local_experts, float("-inf")).amax(dim=-1, keepdim=True)
        gain = (logits.gather(-1, top_k_index) - best_local).masked_fill(~is_remote, float("-inf"))
        order = gain.flatten().argsort(descending=True, stable=True)
        keeps = torch.zeros_like(is_remote).flatten()
        keeps[order[: self.ceiling(*top_k_index.shape)]] = True
        return is_remote & ~keeps.view_as(is_remote)


def limit_to_capacity(
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    router_logits: torch.Tensor,
    capacity: int | None,
    overflow: str = "drop",
    token_mask: torch.Tensor | None = None,
    remote_tier: RemoteTier | None = None,
) -> CapacityAssignment:
    """
    Lets each expert take its first `capacity` assignments: first choices before second ones, and earlier tokens before
    later ones.

    Args:
        top_k_index (`torch.Tensor` of shape `(T, k)`): Int64.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): Routing weights.
        router_logits (`torch.Tensor` of shape `(T, n)`): Preferences for `"next_best"`, and the weights there.
        capacity (`int`, *optional*): Assignments an expert takes; no limit if not given.
        overflow (`"drop"` or `"next_best"`): Overflow keeps its expert id with weight 0, so the token passes by the
            residual alone; or goes to the token's best other expert with room, with that expert's softmax probability as
            weight, and is dropped only where none has room.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token is padding, which takes no room and
            gets weight 0.
        remote_tier ([`RemoteTier`], *optional*): Which assignments may leave the node. It comes first: what is over it goes
            to the token's best node-local expert with room whatever `overflow` says, and nothing is rerouted off the node.

    Returns:
        [`CapacityAssignment`].
    """
    num_tokens, num_experts = router_logits.shape
    wanted = top_k_index if token_mask is None else top_k_index.masked_fill(~token_mask.unsqueeze(-1), num_experts)
    is_real = wanted < num_experts
    stays_here = torch.zeros_like(is_real)
    if remote_tier is not None:
        stays_here = remote_tier.overflow(top_k_index, router_logits, token_mask)
    fits = is_real & ~stays_here
    if capacity is not None:
        asked = wanted.masked_fill(stays_here, num_experts)
        position = _position_of_choice(asked, num_experts)
        fits = fits & (position < capacity)
    overflowing = is_real & ~fits
    rerouted = torch.zeros_like(fits)
    index = top_k_index
    if overflow == "next_best" or remote_tier is not None:
        moving = overflowing if overflow == "next_best" else stays_here
        reachable = None if remote_tier is None else remote_tier.node_local_experts
        if capacity is None:
            index, rerouted = _reroute_without_limit(index, moving, router_logits, reachable)
        else:
            index, rerouted = _reroute(index, fits, moving, router_logits, capacity, reachable)
        probability = router_logits.softmax(dim=-1).gather(-1, index).to(top_k_weights.dtype)
        top_k_weights = torch.where(rerouted, probability, top_k_weights)
    weights = top_k_weights * (fits | rerouted)
    return CapacityAssignment(index, weights, overflowing & ~rerouted, rerouted)


def _reroute_without_limit(index, overflowing, router_logits, allowed):
    """Each overflowing assignment of a token to its best other expert, the second one to the second best."""
    logits = router_logits if allowed is None else router_logits.masked_fill(~allowed, float("-inf"))
    rest = logits.scatter(-1, index, float("-inf"))
    best = rest.sort(dim=-1, descending=True, stable=True)
    place = (overflowing.cumsum(dim=-1) - 1).clamp_min(0)
    rerouted = overflowing & best.values.gather(-1, place).isneginf().logical_not()
    return torch.where(rerouted, best.indices.gather(-1, place), index), rerouted


def _reroute(index, fits, overflowing, router_logits, capacity, allowed=None):
    """Rounds of proposals: each token with an unplaced assignment asks its next-best expert, which takes while it has room."""
    num_tokens, num_experts = router_logits.shape
    top_k = index.shape[1]
    # a token's own choices come first, so later columns never repeat one
    rest = router_logits.scatter(-1, index, float("inf"))
    preference = rest.sort(dim=-1, descending=True, stable=True).indices
    reachable = rest.gather(-1, preference).isneginf().logical_not()
    if allowed is not None:
        reachable = reachable & allowed[preference]
    taken = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    taken.scatter_add_(0, index.reshape(-1), fits.reshape(-1).to(torch.int64))
    rerouted = torch.zeros_like(fits)
    for column in range(top_k, num_experts):
        waiting = overflowing & ~rerouted
        slot = stable_top_k(waiting.to(torch.int8), 1)
        asks = waiting.any(dim=-1) & reachable[:, column]
        expert = torch.where(asks, preference[:, column], num_experts)
        accepted = asks & (position_in_expert(expert, num_experts) < (capacity - taken)[expert])
        taken.scatter_add_(0, expert, accepted.to(torch.int64))
        accepted = torch.zeros_like(fits).scatter_(1, slot, accepted.unsqueeze(-1))
        index = torch.where(accepted, expert.unsqueeze(-1), index)
        rerouted = rerouted | accepted
    return index, rerouted


class CapacityRule(nn.Module):
    """
    The number of assignments an expert of one layer takes in a batch, by `config.capacity_mode`.

    `"critical"` takes the lower bound of Theorem 1 from the run itself: over the first `critical_capacity_steps` optimizer
    steps nothing is dropped and the `critical_capacity_quantile` of the token-gate cosines is averaged (buffer
    `cos_angle`); after that the capacity is `min(T, max(ceil(4.6 ec_min), ceil(T k / n)))`. Where more than
    `critical_max_drop_rate` of the assignments are then dropped, the capacity is raised to the one that drops about one
    per cent of them at the loads seen (buffer `min_factor`), and the bound is a floor.
    """

    DROP_RATE_TARGET = 0.01

    def __init__(self, config):
        super().__init__()
        self.mode = config.capacity_mode
        self.factor = config.expert_capacity_factor
        self.at_eval = config.capacity_at_eval
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        self.hidden_size = config.hidden_size
        self.calibration_steps = config.critical_capacity_steps
        self.quantile = config.critical_capacity_quantile
        self.max_drop_rate = config.critical_max_drop_rate
        # what `capacity` reads, on the host: (steps measured, ec_min, min_factor)
        self._measured = (0, 0.0, 0.0)
        if self.mode == "critical":
            self.register_buffer("steps", torch.zeros((), dtype=torch.float32))
            self.register_buffer("cos_angle", torch.zeros((), dtype=torch.float32))
            self.register_buffer("min_factor", torch.zeros((), dtype=torch.float32))
            self.register_load_state_dict_post_hook(_refresh_after_loading)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, factor={self.factor}"

    def reset_buffers(self, copy) -> None:
        """Write initial buffer values with `copy(buffer, value)`."""
        if self.mode == "critical":
            for buffer in (self.steps, self.cos_angle, self.min_factor):
                copy(buffer, torch.zeros(()))

    def refresh(self) -> None:
        """Read the measured values back to the host, after they were loaded or updated."""
        if self.mode != "critical" or self.steps.is_meta:
            return
        steps, cos_angle, min_factor = torch.stack([self.steps, self.cos_angle, self.min_factor]).tolist()
        min_capacity = 0.0
        if cos_angle > 0:
            bound = min_expert_capacity(torch.tensor(min(cos_angle, 1.0)), self.hidden_size, self.num_experts)
            min_capacity = float(bound)
        self._measured = (int(steps), min_capacity, min_factor)

    @property
    def measures_cosines(self) -> bool:
        """Whether the layer's statistics should hold the cosine quantile."""
        return self.mode == "critical" and self._measured[0] < self.calibration_steps

    def capacity(self, num_tokens: int) -> int | None:
        """Assignments an expert takes of a batch of `num_tokens` tokens; None for all of them."""
        if self.mode == "dropless" or not (self.training or self.at_eval) or num_tokens == 0:
            return None
        if self.mode == "factor":
            return expert_capacity(num_tokens, self.num_experts, self.top_k, self.factor)
        steps, min_capacity, min_factor = self._measured
        if steps < self.calibration_steps:
            return None
        bound = critical_capacity(min_capacity, num_tokens, self.num_experts, self.top_k)
        floor = math.ceil(num_tokens * self.top_k * min_factor / self.num_experts)
        return min(max(bound, floor), num_tokens)  # a token reaches an expert once

    @torch.no_grad()
    def update_state(self, router_stats: torch.Tensor) -> None:
        """
        Once per optimizer step, with the (S, n) statistics summed over its micro-batches and all ranks. Reads them back
        to the host in `"critical"` mode.
        """
        if self.mode != "critical":
            return
        tokens = router_stats[RouterStat.TOKENS]
        num_assignments = float(tokens.sum())
        if num_assignments == 0:
            return
        if self.measures_cosines:
            quantile = router_stats[RouterStat.COS_QUANTILE_SUM].sum() / (num_assignments / self.top_k)
            self.cos_angle += (quantile.to(self.cos_angle.dtype) - self.cos_angle) / (self.steps + 1)
            self.steps += 1
        elif float(router_stats[RouterStat.DROPPED].sum()) > self.max_drop_rate * num_assignments:
            shares = (tokens / num_assignments).double().cpu()
            wanted = capacity_for_drop_rate(shares, int(num_assignments), self.DROP_RATE_TARGET)
            factor = float(wanted) * self.num_experts / num_assignments
            self.min_factor.fill_(max(factor, float(self.min_factor)))
        self.refresh()


def _refresh_after_loading(rule: CapacityRule, incompatible_keys) -> None:
    # a function with a name: a module that holds a lambda cannot be pickled
    rule.refresh()


__all__ = ["CapacityAssignment", "CapacityRule", "RemoteTier", "limit_to_capacity", "position_in_expert"]
