# SPDX-License-Identifier: Apache-2.0
"""What a process group moved: calls, messages and bytes, inside a node and between nodes, per collective."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Traffic:
    """
    What one rank sent with one collective since the group was made.

    Args:
        calls (`int`): how often the collective was called.
        messages_intra_node (`int`): messages to other ranks of this rank's node.
        messages_inter_node (`int`): messages to ranks of other nodes.
        bytes_intra_node (`int`): bytes in the former.
        bytes_inter_node (`int`): bytes in the latter.
    """

    calls: int = 0
    messages_intra_node: int = 0
    messages_inter_node: int = 0
    bytes_intra_node: int = 0
    bytes_inter_node: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other))))


class CommCounters(Mapping):
    """
    Collective -> [`Traffic`], as it stood when it was read. Subtract an earlier reading for what lies between.

    All-to-all and point-to-point traffic is what was sent. For the other collectives the inner backend keeps its
    algorithm to itself: they are counted as a ring in rank order sends.
    """

    def __init__(self, traffic: Mapping[str, Traffic]) -> None:
        self._traffic = dict(traffic)

    def __getitem__(self, collective: str) -> Traffic:
        return self._traffic[collective]

    def __iter__(self) -> Iterator[str]:
        return iter(self._traffic)

    def __len__(self) -> int:
        return len(self._traffic)

    def __sub__(self, earlier: CommCounters) -> CommCounters:
        return CommCounters({name: traffic - earlier.get(name, Traffic()) for name, traffic in self.items()})

    def __repr__(self) -> str:
        return f"CommCounters({self._traffic})"

    @property
    def total(self) -> Traffic:
        """All collectives together."""
        return sum(self.values(), Traffic())


class TrafficLog:
    """The running sums of one group: integer additions, nothing else, on the way of every collective."""

    __slots__ = ("_lock", "_sums")

    def __init__(self) -> None:
        # Plans in several steps count on the group's own thread.
        self._lock = threading.Lock()
        self._sums: dict[str, list[int]] = {}

    def add(
        self,
        collective: str,
        calls: int,
        messages_intra_node: int = 0,
        messages_inter_node: int = 0,
        bytes_intra_node: int = 0,
        bytes_inter_node: int = 0,
    ) -> None:
        with self._lock:
            sums = self._sums.get(collective)
            if sums is None:
                sums = self._sums[collective] = [0, 0, 0, 0, 0]
            sums[0] += calls
            sums[1] += messages_intra_node
            sums[2] += messages_inter_node
            sums[3] += bytes_intra_node
            sums[4] += bytes_inter_node

    def read(self) -> CommCounters:
        with self._lock:
            return CommCounters({collective: Traffic(*sums) for collective, sums in self._sums.items()})
