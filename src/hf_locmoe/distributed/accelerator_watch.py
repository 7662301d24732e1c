# SPDX-License-Identifier: Apache-2.0
"""Notices that a group's work on a GPU does not end, and says who is missing.

On a GPU the stream waits for a collective and the host goes on, so that no call of ours fails when a rank is lost:
NCCL's own watchdog ends the process at the timeout, without a name. A thread of the group looks at its last call about
once a second and logs the explanation before that.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import time
import weakref
from collections.abc import Callable

import torch

from .failure import Call, FailureDesk


logger = logging.getLogger(__name__)

_CAPTURE_MODE_RELAXED = 2


class AcceleratorWatch:
    """
    Watches the calls of one group on one GPU.

    Args:
        desk ([`FailureDesk`]): the group's.
        device (`torch.device`): the GPU.
    """

    def __init__(self, desk: FailureDesk, device: torch.device) -> None:
        self._desk = desk
        self._device = device
        # Set by the caller's thread, taken by the watching one, so that a work (and its tensors) is held for a
        # second at most.
        self._last: tuple[Call, float, Callable[[], bool]] | None = None
        threading.Thread(target=_look_on, args=(weakref.ref(self),), name="locmoe-watch", daemon=True).start()

    def saw(self, call: Call, work) -> None:
        """`call` has been given to the device; `work` is `None` where the current stream waits for it already."""
        if torch.cuda.is_current_stream_capturing():
            return
        if work is None:
            event = torch.cuda.Event()
            event.record()
            has_ended = event.query
        else:
            # Asked, never waited for: NCCL's works let go of their callers' tensors when the first one waits.
            has_ended = work.is_completed
        self._last = (call, time.monotonic(), has_ended)

    def take_last(self) -> tuple[Call, float, Callable[[], bool]] | None:
        last, self._last = self._last, None
        return last

    def look_at(self, call: Call, started: float) -> bool:
        """A call that has not ended: whether it was given up, and the explanation logged."""
        desk, age = self._desk, time.monotonic() - started
        late = age >= desk.patience_s
        if not late and not (age > desk.glance_s and desk.alarm_raised()):
            return False
        cause = f"no end after {age:.1f} s" if late else "another rank gave up"
        logger.error("%s", desk.explain(call, cause))
        return True

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def pause_s(self) -> float:
        return self._desk.glance_s


def _look_on(reference: weakref.ref[AcceleratorWatch]) -> None:
    watch = reference()
    if watch is None or not _may_ask_during_capture():
        return
    torch.cuda.set_device(watch.device)
    pending = None
    while watch is not None:
        if pending is not None and pending[2]():
            pending = None
        pending = pending or watch.take_last()
        if pending is not None and not pending[2]() and watch.look_at(pending[0], pending[1]):
            return
        pause_s = watch.pause_s
        watch = None
        time.sleep(pause_s)
        watch = reference()


def _may_ask_during_capture() -> bool:
    """
    Lets this thread query events while another one captures a CUDA graph, which would spoil the capture otherwise:
    what NCCL's watchdog does for itself. `False` where the runtime library is not found: then nothing is watched.
    """
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}")
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        return runtime.cudaThreadExchangeStreamCaptureMode(ctypes.byref(mode)) == 0
    except (OSError, AttributeError):
        return False
