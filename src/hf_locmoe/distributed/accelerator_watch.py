# SPDX-License-Identifier: Apache-2.0
"""Notices that a group's work on a GPU does not end, says who is missing, and ends the process at the timeout.

On a GPU the stream waits for a collective and the host goes on, so that no call of ours fails when a rank is lost.
NCCL's own watchdog gives no name, and ends the process a minute after its timeout, having slept for a dump of its own.

Two threads of the group see to it. One asks the device about once a second whether the newest call has ended; what it
asks may block for as long as a peer is lost. The other one decides and calls neither CUDA nor NCCL: for it a call has
not ended until the first one has heard so.
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import sys
import threading
import time
import weakref
from contextlib import suppress
from typing import Any

import torch

from .failure import Call, FailureDesk
from .work import EventWork


logger = logging.getLogger(__name__)

_CAPTURE_MODE_RELAXED = 2
_NOT_READY = 600  # cudaErrorNotReady
# The modes in which NCCL's watchdog leaves the process alone; what it does not end, we do not end either.
_ERROR_HANDLING_VARIABLE = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_MODES_WITHOUT_END = ("0", "2")


class AcceleratorWatch:
    """
    Watches the calls of one group on one GPU.

    Args:
        desk ([`FailureDesk`]): the group's.
        device (`torch.device`): the GPU.
    """

    def __init__(self, desk: FailureDesk, device: torch.device) -> None:
        self.desk = desk
        self.device = device
        # The newest call only: a group's calls end in their order. While others follow, the host is not stuck.
        self.newest: _Watched | None = None
        _start(_ask_on, weakref.ref(self))

    def saw(self, call: Call, work) -> None:
        """`call` has been given to the device; `work` is `None` where the current stream waits for it already."""
        if torch.cuda.is_current_stream_capturing():
            return
        if work is None:
            work = torch.cuda.Event()
            work.record()
        elif isinstance(work, EventWork):
            work = work.event
        self.newest = _Watched(call, work)

    def forget(self) -> None:
        """The group is shut down: what is open is its owner's affair."""
        self.newest = None


class _Watched:
    """A call, and the event or work to ask; `None` once it has ended, so that its tensors are not held."""

    __slots__ = ("call", "seen_at", "target")

    def __init__(self, call: Call, target) -> None:
        self.call = call
        self.seen_at = time.monotonic()
        self.target: Any = target

    @property
    def age_s(self) -> float:
        return time.monotonic() - self.seen_at


def _start(loop, reference: weakref.ref[AcceleratorWatch]) -> None:
    threading.Thread(target=loop, args=(reference,), name=f"locmoe-watch{loop.__name__}", daemon=True).start()


# ---- asking ---------------------------------------------------------------------------------------------------------


def _ask_on(reference: weakref.ref[AcceleratorWatch]) -> None:
    watch, runtime = reference(), _open_runtime()
    if watch is None or runtime is None:
        return
    torch.cuda.set_device(watch.device)
    # Only now: where nothing can be asked, silence says nothing.
    _start(_decide_on, reference)
    while watch is not None:
        watched, pause_s = watch.newest, watch.desk.glance_s
        watch = None
        if watched is not None and (target := watched.target) is not None:
            try:
                has_ended = _has_ended(target, runtime)
            except Exception:  # only a question without an answer may end the process, not one that cannot be asked
                logger.exception("%s cannot be watched", watched.call)
                has_ended = True
            if has_ended:
                watched.target = None
        watched = target = None
        time.sleep(pause_s)
        watch = reference()


def _has_ended(target, runtime) -> bool:
    """
    Whether an event was reached. Not by `Event.query`, which holds the interpreter's lock while it asks: if it blocked,
    so would the thread that decides. NCCL's works can be asked through torch only, and are never waited for: they let
    go of their callers' tensors when the first one waits. One that ended by an error has ended: NCCL's watchdog, which
    sees the same error, ends the process.
    """
    if not isinstance(target, torch.cuda.Event):
        return target.is_completed()
    if runtime.cudaEventQuery(ctypes.c_void_p(target.cuda_event)) != _NOT_READY:
        return True  # also where the device failed: whoever uses it next is told
    runtime.cudaGetLastError()
    return False


def _open_runtime():
    """
    CUDA's runtime library, told to let this thread query events while another one captures a CUDA graph, which would
    spoil the capture otherwise: what NCCL's watchdog does for itself. `None` where it is not found: then nothing is
    watched.
    """
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        is_set = runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
        return runtime if is_set and runtime.cudaEventQuery and runtime.cudaGetLastError else None
    except (OSError, AttributeError):
        return None


# ---- deciding -------------------------------------------------------------------------------------------------------


def _decide_on(reference: weakref.ref[AcceleratorWatch]) -> None:
    explained: _Watched | None = None
    while (watch := reference()) is not None:
        desk, watched = watch.desk, watch.newest
        watch = None
        is_open = watched is not None and watched.target is not None
        if explained is not None:
            if watched is None:
                return
            if watched is not explained or not is_open:
                logger.info("%s: the process went on after all", explained.call)
                return
            if explained.age_s >= desk.timeout_s:
                _end_process(explained)
                return
        elif watched is not None and is_open and (explanation := _explanation(watched, desk)):
            logger.error("%s", explanation)
            explained = watched
        watched = None
        time.sleep(desk.glance_s)


def _explanation(watched: _Watched, desk: FailureDesk) -> str | None:
    """
    Of a call that has not ended: `None` as long as it is not given up. That is a grace earlier than where the host itself
    waits, so that the names are known, and a call may still end, before the process does at the timeout.
    """
    age_s = watched.age_s
    late = age_s >= desk.patience_s - desk.grace_s
    cause = f"no end after {age_s:.1f} s" if late else "another rank gave up"
    try:
        if late or (age_s > desk.glance_s and desk.alarm_raised()):
            return str(desk.explain(watched.call, cause))
    except Exception as error:  # the end must not depend on it
        return f"{watched.call} failed: {cause}. Who is missing could not be found out: {error}" if late else None
    return None


def _end_process(watched: _Watched) -> None:
    """As NCCL's watchdog would have: a hang is worse than an end."""
    if os.environ.get(_ERROR_HANDLING_VARIABLE) in _MODES_WITHOUT_END:
        return
    text = f"{watched.call} has not ended after {watched.age_s:.1f} s: SIGABRT. Where the threads of this process are:"
    # Not through logging, whose locks a thread that hangs may hold.
    with suppress(Exception):
        print(text, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os.abort()
