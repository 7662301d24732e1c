# SPDX-License-Identifier: Apache-2.0
"""
When the exchanges of tokens were started, and when a rank stood still for them: host time on the CPU, events on the
stream of an accelerator, which nothing waits for.

    this rank    ──computes──>D ──computes── <D........| ──computes──
    last rank    ──computes───────────────────── >D ......| ──
                              |--- under way ---------|
                              |-- overlap --|-- wait --|
                                            |idle| until the last rank of the group has started

Shapes: E exchanges of one group between two readings, the same on all its ranks and in the same order.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist


MAX_MARKS = 2048  # exchanges between two readings, beyond which steps are no longer timed
_ROUNDS = 5  # of the alignment: the median drops one that was held up


@dataclass(frozen=True)
class ExchangeTimes:
    """
    Seconds of this rank, summed over `num_steps` optimizer steps.

    Args:
        num_steps (`int`): steps that were timed.
        step_s (`float`): all of it.
        exchange_s (`float`): at least one exchange was under way: started, and not yet waited for to its end.
        wait_s (`float`): of these, those in which the rank did nothing but wait. The rest ran under computation.
        idle_s (`float`): of the waiting, until the last rank of the group had started its part.
    """

    num_steps: int = 0
    step_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    idle_s: float = 0.0

    def __add__(self, other: ExchangeTimes) -> ExchangeTimes:
        return ExchangeTimes(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))


class Mark:
    """One exchange on this rank. Moments are seconds, or events."""

    __slots__ = ("_now", "ended", "group", "started", "waiting")

    def __init__(self, group: Any, now: Any) -> None:
        self._now, self.group = now, group
        self.started = self.waiting = self.ended = now()

    @contextmanager
    def waits(self) -> Iterator[None]:
        """Around what waits for the exchange."""
        self.waiting = self._now()
        try:
            yield
        finally:
            self.ended = self._now()


class ExchangeClock:
    """
    Marks the exchanges of the expert-parallel layers while an optimizer step is timed; costs a comparison otherwise.

    Args:
        group (`ProcessGroup`): the expert-parallel group.
        device (`torch.device`): where its exchanges run.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self._marks: list[Mark] = []
        self._steps: list[tuple[Any, Any, int]] = []  # begin, end, marks so far
        self._begun: Any = None
        self._origin: Any = None
        self._offset_s = 0.0
        self._aligned_at = 0.0

    # ---- marking --------------------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """From here on exchanges are marked."""
        if len(self._marks) < MAX_MARKS:
            self._begun = self._now()

    def end_step(self) -> None:
        """To here."""
        if self._begun is not None:
            self._steps.append((self._begun, self._now(), len(self._marks)))
            self._begun = None

    def start(self, group: Any) -> Mark | None:
        """Where an exchange starts; None where it is not timed."""
        if self._begun is None or self._is_capturing():
            return None
        mark = Mark(group, self._now)
        self._marks.append(mark)
        return mark

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device.type, enable_timing=True)
        event.record()
        return event

    def _is_capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    # ---- reading --------------------------------------------------------------------------------------------------

    def align(self) -> None:
        """
        Makes this rank's moments comparable with the others': all leave a collective at nearly the same time. Before the
        first step, and again from time to time, because clocks drift. A collective of the group.
        """
        token = torch.zeros(1, device=self.device)
        moments = []
        for _ in range(_ROUNDS):
            dist.all_reduce(token, group=self.group)
            moments.append(self._now())
        self._aligned_at = time.monotonic()
        self._origin, self._offset_s = moments[-1], 0.0
        if self.device.type == "cpu":
            mine = torch.tensor(moments, dtype=torch.float64) - moments[-1]
            everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(everyone, mine, group=self.group)
            self._offset_s = statistics.median((everyone[0] - mine).tolist())

    @property
    def seconds_since_alignment(self) -> float:
        return time.monotonic() - self._aligned_at

    def reset(self) -> None:
        """Forgets what was marked."""
        self._marks, self._steps, self._begun = [], [], None

    def read(self) -> ExchangeTimes:
        """What was marked since the last reading. A collective of the groups; waits for an accelerator's last step."""
        marks, steps = self._marks, self._steps
        self.reset()
        if not steps:
            return ExchangeTimes()
        if self.device.type != "cpu":
            steps[-1][1].synchronize()
        latest = self._latest_starts(marks)
        spans = [
            (self._seconds(mark.started), self._seconds(mark.waiting), self._seconds(mark.ended)) for mark in marks
        ]
        total, first = ExchangeTimes(), 0
        for begin, end, last in steps:
            some = spans[first:last]
            wait_s = sum(ended - waiting for _, waiting, ended in some)
            idle_s = sum(
                min(max(others - waiting, 0.0), ended - waiting)
                for (_, waiting, ended), others in zip(some, latest[first:last], strict=True)
            )
            step_s = self._seconds(end) - self._seconds(begin)
            total += ExchangeTimes(1, step_s, covered([(start, ended) for start, _, ended in some]), wait_s, idle_s)
            first = last
        return total

    def _latest_starts(self, marks: list[Mark]) -> list[float]:
        """For every exchange when the last rank of its group started it."""
        dtype = torch.float64 if self.device.type in ("cpu", "cuda") else torch.float32
        latest = [0.0] * len(marks)
        # all ranks meet the expert-parallel group's exchange first
        for group in dict.fromkeys([self.group, *(mark.group for mark in marks)]):
            places = [place for place, mark in enumerate(marks) if mark.group is group]
            starts = [self._seconds(marks[place].started) for place in places]
            reduced = torch.tensor(starts, dtype=dtype, device=self.device)
            if places:
                dist.all_reduce(reduced, op=dist.ReduceOp.MAX, group=group)
            for place, start in zip(places, reduced.tolist(), strict=True):
                latest[place] = start
        return latest

    def _seconds(self, moment: Any) -> float:
        if self.device.type == "cpu":
            return moment - self._origin + self._offset_s
        return self._origin.elapsed_time(moment) / 1000


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans `(start, end)`."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


__all__ = ["MAX_MARKS", "ExchangeClock", "ExchangeTimes", "Mark", "covered"]
