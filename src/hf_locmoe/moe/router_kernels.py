# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of what gates do with logits: top-k, and the sums of the router statistics, one pass each; and the counts of
what found its expert full. The LocMoE gate does the first two as it pools (`gate_kernels.py`).

Importing this file needs Triton; the router falls back to plain torch where it is missing.

Shapes: T tokens, n = num_experts, k = num_experts_per_tok.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..permute.row_kernels import ceil_div, power_of_2


_TILE = 4096  # logits that a program holds
_NUM_SUMS = 3  # rows of `route_sums`: probability, assignments, entropy


@triton.jit
def sortable(x):
    """Float32 to int32 of the same order; integers have a reduction in hardware."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def best_of(values, expert, N_PAD: tl.constexpr):
    """(TOKENS, N_PAD) integers to the expert of each row's greatest; ties go to the lower one."""
    greatest = tl.max(values, axis=1)
    return tl.min(tl.where(values == greatest[:, None], expert[None, :], N_PAD), axis=1)


@triton.jit
def _top_k_kernel(values, index, T, n: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, N_PAD: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N_PAD)
    inside = (token < T)[:, None] & (expert < n)[None, :]
    lowest: tl.constexpr = -(2**31)
    # 0 is added because -0.0 equals 0.0, and its bits do not
    x = sortable(tl.load(values + token[:, None] * n + expert[None, :], mask=inside, other=0.0) + 0.0)
    x = tl.where((expert < n)[None, :], x, lowest)
    for slot in tl.static_range(TOP_K):
        best = best_of(x, expert, N_PAD)
        tl.store(index + token * TOP_K + slot, best.to(tl.int64), mask=token < T)
        x = tl.where(expert[None, :] == best[:, None], lowest, x)


@triton.jit
def _softmax(logits, token, T, n: tl.constexpr, N_PAD: tl.constexpr):
    """(TOKENS, N_PAD) probabilities and their logarithms."""
    expert = tl.arange(0, N_PAD)
    inside = (token < T)[:, None] & (expert < n)[None, :]
    x = tl.load(logits + token[:, None] * n + expert[None, :], mask=inside, other=float("-inf"))
    # rows past the last token have to stay finite
    x = tl.where((token < T)[:, None], x, 0.0)
    x -= tl.max(x, axis=1)[:, None]
    exponential = tl.exp(x)
    total = tl.sum(exponential, axis=1)[:, None]
    return exponential / total, x - tl.log(total)


@triton.jit
def _sums_kernel(
    logits,
    index,
    counted,
    sums,
    T,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    N_PAD: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N_PAD)
    probability, logarithm = _softmax(logits, token, T, n, N_PAD)
    entropy = -tl.sum(tl.where(probability > 0, probability * logarithm, 0.0), axis=1)
    exists = token < T
    weight = exists.to(tl.float32)
    if MASKED:
        weight = tl.load(counted + token, mask=exists, other=0).to(tl.float32)
    out = sums + tl.program_id(0) * 3 * n + expert
    tl.store(out, tl.sum(probability * weight[:, None], axis=0), mask=expert < n)
    num_tokens = tl.zeros((N_PAD,), tl.float32)
    for slot in tl.static_range(TOP_K):
        chosen = tl.load(index + token * TOP_K + slot, mask=exists, other=-1)
        hit = tl.where(chosen[:, None] == expert[None, :], weight[:, None], 0.0)
        num_tokens += tl.sum(hit, axis=0)
        if slot == 0:
            tl.store(out + 2 * n, tl.sum(hit * entropy[:, None], axis=0), mask=expert < n)
    tl.store(out + n, num_tokens, mask=expert < n)


