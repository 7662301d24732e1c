# SPDX-License-Identifier: Apache-2.0
"""The words of every kind of failure, from the bookkeeping alone: ranks are threads, the store is in memory."""

import threading

import pytest
import torch.distributed as dist

from hf_locmoe.distributed.failure import Call, CollectiveError, FailureDesk
from hf_locmoe.distributed.topology import NodeTopology


def desks(num_ranks, timeout_s=1.0):
    store = dist.HashStore()
    topology = NodeTopology.from_ranks_per_node(2, num_ranks=num_ranks)
    return [FailureDesk(store, rank, topology, timeout_s) for rank in range(num_ranks)]


def explain(calls):
    """`calls`: (desk, call) of every rank in trouble, all at once -> their messages."""
    messages = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank, desk=desk, call=call: messages.update({rank: str(desk.explain(call, "boom"))})
        )
        for rank, (desk, call) in enumerate(calls)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [messages[rank] for rank in range(len(calls))]


def test_the_error_can_be_caught_as_torchs_and_as_a_runtime_error():
    assert issubclass(CollectiveError, dist.DistBackendError)
    assert issubclass(CollectiveError, RuntimeError)


def test_missing_ranks_and_whole_nodes():
    group = desks(6)
    group[0].label = "model.layers.2.mlp"
    (message,) = explain([(group[0], group[0].open_call("all_to_all_single"))])
    assert message.startswith("`all_to_all_single` number 1 in model.layers.2.mlp failed on rank 0 (node 0): ")
    assert "rank 1 (node 0), rank 2 (node 1), rank 3 (node 1), rank 4 (node 2), rank 5 (node 2)." in message
    assert "All ranks of node 1, 2 are among them" in message
    assert "`LOCMOE_TIMEOUT_S` (1)" in message
    assert message.endswith("What this rank saw: boom")


def test_many_missing_ranks_are_counted():
    group = desks(20)
    (message,) = explain([(group[0], group[0].open_call("barrier"))])
    assert "rank 8 (node 4) and 11 more" in message


def test_another_collective_in_its_place():
    group = desks(2)
    messages = explain([(group[0], group[0].open_call("barrier")), (group[1], group[1].open_call("all_reduce"))])
    assert "rank 1 (node 0) called `all_reduce` number 1 in its place" in messages[0]
    assert "rank 0 (node 0) called `barrier` number 1 in its place" in messages[1]


def test_a_rank_that_is_behind_and_the_one_that_came_too_late():
    group = desks(2)
    for _ in range(3):
        late = group[0].open_call("all_reduce")
    early = group[1].open_call("all_reduce")
    messages = explain([(group[0], late), (group[1], early)])
    assert "rank 1 (node 0) had not reached it, the last call there being number 1" in messages[0]
    assert "this rank came too late: rank 0 (node 0) had given up on it" in messages[1]


def test_all_there_and_yet_an_error():
    group = desks(2)
    for message in explain([(desk, desk.open_call("all_reduce")) for desk in group]):
        assert "all ranks had reached it and none is lost, so the connection between them is at fault" in message


def test_one_alarm_ends_the_wait_of_all():
    group = desks(4)
    assert not group[2].alarm_raised()
    explain([(group[0], group[0].open_call("barrier"))])
    assert group[2].alarm_raised()


def test_the_first_explanation_stands_and_every_raise_is_an_error_of_its_own():
    group = desks(2)
    call = group[0].open_call("barrier")
    first = group[0].explain(call, "boom")
    second = group[0].explain(group[0].open_call("all_reduce"), "bang")
    assert str(first) == str(second)
    assert first is not second


def test_point_to_point_calls_say_what_they_saw_and_raise_no_alarm():
    group = desks(2)
    error = group[0].explain(Call(0, "recv from rank 1 (node 0)"), "connection closed by peer")
    assert str(error) == "`recv from rank 1 (node 0)` failed on rank 0 (node 0): connection closed by peer."
    assert not group[1].alarm_raised()


def test_a_store_that_is_gone():
    class GoneStore:
        def set(self, key, value):
            raise RuntimeError("Broken pipe\nstack")

        check = set

        def clone(self):
            return self

    desk = FailureDesk(GoneStore(), 1, NodeTopology.from_ranks_per_node(2, num_ranks=2), 1.0)
    message = str(desk.explain(desk.open_call("barrier"), "boom"))
    assert "The store does not answer either (Broken pipe)" in message


def test_a_store_beyond_a_cut_link_never_answers():
    link_is_back = threading.Event()

    class MuteStore:
        def set(self, key, value):
            assert link_is_back.wait(30)
            return False

        def check(self, keys):
            return self.set(keys, "")

        def clone(self):
            return self

    desk = FailureDesk(MuteStore(), 1, NodeTopology.from_ranks_per_node(2, num_ranks=2), 1.0)
    assert not desk.alarm_raised()
    assert not desk.alarm_raised(), "while the first question hangs"
    message = str(desk.explain(desk.open_call("barrier"), "boom"))
    assert "The store does not answer either (no answer in" in message
    link_is_back.set()


@pytest.mark.parametrize("timeout_s", [1.0, 10.0, 600.0])
def test_waiting_and_asking_fit_into_the_timeout(timeout_s):
    (desk,) = desks(1, timeout_s)
    assert desk.patience_s + desk.grace_s == pytest.approx(timeout_s)
    assert desk.glance_s < desk.grace_s < desk.patience_s
