# SPDX-License-Identifier: Apache-2.0
"""How calls on a GPU are watched, without a GPU: asked whether they have ended, never waited for, and not for ever."""

import threading
import time
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hf_locmoe.distributed import accelerator_watch, collectives
from hf_locmoe.distributed.accelerator_watch import AcceleratorWatch
from hf_locmoe.distributed.backend import LocMoeProcessGroup
from hf_locmoe.distributed.failure import Call, FailureDesk
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.distributed.work import EventWork


CALL = Call(3, "all_to_all_single", "MoE layer 1")
TIMEOUT_S = 0.4


class PlayedWork:
    """NCCL's: the first wait lets go of the callers' tensors, and a wait with an end gives the group up."""

    def __init__(self):
        self.waits = []
        self.has_ended = False
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def wait(self, timeout: timedelta | None = None):
        self.waits.append(timeout)
        return True

    def is_completed(self):
        self.asked.set()
        self.answers.wait()
        return self.has_ended


class PlayedEvent:
    """A CUDA event; asked by its handle, as its own `query` would keep every other thread waiting."""

    made = []

    def __init__(self):
        self.cuda_event = len(self.made) + 1
        self.made.append(self)

    def record(self):
        pass

    def query(self):
        raise AssertionError("holds the interpreter's lock")


class PlayedRuntime:
    NOT_READY, SUCCESS, LAUNCH_FAILURE = 600, 0, 719

    def __init__(self):
        self.result = self.NOT_READY
        self.asked = threading.Event()
        self.answers = threading.Event()
        self.answers.set()

    def cudaEventQuery(self, handle):
        assert handle.value == PlayedEvent.made[-1].cuda_event
        self.asked.set()
        self.answers.wait()
        return self.result

    def cudaGetLastError(self):
        return self.NOT_READY


@pytest.fixture
def runtime(monkeypatch):
    runtime = PlayedRuntime()
    monkeypatch.setattr(PlayedEvent, "made", [])
    monkeypatch.setattr(torch.cuda, "Event", PlayedEvent)
    monkeypatch.setattr(accelerator_watch, "_open_runtime", lambda: runtime)
    yield runtime
    runtime.answers.set()


@pytest.fixture
def ended(monkeypatch):
    """Set where the process would have been ended."""
    ended = threading.Event()
    monkeypatch.setattr(accelerator_watch.os, "abort", ended.set)
    monkeypatch.setattr(accelerator_watch.faulthandler, "dump_traceback", lambda *args, **kwargs: None)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    return ended


@pytest.fixture
def desk(monkeypatch, runtime, ended):
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    desk = FailureDesk(dist.HashStore(), 0, NodeTopology.from_ranks_per_node(2, num_ranks=4), TIMEOUT_S)
    yield desk
    # or what is open would end the tests' own process
    if desk.accelerator_watch is not None:
        desk.accelerator_watch.forget()
        time.sleep(10 * desk.glance_s)


@pytest.fixture
def watch(desk):
    desk.accelerator_watch = AcceleratorWatch(desk, torch.device("cuda", 0))
    return desk.accelerator_watch


def wait_for_messages(caplog, count):
    deadline = time.monotonic() + 10.0
    while len(caplog.records) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return [record.getMessage() for record in caplog.records]


def test_a_work_is_asked_and_not_waited_for(watch, ended, caplog):
    work = PlayedWork()
    watch.saw(CALL, work)
    assert work.asked.wait(5.0)
    work.has_ended = True
    work.asked.clear()
    assert work.asked.wait(5.0)
    assert not ended.wait(2 * TIMEOUT_S)
    assert work.waits == []
    assert not caplog.records


def test_a_work_that_ended_is_let_go(watch):
    work = PlayedWork()
    work.has_ended = True
    reference = weakref.ref(work)
    watch.saw(CALL, work)
    assert work.asked.wait(5.0)
    del work
    deadline = time.monotonic() + 5.0
    while reference() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reference() is None


def test_a_work_that_does_not_end_names_the_missing_ranks_and_ends_the_process(watch, ended, caplog, capfd):
    started = time.monotonic()
    work = PlayedWork()
    watch.saw(CALL, work)
    text = wait_for_messages(caplog, 1)[0]
    assert text.startswith("`all_to_all_single` number 3 in MoE layer 1 failed on rank 0 (node 0): lost or stalled:")
    assert "rank 1 (node 0), rank 2 (node 1), rank 3 (node 1)" in text
    assert not ended.is_set()
    assert ended.wait(10.0)
    assert time.monotonic() - started >= TIMEOUT_S
    assert "`all_to_all_single` number 3 in MoE layer 1 has not ended after" in capfd.readouterr().err
    assert len(caplog.records) == 1
    assert work.waits == []


