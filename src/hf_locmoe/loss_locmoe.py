# SPDX-License-Identifier: Apache-2.0
"""
The language-modelling loss.

Shapes: B = batch size, Q = sequence length, T = B * Q, V = vocab_size.
"""

from __future__ import annotations

import torch
from transformers.loss.loss_utils import ForCausalLMLoss


try:
    from .decoder_kernels import cross_entropy_rows
except ImportError:  # no Triton
    cross_entropy_rows = None


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    As transformers' `ForCausalLMLoss`: the cross-entropy of the next token in float32. On CUDA with Triton the logits are
    read in their own dtype and no float32 copy of them is written, neither forward nor backward.

    Args:
        logits (`torch.Tensor` of shape `(B, Q, V)`): Any float dtype; left as they are.
        labels (`torch.Tensor` of shape `(B, Q)`): Token ids; `ignore_index` counts nowhere.
        vocab_size (`int`): V.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the sum over tokens is divided by; their number if
            not given.
        shift_labels (`torch.Tensor` of shape `(B, Q)`, *optional*): The labels shifted already.

    Returns:
        `torch.Tensor`: Scalar, float32.
    """
    if cross_entropy_rows is None or not _runs_on(logits):
        return ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    counted = targets != ignore_index
    torch._assert_async(
        (~counted | ((targets >= 0) & (targets < vocab_size))).all(), f"`labels` must be from 0 to {vocab_size - 1}"
    )
    total = cross_entropy_rows(logits.view(-1, vocab_size), targets, ignore_index).sum()
    if num_items_in_batch is None:
        return total / counted.sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _runs_on(logits) -> bool:
    # the compiler fuses the plain form by itself
    if not logits.is_cuda or torch.compiler.is_compiling() or type(logits) is not torch.Tensor:
        return False
    return logits.dtype != torch.float64


__all__ = ["causal_lm_loss"]
