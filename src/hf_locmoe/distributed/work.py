# SPDX-License-Identifier: Apache-2.0
"""The `Work` objects that the backend hands out.

`torch.distributed` waits on works from Python and from C++ (functional collectives, DDP's reducer); C++ sees `wait`
and `get_future` of a Python work only, so these two carry everything that matters: errors above all. The ready-made
`_create_work_from_future` reports success for a failed future, hence classes of our own.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import TimeoutError as ThreadTimeoutError
from datetime import timedelta

import torch
import torch.distributed as dist

from .failure import Call, FailureDesk


NO_TIMEOUT = timedelta(0)


class DoneWork(dist.Work):
    """A call that had nothing to wait for: NCCL answers a synchronous call with no work at all, and C++ wants one."""

    def __init__(self, result: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self._result = result or []

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self):
        return None

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def result(self) -> list[torch.Tensor]:
        return self._result

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(self._result)
        return future


class EventWork(DoneWork):
    """Work on a stream of its own: waiting makes the waiting stream wait, never the host."""

    def __init__(self, event: torch.cuda.Event, keep_alive: tuple, result: list[torch.Tensor]) -> None:
        super().__init__(result)
        self.event = event
        # Callers may drop their tensors before they wait.
        self._keep_alive = keep_alive

    def is_completed(self) -> bool:
        return self.event.query()

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        torch.cuda.current_stream().wait_event(self.event)
        self._keep_alive = ()
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future(devices=[tensor.device for tensor in self._result[:1]])
        with torch.cuda.stream(torch.cuda.current_stream()):
            self.wait()
            future.set_result(self._result)
        return future


class TaskThread:
    """
    Runs tasks one after another on a thread that does not keep a process from ending: one that lingered, waiting for
    peers, would hide its end from them.
    """

    def __init__(self, name: str) -> None:
        self.closing = False
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, task: Callable[[], None]) -> ThreadFuture:
        future: ThreadFuture = ThreadFuture()
        self._tasks.put((future, task))
        return future

    def wait(self, work: dist.Work, glance: timedelta) -> None:
        """Waits inside a task: for the work, or for the end of the thread."""
        while True:
            try:
                work.wait(glance)
                return
            except RuntimeError:
                if work.is_completed() or self.closing:
                    raise

    def close(self) -> None:
        """Drops what has not begun, and lets a task that waits end at its next glance."""
        atexit.unregister(self.close)
        self.closing = True
        self._tasks.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task = entry
            if self.closing:
                future.set_exception(RuntimeError("the process group was shut down before this exchange began"))
                continue
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)


class ThreadWork(dist.Work):
    """A task on the group's own thread, seen as a work."""

    def __init__(self, task: ThreadFuture, result: list[torch.Tensor]) -> None:
        super().__init__()
        self._task = task
        self._result = result

    def is_completed(self) -> bool:
        return self._task.done()

    def exception(self):
        return self._task.exception() if self._task.done() else None

    def is_success(self) -> bool:
        return self._task.done() and self._task.exception() is None

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        try:
            self._task.result(timeout.total_seconds() or None)
        except ThreadTimeoutError as error:
            if self._task.done():
                raise
            raise RuntimeError("Operation timed out!") from error
        return True

    def result(self) -> list[torch.Tensor]:
        return self._result

    def get_future(self) -> torch.futures.Future:
        future: torch.futures.Future = torch.futures.Future()

        def settle(task: ThreadFuture) -> None:
            error = task.exception()
            if error is None:
                future.set_result(self._result)
            else:
                future.set_exception(error)

        self._task.add_done_callback(settle)
        return future


class WatchedWork(dist.Work):
    """
    A work on the CPU whose failure, or whose failure to end in time, is explained: which rank is missing, on which
    node, in which call.

    Args:
        inner: the work itself.
        call ([`Call`]): what was called.
        watch ([`FailureDesk`]): the group's.
        finish (`Callable`, *optional*): run once when the inner work has ended, by whoever learns of it first.
    """

    def __init__(
        self, inner: dist.Work, call: Call, watch: FailureDesk, finish: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._inner = inner
        self._call = call
        self._watch = watch
        self._finish = finish
        self._finishing = threading.Lock() if finish is not None else None
        self._started = time.monotonic()

    def wait(self, timeout: timedelta = NO_TIMEOUT) -> bool:
        if timeout:
            self._wait_in_glances(time.monotonic() + timeout.total_seconds(), raise_plainly=True)
        else:
            try:
                # nearly always the whole story
                self._inner.wait(self._watch.glance)
            except RuntimeError:
                self._wait_in_glances(self._started + self._watch.patience_s, raise_plainly=False)
        if self._finish is not None:
            self._run_finish()
        return True

    def _wait_in_glances(self, end: float, raise_plainly: bool) -> None:
        """
        Until `end`, with a look at the alarm now and then. `raise_plainly`: running out of time is the caller's
        affair.
        """
        watch = self._watch
        while True:
            left = max(end - time.monotonic(), 0.001)
            try:
                self._inner.wait(min(timedelta(seconds=left), watch.glance))
                return
            except RuntimeError as error:
                if self._inner.is_completed():
                    raise watch.explain(self._call, _cause(error)) from error
                late = time.monotonic() >= end
                if late and raise_plainly:
                    raise
                if late or watch.alarm_raised():
                    cause = (
                        f"no end after {time.monotonic() - self._started:.1f} s" if late else "another rank gave up"
                    )
                    raise watch.explain(self._call, cause) from error

    def _run_finish(self) -> None:
        assert self._finishing is not None
        with self._finishing:
            if self._finish is not None:
                self._finish()
                self._finish = None

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._inner.is_completed()

    def is_success(self) -> bool:
        return self._inner.is_success()

    def exception(self):
        return self._inner.exception()

    def source_rank(self) -> int:
        return self._inner._source_rank()

    _source_rank = source_rank

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return self._inner.result()

    def get_future(self) -> torch.futures.Future:
        future = self._inner.get_future()
        if self._finish is None:
            return future

        def finished(done: torch.futures.Future):
            value = done.value()
            self._run_finish()
            return value

        return future.then(finished)


def _cause(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
