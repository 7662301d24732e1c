# SPDX-License-Identifier: Apache-2.0
"""
The LocMoE gate's kernels (`gate_jit_kernels.py`) as operators of torch: what autograd and the compiler see of them.

Importing this file needs Triton; the gate falls back to plain torch where it is missing.

Shapes: T tokens, d = hidden_size, n = num_experts, k = num_experts_per_tok, S = len(RouterStat).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..permute.row_kernels import ceil_div, choose, needs_operator, power_of_2, with_gradient
from .gate_jit_kernels import add_partials_kernel, gate_kernel, route_backward_kernel


_TILE = 4096  # elements of the hidden states that a program reads or writes together
_MAX_BLOCK = 32768  # dimensions of an expert's block, all in registers
_BACKWARD_CHUNK = 8  # tokens of a program of the backward
_MAX_EXPERTS = 8192  # affinities of one token, all in registers
_PROGRAMS = 512  # that many of the backward keep an H100 busy
# Of the forward, by the most experts: registers of a thread, and the warps of 32 threads that an H100 holds with them, on
# 132 multiprocessors of 65536 registers. Few experts' sums need few registers, and more warps wait for memory together; many
# experts' would spill.
_LAUNCHES = ((48, 96, 20 * 132), (128, 128, 16 * 132), (_MAX_EXPERTS, 168, 12 * 132))
_SUMMED_EXPERTS = 8  # of which a program adds the partial sums: 32 bytes, what memory moves at least
_NUM_STATS, _NUM_SUMMED = 7, 4  # rows of `RouterStat`, and of those the ones that a gate sums itself


def pools_in_one_pass(hidden_size: int, num_experts: int) -> bool:
    """Whether a block of dimensions and a token's affinities fit the registers of one program."""
    return -(-hidden_size // num_experts) <= _MAX_BLOCK // 2 and num_experts <= _MAX_EXPERTS


def _chunk(num_tokens: int, most: int) -> int:
    """Tokens of a program: a power of two, at most `most`, less where that would leave multiprocessors idle."""
    return max(1, min(most, power_of_2(num_tokens // _PROGRAMS)))


def _launch_of(n: int) -> tuple[int, int]:
    """Registers of a thread of the forward, and the warps that it is to have in all."""
    return next((registers, warps) for most, registers, warps in _LAUNCHES if n <= most)


@functools.lru_cache(maxsize=256)
def _forward_layout(d: int, n: int) -> dict[str, int]:
    """Tiles of `gate_kernel`, and a program's warps and registers."""
    align = 8 if d % 8 == 0 else 1
    starts = [i * d // n for i in range(n + 1)]
    widest = max(-(-end // align) * align - start // align * align for start, end in zip(starts, starts[1:]))
    size = power_of_2(widest)
    padded = window = power_of_2(n)
    # as many experts as fit, with few lanes past the last
    while window > 1 and (window * size > _TILE or -(-n // window) * window > 1.25 * n):
        window //= 2
    # one warp, so that no reduction leaves it, as long as its registers hold a tile and a token's affinities
    warps = max(1, window * size // (2 * _TILE), min(8, padded // 256))
    layout = {"WINDOW": window, "WINDOWS": -(-n // window), "SIZE_PAD": size, "ALIGN": align, "N_PAD": padded}
    return {**layout, "num_warps": warps, "maxnreg": _launch_of(n)[0]}


@functools.lru_cache(maxsize=256)
def _backward_layout(num_tokens: int, d: int, n: int) -> dict[str, int]:
    """Tiles of `route_backward_kernel`."""
    padded = power_of_2(n)
    chunk = _chunk(num_tokens, max(1, min(_BACKWARD_CHUNK, _MAX_EXPERTS // padded)))
    # blocks of 7 dimensions or more: of 8 dimensions that begin at a multiple of 8, at most two experts have a part
    width = 8 if d % 8 == 0 and d // n >= 7 else 1
    vectors = power_of_2(d // width)
    while vectors > 1 and (vectors * width > 1024 or -(-d // (vectors * width)) * vectors * width > 1.1 * d):
        vectors //= 2
    tokens = max(1, min(chunk, _TILE // (vectors * width)))
    return {"CHUNK": chunk, "N_PAD": padded, "TOKENS": tokens, "VECTORS": vectors, "WIDTH": width}


def _route(
    hidden_states: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    num_experts: int,
    top_k: int,
    cosine: bool,
    relu: bool,
    norm_topk_prob: bool,
    sample_stride: int,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden_states = hidden_states.contiguous()
    outputs = logits, weights, index, norm, stats = _empty_outputs(
        hidden_states, num_experts, top_k, cosine, sample_stride
    )
    num_tokens, hidden_size = hidden_states.shape
    if not num_tokens:
        stats.zero_()
        return outputs
    layout = _forward_layout(hidden_size, num_experts)
    span = ceil_div(num_tokens * layout["num_warps"], _launch_of(num_experts)[1])
    programs = ceil_div(num_tokens, span)
    partials = counts = logits
    if sample_stride:
        partials, counts = logits.new_empty((programs, _NUM_SUMMED, num_experts)), logits.new_empty((programs, 2))
    gate_kernel[(programs,)](
        hidden_states,
        _or_any(bias, logits),
        _or_any(noise, logits),
        _or_any(token_mask, index),
        logits,
        weights,
        index,
        norm,
        partials,
        counts,
        num_tokens,
        span,
        sample_stride,
        n=num_experts,
        D=hidden_size,
        TOP_K=top_k,
        K_PAD=power_of_2(max(top_k, 1)),
        COSINE=cosine,
        RELU=relu,
        NORMALIZE=norm_topk_prob,
        NOISY=noise is not None,
        STATS=sample_stride > 0,
        MASKED=token_mask is not None,
        **layout,
    )
    if sample_stride:
        experts = min(_SUMMED_EXPERTS, power_of_2(num_experts))
        parts = min(power_of_2(programs), 2 * _TILE // experts)
        add_partials_kernel[(_NUM_STATS, ceil_div(num_experts, experts))](
            partials, counts, stats, programs, capacity, n=num_experts, PARTS=parts, EXPERTS=experts, num_warps=8
        )
    return outputs


def _or_any(tensor: Tensor | None, other: Tensor) -> Tensor:
    """`tensor`, or where there is none something to point to, which the kernel does not touch."""
    return other if tensor is None else tensor.contiguous()


def _empty_outputs(hidden_states, num_experts, top_k, cosine, sample_stride):
    num_tokens = hidden_states.shape[0]
    logits, weights, norm, stats = (
        hidden_states.new_empty(shape, dtype=torch.float32)
        for shape in (
            (num_tokens, num_experts),
            (num_tokens, top_k),
            (num_tokens if cosine else 0,),
            (_NUM_STATS if sample_stride else 0, num_experts),
        )
    )
    index = hidden_states.new_empty((num_tokens, top_k), dtype=torch.int64)
    return logits, weights, index, norm, stats


_route_op = torch.library.custom_op("hf_locmoe::route_pooled", _route, mutates_args=())


@_route_op.register_fake
def _(
    hidden_states, bias, noise, token_mask, num_experts, top_k, cosine, relu, norm_topk_prob, sample_stride, capacity
):
    return _empty_outputs(hidden_states, num_experts, top_k, cosine, sample_stride)


def _route_backward(
    grad_logits: Tensor | None,
    grad_weights: Tensor | None,
    grad_stats: Tensor | None,
    hidden_states: Tensor,
    noise: Tensor | None,
    token_mask: Tensor | None,
    logits: Tensor,
    index: Tensor,
    norm: Tensor,
    cosine: bool,
    relu: bool,
    norm_topk_prob: bool,
) -> Tensor:
    hidden_states = hidden_states.contiguous()
    grad_hidden = torch.empty_like(hidden_states)
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        return grad_hidden
    hidden_size = hidden_states.shape[1]
    tiles = _backward_layout(num_tokens, hidden_size, num_experts)
    route_backward_kernel[(ceil_div(num_tokens, tiles["CHUNK"]),)](
        _or_any(grad_logits, logits),
        _or_any(grad_weights, logits),
        _or_any(grad_stats, logits),
        hidden_states,
        _or_any(noise, logits),
        _or_any(token_mask, index),
        logits,
        index,
        norm,
        torch.empty_like(logits),
        logits.new_empty((num_tokens,)),
        grad_hidden,
        num_tokens,
        n=num_experts,
        D=hidden_size,
        TOP_K=index.shape[1],
        COSINE=cosine,
        RELU=relu,
        NORMALIZE=norm_topk_prob,
        NOISY=noise is not None,
        FROM_LOGITS=grad_logits is not None,
        FROM_WEIGHTS=grad_weights is not None and grad_weights.numel() > 0,
        FROM_STATS=grad_stats is not None and grad_stats.numel() > 0,
        MASKED=token_mask is not None,
        num_warps=8,
        **tiles,
    )
    return grad_hidden


_route_backward_op = torch.library.custom_op("hf_locmoe::route_pooled_backward", _route_backward, mutates_args=())


@_route_backward_op.register_fake
def _(
    grad_logits,
    grad_weights,
    grad_stats,
    hidden_states,
    noise,
    token_mask,
    logits,
    index,
    norm,
    cosine,
    relu,
    norm_topk_prob,
):
    return hidden_states.new_empty(hidden_states.shape)


def _save(ctx, inputs, output):
    hidden_states, _, noise, token_mask, _, _, *ctx.options, _, _ = inputs
    logits, _, index, norm, _ = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(index, norm)
    ctx.save_for_backward(hidden_states, noise, token_mask, logits, index, norm)


def _backward(ctx, grad_logits, grad_weights, _, __, grad_stats):
    hidden_states, *saved = ctx.saved_tensors
    call = _route_backward_op if needs_operator(hidden_states) else _route_backward
    grad = call(grad_logits, grad_weights, grad_stats, hidden_states, *saved, *ctx.options)
    return grad, *[None] * 10


_route_op.register_autograd(_backward, setup_context=_save)


_Route = with_gradient(_route, _save, _backward)


def _call(hidden_states, *arguments):
    return choose(hidden_states, _route_op, _Route, _route)(hidden_states, *arguments)


def pool_affinity(hidden_states: Tensor, num_experts: int, cosine: bool) -> Tensor:
    """
    Affinities of grouped average pooling (arXiv 2401.13920, eq. 2): the mean of each of n contiguous blocks of dimensions,
    or `sqrt(d)` times the cosine with the block's indicator; see [`~hf_locmoe.moe.gate.LocMoeGate`].

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): Any float dtype; read once, summed in float32.
        num_experts (`int`): n; block i is `floor(i d / n) <= j < floor((i + 1) d / n)`.
        cosine (`bool`): Whether cosines or means.

    Returns:
        `torch.Tensor` of shape `(T, n)`, float32.
    """
    return _call(hidden_states, None, None, None, num_experts, 0, cosine, False, False, 0, -1)[0]


def route_pooled(
    hidden_states: Tensor,
    bias: Tensor,
    noise: Tensor | None,
    num_experts: int,
    top_k: int,
    cosine: bool,
    relu: bool,
    norm_topk_prob: bool,
    token_mask: Tensor | None = None,
    sample_stride: int = 0,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """
    The gate from hidden states to experts, weights and statistics; `hidden_states`, `num_experts` and `cosine` as for
    [`pool_affinity`].

    Args:
        bias (`torch.Tensor` of shape `(n,)`): Float32, added for the choice of experts alone.
        noise (`torch.Tensor` of shape `(T, n)`, *optional*): Float32, added to the affinities.
        top_k (`int`): Experts a token, at least 1.
        relu (`bool`): Whether the logits pass through a ReLU; the choice is made before it.
        norm_topk_prob (`bool`): Whether a token's weights are scaled to sum to one.
        token_mask (`torch.Tensor` of shape `(T,)`, *optional*): False where a token counts in no statistic.
        sample_stride (`int`): Every how many tokens the cosine with the first expert is taken; 0 for no statistics.
        capacity (`int`, *optional*): Assignments an expert takes, where what is over it is dropped.

    Returns:
        Logits `(T, n)` and weights `(T, k)` float32, indices `(T, k)` int64, and the statistics `(S, n)` of
        [`~hf_locmoe.moe.routing.router_statistics`] without quantile and what is rerouted, `(0, n)` if there are to be none. Of the
        statistics, `PROB_SUM` alone carries a gradient.
    """
    logits, weights, index, _, stats = _call(
        hidden_states,
        bias,
        noise,
        token_mask,
        num_experts,
        top_k,
        cosine,
        relu,
        norm_topk_prob,
        sample_stride,
        -1 if capacity is None else capacity,
    )
    return logits, weights, index, stats


__all__ = ["pool_affinity", "pools_in_one_pass", "route_pooled"]
