# SPDX-License-Identifier: Apache-2.0
"""Tiny models and batches that tests share."""

from __future__ import annotations

from typing import Any

import torch

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM


TINY_SHAPE: dict[str, Any] = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=4,
    max_position_embeddings=128,
    # at 0.02 a model this narrow computes next to nothing: every comparison would hold
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_config(**overrides: Any) -> LocMoeConfig:
    """A `LocMoeConfig` of some ten thousand parameters."""
    return LocMoeConfig(**{**TINY_SHAPE, **overrides})


def tiny_model(seed: int = 0, model_class: type = LocMoeForCausalLM, **overrides: Any) -> Any:
    """A model with the weights that `seed` gives, in evaluation mode."""
    torch.manual_seed(seed)
    return model_class(tiny_config(**overrides)).eval()


def random_ids(batch_size: int = 2, length: int = 12, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    """Token ids of shape (batch_size, length), none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab_size, (batch_size, length), generator=generator)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter's gradient; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in model.named_parameters()
    }
