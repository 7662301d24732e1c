# SPDX-License-Identifier: Apache-2.0
"""
Triton kernel for grouped average pooling: block sums, norm and affinities in one pass over the hidden states.

Importing this file needs Triton; the gate falls back to plain torch where it is missing.

Shapes: T tokens, d = hidden_size, n = num_experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


_TILE = 4096  # elements of the hidden states that a program holds, padding included
_MAX_TILE = 32768


def pools_in_one_tile(hidden_size: int, num_experts: int) -> bool:
    """Whether a token fits the registers of one program, its blocks padded to powers of two."""
    return _padded_size(hidden_size, num_experts) <= _MAX_TILE


def _padded_size(hidden_size: int, num_experts: int) -> int:
    return triton.next_power_of_2(num_experts) * triton.next_power_of_2(-(-hidden_size // num_experts))


@triton.jit
def _blocks(n: tl.constexpr, D: tl.constexpr, N_PAD: tl.constexpr):
    """First dimension and number of dimensions of each expert's block."""
    expert = tl.arange(0, N_PAD)
    if D % n == 0:
        return expert * (D // n), tl.full((N_PAD,), D // n, tl.int32)
    else:
        start = expert * D // n
        return start, (expert + 1) * D // n - start


@triton.jit
def _tile(n: tl.constexpr, D: tl.constexpr, N_PAD: tl.constexpr, SIZE_PAD: tl.constexpr):
    """(N_PAD, SIZE_PAD) offsets of the hidden dimensions in a token, and which of them exist."""
    expert, within = tl.arange(0, N_PAD), tl.arange(0, SIZE_PAD)
    start, size = _blocks(n, D, N_PAD)
    offset = start[:, None] + within[None, :]
    # a constant bound where there is one lets the loads be 16 bytes wide
    bound = D // n if D % n == 0 else size[:, None]
    return offset, (within[None, :] < bound) & (expert[:, None] < n)


@triton.jit
def _pool_kernel(
    hidden,
    affinity,
    norm,
    T,
    n: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    TOKENS: tl.constexpr,
    N_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < T
    offset, inside = _tile(n, D, N_PAD, SIZE_PAD)
    x = tl.load(
        hidden + token[:, None, None] * D + offset[None], mask=exists[:, None, None] & inside[None], other=0.0
    ).to(tl.float32)
    _, size = _blocks(n, D, N_PAD)
    total = tl.sum(x, axis=2)
    if COSINE:
        length = tl.sqrt(tl.sum(tl.sum(x * x, axis=2), axis=1))
        tl.store(norm + token, length, mask=exists)
        length = tl.where(length == 0, 1.0, length)
        value = total / tl.sqrt(size.to(tl.float32))[None, :] / length[:, None] * D**0.5
    else:
        value = total / size.to(tl.float32)[None, :]
    expert = tl.arange(0, N_PAD)
    tl.store(affinity + token[:, None] * n + expert[None, :], value, mask=exists[:, None] & (expert < n)[None, :])


@triton.jit
def _pool_backward_kernel(
    grad,
    hidden,
    affinity,
    norm,
    grad_hidden,
    T,
    n: tl.constexpr,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    TOKENS: tl.constexpr,
    N_PAD: tl.constexpr,
    SIZE_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    exists = token < T
    expert = tl.arange(0, N_PAD)
    of_expert = token[:, None] * n + expert[None, :]
    has_expert = exists[:, None] & (expert < n)[None, :]
    slope = tl.load(grad + of_expert, mask=has_expert, other=0.0)
    offset, inside = _tile(n, D, N_PAD, SIZE_PAD)
    place = token[:, None, None] * D + offset[None]
    inside = exists[:, None, None] & inside[None]
    _, size = _blocks(n, D, N_PAD)
    if COSINE:
        length = tl.load(norm + token, mask=exists, other=1.0)
        length = tl.where(length == 0, 1.0, length)
        along = tl.sum(slope * tl.load(affinity + of_expert, mask=has_expert, other=0.0), axis=1) / (length * length)
        slope = slope / tl.sqrt(size.to(tl.float32))[None, :] / length[:, None] * D**0.5
        x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        value = slope[:, :, None] - x * along[:, None, None]
    else:
        value = (slope / size.to(tl.float32)[None, :])[:, :, None] + tl.zeros((TOKENS, N_PAD, SIZE_PAD), tl.float32)
    tl.store(grad_hidden + place, value.to(grad_hidden.dtype.element_ty), mask=inside)


def _layout(hidden: Tensor, num_experts: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and constants of both kernels."""
    num_tokens, hidden_size = hidden.shape
    padded = _padded_size(hidden_size, num_experts)
    tokens = max(1, _TILE // padded)
    constants = {
        "T": num_tokens,
        "n": num_experts,
        "D": hidden_size,
        "TOKENS": tokens,
        "N_PAD": triton.next_power_of_2(num_experts),
        "SIZE_PAD": triton.next_power_of_2(-(-hidden_size // num_experts)),
        "num_warps": 4 if padded * tokens <= 4096 else 8,
    }
    return (triton.cdiv(num_tokens, tokens),), constants


@torch.library.custom_op("hf_locmoe::pool_affinity", mutates_args=())
def _pool(hidden_states: Tensor, num_experts: int, cosine: bool) -> tuple[Tensor, Tensor]:
    hidden_states = hidden_states.contiguous()
    num_tokens = hidden_states.shape[0]
    affinity = hidden_states.new_empty((num_tokens, num_experts), dtype=torch.float32)
    norm = hidden_states.new_empty((num_tokens if cosine else 0,), dtype=torch.float32)
    if num_tokens:
        grid, constants = _layout(hidden_states, num_experts)
        _pool_kernel[grid](hidden_states, affinity, norm, COSINE=cosine, **constants)
    return affinity, norm


@torch.library.custom_op("hf_locmoe::pool_affinity_backward", mutates_args=())
def _pool_backward(grad: Tensor, hidden_states: Tensor, affinity: Tensor, norm: Tensor, cosine: bool) -> Tensor:
    hidden_states, grad = hidden_states.contiguous(), grad.contiguous()
    grad_hidden = torch.empty_like(hidden_states)
    if hidden_states.shape[0]:
        grid, constants = _layout(hidden_states, affinity.shape[1])
        _pool_backward_kernel[grid](grad, hidden_states, affinity, norm, grad_hidden, COSINE=cosine, **constants)
    return grad_hidden


@_pool.register_fake
def _(hidden_states, num_experts, cosine):
    num_tokens = hidden_states.shape[0]
    affinity = hidden_states.new_empty((num_tokens, num_experts), dtype=torch.float32)
    return affinity, hidden_states.new_empty((num_tokens if cosine else 0,), dtype=torch.float32)


@_pool_backward.register_fake
def _(grad, hidden_states, affinity, norm, cosine):
    return hidden_states.new_empty(hidden_states.shape)


def _save(ctx, inputs, output):
    hidden_states, _, ctx.cosine = inputs
    affinity, norm = output
    ctx.save_for_backward(hidden_states, affinity, norm)


_pool.register_autograd(
    lambda ctx, grad, _: (_pool_backward(grad, *ctx.saved_tensors, ctx.cosine), None, None), setup_context=_save
)


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
    return _pool(hidden_states, num_experts, cosine)[0]


__all__ = ["pool_affinity", "pools_in_one_tile"]
