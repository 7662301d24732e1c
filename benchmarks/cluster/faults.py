# SPDX-License-Identifier: Apache-2.0
"""Things that go wrong in the middle of a run, and what sets them off."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from dataclasses import dataclass

from .network import Cluster
from .processes import pid_of_rank, slow_down


KINDS = {"cut": "node", "slow": "rank", "stop": "rank", "kill": "rank"}
GRAMMAR = re.compile(
    r"(?P<kind>[a-z]+):(?P<target>\d+)(?::(?P<factor>\d+(?:\.\d+)?))?"
    r"@(?:/(?P<pattern>.+)/|(?P<after>\d+(?:\.\d+)?)s)(?:\+(?P<lasts>\d+(?:\.\d+)?)s)?"
)


@dataclass(frozen=True)
class Fault:
    """One fault: `KIND:TARGET[:FACTOR]@WHEN[+DURATION]`, as in `cut:1@/step 3/`, `slow:2:10@5s+20s`, `kill:3@12.5s`.

    KIND is `cut` (a node's link), `slow` (a rank runs 1/FACTOR of the time), `stop` (a rank stands still) or `kill` (a
    rank gets SIGKILL). WHEN is a time after the start, or a regular expression: the first line of output, of any node,
    in which it is found. After DURATION the fault is mended; without one it lasts.

    Args:
        kind: one of the four.
        target: node for `cut`, global rank for the others.
        factor: for `slow`.
        pattern: regular expression that sets the fault off, or `None`.
        after_s: seconds after the start, or `None`.
        lasts_s: seconds until it is mended, or `None`.
    """

    kind: str
    target: int
    factor: float | None = None
    pattern: str | None = None
    after_s: float | None = None
    lasts_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        match = GRAMMAR.fullmatch(text)
        if not match or match["kind"] not in KINDS:
            raise ValueError(
                f"`fault` ({text}) must be KIND:TARGET[:FACTOR]@WHEN[+DURATION] with KIND out of {', '.join(KINDS)}: "
                "write it like cut:1@/step 3/ or slow:2:10@5s+20s."
            )
        numbers = {
            name: None if match[group] is None else float(match[group])
            for name, group in (("factor", "factor"), ("after_s", "after"), ("lasts_s", "lasts"))
        }
        return cls(kind=match["kind"], target=int(match["target"]), pattern=match["pattern"], **numbers)

    def __post_init__(self):
        if (self.kind == "slow") != (self.factor is not None) or (self.factor is not None and self.factor <= 1):
            raise ValueError(
                f"`factor` ({self.factor}) must be a number above 1 for `slow` and absent for every other kind "
                f"(`kind` is {self.kind})."
            )
        if self.kind == "kill" and self.lasts_s is not None:
            raise ValueError(f"`lasts_s` ({self.lasts_s}) must be absent for `kill`: a dead rank does not come back.")

    def describe(self) -> str:
        amount = f" by {self.factor:g}" if self.factor else ""
        return f"{self.kind} {KINDS[self.kind]} {self.target}{amount}"


class FaultInjector:
    """Arms the faults of one run, sets each off once, and mends what is left at the end.

    Args:
        cluster: where the run takes place.
        faults: what goes wrong.
        tell: called with a line of text when a fault happens or is mended.
    """

    def __init__(self, cluster: Cluster, faults: list[Fault], tell):
        self._cluster, self._tell = cluster, tell
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._waiting = list(faults)
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> FaultInjector:
        for fault in [fault for fault in self._waiting if fault.after_s is not None]:
            self._begin(fault)
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def see(self, line: str) -> None:
        """A line of output: does it set a fault off?"""
        for fault in [fault for fault in self._waiting if fault.pattern and re.search(fault.pattern, line)]:
            self._begin(fault)

    def _begin(self, fault: Fault) -> None:
        with self._lock:
            if fault not in self._waiting:  # another node's reader saw the pattern first
                return
            self._waiting.remove(fault)
            thread = threading.Thread(target=self._run, args=(fault,), daemon=True)
            self._threads.append(thread)
        thread.start()

    def _run(self, fault: Fault) -> None:
        if self._over.wait(fault.after_s or 0):
            return
        self._tell(f"fault: {fault.describe()}")
        with contextlib.suppress(ProcessLookupError):
            getattr(self, f"_{fault.kind}")(fault)

    def _mended(self, fault: Fault) -> None:
        self._tell(f"mended: {fault.describe()}")

    def _pid(self, fault: Fault) -> int:
        pid = pid_of_rank(self._cluster.namespaces, fault.target)
        if pid is None:
            self._tell(f"fault: no process with RANK={fault.target}, nothing done")
            raise ProcessLookupError
        return pid

    def _cut(self, fault: Fault) -> None:
        self._cluster.cut(fault.target)
        if not self._over.wait(fault.lasts_s):
            self._cluster.mend(fault.target)
            self._mended(fault)

    def _slow(self, fault: Fault) -> None:
        pid, done = self._pid(fault), threading.Event()
        thread = threading.Thread(target=slow_down, args=(pid, fault.factor, done), daemon=True)
        thread.start()
        over = self._over.wait(fault.lasts_s)
        done.set()
        thread.join()
        if not over:
            self._mended(fault)

    def _stop(self, fault: Fault) -> None:
        pid = self._pid(fault)
        os.kill(pid, signal.SIGSTOP)
        over = self._over.wait(fault.lasts_s)
        os.kill(pid, signal.SIGCONT)
        if not over:
            self._mended(fault)

    def _kill(self, fault: Fault) -> None:
        os.kill(self._pid(fault), signal.SIGKILL)
