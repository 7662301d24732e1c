# SPDX-License-Identifier: Apache-2.0
"""
Rows to the places that their copies are wanted at, and the copies' sums back: Triton kernels on CUDA, plain torch elsewhere.

Legend: N rows, W copies at most of one row, d hidden size, S rows that are wanted, n destinations.

    row_of_copy   (N, W)   which of the S rows each copy is, -1 where there is none
    copy_of_row   (S,)     its inverse: `row * W + slot`, -1 where a row is padding

Nothing here reads anything back to the host.
"""

from __future__ import annotations

import torch


try:
    from . import layout_kernels, row_kernels
except ImportError:  # no Triton
    layout_kernels = row_kernels = None


_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # sums are in float32: float64 has plain torch
_MOST_KERNEL_BINS = 1024  # of more, few values fall into each, and torch's atomic additions do not wait for each other


def _kernels_run_on(tensor: torch.Tensor) -> bool:
    return row_kernels is not None and tensor.is_cuda


def lay_out(
    destination: torch.Tensor, num_destinations: int, room: torch.Tensor | None = None, num_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Sorts copies by destination, in the order of the rows within one destination.

    Args:
        destination (`torch.Tensor` of shape `(N, W)`, int64): of each copy; `num_destinations` for no copy.
        num_destinations (`int`): n.
        room (`torch.Tensor` of shape `(n,)`, int64, *optional*):
            rows of every destination, for fixed shapes: of what does not fit the last copies have no row, and what is left
            of the room is padding. As many as there are copies when left out.
        num_rows (`int`, *optional*): the room's sum, on the host.

    Returns:
        `row_of_copy` and `copy_of_row`, int64. Without `room` the latter has shape `(N * W,)`: the copies of no destination
        leave padding at its end.
    """
    if _kernels_run_on(destination):
        if room is None:
            return layout_kernels.rows_by_expert(destination, num_destinations)[:2]
        return layout_kernels.rows_in_rooms(destination, room, num_rows)
    flat = destination.reshape(-1)
    num_rows = flat.numel() if room is None else num_rows
    counts = count(flat, num_destinations + 1)
    # Room and first place of every destination; no room for "no copy".
    sizes = torch.nn.functional.pad(counts[:-1] if room is None else room, (0, 1))
    first = sizes.cumsum(0) - sizes
    by_destination, order = torch.sort(flat, stable=True)
    position = torch.arange(flat.numel(), device=flat.device) - (counts.cumsum(0) - counts)[by_destination]
    fits = position < sizes[by_destination]
    row = first[by_destination] + position
    row_of_copy = torch.empty_like(flat).scatter_(0, order, row.masked_fill(~fits, -1))
    copy_of_row = torch.full((num_rows + 1,), -1, device=flat.device)
    copy_of_row = copy_of_row.scatter_(0, row.masked_fill(~fits, num_rows), order)[:-1]
    return row_of_copy.view(destination.shape), copy_of_row


def first_slots(values: torch.Tensor) -> torch.Tensor:
    """(N, W) int64 -> for each value of a row the first slot that has it, (N, W) int64."""
    if _kernels_run_on(values):
        return layout_kernels.first_slots(values)
    return (values.unsqueeze(2) == values.unsqueeze(1)).to(torch.int8).argmax(dim=2)


def count(values: torch.Tensor, num_values: int) -> torch.Tensor:
    """How often each of `0 .. num_values - 1` occurs: `bincount` without its host sync. Shape `(num_values,)`."""
    values = values.reshape(-1)
    if _kernels_run_on(values) and num_values <= _MOST_KERNEL_BINS:
        return layout_kernels.count_values(values, num_values)
    return values.new_zeros(num_values).scatter_add_(0, values, torch.ones_like(values))


def spread_rows(
    rows: torch.Tensor, row_of_copy: torch.Tensor, copy_of_row: torch.Tensor, has_padding: bool = True
) -> torch.Tensor:
    """
    (N, d) rows to (S, d) copies; padding is zeros. Differentiable.

    Args:
        has_padding (`bool`): False where every one of the S rows is known to be a copy: then no row is appended to copy from.
    """
    if _kernels_run_on(rows) and rows.dtype in _KERNEL_DTYPES:
        return row_kernels.gather_rows(rows, copy_of_row, row_of_copy)
    return _plain_spread(rows, row_of_copy, copy_of_row, has_padding)


def spread_rows_into(
    out: torch.Tensor,
    rows: torch.Tensor,
    row_of_copy: torch.Tensor,
    copy_of_row: torch.Tensor,
    has_padding: bool = True,
) -> None:
    """[`spread_rows`] into `out` of shape `(S, d)`, any dtype and any distance between its rows. Without a gradient."""
    if _kernels_run_on(rows) and rows.dtype != torch.float64:
        row_kernels.gather_rows_into(out, rows, copy_of_row, row_of_copy.shape[1])
    else:
        out.copy_(_plain_spread(rows, row_of_copy, copy_of_row, has_padding))


def collect_rows(
    rows: torch.Tensor, row_of_copy: torch.Tensor, copy_of_row: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """
    (S, d) copies to the (N, d) sums of every row's copies, made in float32 or better and in a fixed order, so that they
    repeat bit for bit. Differentiable without `dtype`.

    Args:
        dtype (`torch.dtype`, *optional*): of the sums; the copies' when left out.
    """
    if _kernels_run_on(rows) and rows.dtype in _KERNEL_DTYPES:
        if dtype is None:
            return row_kernels.combine_rows(rows, row_of_copy, copy_of_row)
        return row_kernels.combine_rows_as(dtype, rows, row_of_copy)
    dtype = rows.dtype if dtype is None else dtype
    if row_of_copy.size(1) > 1 and rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    places = row_of_copy % rows.size(0)  # -1 is the row of zeros at the end
    total = rows.index_select(0, places[:, 0])
    for column in places.unbind(1)[1:]:
        total = total + rows.index_select(0, column)
    return total.to(dtype)


def _plain_spread(rows, row_of_copy, copy_of_row, has_padding):
    source = copy_of_row // row_of_copy.size(1)
    if has_padding:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        source = source % rows.size(0)  # -1 is the row of zeros at the end
    return rows.index_select(0, source)


__all__ = ["collect_rows", "count", "first_slots", "lay_out", "spread_rows", "spread_rows_into"]
