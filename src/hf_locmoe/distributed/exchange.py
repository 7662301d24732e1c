# SPDX-License-Identifier: Apache-2.0
"""
One exchange of rows between ranks, and its adjoint, as a pair of autograd functions: *start* and *finish*.

Shape legend: N input rows, W copies at most of one input row, S rows sent, R rows received, d hidden size.

An exchange is linear. `spread` is D: every input row is copied to its places among the sent rows and they travel;
`collect` is its transpose: the rows travel back and the copies of one input row are summed. The backward of one is
the forward of the other, so two primitives serve dispatch and combine, forward and backward.

Start and finish are two functions because whatever runs between them hides the transfer, and because autograd runs
them backwards: the finish's backward *starts* the reverse transfer and the start's backward waits for it. The rows
themselves do not pass along the graph's edge between the two (a buffer that is still being written must not be seen
by autograd), only a scalar ticket does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor

from .backend import label_calls
from .exchange_clock import ExchangeClock, Mark


@dataclass(frozen=True)
class Route:
    """
    Which rows leave, for whom, and how many arrive.

    Args:
        source (`torch.Tensor` of shape `(S,)`, int64): the input row that each sent row copies; `N` is padding.
        copies (`torch.Tensor` of shape `(N, W)`, int64):
            the inverse: where the copies of each input row are among the sent rows; `S` where there is none.
        send_sizes (`list[int]`): rows for each rank of the group, adding up to S.
        recv_sizes (`list[int]`): rows from each rank of the group, adding up to R.
        group (`ProcessGroup`, *optional*): `None` copies rows on this rank, nothing travels.
        padded (`bool`): whether `source` may hold padding (fixed shapes).
    """

    source: torch.Tensor
    copies: torch.Tensor
    send_sizes: list[int]
    recv_sizes: list[int]
    group: Any = None
    padded: bool = False


def make_route(
    destination: torch.Tensor,
    send_sizes: list[int],
    recv_sizes: list[int],
    group: Any = None,
    room: torch.Tensor | None = None,
) -> Route:
    """
    Sorts copies by destination, in the order of the input rows within one destination. Nothing goes to or from the host.

    Args:
        destination (`torch.Tensor` of shape `(N, W)`, int64):
            group rank each copy goes to; `len(send_sizes)` for no copy.
        send_sizes (`list[int]`): rows for each rank: the exact counts, or with `room` the room.
        recv_sizes, group: see [`Route`].
        room (`torch.Tensor` of shape `(len(send_sizes),)`, int64, *optional*):
            `send_sizes` on the device, for fixed shapes: what does not fit is dropped, the last rows first, and what is
            left of the room is padding.
    """
    num_rows, width = destination.shape
    num_destinations, num_sent = len(send_sizes), sum(send_sizes)
    flat = destination.reshape(-1)
    counts = count(flat, num_destinations + 1)
    # Room and first place of every destination; no room for "no copy".
    sizes = torch.nn.functional.pad(counts[:-1] if room is None else room, (0, 1))
    first = sizes.cumsum(0) - sizes
    by_destination, order = torch.sort(flat, stable=True)
    position = torch.arange(flat.numel(), device=flat.device) - (counts.cumsum(0) - counts)[by_destination]
    place = torch.where(position < sizes[by_destination], first[by_destination] + position, num_sent)
    copies = torch.empty_like(flat).scatter_(0, order, place)
    source = torch.full((num_sent + 1,), num_rows, device=flat.device)
    source = source.scatter_(0, place, order // width)[:num_sent]
    return Route(source, copies.view(num_rows, width), send_sizes, recv_sizes, group, room is not None)


def count(values: torch.Tensor, num_values: int) -> torch.Tensor:
    """How often each of `0 .. num_values - 1` occurs: `bincount` without its host sync. Shape `(num_values,)`."""
    values = values.reshape(-1)
    return values.new_zeros(num_values).scatter_add_(0, values, torch.ones_like(values))


@dataclass
class _Flight:
    """A transfer under way. `sent` keeps the buffer alive until it has left."""

    work: Any
    sent: torch.Tensor
    received: torch.Tensor
    mark: Mark | None = None

    def wait(self) -> torch.Tensor:
        if self.work is not None:
            with nullcontext() if self.mark is None else self.mark.waits():
                self.work.wait()
        return self.received


@dataclass
class Exchange:
    """
    One differentiable exchange along a route: start it with [`start`], get the rows with [`finish`].

    Several columns travel as one message: the first in the wire's dtype, the others bit for bit. Sums run in float32
    or better whatever the wire's dtype.

    Args:
        route (`Route`): the way.
        back (`bool`): False spreads (dispatch), True collects (combine).
        wire_dtype (`torch.dtype`, *optional*): dtype of the first column under way; its own when left out.
        on_backward (callable, *optional*): called when the backward of this exchange begins.
        label (`str`, *optional*): where in the model this is, for the backend's errors.
        clock ([`ExchangeClock`], *optional*): times it.
    """

    route: Route
    back: bool = False
    wire_dtype: torch.dtype | None = None
    on_backward: Any = None
    label: str | None = None
    clock: ExchangeClock | None = None
    _columns: tuple[tuple[int, torch.dtype], ...] = ()
    _flight: _Flight | None = None
    _traced: tuple[torch.Tensor, ...] = ()

    def begin(self, columns: Sequence[torch.Tensor], back: bool) -> None:
        route = self.route
        self._columns = tuple((column.size(1), column.dtype) for column in columns)
        rows = _pack(columns, self.wire_dtype if route.group is not None else None)
        if back:
            send_sizes, recv_sizes = route.recv_sizes, route.send_sizes
        else:
            send_sizes, recv_sizes = route.send_sizes, route.recv_sizes
            if route.padded:
                rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
            rows = rows.index_select(0, route.source)
        if route.group is None:
            self._flight = _Flight(None, rows, torch.nn.functional.pad(rows, (0, 0, 0, 1)) if back else rows)
            return
        # Rows that come back get one zero row behind them: the copy that does not exist (see `_sum_copies`).
        num_received = sum(recv_sizes)
        received = rows.new_empty(num_received + back, rows.size(1))
        received[num_received:] = 0
        label_calls(route.group, self.label)
        mark = None if self.clock is None else self.clock.start(route.group)
        work = dist.all_to_all_single(
            received[:num_received], rows, recv_sizes, send_sizes, group=route.group, async_op=True
        )
        self._flight = _Flight(work, rows, received, mark)

    def end(self, back: bool) -> list[torch.Tensor]:
        assert self._flight is not None
        columns = _unpack(self._flight.wait(), self._columns)
        self._flight = None
        if back:
            columns = [_sum_copies(column, self.route.copies) for column in columns]
        return [column.to(dtype) for column, (_, dtype) in zip(columns, self._columns, strict=True)]


def start(exchange: Exchange, *columns: torch.Tensor, after: torch.Tensor | None = None) -> torch.Tensor:
    """
    Starts an exchange of `columns`, each of shape `(rows, any)`.

    Args:
        after (`torch.Tensor`, *optional*):
            a scalar of an earlier exchange (the last value [`finish`] gives). It ties the two in the graph, so that
            the backward of the earlier one runs even where nothing that was computed in between depends on it.

    Returns:
        the ticket for [`finish`].
    """
    if torch.compiler.is_compiling():
        exchange._traced = tuple(_traced_exchange(exchange, column) for column in columns)
        return columns[0].new_zeros(())
    return _Start.apply(exchange, after, *columns)


def finish(exchange: Exchange, ticket: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Waits for a started exchange: its columns on this side, then the scalar for `start(after=...)`."""
    if torch.compiler.is_compiling():
        return *exchange._traced, ticket
    return _Finish.apply(exchange, ticket)


