# SPDX-License-Identifier: Apache-2.0
"""
Triton kernels that lay assignments out by expert, or copies of tokens by destination: a counting sort in two passes, where
torch takes a dozen operators.

Importing this file needs Triton; callers fall back to plain torch where it is missing. Sums of whole numbers in a fixed
order: the same layout every time.

Shapes: T tokens, n = num_experts, k = num_experts_per_tok, A = T * k assignments, C = capacity, R = rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .row_kernels import ceil_div, needs_operator, power_of_2


_TILE = 4096  # assignments times experts that a program holds at a time
_SPAN = 512  # assignments of a program, at least
_MAX_PROGRAMS = 256  # each reads the counts of all of them
_FIRST_TILE = 1024  # values that a program compares at a time


@triton.jit
def _expert_of(
    index,
    weights,
    place,
    A,
    T,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS_FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """The assignments that come `place`-th, and their experts: n for none."""
    choice = place
    if SLOTS_FIRST:  # all first choices, then all second ones
        choice = (place % T) * TOP_K + place // T
    exists = place < A
    expert = tl.load(index + choice, mask=exists, other=n).to(tl.int32)
    if WEIGHTED:
        weight = tl.load(weights + choice, mask=exists, other=0.0)
        expert = tl.where(weight != 0, expert, n)
    return choice, tl.where((expert >= 0) & (expert < n), expert, n)


@triton.jit(do_not_specialize=["A", "T"])
def _count_kernel(
    index,
    weights,
    counts,
    A,
    T,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS_FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    N_PAD: tl.constexpr,
):
    """How many of a program's assignments each expert has."""
    program = tl.program_id(0)
    bins = tl.arange(0, N_PAD)
    count = tl.zeros((CHUNK, N_PAD), tl.int32)
    for start in range(0, SPAN, CHUNK):
        place = program * SPAN + start + tl.arange(0, CHUNK)
        _, expert = _expert_of(index, weights, place, A, T, n, TOP_K, SLOTS_FIRST, WEIGHTED)
        count += tl.where((expert[:, None] == bins[None, :]) & (place < A)[:, None], 1, 0)
    tl.store(counts + program * N_PAD + bins, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["A", "T", "C", "P", "R"])
