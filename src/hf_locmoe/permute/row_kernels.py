# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels that copy rows to where they are wanted, and add them up again.

Importing this file needs Triton; callers fall back to plain torch where it is missing. Each kernel is a custom operator
with a gradient, so torch.compile takes them as they are; in eager mode it is called past the operator, whose cost on the host
is a multiple of a launch's. Sums are made in float32 whatever the dtype of the rows.

Shapes: T tokens, d = hidden_size, k choices per token (its experts, or its destinations), R rows.
`row_of_choice` (T, k) is the row of each token's choices, -1 where a choice has none; `choice_of_row` (R,) its inverse:
`token * k + slot`, -1 where a row is empty. Both int64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


_MOST_ALIGNED = 16  # elements: what a thread reads at most in one go, of any dtype
_COLUMNS = 1024  # columns of a row that a program handles at a time


# Distances between rows come as a number of units, so that the compiler knows how rows are aligned.


@triton.jit(do_not_specialize=["source_step", "rows_step"])
def _gather_kernel(
    source,
    choice_of_row,
    rows,
    source_step,
    rows_step,
    SOURCE_UNIT: tl.constexpr,
    ROWS_UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(choice_of_row + row)
    source += (choice // TOP_K) * source_step * SOURCE_UNIT
    rows += row * rows_step * ROWS_UNIT
    for start in tl.static_range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(source + column, mask=(column < WIDTH) & (choice >= 0), other=0)
        tl.store(rows + column, values.to(rows.dtype.element_ty), mask=column < WIDTH)


@triton.jit(do_not_specialize=["rows_step"])
def _combine_kernel(
    rows,
    row_of_choice,
    output,
    rows_step,
    ROWS_UNIT: tl.constexpr,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(row_of_choice + token * TOP_K + slot)
        start = rows + row * rows_step * ROWS_UNIT
        values = tl.load(start + column, mask=(column < WIDTH) & (row >= 0), other=0.0)
        total += values.to(tl.float32)
    tl.store(output + token * WIDTH + column, total.to(output.dtype.element_ty), mask=column < WIDTH)


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


def gather_rows_into(rows: Tensor, source: Tensor, choice_of_row: Tensor, top_k: int) -> None:
    """[`gather_rows`] into `rows` of shape `(R, d)`, of any floating dtype and distance between rows. Without a gradient."""
    source, width = _with_whole_rows(source), source.shape[1]
    if rows.numel():
        (source_step, source_unit), (rows_step, rows_unit) = _step_of(source), _step_of(rows)
        sizes = source_step, rows_step, source_unit, rows_unit, top_k, width, block_of(width)
        _gather_kernel[(rows.shape[0],)](source, choice_of_row, rows, *sizes)


def combine_rows(rows: Tensor, row_of_choice: Tensor, choice_of_row: Tensor) -> Tensor:
    """(R, d) rows to the (T, d) sums over each token's choices."""
    return choose(rows, _combine_op, _Combine, combine)(rows, row_of_choice, choice_of_row)


def combine_rows_as(dtype: torch.dtype, rows: Tensor, row_of_choice: Tensor) -> Tensor:
    """[`combine_rows`] with sums of another dtype. Without a gradient."""
    rows, (num_tokens, top_k), width = _with_whole_rows(rows), row_of_choice.shape, rows.shape[1]
    output = rows.new_empty((num_tokens, width), dtype=dtype)
    if output.numel():
        grid = (num_tokens, ceil_div(width, block_of(width)))
        _combine_kernel[grid](rows, row_of_choice, output, *_step_of(rows), top_k, width, block_of(width))
    return output


def gather(source: Tensor, choice_of_row: Tensor, row_of_choice: Tensor) -> Tensor:
    """[`gather_rows`] without a gradient."""
    rows = source.new_empty((choice_of_row.shape[0], source.shape[1]))
    gather_rows_into(rows, source, choice_of_row, row_of_choice.shape[1])
    return rows


def combine(rows: Tensor, row_of_choice: Tensor, choice_of_row: Tensor) -> Tensor:
    """[`combine_rows`] without a gradient."""
    return combine_rows_as(rows.dtype, rows, row_of_choice)


def _with_whole_rows(rows: Tensor) -> Tensor:
    """Rows may lie apart, as columns of a wider buffer do; not their elements."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _step_of(rows: Tensor) -> tuple[int, int]:
    """The distance between rows as a number of units, and the unit in elements."""
    unit = math.gcd(rows.stride(0), _MOST_ALIGNED)
    return rows.stride(0) // unit, unit


def block_of(width: int) -> int:
    """Columns that a program handles at a time."""
    return min(_COLUMNS, power_of_2(width))


_gather_op = torch.library.custom_op("hf_locmoe::gather_rows", gather, mutates_args=())
_combine_op = torch.library.custom_op("hf_locmoe::combine_rows", combine, mutates_args=())


@_gather_op.register_fake
def _(source, choice_of_row, row_of_choice):
    return source.new_empty((choice_of_row.shape[0], source.shape[1]))


@_combine_op.register_fake
def _(rows, row_of_choice, choice_of_row):
    return rows.new_empty((row_of_choice.shape[0], rows.shape[1]))


def _save_indices(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _gather_backward(ctx, grad):
    choice_of_row, row_of_choice = ctx.saved_tensors
    return combine_rows(grad, row_of_choice, choice_of_row), None, None


def _combine_backward(ctx, grad):
    row_of_choice, choice_of_row = ctx.saved_tensors
    return gather_rows(grad, choice_of_row, row_of_choice), None, None


_gather_op.register_autograd(_gather_backward, setup_context=_save_indices)
_combine_op.register_autograd(_combine_backward, setup_context=_save_indices)


_Gather = with_gradient(gather, _save_indices, _gather_backward)
_Combine = with_gradient(combine, _save_indices, _combine_backward)


__all__ = [
    "block_of",
    "ceil_div",
    "choose",
    "combine",
    "combine_rows",
    "combine_rows_as",
    "gather",
    "gather_rows",
    "gather_rows_into",
    "needs_operator",
    "power_of_2",
    "with_gradient",
]
