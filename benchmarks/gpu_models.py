# SPDX-License-Identifier: Apache-2.0
"""
The models of the single-GPU benchmarks: pairs of a transformers model and a LocMoE of the same size, random weights in bfloat16.

* `olmoe`: OLMoE-1B-7B's geometry, 64 experts, top-8, 1.3 B of 6.9 B parameters active.
* `mixtral`: a Mixtral with 8 large experts, top-1, 0.9 B of 5.2 B parameters active.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig

from hf_locmoe import LocMoeConfig


DEVICE = "cuda"
SEQUENCE = 4096
GEOMETRIES: dict[str, dict[str, Any]] = {
    "olmoe": dict(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts_per_tok=8,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
    ),
    "mixtral": dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=7168,
        num_hidden_layers=14,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_experts_per_tok=1,
        max_position_embeddings=SEQUENCE,
        tie_word_embeddings=False,
    ),
}
NUM_EXPERTS = {"olmoe": 64, "mixtral": 8}
TITLES = {"olmoe": "OLMoE", "mixtral": "Mixtral"}


def build(size: str, ours: bool) -> torch.nn.Module:
    """The LocMoE of a size, or transformers' model with its `grouped_mm`."""
    torch.manual_seed(0)
    geometry, num_experts = GEOMETRIES[size], NUM_EXPERTS[size]
    config: Any
    if ours:
        own = dict(moe_intermediate_size=geometry["intermediate_size"], gated_mlp=True, hidden_act="silu")
        own["qk_norm"] = "full" if size == "olmoe" else None
        config = LocMoeConfig(**geometry, **own, num_experts=num_experts)
    elif size == "olmoe":
        config = OlmoeConfig(**geometry, num_experts=num_experts, output_router_logits=True)
    else:
        config = MixtralConfig(
            **geometry, num_local_experts=num_experts, sliding_window=None, output_router_logits=True
        )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_experts_implementation("capacity_bmm" if ours else "grouped_mm")
    return model


def release() -> None:
    """Gives back the memory of models that nothing refers to any more."""
    gc.collect()
    torch.cuda.empty_cache()


def active_parameters(size: str) -> int:
    """Parameters whose product a token takes part in: without embeddings, norms and router, alike for both models."""
    geometry = GEOMETRIES[size]
    d, head_dim = geometry["hidden_size"], geometry["hidden_size"] // geometry["num_attention_heads"]
    attention = 2 * d * d + 2 * d * head_dim * geometry["num_key_value_heads"]
    experts = geometry["num_experts_per_tok"] * 3 * d * geometry["intermediate_size"]
    return geometry["num_hidden_layers"] * (attention + experts) + d * geometry["vocab_size"]


def active_flops(size: str, sequence: int = SEQUENCE) -> float:
    """Operations a token and training step needs: 6 for each active parameter, and causal attention."""
    geometry = GEOMETRIES[size]
    return 6 * active_parameters(size) + 6 * geometry["num_hidden_layers"] * geometry["hidden_size"] * sequence


def set_capacity(model, factor: float | None) -> None:
    """Every MoE layer's capacity factor in training; None for dropless."""
    for block in model.sparse_blocks:
        block.capacity_rule.mode, block.capacity_rule.factor = (
            ("dropless", 1.0) if factor is None else ("factor", factor)
        )


__all__ = [
    "DEVICE",
    "GEOMETRIES",
    "NUM_EXPERTS",
    "SEQUENCE",
    "TITLES",
    "active_flops",
    "active_parameters",
    "build",
    "release",
    "set_capacity",
]
