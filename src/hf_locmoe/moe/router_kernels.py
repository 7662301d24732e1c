# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels of what every gate does with its logits: top-k, and the sums of the router statistics, one pass each.

Importing this file needs Triton; the router falls back to plain torch where it is missing.

Shapes: T tokens, n = num_experts, k = num_experts_per_tok.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


_TILE = 4096  # logits that a program holds
NUM_SUMS = 5  # rows of `route_sums`: probability, assignments, dropped, rerouted, entropy; `RouterStat` names them


@triton.jit
def _top_k_kernel(values, index, T, n: tl.constexpr, TOP_K: tl.constexpr, TOKENS: tl.constexpr, N_PAD: tl.constexpr):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, N_PAD)
    inside = (token < T)[:, None] & (expert < n)[None, :]
    x = tl.load(values + token[:, None] * n + expert[None, :], mask=inside, other=float("-inf"))
    for slot in tl.static_range(TOP_K):
        best = tl.argmax(x, axis=1, tie_break_left=True)
        tl.store(index + token * TOP_K + slot, best.to(tl.int64), mask=token < T)
        x = tl.where(expert[None, :] == best[:, None], float("-inf"), x)


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
    dropped,
    rerouted,
    sums,
    T,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    MASKED: tl.constexpr,
    LIMITED: tl.constexpr,
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
    out = sums + tl.program_id(0) * 5 * n + expert
    tl.store(out, tl.sum(probability * weight[:, None], axis=0), mask=expert < n)
    num_tokens = tl.zeros((N_PAD,), tl.float32)
    num_dropped = tl.zeros((N_PAD,), tl.float32)
    num_rerouted = tl.zeros((N_PAD,), tl.float32)
    for slot in tl.static_range(TOP_K):
        place = token * TOP_K + slot
        chosen = tl.load(index + place, mask=exists, other=-1)
        hit = tl.where(chosen[:, None] == expert[None, :], weight[:, None], 0.0)
        num_tokens += tl.sum(hit, axis=0)
        if slot == 0:
            tl.store(out + 4 * n, tl.sum(hit * entropy[:, None], axis=0), mask=expert < n)
        if LIMITED:
            is_dropped = tl.load(dropped + place, mask=exists, other=0).to(tl.float32)
            is_rerouted = tl.load(rerouted + place, mask=exists, other=0).to(tl.float32)
            num_dropped += tl.sum(hit * is_dropped[:, None], axis=0)
            num_rerouted += tl.sum(hit * is_rerouted[:, None], axis=0)
    tl.store(out + n, num_tokens, mask=expert < n)
    tl.store(out + 2 * n, num_dropped, mask=expert < n)
    tl.store(out + 3 * n, num_rerouted, mask=expert < n)


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
    padded = triton.next_power_of_2(num_experts)
    tokens = max(1, _TILE // padded)
    constants = {"T": num_tokens, "n": num_experts, "TOKENS": tokens, "N_PAD": padded}
    return (triton.cdiv(num_tokens, tokens),), constants


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
def _route_sums(logits: Tensor, index: Tensor, counted: Tensor, dropped: Tensor, rerouted: Tensor) -> Tensor:
    logits, index = logits.contiguous(), index.contiguous()
    if not logits.shape[0]:
        return logits.new_zeros((NUM_SUMS, logits.shape[1]))
    grid, constants = _layout(logits)
    sums = logits.new_empty((*grid, NUM_SUMS, logits.shape[1]))
    _sums_kernel[grid](
        logits,
        index,
        counted.contiguous(),
        dropped.contiguous(),
        rerouted.contiguous(),
        sums,
        TOP_K=index.shape[1],
        MASKED=counted.numel() > 0,
        LIMITED=dropped.numel() > 0,
        **constants,
    )
    return sums.sum(dim=0)


@torch.library.custom_op("hf_locmoe::route_sums_backward", mutates_args=())
def _route_sums_backward(grad: Tensor, logits: Tensor, counted: Tensor) -> Tensor:
    logits = logits.contiguous()
    grad_logits = torch.empty_like(logits)
    if logits.shape[0]:
        grid, constants = _layout(logits)
        _sums_backward_kernel[grid](
            grad.contiguous(), logits, counted.contiguous(), grad_logits, MASKED=counted.numel() > 0, **constants
        )
    return grad_logits


@top_k_of_router.register_fake
def _(values, k):
    return values.new_empty((values.shape[0], k), dtype=torch.int64)


@_route_sums.register_fake
def _(logits, index, counted, dropped, rerouted):
    return logits.new_empty((NUM_SUMS, logits.shape[1]))


@_route_sums_backward.register_fake
def _(grad, logits, counted):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[2])


_route_sums.register_autograd(
    lambda ctx, grad: (_route_sums_backward(grad, *ctx.saved_tensors), None, None, None, None), setup_context=_save
)


def route_sums(
    logits: Tensor,
    index: Tensor,
    token_mask: Tensor | None = None,
    dropped: Tensor | None = None,
    rerouted: Tensor | None = None,
) -> Tensor:
    """
    The first rows of [`~hf_locmoe.moe.routing.router_statistics`], `PROB_SUM` to `ENTROPY_SUM`.

    Args:
        logits (`torch.Tensor` of shape `(T, n)`): Float32.
        index (`torch.Tensor` of shape `(T, k)`): Int64, the experts wanted.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token counts nowhere.
        dropped, rerouted (`torch.Tensor` of shape `(T, k)`, *optional*): Boolean; both or none.

    Returns:
        `torch.Tensor` of shape `(5, n)`, float32; the first row alone carries a gradient.
    """
    none = index.new_empty((0,), dtype=torch.bool)
    return _route_sums(
        logits,
        index,
        none if token_mask is None else token_mask,
        none if dropped is None else dropped,
        none if rerouted is None else rerouted,
    )


__all__ = ["NUM_SUMS", "route_sums", "top_k_of_router"]
