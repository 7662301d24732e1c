# SPDX-License-Identifier: Apache-2.0
"""Numbers with units, read and written."""

from __future__ import annotations

import re


_UNITS = {
    "bytes": {"": 1.0, "b": 1.0}
    | {f"{p}b": 1e3**i for i, p in enumerate("kmgt", 1)}
    | {f"{p}ib": 1024.0**i for i, p in enumerate("kmgt", 1)},
    "flops": {"": 1.0} | {f"{p}{word}": 1e3**i for i, p in enumerate("gtp", 3) for word in ("", "flops")},
    "seconds": {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9},
}
_UNITS["rate"] = _UNITS["bytes"] | {f"{p}bit": 1e3**i / 8 for i, p in enumerate(("", "k", "m", "g", "t"))}


def quantity(text: str, kind: str, field: str) -> float:
    """
    A number with a unit: `"200gbit"` or `"25GB"` a second (`"rate"`), `"80GB"` (`"bytes"`), `"400T"` (`"flops"`),
    `"10us"` (`"seconds"`); without one, bytes, operations or seconds.

    Raises:
        ValueError: not a positive number, or another unit.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:e[+-]?\d+)?)\s*([a-z]*?)(?:/s)?\s*", text.lower())
    try:
        value = float(match[1]) * _UNITS[kind][match[2]]
    except (TypeError, ValueError, KeyError):
        value = 0.0
    if value <= 0:
        raise ValueError(
            f"`{field}` ({text}) must be a positive number with one of the units {', '.join(filter(None, _UNITS[kind]))}."
        )
    return value


def format_bytes(number: float) -> str:
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g} B"


def format_time(seconds: float) -> str:
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    for limit, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= limit:
            return f"{seconds / limit:.3g} {unit}"
    return f"{seconds:.3g} s"
