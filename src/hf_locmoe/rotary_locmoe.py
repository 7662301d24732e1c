# SPDX-License-Identifier: Apache-2.0
"""
Rotary positions of queries and keys.

Shapes: B = batch size, Q = sequence length, H = heads, D = head_dim.
"""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


try:
    from .decoder_kernels import rotate
except ImportError:  # no Triton
    rotate = None


def apply_rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As transformers' `apply_rotary_pos_emb`, bit for bit; on CUDA with Triton one kernel, which reads queries and keys once.

    Args:
        query (`torch.Tensor` of shape `(B, H, Q, D)`): Any float dtype.
        key (`torch.Tensor` of shape `(B, H', Q, D)`): Likewise, with as many heads or fewer.
        cos, sin (`torch.Tensor` of shape `(B, Q, D)` or `(1, Q, D)`): In the dtype of the queries.

    Returns:
        Queries and keys, new tensors of the same shapes.
    """
    if rotate is None or not _runs_on(query, key, cos, sin):
        return apply_rotary_pos_emb(query, key, cos, sin)
    return rotate(query, key, cos, sin)


def _runs_on(query, key, cos, sin) -> bool:
    # the compiler fuses the plain form by itself, with what is around it
    if not query.is_cuda or torch.compiler.is_compiling() or type(query) is not torch.Tensor:
        return False
    one_dtype = query.dtype == key.dtype == cos.dtype == sin.dtype
    return one_dtype and cos.shape[-1] == query.shape[-1] == key.shape[-1] and cos.dim() == 3


__all__ = ["apply_rotary"]
