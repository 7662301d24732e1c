# SPDX-License-Identifier: Apache-2.0
"""What a link between a node and the switch is like, and how `tc` and `nft` are told so. Pure: runs nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass


BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _quantity(field: str, text: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z%]+)", text)
    if not match or match[2] not in units or float(match[1]) == 0:
        raise ValueError(
            f"`{field}` ({text}) must be a number above 0 with a unit out of {', '.join(units)}: write it like {example}."
        )
    return float(match[1]) * units[match[2]]


@dataclass(frozen=True)
class Link:
    """Every node's link to the switch, the same in both directions.

    Args:
        rate: bits per second, like `200mbit` or `1gbit`; `None` leaves the link unshaped.
        delay: time from node to node, one way, like `500us`; `None` adds nothing.
        loss: share of the packets that a node's interface loses on arrival, like `1%`; `None` loses none.
        mtu: largest packet in bytes.
    """

    rate: str | None = None
    delay: str | None = None
    loss: str | None = None
    mtu: int = 1500

    def __post_init__(self):
        if self.rate is not None:
            _quantity("rate", self.rate, BITS, "200mbit")
        if self.delay is not None:
            _quantity("delay", self.delay, SECONDS, "500us")
        if self.loss is not None and _quantity("loss", self.loss, {"%": 0.01}, "1%") >= 1:
            raise ValueError(f"`loss` ({self.loss}) must be below 100%: cut the link instead.")
        if not 576 <= self.mtu <= 65535:
            raise ValueError(f"`mtu` ({self.mtu}) must be between 576 and 65535: 1500 is Ethernet's.")

    def __str__(self) -> str:
        parts = [self.rate or "unshaped"]
        parts += [f"delay {self.delay}"] if self.delay else []
        parts += [f"loss {self.loss}"] if self.loss else []
        return ", ".join(parts)

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes a second in each direction, or `None` where the link is unshaped."""
        return None if self.rate is None else _quantity("rate", self.rate, BITS, "200mbit") / 8

    def queueing_disciplines(self) -> list[str]:
        """Arguments of `tc qdisc add dev DEVICE` for one end of a link, outermost first.

        Both ends are shaped, so the rate holds in each direction and a packet from node to node passes two shapers:
        half of the delay belongs to each of them.
        """
        words = []
        if self.bytes_per_s is not None:
            # Burst: 1 ms of traffic, and room for one 64 KiB packet of the segmentation offload, which tbf would
            # drop whole otherwise. Queue: 100 ms, like a switch's port.
            burst = max(int(self.bytes_per_s / 1000), 66 * 1024)
            limit = max(int(self.bytes_per_s / 10), 1024 * 1024)
            words.append(f"root handle 1: tbf rate {self.rate} burst {burst} limit {limit}")
        if self.delay is not None:
            half_us = _quantity("delay", self.delay, SECONDS, "500us") / 2 * 1e6
            parent = "parent 1:1" if words else "root"
            words.append(f"{parent} netem delay {half_us:.0f}us limit 100000")
        return words

    def loss_rules(self, device: str) -> str | None:
        """An `nft -f -` script that drops arriving packets at random, or `None` where nothing is lost."""
        if self.loss is None:
            return None
        per_million = round(_quantity("loss", self.loss, {"%": 0.01}, "1%") * 1e6)
        return (
            "table inet loss { chain arriving {\n"
            "type filter hook input priority 0;\n"
            f'iifname "{device}" numgen random mod 1000000 < {per_million} counter drop;\n'
            "}\n}\n"
        )
