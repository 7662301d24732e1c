# SPDX-License-Identifier: Apache-2.0
"""The processes inside network namespaces: found by namespace, signalled by pid, never by name."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path


NAMESPACES = Path("/run/netns")


def processes_in(namespaces: list[str]) -> set[int]:
    """The pids whose network namespace is one of these (a zombie has none, so it does not count)."""
    inodes = set()
    for namespace in namespaces:
        with contextlib.suppress(FileNotFoundError):
            inodes.add((NAMESPACES / namespace).stat().st_ino)
    found = set()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "ns/net").stat().st_ino in inodes:
                found.add(int(entry.name))
    return found


def end_processes(namespaces: list[str], patience_s: float = 5.0) -> None:
    """End every process inside these namespaces, each by its pid: SIGTERM first, then SIGKILL."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + patience_s
        told: set[int] = set()
        while (pids := processes_in(namespaces)) and time.monotonic() < deadline:
            for pid in pids - told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
                    os.kill(pid, signal.SIGCONT)  # a stopped process takes no SIGTERM
            told |= pids
            time.sleep(0.05)


def _environment_of(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(pair.decode(errors="replace").split("=", 1) for pair in pairs if b"=" in pair)


def _parent_of(pid: int) -> int:
    # the command name, in parentheses, may hold spaces: what follows it is split
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pid_of_rank(namespaces: list[str], rank: int) -> int | None:
    """The process that a launcher started with `RANK=rank`, not the workers that inherited its environment."""
    candidates = {pid for pid in processes_in(namespaces) if _environment_of(pid).get("RANK") == str(rank)}
    for pid in sorted(candidates):
        with contextlib.suppress(OSError):
            if _parent_of(pid) not in candidates:
                return pid
    return None


def slow_down(pid: int, factor: float, until: threading.Event, period_s: float = 0.05) -> None:
    """Let a process run 1/factor of the time, by SIGSTOP and SIGCONT, until the event is set or the process is gone.

    Unlike a nice value this holds on an idle machine too, and unlike a cgroup's quota it needs no writable cgroup tree.
    """
    with contextlib.suppress(ProcessLookupError):
        try:
            while not until.is_set():
                os.kill(pid, signal.SIGCONT)
                until.wait(period_s / factor)
                os.kill(pid, signal.SIGSTOP)
                until.wait(period_s * (1 - 1 / factor))
        finally:
            os.kill(pid, signal.SIGCONT)
