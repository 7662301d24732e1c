# SPDX-License-Identifier: Apache-2.0
"""
What the routers of a checkpoint see on a sample of text.

Shapes: N = tokens kept of a layer, d = hidden_size, n = num_experts, L = MoE layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..configuration_locmoe import LocMoeConfig
from ..modeling_locmoe import LocMoeForCausalLM
from .run import ReportError


NUM_TOKENS = 2048  # of the sample
NUM_KEPT = 1024  # tokens of a layer that are compared in pairs
MAX_LENGTH = 256
HISTOGRAM_BINS = 100


@dataclass(frozen=True)
class LayerProbe:
    """
    One layer's router on the sample.

    Args:
        layer (`int`): Index in the decoder.
        same, different (`torch.Tensor` of shape `(HISTOGRAM_BINS,)`): Pairs of tokens of the same expert and of different
            ones, counted by their cosine from -1 to 1.
        same_mean, different_mean (`float`): Mean cosines of those pairs; NaN where there is no such pair.
        chosen (`torch.Tensor` of shape `(N,)`): Cosine of each token with the gate weight of its expert.
        others (`torch.Tensor` of shape `(N * (n - 1),)`): With the other experts' gate weights.
        by_expert (`torch.Tensor` of shape `(n, n)`): Mean cosine of the tokens of expert i with gate weight j; NaN rows
            for experts without tokens.
    """

    layer: int
    same: torch.Tensor
    different: torch.Tensor
    same_mean: float
    different_mean: float
    chosen: torch.Tensor
    others: torch.Tensor
    by_expert: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """The layers of a checkpoint, on a sample whose `source` is told in words."""

    layers: list[LayerProbe]
    source: str
    config: LocMoeConfig


@torch.no_grad()
def probe_checkpoint(checkpoint: Path, text: str | os.PathLike[str] | None = None, seed: int = 0) -> Probe | None:
    """
    Runs a checkpoint on text and compares the hidden states that reach its routers.

    Args:
        checkpoint (`Path`): Folder with config, weights and, for `text`, a tokenizer.
        text (`str` or `os.PathLike`, *optional*): A UTF-8 text file. Without one the model writes its own sample.
        seed (`int`, *optional*, defaults to 0): Of that sample.

    Returns:
        [`Probe`]: None where the checkpoint is not a LocMoE causal language model.

    Raises:
        ReportError: The text cannot be read, or is too short.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, LocMoeConfig) or LocMoeForCausalLM.__name__ not in (config.architectures or []):
        return None
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    if text is None:
        input_ids, source = _own_sample(model, seed), "text that the model sampled itself"
    else:
        input_ids, source = _tokens_of(Path(text), checkpoint, config), f"`{Path(text).name}`"
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        block.gate.register_forward_hook(lambda gate, args, output: seen.append((args[0].float(), output[2][:, 0])))
        for block in model.sparse_blocks
    ]
    try:
        model(input_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        _probe_layer(layer, block.gate, *states)
        for layer, block, states in zip(config.sparse_layers, model.sparse_blocks, seen, strict=True)
    ]
    return Probe(layers, f"{input_ids.numel():,} tokens of {source}", config)


def _probe_layer(layer: int, gate, hidden_states: torch.Tensor, expert: torch.Tensor) -> LayerProbe:
    stride = -(-hidden_states.shape[0] // NUM_KEPT)
    hidden_states, expert = hidden_states[::stride], expert[::stride]
    directions = torch.nn.functional.normalize(hidden_states, dim=-1)
    similarity = (directions @ directions.T).clamp(-1, 1)
    above_diagonal = torch.ones_like(similarity, dtype=torch.bool).triu(diagonal=1)
    equal = expert[:, None] == expert[None, :]
    pairs = {name: similarity[mask & above_diagonal] for name, mask in (("same", equal), ("different", ~equal))}
    cosine = gate.cosines(hidden_states)
    is_chosen = torch.nn.functional.one_hot(expert, cosine.shape[-1]).bool()
    members = is_chosen.float()
    return LayerProbe(
        layer,
        **{name: torch.histc(values, bins=HISTOGRAM_BINS, min=-1, max=1) for name, values in pairs.items()},
        **{f"{name}_mean": values.mean().item() for name, values in pairs.items()},
        chosen=cosine[is_chosen],
        others=cosine[~is_chosen],
        by_expert=(members.T @ cosine) / members.sum(dim=0).unsqueeze(-1),
    )


def _own_sample(model: LocMoeForCausalLM, seed: int) -> torch.Tensor:
    length = min(MAX_LENGTH, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(model.config.vocab_size, (max(1, NUM_TOKENS // length), 1), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model.generate(
            starts, max_length=length, min_length=length, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0
        )


def _tokens_of(text: Path, checkpoint: Path, config: LocMoeConfig) -> torch.Tensor:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"`--text` ({text}) cannot be read as UTF-8 text: {error}.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ReportError(f"`--text` needs a tokenizer, and {checkpoint} has none: leave `--text` out.") from error
    token_ids = tokenizer(content, verbose=False)["input_ids"][:NUM_TOKENS]
    length = min(MAX_LENGTH, config.max_position_embeddings, len(token_ids))
    if length < 2:
        raise ReportError(f"`--text` ({text}) is too short: it has {len(token_ids)} tokens, and pairs are compared.")
    return torch.tensor(token_ids[: len(token_ids) // length * length]).view(-1, length)


__all__ = ["HISTOGRAM_BINS", "LayerProbe", "Probe", "probe_checkpoint"]
