# SPDX-License-Identifier: Apache-2.0
"""From "connection closed by peer" to "rank 3 (node 1) did not arrive": who is missing, found out through the store.

Nothing here runs while all is well. A rank whose collective fails, or does not end in time, writes a report, raises
the group's alarm and waits a little for the others' reports. Ranks that wait look at the alarm about once a second, so
that one rank's failure ends the wait of all. A rank without a report is lost or stalled.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from .topology import NodeTopology


TIMEOUT_VARIABLE = "LOCMOE_TIMEOUT_S"
_ALARM = "alarm"
_REPORT = "report"


class CollectiveError(dist.DistBackendError):
    """A collective failed because a rank was lost, stalled, or called something else. A `RuntimeError`."""


class Call(NamedTuple):
    """One call: the how-manieth collective of its group (0 for point-to-point calls), its name, where it was made."""

    sequence: int
    collective: str
    label: str | None = None

    def __str__(self) -> str:
        number = f" number {self.sequence}" if self.sequence else ""
        where = f" in {self.label}" if self.label else ""
        return f"`{self.collective}`{number}{where}"


class Report(NamedTuple):
    """What a rank in trouble tells the others: the call that failed, and how far it had got."""

    call: Call
    last_sequence: int
    cause: str


class FailureDesk:
    """
    The failure bookkeeping of one group on one rank.

    Args:
        store: the group's store, under a prefix of its own.
        rank (`int`): this rank in the group.
        topology ([`NodeTopology`]): ranks and nodes of the group, for the words of the message.
        timeout_s (`float`): seconds after the start of a collective within which an error is to be raised.
    """

    def __init__(self, store, rank: int, topology: NodeTopology, timeout_s: float) -> None:
        self._store = store
        self._own_store: Any = None
        self._asker = _Asker()
        self._rank = rank
        self._topology = topology
        self._lock = threading.Lock()
        self._error: CollectiveError | None = None
        self._last_sequence = 0
        self.label: str | None = None
        self.accelerator_watch: Any = None
        self.set_timeout(timeout_s)

    def set_timeout(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        # Part of the timeout is kept for asking around, so that the error comes within it.
        self.grace_s = min(0.2 * timeout_s, 30.0)
        self.patience_s = timeout_s - self.grace_s
        self.glance_s = min(1.0, 0.25 * self.grace_s)
        self.glance = timedelta(seconds=self.glance_s)

    def open_call(self, collective: str) -> Call:
        """The next collective of the group."""
        self._last_sequence += 1
        return Call(self._last_sequence, collective, self.label)

    def alarm_raised(self) -> bool:
        """Whether another rank of the group gave up. One round trip to the store."""
        try:
            return self._asker.ask(lambda: self._connect().check([_ALARM]), self.glance_s)
        except _NoAnswerError:
            return False  # perhaps the link comes back: this rank's own patience decides
        except RuntimeError:
            return True

    def explain(self, call: Call, cause: str) -> CollectiveError:
        """
        Reports this rank's failure, hears the others, and returns the error to raise. Takes up to `grace_s` seconds;
        the first explanation stands for all later failures of the group. Point-to-point calls concern two ranks, and
        say what they saw.
        """
        with self._lock:
            if self._error is None:
                if not call.sequence:
                    return CollectiveError(f"{call} failed on {self._topology.describe_rank(self._rank)}: {cause}.")
                self._error = CollectiveError(self._find_out(call, cause))
            # An exception carries one traceback: every raise gets its own.
            return CollectiveError(*self._error.args)

    def _find_out(self, call: Call, cause: str) -> str:
        head = f"{call} failed on {self._topology.describe_rank(self._rank)}: "
        heard: dict[int, Report | None] = {}
        report = Report(call, self._last_sequence, cause)
        try:
            self._asker.ask(lambda: self._exchange_reports(report, heard), self.grace_s + self.glance_s)
        except RuntimeError as error:
            if not (heard and isinstance(error, _NoAnswerError)):
                return (
                    f"{head}{cause}. The store does not answer either ({_first_line(error)}): the process that hosts "
                    "it (rank 0, unless the launcher does) was lost, or this node is cut off from it. Look at that "
                    "process's log first."
                )
        # a copy: the thread may be writing still
        reports = {rank: known for rank, known in list(heard.items()) if known is not None}
        others = [rank for rank in range(self._topology.num_ranks) if rank != self._rank]
        missing = [rank for rank in others if rank not in reports]
        behind = [rank for rank in others if rank in reports and reports[rank].last_sequence < call.sequence]
        elsewhere = [
            rank
            for rank in others
            if rank in reports
            and reports[rank].call.sequence == call.sequence
            and reports[rank].call.collective != call.collective
        ]
        if missing:
            return (
                f"{head}lost or stalled: {self._name(missing)}. {self._whole_nodes(missing)}No sign of life came in "
                f"the {self.grace_s:g} s after the call failed here: look at the log of rank "
                f"{self._topology.global_ranks[missing[0]]} first; if it was only slow, raise `{TIMEOUT_VARIABLE}` "
                f"({self.timeout_s:g}). What this rank saw: {cause}"
            )
        if elsewhere:
            theirs = reports[elsewhere[0]].call
            return (
                f"{head}{self._name(elsewhere)} called {theirs} in its place: all ranks of a group must call the same "
                "collectives in the same order."
            )
        if behind:
            return (
                f"{head}{self._name(behind)} had not reached it, the last call there being number "
                f"{reports[behind[0]].last_sequence}: it was slow, or raised on its own. Look at its log first; if it "
                f"was only slow, raise `{TIMEOUT_VARIABLE}` ({self.timeout_s:g})."
            )
        first = next((rank for rank in sorted(reports) if reports[rank].last_sequence > call.sequence), None)
        if first is not None:
            return (
                f"{head}this rank came too late: {self._topology.describe_rank(first)} had given up on it. If it was "
                f"only slow, raise `{TIMEOUT_VARIABLE}` ({self.timeout_s:g}). What this rank saw: {cause}"
            )
        return (
            f"{head}all ranks had reached it and none is lost, so the connection between them is at fault. What this "
            f"rank saw: {cause}"
        )

    def _connect(self):
        """A connection of our own: a thread that waits in the group's for a key keeps everybody else from using it."""
        if self._own_store is None:
            self._own_store = self._store.clone()
        return self._own_store

    def _exchange_reports(self, report: Report, heard: dict[int, Report | None]) -> None:
        """Fills in what the store says of each other rank, `None` as long as it has no report."""
        store = self._connect()
        store.set(f"{_REPORT}/{self._rank}", json.dumps(report))
        store.set(_ALARM, "")
        waiting = set(range(self._topology.num_ranks)) - {self._rank}
        give_up_at = time.monotonic() + self.grace_s
        while waiting and time.monotonic() < give_up_at:
            for rank in sorted(waiting):
                has_report = store.check([f"{_REPORT}/{rank}"])
                heard.setdefault(rank, None)
                if has_report:
                    call, *rest = json.loads(store.get(f"{_REPORT}/{rank}"))
                    heard[rank] = Report(Call(*call), *rest)
                    waiting.remove(rank)
            if waiting:
                time.sleep(0.1 * self.glance_s)

    def _name(self, ranks: list[int]) -> str:
        named = ", ".join(map(self._topology.describe_rank, ranks[:8]))
        return named + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")

    def _whole_nodes(self, ranks: list[int]) -> str:
        gone = [
            self._topology.node_names[node]
            for node in range(self._topology.num_nodes)
            if set(self._topology.ranks_of_node(node)) <= set(ranks)
        ]
        return f"All ranks of node {', '.join(gone)} are among them: a lost node or a cut link. " if gone else ""


class _NoAnswerError(RuntimeError):
    """The store did not answer in time."""


class _Asker:
    """
    Asks the store from a thread, one question at a time, and waits so long for the answer: a store beyond a cut link
    does not fail, it never answers. A question without an answer keeps its thread until the kernel gives the
    connection up.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def ask(self, question: Callable[[], Any], timeout_s: float) -> Any:
        end = time.monotonic() + timeout_s
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise _NoAnswerError(f"no answer in {timeout_s:g} s")
        answer: queue.SimpleQueue = queue.SimpleQueue()

        def run() -> None:
            try:
                answer.put((question(), None))
            except Exception as error:
                answer.put((None, error))

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        try:
            value, error = answer.get(timeout=max(end - time.monotonic(), 0.0))
        except queue.Empty:
            raise _NoAnswerError(f"no answer in {timeout_s:g} s") from None
        if error is not None:
            raise error
        return value


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
