# SPDX-License-Identifier: Apache-2.0
"""The backend over NCCL, as far as one GPU goes: what C++ and streams see. Numbers over several ranks: the gloo tests."""

import pytest
import torch
import torch.distributed as dist

from hf_locmoe_backend import register
from tests.harness import run_ranks


pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]


def _group(**options):
    from hf_locmoe.distributed.backend import LocMoeBackendOptions

    register()
    torch.cuda.set_device(0)
    return dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(**options))


def _collectives():
    import torch.distributed._functional_collectives as funcol

    group = _group()
    ones = torch.ones(4, 2, device="cuda")
    for asynchronous in (False, True):
        for call in (
            lambda **k: dist.all_reduce(ones.clone(), **k),
            lambda **k: dist.broadcast(ones.clone(), 0, **k),
            lambda **k: dist.all_gather_into_tensor(torch.empty_like(ones), ones, **k),
            lambda **k: dist.all_gather([torch.empty_like(ones)], ones, **k),
            lambda **k: dist.reduce_scatter_tensor(torch.empty_like(ones), ones, **k),
            lambda **k: dist.reduce_scatter(torch.empty_like(ones), [ones], **k),
            lambda **k: dist.reduce(ones.clone(), 0, **k),
            lambda **k: dist.all_to_all([torch.empty_like(ones)], [ones], **k),
            lambda **k: dist.all_to_all_single(torch.empty_like(ones), ones, **k),
            lambda **k: dist.all_to_all_single(torch.empty_like(ones), ones, [4], [4], **k),
            lambda **k: dist.barrier(**k),
        ):
            work = call(group=group, async_op=asynchronous)
            if asynchronous:
                work.wait()
    moved = funcol.wait_tensor(funcol.all_to_all_single(ones * 3, [4], [4], group))
    assert torch.equal(moved, ones * 3)
    source = ones.clone().requires_grad_()
    (funcol.all_to_all_single_autograd(source, [4], [4], group) * 5).sum().backward()
    assert torch.equal(source.grad, ones * 5)
    total = torch.ones(3)
    dist.all_reduce(total, group=group)  # tensors on the CPU go to gloo in the same group
    objects = [None]
    dist.all_gather_object(objects, "text", group=group)
    assert objects == ["text"]


def test_every_collective_on_one_gpu():
    run_ranks(_collectives, 1, timeout_s=120)


def _streams():
    group = _group(plan="two_level")
    exchange = group._all_to_all
    exchange._two_level = True  # one rank: the steps run, each with itself
    source = torch.randn(1024, 256, device="cuda")
    # makes the communicators and loads the kernels: loading waits for what runs
    dist.all_to_all_single(torch.empty_like(source), source * 2, group=group)
    torch.cuda._sleep(1)
    torch.zeros_like(source).add_(1).sum()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = torch.empty_like(source)
        torch.cuda._sleep(1_500_000_000)  # most of a second
        sent = source * 2  # not there yet when the exchange is begun
        work = dist.all_to_all_single(output, sent, group=group, async_op=True)
        del sent
        clutter = [torch.zeros_like(source) for _ in range(4)]  # may take the freed memory, but not too early
        assert not work.is_completed(), "the host waited"
        work.wait()
        result = output + 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(result, source * 2 + 1)
    assert work.is_completed()
    assert len(clutter) == 4
    value = dist.all_to_all_single(output, source, [1024], [1024], group=group, async_op=True).get_future().wait()
    assert torch.equal(value[0], source)


def test_steps_on_a_side_stream_without_waiting_on_the_host():
    run_ranks(_streams, 1, timeout_s=120)


def _graph():
    group = _group(plan="flat")
    source = torch.randn(64, 8, device="cuda")
    output = torch.empty_like(source)
    dist.all_to_all_single(output, source, group=group)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_to_all_single(output, source * 2, group=group)
    source.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, torch.full_like(output, 6.0))


def test_the_exchange_captures_in_a_cuda_graph():
    run_ranks(_graph, 1, timeout_s=120)


def _stall():
    import logging
    import os
    import time

    from hf_locmoe.distributed.accelerator_watch import logger

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    # on a GPU that others use, too, the stall may outlast the timeout, and is to be explained then and not to end us
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    group = _group(plan="flat", timeout_s=4.0)
    ones = torch.ones(8, device="cuda")
    for asynchronous in (True, False):
        dist.all_to_all_single(torch.empty_like(ones), ones, group=group, async_op=asynchronous)
    torch.cuda.synchronize()
    time.sleep(1.0)
    assert not messages
    torch.cuda._sleep(8_000_000_000)  # some seconds, as if a rank did not come
    dist.all_to_all_single(torch.empty_like(ones), ones, group=group, async_op=True)
    # the watch asks the device while another stream captures
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = ones + 1
        time.sleep(2.0)
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(held, ones + 1)
    return messages


def test_work_that_does_not_end_is_explained():
    (messages,) = run_ranks(_stall, 1, timeout_s=60)
    assert len(messages) == 1
    assert messages[0].startswith("`all_to_all_single` number 3 failed on rank 0")
