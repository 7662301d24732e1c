# SPDX-License-Identifier: Apache-2.0
"""
Rows that are copied to their places and summed again: the kernels against plain torch, and both against each other's adjoint.

On a CUDA device, or anywhere under Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/unit/permute`.
"""

from __future__ import annotations

import os

import pytest
import torch

from hf_locmoe.permute import rows as rows_module
from hf_locmoe.permute.rows import collect_rows, count, first_slots, lay_out, spread_rows, spread_rows_into
from tests.tolerances import TOLERANCES, assert_close


pytest.importorskip("triton", reason="the kernels need Triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the kernels need a CUDA device, or TRITON_INTERPRET=1 set from the start", allow_module_level=True)

from hf_locmoe.permute import layout_kernels


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
# the interpreter does not round to bfloat16
WIRE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SIZES = [(0, 2, 3), (1, 1, 1), (7, 1, 4), (13, 3, 5), (101, 8, 4), (40, 6, 128)]  # rows, copies, destinations


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """What is not written shows: new memory holds NaN, as far as torch fills it."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def both(monkeypatch):
    """Calls a function on the kernels and in plain torch."""

    def call(function, *args, **kwargs):
        results = []
        for on_kernels in (True, False):
            monkeypatch.setattr(rows_module, "_kernels_run_on", lambda _, on_kernels=on_kernels: on_kernels)
            results.append(function(*args, **kwargs))
        return results

    return call


def draw_destination(num_rows, width, num_destinations):
    """Uneven, with destinations that get nothing and copies that go nowhere."""
    destination = torch.randint(num_destinations + 1, (num_rows, width), device=DEVICE)
    destination[::3] = num_destinations // 2
    return destination


def draw_room(num_destinations, most):
    return torch.randint(most + 1, (num_destinations,), device=DEVICE)


@pytest.mark.parametrize("small_programs", [False, True])
@pytest.mark.parametrize("num_rows, width, num_destinations", SIZES)
def test_layouts(num_rows, width, num_destinations, small_programs, both, monkeypatch):
    if small_programs:
        monkeypatch.setattr(layout_kernels, "_SPAN", 64)
        monkeypatch.setattr(layout_kernels, "_TILE", 256)
        monkeypatch.setattr(layout_kernels, "_MAX_PROGRAMS", 8)
    destination = draw_destination(num_rows, width, num_destinations)
    fast, slow = both(lay_out, destination, num_destinations)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow))
    assert slow[1].shape == (num_rows * width,)
    placed = slow[0] >= 0
    assert torch.equal(placed, destination < num_destinations)
    for most in (0, 2, num_rows * width + 1):
        room = draw_room(num_destinations, most)
        fast, slow = both(lay_out, destination, num_destinations, room, int(room.sum()))
        assert all(torch.equal(a, b) for a, b in zip(fast, slow))
        per_destination = slow[1].split(room.tolist())
        for to, copies in enumerate(per_destination):
            expected = (destination.flatten() == to).nonzero().flatten()[: len(copies)]
            assert torch.equal(copies[: len(expected)], expected)
            assert (copies[len(expected) :] == -1).all()


@pytest.mark.parametrize("num_rows, width, num_destinations", SIZES)
def test_first_slots_and_counts(num_rows, width, num_destinations, both):
    values = draw_destination(num_rows, width, num_destinations)
    fast, slow = both(first_slots, values)
    assert torch.equal(fast, slow)
    for row, firsts in zip(values.tolist(), slow.tolist()):
        assert firsts == [row.index(value) for value in row]
    for num_values in (num_destinations + 1, 2000):  # the latter are too many for the kernel
        fast, slow = both(count, values, num_values)
        assert torch.equal(fast, slow)
        assert torch.equal(slow, torch.bincount(values.flatten(), minlength=num_values))


def make_layout(num_rows, width, num_destinations, padded):
    destination = draw_destination(num_rows, width, num_destinations)
    if padded:
        room = draw_room(num_destinations, num_rows)
        return lay_out(destination, num_destinations, room, int(room.sum()))
    row_of_copy, copy_of_row = lay_out(destination, num_destinations)
    return row_of_copy, copy_of_row[: int((row_of_copy >= 0).sum())]


def run_with_gradient(function, leaf, direction, *args):
    leaf = leaf.detach().requires_grad_()
    output = function(leaf, *args)
    return output.detach(), *torch.autograd.grad(output, leaf, direction)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("columns", [1, 24, 1030])
@pytest.mark.parametrize("num_rows, width, num_destinations", SIZES[:5])
def test_rows_there_and_back(num_rows, width, num_destinations, columns, padded, both):
    ways = make_layout(num_rows, width, num_destinations, padded)
    rows = torch.randn(num_rows, columns, device=DEVICE)
    copies = torch.randn(ways[1].shape[0], columns, device=DEVICE)
    for fast, slow in (
        both(run_with_gradient, spread_rows, rows, copies, *ways, padded),
        both(run_with_gradient, collect_rows, copies, rows, *ways),
    ):
        for a, b in zip(fast, slow):
            assert_close(a, b)
    spread, collected = spread_rows(rows, *ways, padded), collect_rows(copies, *ways)
    torch.testing.assert_close((spread * copies).sum(), (rows * collected).sum(), rtol=1e-4, atol=1e-3)
    assert (spread[ways[1] < 0] == 0).all()


@pytest.mark.parametrize("padded", [False, True])
def test_columns_of_a_wider_buffer_and_another_dtype(padded, both):
    ways = make_layout(13, 3, 5, padded)

    def there_and_back(rows):
        buffer = torch.full((ways[1].shape[0], 48), 7, device=DEVICE, dtype=WIRE)
        spread_rows_into(buffer[:, 8:32], rows[:, 3:27], *ways, padded)
        assert (buffer[:, :8] == 7).all() and (buffer[:, 32:] == 7).all()
        return buffer[:, 8:32].clone(), collect_rows(buffer[:, 8:32], *ways, torch.float32)

    fast, slow = both(there_and_back, torch.randn(13, 30, device=DEVICE))
    assert torch.equal(fast[0], slow[0])  # rounded once
    assert fast[1].dtype == torch.float32
    torch.testing.assert_close(
        fast[1], slow[1], **TOLERANCES[torch.float32]
    )  # sums of rounded numbers, not rounded again


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float64])
def test_bits_stay_what_they_are(dtype, both):
    """Whole numbers, patterns of a NaN among them, and a dtype whose sums the kernels do not make."""
    ways = make_layout(13, 3, 5, True)
    rows = torch.randint(-(2**15), 2**15, (13, 6), device=DEVICE)
    rows[2] = -1
    rows[5] = 0x7F81 - 2**15
    rows = rows.to(dtype)

    def there(rows):
        out = torch.empty(ways[1].shape[0], 6, device=DEVICE, dtype=dtype)
        spread_rows_into(out, rows, *ways)
        return out

    fast, slow = both(there, rows)
    assert torch.equal(fast, slow)


def test_float64_is_summed_in_float64(both):
    ways = make_layout(13, 3, 5, False)
    copies = torch.randn(ways[1].shape[0], 6, device=DEVICE, dtype=torch.float64)
    fast, slow = both(collect_rows, copies, *ways)
    assert torch.equal(fast, slow)