def _traced_exchange(exchange: Exchange, column: torch.Tensor) -> torch.Tensor:
    """The same in operations that `torch.compile` can trace and differentiate. It orders the transfers itself."""
    route, group = exchange.route, exchange.route.group
    sizes = [route.recv_sizes, route.send_sizes]
    rows = column
    if exchange.wire_dtype is not None and group is not None and column.is_floating_point():
        rows = rows.to(exchange.wire_dtype)
    if not exchange.back:
        if route.padded:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        rows = rows.index_select(0, route.source)
    else:
        sizes.reverse()
    if group is not None:
        exchange_rows = all_to_all_single_autograd if rows.requires_grad else all_to_all_single
        rows = wait_tensor(exchange_rows(rows, *sizes, group))
    if exchange.back:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
        rows = _sum_copies(rows, route.copies)
    return rows.to(column.dtype)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, after: torch.Tensor | None, *columns: torch.Tensor) -> torch.Tensor:
        ctx.exchange = exchange
        ctx.is_float = [column.is_floating_point() for column in columns]
        ctx.has_link = after is not None
        exchange.begin(columns, exchange.back)
        return columns[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, ticket_grad: torch.Tensor):
        grads = iter(ctx.exchange.end(not ctx.exchange.back))
        link_grad = ticket_grad.new_zeros(()) if ctx.has_link else None
        return None, link_grad, *(next(grads) if is_float else None for is_float in ctx.is_float)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange: Exchange, ticket: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        columns = exchange.end(exchange.back)
        ctx.is_float = [column.is_floating_point() for column in columns]
        ctx.mark_non_differentiable(*(column for column in columns if not column.is_floating_point()))
        return *columns, columns[0].new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: torch.Tensor):
        exchange = ctx.exchange
        if exchange.on_backward is not None:
            exchange.on_backward()
        floats = [grad for grad, is_float in zip(grads, ctx.is_float, strict=False) if is_float]
        exchange.begin(floats, not exchange.back)
        return None, grads[-1].new_zeros(())


def _pack(columns: Sequence[torch.Tensor], wire_dtype: torch.dtype | None) -> torch.Tensor:
    head = columns[0] if wire_dtype is None else columns[0].to(wire_dtype)
    if len(columns) == 1:
        return head.contiguous()
    tail = torch.cat([column.contiguous().view(torch.uint8) for column in columns[1:]], dim=1)
    tail = torch.nn.functional.pad(tail, (0, -tail.size(1) % head.element_size()))
    return torch.cat([head, tail.view(head.dtype)], dim=1)


def _unpack(rows: torch.Tensor, columns: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    width = columns[0][0]
    unpacked = [rows[:, :width]]
    if len(columns) > 1:
        tail, start_byte = rows[:, width:].contiguous().view(torch.uint8), 0
        for width, dtype in columns[1:]:
            num_bytes = width * dtype.itemsize
            unpacked.append(tail[:, start_byte : start_byte + num_bytes].contiguous().view(dtype))
            start_byte += num_bytes
    return unpacked


def _sum_copies(rows: torch.Tensor, copies: torch.Tensor) -> torch.Tensor:
    """(S + 1, c) -> (N, c): the sum of every row's copies, in a fixed order so that it repeats bit for bit."""
    if copies.size(1) > 1 and rows.dtype in (torch.bfloat16, torch.float16):
        rows = rows.float()
    total = rows.index_select(0, copies[:, 0])
    for column in copies.unbind(1)[1:]:
        total = total + rows.index_select(0, column)
    return total
