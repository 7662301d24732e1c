# SPDX-License-Identifier: Apache-2.0
"""
The gates the paper compares with: Switch (learned, dense) and Hash (balanced hash of the token id).

Shapes: T tokens, d = hidden_size, n = num_experts, k = num_experts_per_tok.
"""

from __future__ import annotations

import torch
from torch import nn

from .routing import Router, domain_mask


class SwitchGate(Router):
    """
    Learned dense gate, affinity = W x (Switch Transformer, arXiv 2101.03961). `gate_relu` belongs to the LocMoE gate and
    is not applied here.
    """

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.use_relu = False
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size))

    def affinity(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(hidden_states.float(), self.weight.float())

    def cosines(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (
            nn.functional.normalize(hidden_states.float(), dim=-1)
            @ nn.functional.normalize(self.weight.float(), dim=-1).T
        )


class HashGate(Router):
    """
    Balanced hash of the token id (hash layers, arXiv 2106.04426): a table names each token id's experts; every chosen
    expert has weight 1/k. With k > 1 a token id has k different experts.

    The initial table is balanced in the number of token ids; [`HashGate.balance_by_frequency`] balances it in the number
    of tokens. Given `domain_ids`, the hash chooses inside the token's expert group: the random routed experts of
    PanGu-Sigma.
    """

    expert_of_token: torch.Tensor

    def __init__(self, config, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        self.vocab_size = config.vocab_size
        self.register_buffer("expert_of_token", torch.zeros(self.vocab_size, self.top_k, dtype=torch.int64))

    def reset_buffers(self, copy) -> None:
        super().reset_buffers(copy)
        # one seed for every layer, as in the hash layers' paper: a token id keeps its expert
        order = torch.randperm(self.vocab_size, generator=torch.Generator().manual_seed(0))
        expert = torch.empty_like(order)
        expert[order] = torch.arange(self.vocab_size) % self.num_experts
        copy(self.expert_of_token, self._with_followers(expert))

    def _with_followers(self, expert: torch.Tensor) -> torch.Tensor:
        return (expert.unsqueeze(-1) + torch.arange(self.top_k, device=expert.device)) % self.num_experts

    @torch.no_grad()
    def balance_by_frequency(self, token_counts: torch.Tensor) -> None:
        """
        Rebuilds the table so that experts have equal shares of the tokens: the most frequent token id first, each to the
        expert with the fewest tokens so far.

        Args:
            token_counts (`torch.Tensor` of shape `(vocab_size,)`): Occurrences of each token id in the training data.
        """
        if token_counts.shape != (self.vocab_size,):
            raise ValueError(
                f"`token_counts` has shape {tuple(token_counts.shape)} and must have shape ({self.vocab_size},), one count "
                f"for each of the `vocab_size` ({self.vocab_size}) token ids."
            )
        counts = token_counts.tolist()
        load = [(0.0, expert) for expert in range(self.num_experts)]
        expert = torch.empty(self.vocab_size, dtype=torch.int64)
        for token in sorted(range(self.vocab_size), key=lambda t: (-counts[t], t)):
            if counts[token] <= 0:
                break
            total, least = min(load)
            expert[token] = least
            load[least] = (total + counts[token], least)
        # token ids never seen weigh nothing, so they are dealt out in turn
        unseen = (token_counts <= 0).nonzero().flatten().cpu()
        expert[unseen] = torch.arange(unseen.numel()) % self.num_experts
        self.expert_of_token.copy_(self._with_followers(expert))

    @torch.no_grad()
    def resize(self, vocab_size: int) -> None:
        """Follows a change of the vocabulary: token ids keep their experts, new ones are dealt out in turn."""
        added = max(vocab_size - self.vocab_size, 0)
        new = torch.arange(added, device=self.expert_of_token.device) % self.num_experts
        self.expert_of_token = torch.cat([self.expert_of_token[:vocab_size], self._with_followers(new)])
        self.vocab_size = vocab_size

    def affinity(self, hidden_states: torch.Tensor, input_ids: torch.Tensor | None = None) -> torch.Tensor:
        raise AssertionError("the hash gate has no affinities")

    def cosines(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_zeros((hidden_states.shape[0], self.num_experts), dtype=torch.float32)

    def forward(
        self,
        hidden_states,
        input_ids=None,
        domain_ids=None,
        token_mask=None,
        output_router_stats=False,
        capacity=None,
    ):
        if input_ids is None:
            raise ValueError(
                "`gate_type` ('hash') routes by token id and needs `input_ids`: pass them instead of `inputs_embeds`, or "
                "use `gate_type='locmoe'`."
            )
        index = self.expert_of_token[input_ids]
        if domain_mask(domain_ids, self.num_experts, self.num_expert_groups, self.top_k) is not None:
            group_size = self.num_experts // self.num_expert_groups
            index = index % group_size + group_size * domain_ids.unsqueeze(-1)
        shape = (hidden_states.shape[0], self.num_experts)
        logits = torch.full(shape, float("-inf"), device=hidden_states.device).scatter(-1, index, 0.0)
        return logits, torch.full(index.shape, 1 / self.top_k, device=hidden_states.device), index

    def update_state(self, tokens_per_expert: torch.Tensor, hidden_sum: torch.Tensor | None = None) -> None:
        """A hash learns nothing."""


__all__ = ["HashGate", "SwitchGate"]
