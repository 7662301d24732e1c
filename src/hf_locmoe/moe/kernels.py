# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels for the expert computation: laying tokens out by expert, the weighted activation, adding results up.

Importing this file needs Triton; callers fall back to plain torch where it is missing. Each kernel is a custom operator
with a gradient, so torch.compile takes them as they are; in eager mode it is called past the operator, whose cost on the host
is a multiple of a launch's. Sums are made in float32 whatever the dtype of the tensors.

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


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations to those of the kernels."""

_COLUMNS = 1024  # columns of a row that a program handles at a time


@triton.jit
def _gather_kernel(source, choice_of_row, rows, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(choice_of_row + row)
    for start in tl.static_range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(source + (choice // TOP_K) * WIDTH + column, mask=(column < WIDTH) & (choice >= 0), other=0.0)
        tl.store(rows + row * WIDTH + column, values, mask=column < WIDTH)


@triton.jit
def _combine_kernel(rows, row_of_choice, output, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(row_of_choice + token * TOP_K + slot)
        values = tl.load(rows + row * WIDTH + column, mask=(column < WIDTH) & (row >= 0), other=0.0)
        total += values.to(tl.float32)
    tl.store(output + token * WIDTH + column, total.to(output.dtype.element_ty), mask=column < WIDTH)


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


def ceil_div(a: int, b: int) -> int:
    """`a / b` rounded up. triton.cdiv takes as long as a tenth of a launch."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is no less than `n`, at least 1; as triton.next_power_of_2."""
    return 1 << max(n - 1, 0).bit_length()


def needs_operator(tensor: Tensor) -> bool:
    """Whether a kernel has to be called as the operator that the compiler and fake tensors know."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor


def with_gradient(forward, save, backward) -> type[torch.autograd.Function]:
    """
    A function of autograd from the three parts that `torch.library.register_autograd` takes. torch binds the arguments of
    one that has a `setup_context` by its signature, at every call, which takes longer than a launch.
    """

    def forward_and_save(ctx, *inputs):
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    parts = {"forward": staticmethod(forward_and_save), "backward": staticmethod(backward)}
    return type(f"With gradient: {forward.__name__}", (torch.autograd.Function,), parts)


def choose(tensor: Tensor, operator, function: type[torch.autograd.Function], plain):
    """Of the forms of a kernel the cheapest for the host that serves: operator, with a gradient, without."""
    if needs_operator(tensor):
        return operator
    return function.apply if torch.is_grad_enabled() else plain


def gather_rows(source: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    """(T, d) tokens to the (R, d) rows of their choices; empty rows are zeros."""
    return choose(source, _gather_op, _Gather, gather)(source, choice_of_row, row_of_choice)


def combine_rows(rows: Tensor, row_of_choice: Tensor, choice_of_row: Tensor) -> Tensor:
    """(R, d) rows to the (T, d) sums over each token's choices."""
    return choose(rows, _combine_op, _Combine, combine)(rows, row_of_choice, choice_of_row)


def weighted_activation(inner: Tensor, weights: Tensor, choice_of_row: Tensor, activation: str, gated: bool) -> Tensor:
    """(R, f) or, gated, (R, 2 f) first projections and (T, k) weights to (R, f): activation times the row's weight."""
    call = choose(inner, _activate_op, _Activate, activate)
    return call(inner, weights, choice_of_row, activation, gated)


def gather(source: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    """[`gather_rows`] without a gradient."""
    source = source.contiguous()
    width, num_rows = source.shape[-1], choice_of_row.shape[0]
    rows = source.new_empty((num_rows, width))
    if num_rows:
        _gather_kernel[(num_rows,)](source, choice_of_row, rows, row_of_choice.shape[1], width, _block(width))
    return rows


def combine(rows: Tensor, row_of_choice: Tensor, choice_of_row: Tensor) -> Tensor:
    """[`combine_rows`] without a gradient."""
    rows = rows.contiguous()
    width, (num_tokens, top_k) = rows.shape[-1], row_of_choice.shape
    output = rows.new_empty((num_tokens, width))
    if num_tokens:
        grid = (num_tokens, ceil_div(width, _block(width)))
        _combine_kernel[grid](rows, row_of_choice, output, top_k, width, _block(width))
    return output


def activate(inner: Tensor, weights: Tensor, choice_of_row: Tensor, activation: str, gated: bool) -> Tensor:
    """[`weighted_activation`] without a gradient."""
    inner, weights = inner.contiguous(), weights.contiguous()
    num_rows, width = inner.shape[0], inner.shape[1] // (2 if gated else 1)
    output = inner.new_empty((num_rows, width))
    if num_rows:
        grid = (num_rows, ceil_div(width, _block(width)))
        _activate_kernel[grid](inner, weights, choice_of_row, output, activation, gated, width, _block(width))
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
            _block(grad.shape[1]),
        )
    return grad_inner, grad_weights


def _block(width: int) -> int:
    return min(_COLUMNS, power_of_2(width))


_gather_op = torch.library.custom_op("hf_locmoe::gather_rows", gather, mutates_args=())
_combine_op = torch.library.custom_op("hf_locmoe::combine_rows", combine, mutates_args=())
_activate_op = torch.library.custom_op("hf_locmoe::weighted_activation", activate, mutates_args=())
_activate_backward_op = torch.library.custom_op(
    "hf_locmoe::weighted_activation_backward", activate_backward, mutates_args=()
)


@_gather_op.register_fake
def _(source, choice_of_row, row_of_choice):
    return source.new_empty((choice_of_row.shape[0], source.shape[1]))


@_combine_op.register_fake
def _(rows, row_of_choice, choice_of_row):
    return rows.new_empty((row_of_choice.shape[0], rows.shape[1]))


@_activate_op.register_fake
def _(inner, weights, choice_of_row, activation, gated):
    return inner.new_empty((inner.shape[0], inner.shape[1] // (2 if gated else 1)))


@_activate_backward_op.register_fake
def _(grad, inner, weights, choice_of_row, activation, gated):
    return inner.new_empty(inner.shape), weights.new_empty(weights.shape)


def _save_indices(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _save_activation(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _gather_backward(ctx, grad):
    choice_of_row, row_of_choice = ctx.saved_tensors
    return combine_rows(grad, row_of_choice, choice_of_row), None, None


def _combine_backward(ctx, grad):
    row_of_choice, choice_of_row = ctx.saved_tensors
    return gather_rows(grad, choice_of_row, row_of_choice), None, None


def _activation_backward(ctx, grad):
    call = _activate_backward_op if needs_operator(grad) else activate_backward
    return *call(grad, *ctx.saved_tensors, *ctx.options), None, None, None


_gather_op.register_autograd(_gather_backward, setup_context=_save_indices)
_combine_op.register_autograd(_combine_backward, setup_context=_save_indices)
_activate_op.register_autograd(_activation_backward, setup_context=_save_activation)


_Gather = with_gradient(gather, _save_indices, _gather_backward)
_Combine = with_gradient(combine, _save_indices, _combine_backward)
_Activate = with_gradient(activate, _save_activation, _activation_backward)


__all__ = [
    "ACTIVATIONS",
    "activate",
    "activate_backward",
    "ceil_div",
    "choose",
    "combine",
    "combine_rows",
    "gather",
    "gather_rows",
    "needs_operator",
    "power_of_2",
    "weighted_activation",
    "with_gradient",
]
