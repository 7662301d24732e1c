# SPDX-License-Identifier: Apache-2.0
"""How calls on a GPU are watched, without a GPU: works are asked whether they have ended, and never waited for."""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hf_locmoe.distributed import accelerator_watch, collectives
from hf_locmoe.distributed.accelerator_watch import AcceleratorWatch
from hf_locmoe.distributed.backend import LocMoeProcessGroup
from hf_locmoe.distributed.failure import Call, FailureDesk
from hf_locmoe.distributed.topology import NodeTopology


CALL = Call(3, "all_to_all_single", "MoE layer 1")


class PlayedWork:
    """NCCL's: the first wait lets go of the callers' tensors, and a wait with an end gives the group up."""

    def __init__(self):
        self.waits = []
        self.has_ended = False
        self.asked = threading.Event()

    def wait(self, timeout: timedelta | None = None):
        self.waits.append(timeout)
        return True

    def is_completed(self):
        self.asked.set()
        return self.has_ended


@pytest.fixture
def desk(monkeypatch):
    monkeypatch.setattr(accelerator_watch, "_may_ask_during_capture", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return FailureDesk(dist.HashStore(), 0, NodeTopology.from_ranks_per_node(2, num_ranks=4), 0.4)


def test_a_work_is_asked_and_not_waited_for(desk, caplog):
    watch, work = AcceleratorWatch(desk, torch.device("cuda", 0)), PlayedWork()
    watch.saw(CALL, work)
    assert work.asked.wait(5.0)
    work.has_ended = True
    work.asked.clear()
    assert work.asked.wait(5.0)
    assert work.waits == []
    assert not caplog.records


def test_a_work_that_does_not_end_names_the_missing_ranks(desk, caplog):
    watch, work = AcceleratorWatch(desk, torch.device("cuda", 0)), PlayedWork()
    watch.saw(CALL, work)
    for _ in range(100):
        if caplog.records:
            break
        threading.Event().wait(0.05)
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith("`all_to_all_single` number 3 in MoE layer 1 failed on rank 0 (node 0): lost or stalled:")
    assert "rank 1 (node 0), rank 2 (node 1), rank 3 (node 1)" in text
    assert work.waits == []


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