@triton.jit
def _count_kernel(
    index,
    counted,
    dropped,
    rerouted,
    counts,
    A,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    ASSIGNMENTS: tl.constexpr,
    N_PAD: tl.constexpr,
):
    assignment = tl.program_id(0) * ASSIGNMENTS + tl.arange(0, ASSIGNMENTS)
    expert = tl.arange(0, N_PAD)
    exists = assignment < A
    if MASKED:
        exists = exists & (tl.load(counted + assignment // TOP_K, mask=exists, other=0) != 0)
    hit = tl.load(index + assignment, mask=exists, other=-1)[:, None] == expert[None, :]
    out = counts + tl.program_id(0) * 2 * n + expert
    for row in tl.static_range(2):
        flags = tl.load((dropped if row == 0 else rerouted) + assignment, mask=exists, other=0).to(tl.float32)
        tl.store(out + row * n, tl.sum(tl.where(hit, flags[:, None], 0.0), axis=0), mask=expert < n)


@triton.jit
def _sums_backward_kernel(
    grad,
    logits,
    counted,
    grad_logits,
    T,
    n: tl.constexpr,
    MASKED: tl.constexpr,
    TOKENS: tl.constexpr,
    N_PAD: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N_PAD)
    exists = token < T
    probability, _ = _softmax(logits, token, T, n, N_PAD)
    # of the rows of sums, the first alone carries a gradient
    slope = tl.load(grad + expert, mask=expert < n, other=0.0)[None, :]
    value = probability * (slope - tl.sum(probability * slope, axis=1)[:, None])
    if MASKED:
        value *= tl.load(counted + token, mask=exists, other=0).to(tl.float32)[:, None]
    inside = exists[:, None] & (expert < n)[None, :]
    tl.store(grad_logits + token[:, None] * n + expert[None, :], value, mask=inside)


def _layout(logits: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of the kernels."""
    num_tokens, num_experts = logits.shape
    padded = power_of_2(num_experts)
    tokens = max(1, _TILE // padded)
    constants = {"T": num_tokens, "n": num_experts, "TOKENS": tokens, "N_PAD": padded}
    return (ceil_div(num_tokens, tokens),), constants


@torch.library.custom_op("hf_locmoe::top_k_of_router", mutates_args=())
def top_k_of_router(values: Tensor, k: int) -> Tensor:
    """(T, n) float32 to the (T, k) int64 indices of the k largest, the largest first; ties go to the lower index."""
    values = values.contiguous()
    index = values.new_empty((values.shape[0], k), dtype=torch.int64)
    if values.shape[0]:
        grid, constants = _layout(values)
        _top_k_kernel[grid](values, index, TOP_K=k, **constants)
    return index


@torch.library.custom_op("hf_locmoe::route_sums", mutates_args=())
def route_sums(logits: Tensor, index: Tensor, token_mask: Tensor | None) -> Tensor:
    """
    The sums of [`~hf_locmoe.moe.routing.router_statistics`] that follow from logits and choice alone.

    Args:
        logits (`torch.Tensor` of shape `(T, n)`): Float32.
        index (`torch.Tensor` of shape `(T, k)`): Int64, the experts wanted.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token counts nowhere.

    Returns:
        `torch.Tensor` of shape `(3, n)`, float32: `PROB_SUM`, `TOKENS`, `ENTROPY_SUM`. The first row alone carries a
        gradient.
    """
    logits, index = logits.contiguous(), index.contiguous()
    if not logits.shape[0]:
        return logits.new_zeros((_NUM_SUMS, logits.shape[1]))
    grid, constants = _layout(logits)
    sums = logits.new_empty((*grid, _NUM_SUMS, logits.shape[1]))
    _sums_kernel[grid](
        logits,
        index,
        index if token_mask is None else token_mask.contiguous(),
        sums,
        TOP_K=index.shape[1],
        MASKED=token_mask is not None,
        **constants,
    )
    return sums.sum(dim=0)


@torch.library.custom_op("hf_locmoe::count_limited", mutates_args=())
def count_limited(
    index: Tensor, token_mask: Tensor | None, dropped: Tensor, rerouted: Tensor, num_experts: int
) -> Tensor:
    """
    Counts of the assignments that found their expert full, by the expert wanted.

    Args:
        index (`torch.Tensor` of shape `(T, k)`): Int64, the experts wanted.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token counts nowhere.
        dropped, rerouted (`torch.Tensor` of shape `(T, k)`): Boolean.
        num_experts (`int`): n.

    Returns:
        `torch.Tensor` of shape `(2, n)`, float32: `DROPPED`, `REROUTED`.
    """
    if not index.numel():
        return index.new_zeros((2, num_experts), dtype=torch.float32)
    padded = power_of_2(num_experts)
    assignments = max(1, _TILE // padded)
    programs = ceil_div(index.numel(), assignments)
    counts = index.new_empty((programs, 2, num_experts), dtype=torch.float32)
    _count_kernel[(programs,)](
        index.contiguous(),
        index if token_mask is None else token_mask.contiguous(),
        dropped.contiguous(),
        rerouted.contiguous(),
        counts,
        index.numel(),
        n=num_experts,
        TOP_K=index.shape[1],
        MASKED=token_mask is not None,
        ASSIGNMENTS=assignments,
        N_PAD=padded,
    )
    return counts.sum(dim=0)


@torch.library.custom_op("hf_locmoe::route_sums_backward", mutates_args=())
def _route_sums_backward(grad: Tensor, logits: Tensor, token_mask: Tensor | None) -> Tensor:
    logits = logits.contiguous()
    grad_logits = torch.empty_like(logits)
    if logits.shape[0]:
        grid, constants = _layout(logits)
        _sums_backward_kernel[grid](
            grad.contiguous(),
            logits,
            logits if token_mask is None else token_mask.contiguous(),
            grad_logits,
            MASKED=token_mask is not None,
            **constants,
        )
    return grad_logits


@top_k_of_router.register_fake
def _(values, k):
    return values.new_empty((values.shape[0], k), dtype=torch.int64)


@route_sums.register_fake
def _(logits, index, token_mask):
    return logits.new_empty((_NUM_SUMS, logits.shape[1]))


@count_limited.register_fake
def _(index, token_mask, dropped, rerouted, num_experts):
    return index.new_empty((2, num_experts), dtype=torch.float32)


@_route_sums_backward.register_fake
def _(grad, logits, token_mask):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    logits, _, token_mask = inputs
    ctx.save_for_backward(logits, token_mask)


route_sums.register_autograd(
    lambda ctx, grad: (_route_sums_backward(grad, *ctx.saved_tensors), None, None), setup_context=_save
)


__all__ = ["best_of", "count_limited", "route_sums", "sortable", "top_k_of_router"]