def _place_kernel(
    index,
    weights,
    counts,
    of_choice,
    choice_of_row,
    offsets,
    rooms,
    A,
    T,
    C,
    P,
    R,
    n: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS_FIRST: tl.constexpr,
    WEIGHTED: tl.constexpr,
    RANKS: tl.constexpr,
    LIMITED: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_ROOMS: tl.constexpr,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
    N_PAD: tl.constexpr,
    P_PAD: tl.constexpr,
    PARTS: tl.constexpr,
):
    """
    Each assignment's row, and the assignment of each row: an expert's rows begin where those of the one before it end if
    GROUPED, where the rooms of those before it end if IN_ROOMS, or at `i C`. With RANKS, how many earlier ones its expert has.
    """
    program = tl.program_id(0)
    bins = tl.arange(0, N_PAD)
    earlier_parts = tl.zeros((PARTS, N_PAD), tl.int32)
    all_parts = tl.zeros((PARTS, N_PAD), tl.int32)
    for start in range(0, P_PAD, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        count = tl.load(counts + part * N_PAD + bins[None, :], mask=part < P, other=0)
        earlier_parts += tl.where(part < program, count, 0)
        all_parts += count
    before = tl.sum(earlier_parts, axis=0)
    if GROUPED:
        taken = tl.sum(all_parts, axis=0)
        if LIMITED:
            taken = tl.minimum(taken, C)
        ends = tl.cumsum(taken, axis=0)
        starts = ends - taken
        num_rows = tl.sum(tl.where(bins < n, taken, 0), axis=0)
        if program == 0:
            tl.store(offsets + bins, ends, mask=bins < n)
    if IN_ROOMS:
        room = tl.load(rooms + bins, mask=bins < n, other=0).to(tl.int32)
        ends = tl.cumsum(room, axis=0)
        starts = ends - room
    for start in range(0, SPAN, CHUNK):
        place = program * SPAN + start + tl.arange(0, CHUNK)
        choice, expert = _expert_of(index, weights, place, A, T, n, TOP_K, SLOTS_FIRST, WEIGHTED)
        exists = place < A
        hit = tl.where((expert[:, None] == bins[None, :]) & exists[:, None], 1, 0)
        rank = tl.sum(hit * (tl.cumsum(hit, axis=0) - hit + before[None, :]), axis=1)
        before += tl.sum(hit, axis=0)
        if RANKS:
            tl.store(of_choice + choice, rank.to(tl.int64), mask=exists)
        else:
            has_row = exists & (expert < n)
            if LIMITED:
                has_row = has_row & (rank < C)
            if GROUPED:
                row = rank + tl.sum(hit * starts[None, :], axis=1)
                # rows past the last belong to nobody
                tl.store(
                    choice_of_row + place, tl.full((CHUNK,), -1, tl.int64), mask=(place >= num_rows) & (place < R)
                )
            elif IN_ROOMS:
                row = rank + tl.sum(hit * starts[None, :], axis=1)
                has_row = has_row & (row < tl.sum(hit * ends[None, :], axis=1))
            else:
                row = expert * C + rank
            tl.store(of_choice + choice, tl.where(has_row, row, -1).to(tl.int64), mask=exists)
            tl.store(choice_of_row + row, choice.to(tl.int64), mask=has_row)


@triton.jit(do_not_specialize=["T"])
def _first_kernel(values, first, T, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """For each value of a row the first slot that has it."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    slot = tl.arange(0, SLOTS)[None, :]
    mask = (token < T) & (slot < TOP_K)
    value = tl.load(values + token * TOP_K + slot, mask=mask, other=0)
    found = tl.zeros((BLOCK, SLOTS), tl.int32) + TOP_K
    for earlier in tl.static_range(TOP_K):
        other = tl.load(values + token * TOP_K + earlier, mask=token < T, other=0)
        found = tl.where(value == other, tl.minimum(found, earlier), found)
    tl.store(first + token * TOP_K + slot, found.to(tl.int64), mask=mask)


def _count_parts(index, weights, num_experts, slots_first):
    """The first pass: `(P, n or more)` counts of P parts of the assignments, and what the second has to know of them."""
    num_tokens, top_k = index.shape
    num_assignments = index.numel()
    padded = power_of_2(num_experts)
    chunk = max(1, _TILE // padded)
    span = max(chunk, _SPAN, power_of_2(ceil_div(num_assignments, _MAX_PROGRAMS)))
    programs = ceil_div(num_assignments, span)
    counts = index.new_empty((programs, padded), dtype=torch.int32)
    constants = dict(n=num_experts, TOP_K=top_k, SPAN=span, CHUNK=chunk, N_PAD=padded)
    constants.update(SLOTS_FIRST=slots_first, WEIGHTED=weights is not None)
    # where there is none, something to point to, which the kernel does not touch
    weights = index if weights is None else weights
    _count_kernel[(programs,)](index, weights, counts, num_assignments, num_tokens, **constants)
    return counts, weights, constants


def _sort(index, weights, num_experts, slots_first, capacity, of_choice, choice_of_row, offsets, rooms=None):
    """
    Both passes. Without `choice_of_row` the ranks of choices, with it their rows, one expert's after the other's where
    `offsets` are wanted; `capacity` None for no limit.
    """
    counts, weights, constants = _count_parts(index, weights, num_experts, slots_first)
    programs, grouped = counts.shape[0], offsets is not None
    choice_of_row_or_any, offsets, rooms_or_any = (index if x is None else x for x in (choice_of_row, offsets, rooms))
    _place_kernel[(programs,)](
        index,
        weights,
        counts,
        of_choice,
        choice_of_row_or_any,
        offsets,
        rooms_or_any,
        index.numel(),
        index.shape[0],
        0 if capacity is None else capacity,
        programs,
        choice_of_row_or_any.numel(),
        RANKS=choice_of_row is None,
        LIMITED=capacity is not None,
        GROUPED=grouped,
        IN_ROOMS=rooms is not None,
        P_PAD=power_of_2(programs),
        PARTS=min(power_of_2(programs), constants["CHUNK"]),
        **constants,
    )


def _num_rows(index: Tensor, num_experts: int, capacity: int | None) -> int:
    return index.numel() if capacity is None else min(index.numel(), num_experts * capacity)


def _rows_by_expert(
    index: Tensor, num_experts: int, weights: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    index, weights = index.contiguous(), None if weights is None else weights.contiguous()
    row_of_choice = torch.empty_like(index)
    choice_of_row = index.new_empty((_num_rows(index, num_experts, capacity),))
    offsets = index.new_empty((num_experts,), dtype=torch.int32)
    if index.numel():
        slots_first = capacity is not None
        _sort(index, weights, num_experts, slots_first, capacity, row_of_choice, choice_of_row, offsets)
    else:
        offsets.zero_()
    return row_of_choice, choice_of_row, offsets


def _rows_by_capacity(index: Tensor, weights: Tensor | None, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    index, weights = index.contiguous(), None if weights is None else weights.contiguous()
    row_of_choice, choice_of_row = torch.empty_like(index), index.new_full((num_experts * capacity,), -1)
    if index.numel():
        _sort(index, weights, num_experts, True, capacity, row_of_choice, choice_of_row, None)
    return row_of_choice, choice_of_row


def _rows_in_rooms(index: Tensor, rooms: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    index, rooms = index.contiguous(), rooms.contiguous()
    row_of_choice, choice_of_row = torch.empty_like(index), index.new_full((num_rows,), -1)
    if index.numel():
        _sort(index, None, rooms.numel(), False, None, row_of_choice, choice_of_row, None, rooms)
    return row_of_choice, choice_of_row


def _count_values(index: Tensor, num_values: int) -> Tensor:
    if not index.numel():
        return index.new_zeros((num_values,))
    return _count_parts(index.contiguous().view(-1, 1), None, num_values, False)[0].sum(0)[:num_values]


def _first_slots(values: Tensor) -> Tensor:
    values = values.contiguous()
    (num_tokens, top_k), first = values.shape, torch.empty_like(values)
    if values.numel():
        block = max(1, _FIRST_TILE // power_of_2(top_k))
        grid = (ceil_div(num_tokens, block),)
        _first_kernel[grid](values, first, num_tokens, top_k, power_of_2(top_k), block)
    return first


def _rank_in_expert(index: Tensor, num_experts: int, slots_first: bool) -> Tensor:
    index = index.contiguous()
    rank = torch.empty_like(index)
    if index.numel():
        _sort(index, None, num_experts, slots_first, None, rank, None, None)
    return rank


_rows_by_expert_op = torch.library.custom_op("hf_locmoe::rows_by_expert", _rows_by_expert, mutates_args=())
_rows_by_capacity_op = torch.library.custom_op("hf_locmoe::rows_by_capacity", _rows_by_capacity, mutates_args=())
_rows_in_rooms_op = torch.library.custom_op("hf_locmoe::rows_in_rooms", _rows_in_rooms, mutates_args=())
_rank_in_expert_op = torch.library.custom_op("hf_locmoe::rank_in_expert", _rank_in_expert, mutates_args=())
_count_values_op = torch.library.custom_op("hf_locmoe::count_values", _count_values, mutates_args=())
_first_slots_op = torch.library.custom_op("hf_locmoe::first_slots", _first_slots, mutates_args=())


@_rows_by_expert_op.register_fake
def _(index, num_experts, weights, capacity):
    rows = index.new_empty(index.shape), index.new_empty((_num_rows(index, num_experts, capacity),))
    return *rows, index.new_empty((num_experts,), dtype=torch.int32)


@_rows_by_capacity_op.register_fake
def _(index, weights, num_experts, capacity):
    return index.new_empty(index.shape), index.new_empty((num_experts * capacity,))


@_rows_in_rooms_op.register_fake
def _(index, rooms, num_rows):
    return index.new_empty(index.shape), index.new_empty((num_rows,))


@_count_values_op.register_fake
def _(index, num_values):
    return index.new_empty((num_values,))


@_first_slots_op.register_fake
def _(values):
    return values.new_empty(values.shape)


@_rank_in_expert_op.register_fake
def _(index, num_experts, slots_first):
    return index.new_empty(index.shape)


def rows_by_expert(
    index: Tensor, num_experts: int, weights: Tensor | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """
    The rows of assignments sorted by expert, in the order of the tokens; as many rows for an expert as it has assignments.

    Args:
        index (`torch.Tensor` of shape `(T, k)`): Int64, the experts; an id of n or more is none.
        num_experts (`int`): n.
        weights (`torch.Tensor` of shape `(T, k)`, *optional*): Any float dtype; assignments of weight 0 have no row.
        capacity (`int`, *optional*): C. An expert has at most that many rows, of first choices before second ones.

    Returns:
        `row_of_choice` `(T, k)` and `choice_of_row` `(A,)` or `(min(A, n C),)`, int64, -1 for none; where each expert's rows
        end `(n,)`, int32.
    """
    weights = None if weights is None else weights.detach()
    return _call(_rows_by_expert_op, _rows_by_expert, index, num_experts, weights, capacity)


def rows_by_capacity(index: Tensor, weights: Tensor | None, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    """
    The rows of assignments where expert i has those from `i C`: first choices before second ones, those past the capacity
    and those of weight 0 have none.

    Args:
        index (`torch.Tensor` of shape `(T, k)`): As for [`rows_by_expert`].
        weights (`torch.Tensor` of shape `(T, k)`, *optional*): Likewise.
        num_experts (`int`): n.
        capacity (`int`): C.

    Returns:
        `row_of_choice` `(T, k)` and `choice_of_row` `(n C,)`, int64, -1 for none.
    """
    weights = None if weights is None else weights.detach()
    return _call(_rows_by_capacity_op, _rows_by_capacity, index, weights, num_experts, capacity)


def rows_in_rooms(index: Tensor, rooms: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """
    The rows of assignments where each expert has room for so many, the rooms one behind the other; those past the room
    have none, in the order of the tokens.

    Args:
        index (`torch.Tensor` of shape `(T, k)`): As for [`rows_by_expert`].
        rooms (`torch.Tensor` of shape `(n,)`): Int64.
        num_rows (`int`): R, the rooms' sum.

    Returns:
        `row_of_choice` `(T, k)` and `choice_of_row` `(R,)`, int64, -1 for none.
    """
    return _call(_rows_in_rooms_op, _rows_in_rooms, index, rooms, num_rows)


def count_values(values: Tensor, num_values: int) -> Tensor:
    """How often each of `0 .. num_values - 1` occurs, `(num_values,)` int64; other values are not counted."""
    return _call(_count_values_op, _count_values, values, num_values)


def first_slots(values: Tensor) -> Tensor:
    """(T, k) int64: for each value of a row the first slot that has it."""
    return _call(_first_slots_op, _first_slots, values)


def rank_in_expert(index: Tensor, num_experts: int, slots_first: bool) -> Tensor:
    """
    How many assignments before it went to an assignment's expert.

    Args:
        index (`torch.Tensor` of shape `(T, k)`): As for [`rows_by_expert`].
        num_experts (`int`): n.
        slots_first (`bool`): Whether all first choices come before all second ones, or a token's choices stay together.

    Returns:
        `torch.Tensor` of shape `(T, k)`, int64; without meaning where the expert is none.
    """
    return _call(_rank_in_expert_op, _rank_in_expert, index, num_experts, slots_first)


def _call(op, function, index, *arguments):
    return (op if needs_operator(index) else function)(index, *arguments)


__all__ = ["count_values", "first_slots", "rank_in_expert", "rows_by_capacity", "rows_by_expert", "rows_in_rooms"]
