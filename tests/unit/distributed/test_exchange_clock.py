# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the exchange clock on moments given by hand, on one rank."""

import pytest
import torch
import torch.distributed as dist

from hf_locmoe.distributed import exchange_clock
from hf_locmoe.distributed.exchange_clock import ExchangeClock, ExchangeTimes, covered


@pytest.fixture
def clock(monkeypatch):
    """A clock whose moments are the entries of `clock.moments`, in a group of one rank whose others start at `others`."""
    made = ExchangeClock("group", torch.device("cpu"))
    made.moments, made.others, made._origin = [], {}, 0.0
    monkeypatch.setattr(exchange_clock.time, "perf_counter", lambda: made.moments.pop(0))

    def latest(tensor, op, group):
        assert op == dist.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, torch.tensor(made.others[group], dtype=tensor.dtype)))

    monkeypatch.setattr(exchange_clock.dist, "all_reduce", latest)
    return made


def test_covered():
    assert covered([]) == 0
    assert covered([(0, 1), (3, 4)]) == 2
    assert covered([(3, 4), (0, 2), (1, 3.5), (1, 1.5)]) == 4


def test_two_exchanges_in_one_another(clock):
    """
    A from 1 to 6, waited for from 4; B from 2 to 9, waited for from 7: 5 + 3 of 8 seconds under way, 2 + 2 waiting. The last
    rank began A at 5 and B at 2.5.
    """
    clock.moments = [0, 1, 2, 4, 6, 7, 9, 10]
    clock.others = {"group": [5.0, 2.5]}
    clock.begin_step()
    first, second = clock.start("group"), clock.start("group")
    with first.waits():
        pass
    with second.waits():
        pass
    clock.end_step()
    assert clock.read() == ExchangeTimes(num_steps=1, step_s=10, exchange_s=8, wait_s=4, idle_s=1)
    assert clock.read() == ExchangeTimes()


def test_idle_is_no_longer_than_the_wait_and_groups_are_told_apart(clock):
    clock.moments = [0, 1, 2, 3, 4, 5, 6, 7]
    clock.others = {"node": [99.0], "group": [5.5]}
    clock.begin_step()
    for group in ("node", "group"):
        with clock.start(group).waits():
            pass
    clock.end_step()
    # the node's: begun 1, waited for from 2 to 3; the group's: begun 4, waited for from 5 to 6
    assert clock.read() == ExchangeTimes(num_steps=1, step_s=7, exchange_s=4, wait_s=2, idle_s=1.5)


def test_nothing_is_marked_between_steps_and_beyond_the_limit(clock, monkeypatch):
    assert clock.start("group") is None
    monkeypatch.setattr(exchange_clock, "MAX_MARKS", 1)
    clock.moments, clock.others = [0, 1, 2], {"group": [1.0]}
    clock.begin_step()
    assert clock.start("group") is not None
    clock.end_step()
    assert clock.start("group") is None
    clock.begin_step()
    assert clock.start("group") is None
    clock.end_step()
    assert clock.read() == ExchangeTimes(num_steps=1, step_s=2)


def test_an_unfinished_step_is_dropped(clock):
    clock.moments = [0, 1]
    clock.begin_step()
    clock.start("group")
    clock.reset()
    clock.end_step()
    assert clock.read() == ExchangeTimes()
