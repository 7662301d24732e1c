# SPDX-License-Identifier: Apache-2.0
"""Run one command on every node of a cluster at the same time, and say what came of it."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .counters import Counters
from .faults import Fault, FaultInjector
from .network import Cluster
from .processes import end_processes


MASTER_PORT = 29400


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Args:
        statuses: per node the exit status, `None` where the command was still running when time ran out.
        seconds: from the start to the end of the last node.
        crossed: per node what its interface counted meanwhile.
        output: per node its lines, stdout and stderr together, in order.
        events: the faults that happened and were mended, in order.
    """

    statuses: list[int | None]
    seconds: float
    crossed: list[Counters]
    output: list[list[str]]
    events: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """As a shell counts it: 0 if all are 0, else the first failure (128 + signal), 124 if only time ran out."""
        for status in self.statuses:
            if status:
                return status if status > 0 else 128 - status
        return 124 if None in self.statuses else 0

    def text(self) -> str:
        """All output, node after node, every line with its node."""
        return "\n".join(f"[node{i}] {line}" for i, lines in enumerate(self.output) for line in lines)


def node_environment(cluster: Cluster, index: int, ranks_per_node: int) -> dict[str, str]:
    """What the command on a node finds in its environment, besides this process's own.

    The rendezvous is there under torchrun's own names too, so that `torchrun SCRIPT` needs no argument.
    """
    rendezvous = {
        "MASTER_ADDR": cluster.address(0),
        "MASTER_PORT": str(MASTER_PORT),
        "NODE_RANK": str(index),
        "NNODES": str(cluster.nodes),
        "NPROC_PER_NODE": str(ranks_per_node),
    }
    return {
        "OMP_NUM_THREADS": "1",
        # `Accelerator()` on a machine without an accelerator believes itself alone without it
        "ACCELERATE_USE_CPU": "true",
        **os.environ,
        **rendezvous,
        **{f"PET_{name}": value for name, value in rendezvous.items()},
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
        "PYTHONUNBUFFERED": "1",
    }


def _wait(processes: list[subprocess.Popen], timeout_s: float, grace_s: float) -> list[int | None]:
    deadline = time.monotonic() + timeout_s
    failed = False
    while True:
        statuses = [process.poll() for process in processes]
        if None not in statuses or time.monotonic() > deadline:
            return statuses
        if any(statuses) and not failed:
            failed, deadline = True, min(deadline, time.monotonic() + grace_s)
        time.sleep(0.02)


def run_on_nodes(
    cluster: Cluster,
    command: list[str],
    ranks_per_node: int = 1,
    *,
    environment: dict[str, str] | None = None,
    faults: list[Fault] | None = None,
    timeout_s: float = 600,
    grace_s: float = 10,
    on_line: Callable[[str, str], None] | None = None,
) -> RunResult:
    """Run `command` once on every node and wait for all.

    Args:
        cluster: a cluster that is up.
        command: the same on every node, usually a launcher that starts `ranks_per_node` processes.
        ranks_per_node: told to the launcher through the environment.
        environment: variables set on every node, over everything else.
        faults: what goes wrong meanwhile.
        timeout_s: seconds after which what still runs is ended.
        grace_s: seconds that the others get once the command failed on one node.
        on_line: called with (where, line) for every line of output, from several threads.
    """
    started = time.monotonic()
    before = [cluster.counters(index) for index in range(cluster.nodes)]
    output: list[list[str]] = [[] for _ in range(cluster.nodes)]
    show = on_line or (lambda where, line: None)
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []

    events: list[str] = []

    def tell(text: str) -> None:
        events.append(text)
        show("cluster", text)

    with FaultInjector(cluster, faults or [], tell) as injector:

        def read(index: int, stream) -> None:
            for line in stream:
                output[index].append(line.rstrip("\n"))
                show(f"node{index}", line.rstrip("\n"))
                injector.see(line)

        try:
            for index in range(cluster.nodes):
                process = cluster.start(
                    index,
                    command,
                    env={**node_environment(cluster, index, ranks_per_node), **(environment or {})},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
                reader = threading.Thread(target=read, args=(index, process.stdout), daemon=True)
                reader.start()
                processes.append(process)
                readers.append(reader)
            statuses = _wait(processes, timeout_s, grace_s)
            seconds = time.monotonic() - started
            crossed = [cluster.counters(index) - before[index] for index in range(cluster.nodes)]
        finally:
            end_processes(cluster.namespaces)
            for process, reader in zip(processes, readers, strict=True):
                process.wait()
                reader.join(timeout=5)
    return RunResult(statuses, seconds, crossed, output, events)
