# SPDX-License-Identifier: Apache-2.0
"""
The one way in which tests run several ranks: [`run_ranks`].

    parent (pytest)                       forkserver: torch, transformers and hf_locmoe imported once
      TCPStore, on a port of its own        ├── rank 0   fn(*args) ── result or traceback ──┐
      one pipe per rank  ◄──────────────────├── rank 1   fn(*args) ─────────────────────────┤ pickled, by value
      waits, kills, raises                  └── rank 2   fn(*args) ─────────────────────────┘

Spawned processes import everything again (25 s at 8 ranks) and forked ones inherit threads that may hold a lock; a
forkserver does neither. The parent holds the store, as torchrun's agent does, so no port is raced for and a store
outlives any rank. Ranks stay alive until all have reported: none sees its peer's connection close under it.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


_PRELOAD = ["torch", "torch.distributed", "transformers.trainer", "accelerate", "hf_locmoe"]
_SETTLE_S = 0.5  # after the first failure: time for the other ranks to tell theirs, so that the first cause is found
_TEARDOWN_S = 10.0
# A folder in which the whole output of ranks that failed or hung is kept, thread dumps included.
LOGS_VARIABLE = "LOCMOE_TEST_LOGS"


class RankError(RuntimeError):
    """
    A rank failed, died or hung. The message holds the traceback of the rank that failed first, the end of what it wrote
    to its standard output and error, and one line for every other rank that failed.

    Attributes:
        rank (`int`): The rank that failed first; -1 where all ranks ran out of time.
        kind (`str`): Name of the exception's class, of the signal ("SIGKILL"), or "timeout".
    """

    def __init__(self, rank: int, kind: str, message: str):
        super().__init__(message)
        self.rank = rank
        self.kind = kind


@dataclass(frozen=True)
class _Failure:
    rank: int
    kind: str
    text: str  # traceback, or what is known of a silent death
    seen_at: float  # time.monotonic(), which is one clock for all processes of a machine

    @property
    def order(self) -> tuple[bool, float]:
        # A rank that a signal took is the cause of its peers' errors, whichever was noticed first. SIGABRT is the
        # exception: that is how torch ends a process whose peer went away.
        return (not self.kind.startswith("SIG") or self.kind == "SIGABRT", self.seen_at)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120.0,
    env: Mapping[str, str | Sequence[str]] | None = None,
    init: bool = True,
    backend: str | None = None,
    device: str = "cpu",
    may_die: Collection[int] = (),
) -> list[Any]:
    """
    Calls `fn(*args)` in `world_size` processes and returns what each returned, in the order of the ranks.

    Every rank has torchrun's environment (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`,
    `MASTER_PORT`), one thread, and the parent's environment variables. All ranks are gone when the call returns.

    Args:
        fn: A function at the head of a module. It asks `torch.distributed.get_rank()`, or the environment, who it is.
        world_size (`int`): Number of ranks.
        *args: Handed to `fn` on every rank, pickled by value (tensors included).
        timeout_s (`float`, defaults to 120): All ranks are killed after this time, and the stack of each is reported.
        env (`Mapping`, *optional*): Environment variables of the ranks, on top of the parent's: a string for all ranks
            (`{"LOCMOE_RANKS_PER_NODE": "2"}`), or one string per rank (`{"LOCAL_RANK": ["0", "1", "0", "1"]}`).
        init (`bool`, defaults to `True`): Whether the default process group is set up before `fn` and destroyed after
            it. `False` for functions that do so themselves (`init_process_group("gloo")` finds the store through the
            environment). The store keeps its keys: who initialises twice has to raise `TORCHELASTIC_RESTART_COUNT`.
        backend (`str`, *optional*): Backend of the default process group: gloo, or NCCL with `device="cuda"`. `"nccl"` alone
            is bound to the rank's GPU, as transformers does it; `"cpu:gloo,cuda:nccl"` is not.
        device (`str`, defaults to `"cpu"`): `"cuda"` gives every rank a GPU of its own, which is its current device.
        may_die (`Collection[int]`, defaults to none): Ranks which may end without a result, because the test kills
            them: their result is None.

    Raises:
        RankError: when a rank raised, died or did not finish in time. `LOCMOE_TEST_LOGS` names a folder that then keeps
            the whole output of every rank.
    """
    call = pickle.dumps((fn, args))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as log_dir:
        logs = [Path(log_dir) / f"rank{rank}.log" for rank in range(world_size)]
        ranks = []
        teardown_s = 0.0
        try:
            for rank in range(world_size):
                environ = _environment(rank, world_size, store.port, device, env or {})
                options = {"init": init, "device": device, "timeout_s": timeout_s, "log": str(logs[rank])}
                options["backend"] = backend or {"cpu": "gloo", "cuda": "nccl"}[device]
                ranks.append(_start(rank, call, environ, options))
            try:
                results = _collect(ranks, logs, timeout_s, frozenset(may_die))
            except RankError:
                _keep(logs, getattr(fn, "__name__", "ranks"))
                raise
            teardown_s = (
                _TEARDOWN_S  # all is well: the ranks may close their groups; otherwise they are killed at once
            )
            return results
        finally:
            _end(ranks, teardown_s)


def _environment(
    rank: int, world_size: int, port: int, device: str, env: Mapping[str, str | Sequence[str]]
) -> dict[str, str]:
    environ = dict(os.environ)
    environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        # As under torchrun: the store is there already, rank 0 does not open one.
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    if device == "cpu":
        environ["ACCELERATE_USE_CPU"] = "true"  # it believes in several processes on a CPU only when told
    environ.update({name: value if isinstance(value, str) else value[rank] for name, value in env.items()})
    return environ


@dataclass
class _Rank:
    rank: int
    process: Any
    connection: multiprocessing.connection.Connection


def _start(rank: int, call: bytes, environ: dict[str, str], options: dict[str, Any]) -> _Rank:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_rank_main, args=(call, environ, options, theirs), name=f"rank{rank}", daemon=False
    )
    process.start()
    theirs.close()
    return _Rank(rank, process, ours)


# ---- in the rank ----------------------------------------------------------------------------------------------------


def _rank_main(call: bytes, environ: dict[str, str], options: dict[str, Any], connection: Any) -> None:
    os.setsid()  # a process group of its own, so that what the rank starts ends with it
    log = open(options["log"], "w")  # noqa: SIM115  the faulthandler writes to it until the end
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    released = threading.Event()
    threading.Thread(target=_wait_for_parent, args=(connection, released), daemon=True).start()
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    try:
        device = None
        if options["device"] == "cuda":
            device = torch.device("cuda", int(environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        fn, args = pickle.loads(call)
        if options["init"]:
            bound = {"device_id": device} if options["backend"] == "nccl" else {}
            timeout = timedelta(seconds=options["timeout_s"])
            dist.init_process_group(options["backend"], timeout=timeout, **bound)
        report = ("result", pickle.dumps(fn(*args)))
    except BaseException as error:
        report = ("error", (type(error).__name__, traceback.format_exc(), time.monotonic()))
    connection.send_bytes(pickle.dumps(report))
    released.wait()
    if options["init"] and dist.is_initialized():
        dist.destroy_process_group()


def _wait_for_parent(connection: Any, released: threading.Event) -> None:
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone: nobody would end this rank
    released.set()


# ---- in the parent --------------------------------------------------------------------------------------------------


def _collect(ranks: list[_Rank], logs: list[Path], timeout_s: float, may_die: frozenset[int]) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    deadline = time.monotonic() + timeout_s
    waiting = {rank.rank: rank for rank in ranks}
    while waiting and (remaining := deadline - time.monotonic()) > 0:
        by_handle = {rank.connection: rank for rank in waiting.values()}
        by_handle.update({rank.process.sentinel: rank for rank in waiting.values()})
        ready = {by_handle[handle].rank for handle in multiprocessing.connection.wait(list(by_handle), remaining)}
        for rank in [waiting.pop(number) for number in sorted(ready)]:
            outcome = _outcome(rank, may_die)
            if isinstance(outcome, _Failure):
                if not failures:
                    deadline = min(deadline, time.monotonic() + _SETTLE_S)
                failures.append(outcome)
            else:
                results[rank.rank] = outcome
    if failures:
        raise _error(failures, logs)
    if waiting:
        raise _timeout_error(list(waiting.values()), sorted(results), logs, timeout_s)
    return [results[rank] for rank in sorted(results)]


def _outcome(rank: _Rank, may_die: frozenset[int]) -> Any:
    try:
        status, payload = pickle.loads(rank.connection.recv_bytes())
    except (EOFError, OSError):
        rank.process.join(_TEARDOWN_S)
        if rank.rank in may_die:
            return None
        code = rank.process.exitcode
        kind = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return _Failure(rank.rank, kind, f"the process ended without a result ({kind})", time.monotonic())
    if status == "result":
        return pickle.loads(payload)
    kind, text, seen_at = payload
    return _Failure(rank.rank, kind, text, seen_at)


def _error(failures: list[_Failure], logs: list[Path]) -> RankError:
    first, *others = sorted(failures, key=lambda failure: failure.order)
    lines = [f"rank {first.rank} failed first, with {first.kind}:", first.text.rstrip()]
    lines += _log_tail(first.rank, logs)
    lines += [f"then rank {failure.rank}: {failure.text.rstrip().splitlines()[-1]}" for failure in others]
    return RankError(first.rank, first.kind, "\n".join(lines))


def _timeout_error(hanging: list[_Rank], finished: list[int], logs: list[Path], timeout_s: float) -> RankError:
    for rank in hanging:
        if rank.process.is_alive():
            os.kill(rank.process.pid, signal.SIGUSR1)  # the faulthandler writes the stacks, even past a held GIL
    time.sleep(_SETTLE_S)
    names = [rank.rank for rank in hanging]
    lines = [f"ranks {names} did not finish within {timeout_s:g} s (finished: {finished}); where they are:"]
    for rank in names:
        lines += _log_tail(rank, logs)
    return RankError(names[0] if len(names) == 1 else -1, "timeout", "\n".join(lines))


def _log_tail(rank: int, logs: list[Path], length: int = 4000) -> list[str]:
    text = logs[rank].read_text(errors="replace").strip() if logs[rank].exists() else ""
    return [f"--- rank {rank} wrote:", text[-length:], "---"] if text else []


def _keep(logs: list[Path], name: str) -> None:
    folder = os.environ.get(LOGS_VARIABLE)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        kept = Path(tempfile.mkdtemp(prefix=f"{name.strip('_')}-", dir=Path(folder)))
        for log in filter(Path.exists, logs):
            shutil.copy(log, kept / log.name)


def _end(ranks: list[_Rank], teardown_s: float) -> None:
    for rank in ranks:
        try:
            rank.connection.send_bytes(b"released")
        except OSError:
            pass  # this rank is gone already
    deadline = time.monotonic() + teardown_s
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.is_alive():
            try:
                os.killpg(rank.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                rank.process.kill()  # it had not yet come to have a process group of its own
            rank.process.join()
        rank.connection.close()
