# SPDX-License-Identifier: Apache-2.0
"""A lost, stalled or late rank, a fork, ranks that disagree: an error on every surviving rank that says who and where."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from hf_locmoe_backend import register
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "5"}
LABEL = "model.layers.3.mlp"


def _group(plan="flat", **options):
    from hf_locmoe.distributed.backend import LocMoeBackendOptions, label_calls

    register()
    group = dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(plan=plan, **options))
    label_calls(group, LABEL)
    return group


def _message(call):
    from hf_locmoe.distributed.failure import CollectiveError

    try:
        call()
    except CollectiveError as error:
        return str(error)
    raise AssertionError("the collective did not fail")


def _call(collective, group):
    import torch.distributed._functional_collectives as funcol

    size = dist.get_world_size()
    source = torch.ones(size, 2)
    if collective == "all_to_all_single":
        dist.all_to_all_single(torch.zeros(size, 2), source, group=group)
    elif collective == "asynchronous":
        dist.all_to_all_single(torch.zeros(size, 2), source, group=group, async_op=True).wait()
    elif collective == "functional":
        funcol.wait_tensor(funcol.all_to_all_single(source, [1] * size, [1] * size, group))
    elif collective == "all_reduce":
        dist.all_reduce(source, group=group)
    else:
        dist.barrier(group=group)


def _lose_rank_3(plan, collective):
    group = _group(plan)
    _call(collective, group)
    if dist.get_rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return _message(lambda: _call(collective, group))


@pytest.mark.parametrize(
    "plan, collective",
    [
        ("flat", "all_to_all_single"),
        ("two_level", "all_to_all_single"),
        ("two_level", "functional"),
        ("flat", "asynchronous"),
        ("flat", "all_reduce"),
        ("flat", "barrier"),
    ],
)
def test_a_lost_rank_is_named_on_every_survivor(plan, collective):
    *messages, lost = run_ranks(_lose_rank_3, 4, plan, collective, env=TWO_NODES, may_die=[3], timeout_s=30)
    assert lost is None
    name = "all_to_all_single" if collective in ("asynchronous", "functional") else collective
    for rank, message in enumerate(messages):
        assert f"`{name}` number 2 in {LABEL} failed on rank {rank} (node {rank // 2})" in message
        assert "lost or stalled: rank 3 (node 1)." in message


def _stall_rank_2(release_after_s):
    group = _group()
    dist.barrier(group=group)
    if dist.get_rank() == 2:
        time.sleep(release_after_s)
    return _message(lambda: _call("all_to_all_single", group))


def test_a_stalled_rank_is_named_and_told_that_it_came_too_late():
    messages = run_ranks(_stall_rank_2, 4, 7.0, env=TWO_NODES, timeout_s=40)
    for rank in (0, 1, 3):
        assert "lost or stalled: rank 2 (node 1)." in messages[rank]
        assert "`LOCMOE_TIMEOUT_S` (5)" in messages[rank]
    assert "failed on rank 2 (node 1)" in messages[2]


def _lose_a_rank_in_a_model():
    """With the plugin's defaults but for the timeout: the exchange of an MoE layer is the first to meet the loss."""
    from transformers import AutoModelForCausalLM

    from hf_locmoe.training.accelerate_plugin import LocMoePlugin
    from tests.tiny_models import random_ids, tiny_config

    LocMoePlugin(layout="spread", timeout_s=5).activate()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config())
    ids = random_ids()
    model(ids, labels=ids).loss.backward()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _message(lambda: model(ids, labels=ids))


def test_a_rank_that_is_lost_in_a_forward_is_named_with_the_layer():
    message, _ = run_ranks(_lose_a_rank_in_a_model, 2, env={"LOCMOE_RANKS_PER_NODE": "1"}, may_die=[1], timeout_s=60)
    assert re.search(r"in MoE layer \d+ failed on rank 0 \(node 0\): lost or stalled: rank 1 \(node 1\)\.", message), (
        message
    )


def _lose_a_node():
    group = _group("two_level")
    dist.barrier(group=group)
    if dist.get_rank() >= 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return _message(lambda: _call("all_to_all_single", group))


def test_a_lost_node_is_named_as_such():
    messages = run_ranks(_lose_a_node, 4, env=TWO_NODES, may_die=[2, 3], timeout_s=30)
    for message in messages[:2]:
        assert "lost or stalled: rank 2 (node 1), rank 3 (node 1). All ranks of node 1 are among them" in message


def _wait_briefly():
    group = _group("two_level")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 1:
        time.sleep(1.0)
    output = torch.zeros(size)
    work = dist.all_to_all_single(output, torch.arange(size) + 10.0 * rank, group=group, async_op=True)
    timed_out = 0
    if rank != 1:
        try:
            work.wait(timedelta(milliseconds=50))
        except RuntimeError:
            timed_out = 1
    # the caller's own patience is no failure of the group
    work.wait()
    dist.barrier(group=group)
    return timed_out, output


