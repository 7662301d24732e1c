# SPDX-License-Identifier: Apache-2.0
"""
How close is equal: the one table of tolerances, per dtype, for every test and benchmark that compares numbers.

The figures leave room for sums taken in another order (other kernels, other numbers of ranks), some ten roundings of the
dtype, and for nothing else. A comparison that misses them has found a difference; it does not need a softer table.
"""

from __future__ import annotations

from typing import Any

import torch


TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 2e-5, "atol": 5e-6},
    torch.float16: {"rtol": 5e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 1e-2},
}


def assert_close(actual: Any, expected: Any, dtype: torch.dtype | None = None) -> None:
    """
    Asserts that `actual` equals `expected` within `TOLERANCES[dtype]`.

    Args:
        actual: A tensor, a number, or a sequence or mapping of them.
        expected: The reference, of the same structure.
        dtype (`torch.dtype`, *optional*): The precision that the computation was made in: the dtype of `actual` if not
            given, float32 for Python numbers. Naming it allows the two sides to differ in dtype (a bfloat16 result
            against a float64 reference). Integers and booleans have to be equal.

    Raises:
        AssertionError: with the greatest differences and where they are.
    """
    if dtype is None:
        dtype = _first_dtype(actual)
        same_dtype = True
    else:
        same_dtype = False
    tolerances = TOLERANCES[dtype] if dtype.is_floating_point else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(actual, expected, **tolerances, check_dtype=same_dtype)


def _first_dtype(value: Any) -> torch.dtype:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        dtypes = [_first_dtype(item) for item in value]
        return next((dtype for dtype in dtypes if dtype.is_floating_point), dtypes[0] if dtypes else torch.float32)
    return torch.float32
