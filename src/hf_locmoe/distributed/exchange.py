# SPDX-License-Identifier: Apache-2.0
"""
One exchange of rows between ranks, and its adjoint, as a pair of autograd functions: *start* and *finish*.

Shape legend: N input rows, W copies at most of one input row, S rows sent, R rows received, d hidden size.

An exchange is linear. `spread` is D: every input row is copied to its places among the sent rows and they travel;
`collect` is its transpose: the rows travel back and the copies of one input row are summed. The backward of one is
the forward of the other, so two primitives serve dispatch and combine, forward and backward.

Each side makes one pass over the rows: a gather into the buffer that is sent, with the other columns behind it, and a sum
of the copies out of the buffer that was received (`permute/`).

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

from ..permute.rows import collect_rows, lay_out, spread_rows, spread_rows_into
from .backend import label_calls
from .exchange_clock import ExchangeClock, Mark


@dataclass(frozen=True)
class Route:
    """
    Which rows leave, for whom, and how many arrive.

    Args:
        row_of_copy (`torch.Tensor` of shape `(N, W)`, int64):
            where the copies of each input row are among the sent rows; -1 where there is none.
        copy_of_row (`torch.Tensor` of shape `(S,)`, int64):
            the inverse: the input row times W plus the slot of each sent row; -1 is padding.
        send_sizes (`list[int]`): rows for each rank of the group, adding up to S.
        recv_sizes (`list[int]`): rows from each rank of the group, adding up to R.
        group (`ProcessGroup`, *optional*): `None` copies rows on this rank, nothing travels.
        padded (`bool`): whether there may be padding (fixed shapes).
    """

    row_of_copy: torch.Tensor
    copy_of_row: torch.Tensor
    send_sizes: list[int]
    recv_sizes: list[int]
    group: Any = None
    padded: bool = False

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, c) -> (S, c), differentiable."""
        return spread_rows(rows, self.row_of_copy, self.copy_of_row, self.padded)

    def spread_into(self, out: torch.Tensor, rows: torch.Tensor) -> None:
        """(N, c) -> `out` (S, c), cast to its dtype."""
        spread_rows_into(out, rows, self.row_of_copy, self.copy_of_row, self.padded)

    def collect(self, rows: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(S, c) -> (N, c), the sum of every row's copies; differentiable without `dtype`."""
        return collect_rows(rows, self.row_of_copy, self.copy_of_row, dtype)


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
    num_rows = sum(send_sizes)
    row_of_copy, copy_of_row = lay_out(destination, len(send_sizes), room, num_rows)
    return Route(row_of_copy, copy_of_row[:num_rows], send_sizes, recv_sizes, group, room is not None)


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
        route, (head, *rest) = self.route, columns
        self._columns = tuple((column.size(1), column.dtype) for column in columns)
        dtype = head.dtype if self.wire_dtype is None or route.group is None else self.wire_dtype
        send_sizes, recv_sizes = route.send_sizes, route.recv_sizes
        if back:
            send_sizes, recv_sizes = recv_sizes, send_sizes
        if back and not rest:
            rows = head.to(dtype).contiguous()
        else:
            width, tail = head.size(1), _as_bits(rest, head.size(1), dtype) if rest else None
            rows = head.new_empty((sum(send_sizes), width + (tail.size(1) if rest else 0)), dtype=dtype)
            place = torch.Tensor.copy_ if back else route.spread_into
            place(rows[:, :width], head)
            if rest:
                place(rows[:, width:].view(tail.dtype), tail)
        if route.group is None:
            self._flight = _Flight(None, rows, rows)
            return
        received = rows.new_empty(sum(recv_sizes), rows.size(1))
        label_calls(route.group, self.label)
        mark = None if self.clock is None else self.clock.start(route.group)
        work = dist.all_to_all_single(received, rows, recv_sizes, send_sizes, group=route.group, async_op=True)
        self._flight = _Flight(work, rows, received, mark)

    def end(self, back: bool) -> list[torch.Tensor]:
        assert self._flight is not None
        columns = _columns_of(self._flight.wait(), self._columns)
        self._flight = None
        dtypes = [dtype for _, dtype in self._columns]
        if back:
            return [self.route.collect(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)]
        return [column.to(dtype) for column, dtype in zip(columns, dtypes, strict=True)]


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
        rows = route.spread(rows)
    else:
        sizes.reverse()
    if group is not None:
        exchange_rows = all_to_all_single_autograd if rows.requires_grad else all_to_all_single
        rows = wait_tensor(exchange_rows(rows, *sizes, group))
    if exchange.back:
        rows = route.collect(rows)
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


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW_ALIGNMENT = 16  # bytes: rows begin where a device reads them in one go, and where any dtype's values may


def _as_bits(columns: Sequence[torch.Tensor], head_width: int, dtype: torch.dtype) -> torch.Tensor:
    """
    The columns side by side as whole numbers of the size of `dtype`, so that nothing takes their bits for numbers; filled
    so that the row with its head is aligned.
    """
    # by way of one dimension, which has a stride of 1 even where it is empty
    byte_columns = [
        column.reshape(-1).view(torch.uint8).view(column.size(0), column.size(1) * column.itemsize)
        for column in columns
    ]
    tail = torch.cat(byte_columns, dim=1)
    filling = -(head_width * dtype.itemsize + tail.size(1)) % _ROW_ALIGNMENT
    return torch.nn.functional.pad(tail, (0, filling)).view(_BITS[dtype.itemsize])


def _columns_of(rows: torch.Tensor, columns: Sequence[tuple[int, torch.dtype]]) -> list[torch.Tensor]:
    """What [`Exchange.begin`] put side by side. The first is a part of `rows`, not a copy."""
    width, dtype = columns[0][0], rows.dtype
    unpacked, start_byte = [rows[:, :width]], width * dtype.itemsize
    for width, dtype in columns[1:]:
        num_bytes = width * dtype.itemsize
        # cloned even where one row makes a part contiguous: what begins anywhere can be no other dtype
        column = rows.view(torch.uint8)[:, start_byte : start_byte + num_bytes]
        unpacked.append(column.clone(memory_format=torch.contiguous_format).view(dtype))
        start_byte += num_bytes
    return unpacked
