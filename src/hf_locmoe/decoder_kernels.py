# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of the dense part of the decoder: rotary positions, and the cross-entropy of logits.

Importing this file needs Triton; callers take plain torch where it is missing, and under torch.compile, which fuses that.
Rotary products and sums are rounded where torch's eager operators round them.

Shapes: B = batch size, Q = sequence length, H = heads, D = head_dim, T = tokens, V = vocab_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .permute.row_kernels import power_of_2


_COLUMNS = 4096  # logits that a program holds at a time
_HEADS = 16  # heads of a token that a program holds at a time


@triton.jit
def _rotate_heads(
    source,
    target,
    source_stride,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    within = tl.arange(0, HALF_PAD)[None, :]
    rounded: tl.constexpr = target.dtype.element_ty
    for first in tl.static_range(0, HEADS, BLOCK):
        head = first + tl.arange(0, BLOCK)[:, None]
        mask = (head < HEADS) & (within < HALF)
        x_1 = tl.load(source + head * source_stride + within, mask=mask, other=0.0).to(tl.float32)
        x_2 = tl.load(source + head * source_stride + HALF + within, mask=mask, other=0.0).to(tl.float32)
        if BACKWARD:
            cross_1, cross_2 = x_2 * sin_2, -x_1 * sin_1
        else:
            cross_1, cross_2 = -x_2 * sin_1, x_1 * sin_2
        y_1 = (x_1 * cos_1).to(rounded).to(tl.float32) + cross_1.to(rounded).to(tl.float32)
        y_2 = (x_2 * cos_2).to(rounded).to(tl.float32) + cross_2.to(rounded).to(tl.float32)
        out = target + head * (2 * HALF) + within
        tl.store(out, y_1.to(rounded), mask=mask)
        tl.store(out + HALF, y_2.to(rounded), mask=mask)


@triton.jit(do_not_specialize=["Q"])
def _rotary_kernel(
    query,
    key,
    cos,
    sin,
    new_query,
    new_key,
    Q,
    query_batch,
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    cos_batch,
    cos_token,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """One token of queries and keys; the results lie as (B, Q, H, D)."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // Q, row % Q
    within = tl.arange(0, HALF_PAD)[None, :]
    angle = batch * cos_batch + token * cos_token + within
    inside = within < HALF
    cos_1 = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    source = query + batch * query_batch + token * query_token
    target = new_query + row * (HEADS * 2 * HALF)
    _rotate_heads(source, target, query_head, cos_1, cos_2, sin_1, sin_2, HEADS, BLOCK, HALF, HALF_PAD, BACKWARD)
    source = key + batch * key_batch + token * key_token
    target = new_key + row * (KEY_HEADS * 2 * HALF)
    _rotate_heads(source, target, key_head, cos_1, cos_2, sin_1, sin_2, KEY_HEADS, KEY_BLOCK, HALF, HALF_PAD, BACKWARD)


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, lse, IGNORED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    # a running maximum and sum in each lane; a finite start, since -inf - -inf is no number
    greatest = tl.full((BLOCK,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=column < V, other=float("-inf")).to(tl.float32)
        new_greatest = tl.maximum(greatest, x)
        total = total * tl.exp(greatest - new_greatest) + tl.exp(x - new_greatest)
        greatest = new_greatest
    highest = tl.max(greatest, axis=0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(greatest - highest), axis=0))
    target = tl.load(targets + row)
    counts = target != IGNORED
    of_target = tl.load(logits + row * V + target, mask=counts & (target >= 0) & (target < V), other=0.0).to(
        tl.float32
    )
    tl.store(lse + row, log_sum)
    tl.store(losses + row, tl.where(counts, log_sum - of_target, 0.0))


@triton.jit
def _cross_entropy_backward_kernel(
    grad, logits, targets, lse, grad_logits, IGNORED: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target != IGNORED
    scale, log_sum = tl.load(grad + row), tl.load(lse + row)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + column, mask=(column < V) & counts, other=0.0).to(tl.float32)
        slope = (tl.exp(x - log_sum) - tl.where(column == target, 1.0, 0.0)) * scale
        slope = tl.where(counts, slope, 0.0)
        tl.store(grad_logits + row * V + column, slope.to(grad_logits.dtype.element_ty), mask=column < V)


def _launch_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    batch_size, heads, length, width = query.shape
    key_heads = key.shape[1]
    new_query = query.new_empty((batch_size, length, heads, width))
    new_key = key.new_empty((batch_size, length, key_heads, width))
    if new_query.numel():
        cos_batch = cos.stride(0) if cos.shape[0] > 1 else 0
        _rotary_kernel[(batch_size * length,)](
            query,
            key,
            cos,
            sin,
            new_query,
            new_key,
            length,
            *query.stride()[:3],
            *key.stride()[:3],
            cos_batch,
            cos.stride(1),
            HEADS=heads,
            KEY_HEADS=key_heads,
            HALF=width // 2,
            HALF_PAD=power_of_2(width // 2),
            BLOCK=min(_HEADS, power_of_2(heads)),
            KEY_BLOCK=min(_HEADS, power_of_2(key_heads)),
            BACKWARD=backward,
            enable_fp_fusion=False,  # a fused product and sum would round once where eager operators round twice
        )
    return new_query.transpose(1, 2), new_key.transpose(1, 2)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch_rotary(query, key, cos, sin, backward=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query, grad_key):
        cos, sin = ctx.saved_tensors
        return *_launch_rotary(grad_query, grad_key, cos, sin, backward=True), None, None


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """
    Rotary positions; arguments and results as for [`~hf_locmoe.rotary_locmoe.apply_rotary`], all of one dtype. No gradient
    reaches `cos` and `sin`.
    """
    cos, sin = cos.contiguous(), sin.contiguous()
    return _Rotate.apply(query, key, cos, sin)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        logits, targets = logits.contiguous(), targets.contiguous()
        num_tokens, vocab_size = logits.shape
        losses, lse = logits.new_empty((2, num_tokens), dtype=torch.float32).unbind()
        if num_tokens:
            block = min(_COLUMNS, power_of_2(vocab_size))
            _cross_entropy_kernel[(num_tokens,)](
                logits, targets, losses, lse, IGNORED=ignore_index, V=vocab_size, BLOCK=block, num_warps=8
            )
        ctx.save_for_backward(logits, targets, lse)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        num_tokens, vocab_size = logits.shape
        grad_logits = torch.empty_like(logits)
        if num_tokens:
            block = min(_COLUMNS, power_of_2(vocab_size))
            _cross_entropy_backward_kernel[(num_tokens,)](
                grad.contiguous(),
                logits,
                targets,
                lse,
                grad_logits,
                IGNORED=ctx.ignore_index,
                V=vocab_size,
                BLOCK=block,
                num_warps=8,
            )
        return grad_logits, None, None


def cross_entropy_rows(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """
    The cross-entropy of each row, in float32 whatever the dtype of the logits, of which no other copy is made.

    Args:
        logits (`torch.Tensor` of shape `(T, V)`): Float32, bfloat16 or float16; its gradient has the same dtype.
        targets (`torch.Tensor` of shape `(T,)`): Int64, from 0 to V - 1, or `ignore_index` for a loss of 0.
        ignore_index (`int`): See `targets`.

    Returns:
        `torch.Tensor` of shape `(T,)`, float32.
    """
    return _CrossEntropy.apply(logits, targets, ignore_index)


__all__ = ["cross_entropy_rows", "rotate"]