def test_a_wait_with_a_timeout_of_its_own_can_be_repeated():
    for rank, (timed_out, output) in enumerate(run_ranks(_wait_briefly, 4, env=TWO_NODES, timeout_s=30)):
        assert timed_out == (rank != 1)
        assert output.tolist() == [rank + 10.0 * other for other in range(4)]


def _fail_a_future():
    group = _group("two_level")
    dist.barrier(group=group)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    size = dist.get_world_size()
    work = dist.all_to_all_single(torch.zeros(size), torch.zeros(size), group=group, async_op=True)
    future = work.get_future()
    try:
        future.wait()
    except Exception as error:
        caught = type(error).__name__
    else:
        caught = None
    assert not work.is_success()
    return caught, _message(work.wait)


def test_the_future_of_a_failed_exchange_raises():
    outcome = run_ranks(_fail_a_future, 4, env=TWO_NODES, may_die=[1], timeout_s=30)
    # the ranks of the lost one's node fail at once; those across learn it from their wait
    caught, message = outcome[0]
    assert caught is not None
    assert "rank 1 (node 0)" in message


def _end_with_an_exchange_under_way():
    """In a process of its own, so that it ends as scripts do: without destroying its groups."""
    if dist.get_rank() == 0:
        dist.barrier()
        return None
    code = (
        "import os, torch, torch.distributed as dist; import hf_locmoe.distributed;"
        "from hf_locmoe.distributed.backend import LocMoeBackendOptions;"
        "store = dist.TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False);"
        "dist.init_process_group('locmoe', store=dist.PrefixStore('own', store), rank=int(os.environ['RANK']) - 1,"
        " world_size=4, pg_options=LocMoeBackendOptions(plan='two_level', timeout_s=60.0));"
        "dist.barrier();"
        "works = [] if dist.get_rank() == 3 else"
        " [dist.all_to_all_single(torch.zeros(4), torch.zeros(4), async_op=True)];"
        "dist.get_rank() == 3 and __import__('time').sleep(4);"
        "raise SystemExit(7)"
    )
    started = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", code], timeout=50, capture_output=True, text=True)
    dist.barrier()
    return ended.returncode, time.monotonic() - started, ended.stderr[-2000:]


@pytest.mark.slow
def test_a_process_ends_with_an_exchange_under_way():
    """A rank that raises must go, although its exchange still waits for the others: its end is what they notice."""
    _, *ends = run_ranks(_end_with_an_exchange_under_way, 5, env=TWO_NODES, timeout_s=100)
    assert [code for code, *_ in ends] == [7] * 4, ends


def _use_a_fork():
    group = _group()
    dist.barrier(group=group)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            dist.barrier(group=group)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    text = os.read(reader, 4096).decode()
    dist.barrier(group=group)
    return text


def test_a_fork_may_not_use_the_group():
    for text in run_ranks(_use_a_fork, 2, env=TWO_NODES, timeout_s=30):
        assert "is used in its fork" in text
        assert "make process groups after the fork" in text


def _disagree():
    try:
        _group(plan="flat" if dist.get_rank() == 0 else "two_level")
    except ValueError as error:
        return str(error)
    raise AssertionError("the group was made")


def test_ranks_that_disagree_on_the_plan_all_raise():
    for message in run_ranks(_disagree, 3, env=TWO_NODES, timeout_s=30):
        assert "`plan` (flat on rank 0, two_level on rank 1) must be the same on all ranks" in message


def _stay_away():
    register()
    if dist.get_rank() == 1:
        return None
    try:
        dist.new_group([0, 1], backend="locmoe", use_local_synchronization=True)
    except RuntimeError as error:
        return str(error)
    raise AssertionError("the group was made")


def test_a_rank_that_does_not_make_the_group_is_named():
    message, _ = run_ranks(_stay_away, 2, env=TWO_NODES | {"LOCMOE_TIMEOUT_S": "2"}, timeout_s=30)
    assert "ranks [1] did not arrive within 2 s" in message


def _wrong_splits():
    group = _group("two_level")
    with pytest.raises(
        ValueError, match=r"`input_split_sizes` \(\[1, 1\]\) must be 4 numbers that add up to the rows"
    ):
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4), [1] * 4, [1, 1], group=group)
    with pytest.raises(ValueError, match=r"`input` \(6 rows\) must divide evenly"):
        dist.all_to_all_single(torch.zeros(4), torch.zeros(6), group=group)
    with pytest.raises(ValueError, match="`input` must be contiguous"):
        dist.all_to_all_single(torch.zeros(4, 2), torch.zeros(2, 4).t(), group=group)
    dist.barrier(group=group)


def test_wrong_arguments_are_refused_before_anything_is_sent():
    run_ranks(_wrong_splits, 4, env=TWO_NODES, timeout_s=30)