@pytest.mark.parametrize("synchronous", [True, False])
def test_a_device_that_does_not_even_answer_is_not_waited_for(synchronous, watch, runtime, ended, caplog):
    work = None if synchronous else PlayedWork()
    asked = runtime if synchronous else work
    asked.answers.clear()
    watch.saw(CALL, work)
    assert asked.asked.wait(5.0)
    assert "lost or stalled: rank 1 (node 0), rank 2 (node 1), rank 3 (node 1)" in wait_for_messages(caplog, 1)[0]
    assert ended.wait(10.0)
    asked.answers.set()


def test_calls_that_follow_show_that_the_host_is_not_stuck(watch, runtime, ended, caplog):
    runtime.answers.clear()
    deadline = time.monotonic() + 2.5 * TIMEOUT_S
    while time.monotonic() < deadline:
        watch.saw(CALL, None)
        time.sleep(0.1 * TIMEOUT_S)
    watch.forget()
    assert not ended.is_set()
    assert not caplog.records


@pytest.mark.parametrize("result", ["SUCCESS", "LAUNCH_FAILURE"])
def test_a_synchronous_call_ends_with_its_event_or_with_the_device(result, watch, runtime, ended, caplog):
    runtime.result = getattr(PlayedRuntime, result)
    watch.saw(CALL, None)
    assert not ended.wait(2 * TIMEOUT_S)
    assert not caplog.records


def test_an_exchange_in_several_steps_is_asked_by_its_event(watch, runtime):
    event = PlayedEvent()
    watch.saw(CALL, EventWork(event, (), []))
    assert runtime.asked.wait(5.0)


def test_a_call_that_ends_after_the_explanation_ends_nothing(watch, runtime, ended, caplog):
    caplog.set_level("INFO", logger=accelerator_watch.logger.name)
    watch.saw(CALL, None)
    wait_for_messages(caplog, 1)
    runtime.result = PlayedRuntime.SUCCESS
    assert wait_for_messages(caplog, 2)[1].endswith("the process went on after all")
    assert not ended.wait(2 * TIMEOUT_S)


def test_a_group_that_is_shut_down_after_the_explanation_ends_nothing(watch, ended, caplog):
    watch.saw(CALL, None)
    wait_for_messages(caplog, 1)
    watch.forget()
    assert not ended.wait(2 * TIMEOUT_S)
    assert len(caplog.records) == 1


def test_the_end_does_not_depend_on_the_explanation(desk, watch, ended, caplog, monkeypatch):
    def fails(call, cause):
        raise AttributeError("clone")

    monkeypatch.setattr(desk, "explain", fails)
    watch.saw(CALL, None)
    assert "Who is missing could not be found out: clone" in wait_for_messages(caplog, 1)[0]
    assert ended.wait(10.0)


def test_where_nccl_ends_nothing_neither_do_we(watch, ended, caplog, monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    watch.saw(CALL, None)
    wait_for_messages(caplog, 1)
    assert not ended.wait(2 * TIMEOUT_S)


def test_a_work_that_cannot_be_asked_ends_nothing(watch, ended, caplog):
    work = PlayedWork()
    work.is_completed = lambda: 1 / 0
    watch.saw(CALL, work)
    (message,) = wait_for_messages(caplog, 1)
    assert message.endswith("cannot be watched")
    assert not ended.wait(3 * TIMEOUT_S)


def test_where_nothing_can_be_asked_nothing_is_said(desk, ended, caplog, monkeypatch):
    monkeypatch.setattr(accelerator_watch, "_open_runtime", lambda: None)
    watch = desk.accelerator_watch = AcceleratorWatch(desk, torch.device("cuda", 0))
    watch.saw(CALL, None)
    assert not ended.wait(2 * TIMEOUT_S)
    assert not caplog.records


def test_a_work_on_an_accelerator_is_handed_out_as_it_is(desk):
    work = PlayedWork()
    assert collectives.watch(work, CALL, desk, torch.device("cuda", 0)) is work
    assert collectives.watch(work, CALL, desk, torch.device("cpu")) is not work


def test_a_barrier_runs_where_its_options_say(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    group = LocMoeProcessGroup.__new__(LocMoeProcessGroup, 0, 1)
    group._inner_names = {"cpu": "gloo", "cuda": "nccl"}
    options = dist.BarrierOptions()
    assert group._device_without_tensors((options,)) == torch.device("cuda", 1)
    options.device = torch.device("cpu")
    assert group._device_without_tensors((options,)) == torch.device("cpu")
    options.device = torch.device("cuda")
    assert group._device_without_tensors((options,)) == torch.device("cuda", 1)
