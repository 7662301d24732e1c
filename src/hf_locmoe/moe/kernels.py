# SPDX-License-Identifier: Apache-2.0
"""
Triton kernel for the expert computation: the weighted activation. Those that bring rows to experts and back are in
`permute/`, and what is said there of operators holds here.

Importing this file needs Triton; callers fall back to plain torch where it is missing.

The routing weight multiplies the activation instead of the expert's output: the same product, since the second projection
is linear, and its gradient is then a by-product of the activation's, without another pass over the outputs.

Shapes: T tokens, d = hidden_size, f = moe_intermediate_size, k = num_experts_per_tok, R = rows laid out by expert.
`row_of_choice` (T, k) is the row of each token's choices, -1 where a choice has none; `choice_of_row` (R,) its inverse:
`token * k + slot`, -1 where a row is empty. Both int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..permute.row_kernels import block_of, ceil_div, choose, needs_operator, with_gradient


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations to those of the kernels."""


@triton.jit
def _activation(x, NAME: tl.constexpr):
    """The activation and its derivative."""
    if NAME == "silu":
        sigmoid = tl.sigmoid(x)
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    elif NAME == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return x * share, share + x * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    else:
        return tl.maximum(x, 0.0), (x > 0).to(tl.float32)


@triton.jit
def _activate_kernel(
    inner,
    weights,
    choice_of_row,
    output,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    choice = tl.load(choice_of_row + row)
    mask = (column < WIDTH) & (choice >= 0)
    weight = tl.load(weights + choice, mask=choice >= 0, other=0.0).to(tl.float32)
    start = inner + row * (2 * WIDTH if GATED else WIDTH) + column
    value, _ = _activation(tl.load(start, mask=mask, other=0.0).to(tl.float32), NAME)
    if GATED:
        value *= tl.load(start + WIDTH, mask=mask, other=0.0).to(tl.float32)
    tl.store(output + row * WIDTH + column, (value * weight).to(output.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _activate_backward_kernel(
    grad,
    inner,
    weights,
    choice_of_row,
    grad_inner,
    grad_weights,
    NAME: tl.constexpr,
    GATED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(choice_of_row + row)
    used = choice >= 0
    weight = tl.load(weights + choice, mask=used, other=0.0).to(tl.float32)
    dot = tl.zeros((BLOCK,), dtype=tl.float32)
    inner_width: tl.constexpr = 2 * WIDTH if GATED else WIDTH
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = column < WIDTH
        start = row * inner_width + column
        grad_value = tl.load(grad + row * WIDTH + column, mask=inside & used, other=0.0).to(tl.float32)
        value, slope = _activation(tl.load(inner + start, mask=inside & used, other=0.0).to(tl.float32), NAME)
        if GATED:
            up = tl.load(inner + start + WIDTH, mask=inside & used, other=0.0).to(tl.float32)
            grad_up = grad_value * weight * value
            tl.store(grad_inner + start + WIDTH, grad_up.to(grad_inner.dtype.element_ty), mask=inside)
            value *= up
            slope *= up
        dot += grad_value * value
        tl.store(grad_inner + start, (grad_value * weight * slope).to(grad_inner.dtype.element_ty), mask=inside)
    tl.store(grad_weights + choice, tl.sum(dot, axis=0).to(grad_weights.dtype.element_ty), mask=used)


def weighted_activation(inner: Tensor, weights: Tensor, choice_of_row: Tensor, activation: str, gated: bool) -> Tensor:
    """(R, f) or, gated, (R, 2 f) first projections and (T, k) weights to (R, f): activation times the row's weight."""
    call = choose(inner, _activate_op, _Activate, activate)
    return call(inner, weights, choice_of_row, activation, gated)


def activate(inner: Tensor, weights: Tensor, choice_of_row: Tensor, activation: str, gated: bool) -> Tensor:
    """[`weighted_activation`] without a gradient."""
    inner, weights = inner.contiguous(), weights.contiguous()
    num_rows, width = inner.shape[0], inner.shape[1] // (2 if gated else 1)
    output = inner.new_empty((num_rows, width))
    if num_rows:
        grid = (num_rows, ceil_div(width, block_of(width)))
        _activate_kernel[grid](inner, weights, choice_of_row, output, activation, gated, width, block_of(width))
    return output


def activate_backward(
    grad: Tensor, inner: Tensor, weights: Tensor, choice_of_row: Tensor, activation: str, gated: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of [`weighted_activation`] for projections and weights."""
    grad, inner, weights = grad.contiguous(), inner.contiguous(), weights.contiguous()
    grad_inner, grad_weights = torch.empty_like(inner), torch.zeros_like(weights)
    if inner.shape[0]:
        _activate_backward_kernel[(inner.shape[0],)](
            grad,
            inner,
            weights,
            choice_of_row,
            grad_inner,
            grad_weights,
            activation,
            gated,
            grad.shape[1],
            block_of(grad.shape[1]),
        )
    return grad_inner, grad_weights


_activate_op = torch.library.custom_op("hf_locmoe::weighted_activation", activate, mutates_args=())
_activate_backward_op = torch.library.custom_op(
    "hf_locmoe::weighted_activation_backward", activate_backward, mutates_args=()
)


@_activate_op.register_fake
def _(inner, weights, choice_of_row, activation, gated):
    return inner.new_empty((inner.shape[0], inner.shape[1] // (2 if gated else 1)))


@_activate_backward_op.register_fake
def _(grad, inner, weights, choice_of_row, activation, gated):
    return inner.new_empty(inner.shape), weights.new_empty(weights.shape)


def _save_activation(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _activation_backward(ctx, grad):
    call = _activate_backward_op if needs_operator(grad) else activate_backward
    return *call(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_activate_op.register_autograd(_activation_backward, setup_context=_save_activation)


_Activate = with_gradient(activate, _save_activation, _activation_backward)


__all__ = ["ACTIVATIONS", "activate", "activate_backward", "weighted_activation"]
