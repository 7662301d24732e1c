# SPDX-License-Identifier: Apache-2.0
"""The backend over NCCL on several GPUs: every collective against NCCL's own, streams, tensors kept, a lost rank."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_locmoe_backend import register
from tests.distributed.expert_parallel_runs import Variant, batches, full_model, sharded_model
from tests.distributed.test_backend_conformance import TWO_NODES, compare
from tests.harness import RankError, run_ranks


pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]

# Not bound to a device, beside "nccl", which the harness binds: torch makes and splits groups in other ways then.
UNBOUND = "cpu:gloo,cuda:nccl"
ON_GPUS = dict(device="cuda", timeout_s=120)


def _group(ranks=None, **options):
    from hf_locmoe.distributed.backend import LocMoeBackendOptions

    register()
    return dist.new_group(ranks, backend="locmoe", pg_options=LocMoeBackendOptions(**options))


# ---- every collective -----------------------------------------------------------------------------------------------


@pytest.mark.multigpu(2)
@pytest.mark.parametrize("backend", ["nccl", UNBOUND])
def test_two_gpus_give_what_nccl_gives(backend):
    env = TWO_NODES | {"LOCMOE_RANKS_PER_NODE": "1"}
    results = run_ranks(compare, 2, ("flat", "auto"), "nccl", "cuda", env=env, backend=backend, **ON_GPUS)
    assert min(results) > 150


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("backend", ["nccl", UNBOUND])
def test_four_gpus_give_what_nccl_gives_under_every_plan(backend):
    plans = ("flat", "two_level", "auto")
    results = run_ranks(compare, 4, plans, "nccl", "cuda", env=TWO_NODES, backend=backend, **ON_GPUS)
    assert min(results) > 200


@pytest.mark.multigpu(4)
def test_gpus_scattered_over_nodes():
    env = {"LOCMOE_TIMEOUT_S": "60", "GROUP_RANK": ["0", "1", "0", "1"], "LOCAL_WORLD_SIZE": "2"}
    run_ranks(compare, 4, ("two_level",), "nccl", "cuda", env=env, **ON_GPUS)


# ---- streams --------------------------------------------------------------------------------------------------------


def _rows(size, scale):
    return [[(source + 2 * target) % 3 * scale for target in range(size)] for source in range(size)]


def _expected(rows, rank, width):
    """What comes from each rank: its number, row by row."""
    received = [row[rank] for row in rows]
    values = torch.repeat_interleave(torch.arange(len(rows), device="cuda"), torch.tensor(received, device="cuda"))
    return (values + 1.0).unsqueeze(1).expand(-1, width)


def _streams(plan):
    """
    An exchange of what the GPU has not computed yet: the host goes on at once, and what the caller drops is not taken by
    others too early, however long the caller takes to wait.
    """
    group = _group(plan=plan)
    rank, size, width = dist.get_rank(), dist.get_world_size(), 512
    rows = _rows(size, 4096)
    sends, receives = rows[rank], [row[rank] for row in rows]
    source = torch.full((sum(sends), width), rank / 2 + 0.5, device="cuda")

    def exchange():
        output = torch.zeros(sum(receives), width, device="cuda")
        sent = source * 2
        return output, dist.all_to_all_single(output, sent, receives, sends, group=group, async_op=True)

    for _ in range(2):  # makes the communicators and loads the kernels, which waits for the device
        output, work = exchange()
        work.wait()
        torch.cuda._sleep(1)
        [torch.full_like(source, -1.0) for _ in range(4)]
    expected = _expected(rows, rank, width)
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(4_000_000_000)  # some two seconds, more where others use the GPU, too
                output, work = exchange()
                assert not work.is_completed(), "the host waited"
                time.sleep(1.5)  # the watch looks at the work meanwhile
                # may take the freed memory of what was sent, but not before it left
                clutter = [torch.full_like(source, -1.0) for _ in range(4)]
                work.wait()
                result = output + 0
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        assert torch.equal(result, expected), f"plan {plan}, on {stream}"
        assert work.is_completed()
        assert len(clutter) == 4
    return True


def _both_plans():
    return [_streams(plan) for plan in ("flat", "two_level")]


@pytest.mark.multigpu(4)
def test_an_exchange_waits_on_its_stream_and_keeps_what_it_sends():
    assert run_ranks(_both_plans, 4, env=TWO_NODES, **ON_GPUS) == [[True, True]] * 4


def _come_late():
    """A rank that comes later than the group's glance, and well within its timeout, costs the others nothing but time."""
    group = _group(plan="flat")
    ones = torch.ones(dist.get_world_size(), device="cuda")
    dist.all_to_all_single(torch.empty_like(ones), ones, group=group)
    for _ in range(2):
        if dist.get_rank() == 1:
            time.sleep(2.5)
        dist.barrier(group=group, device_ids=[torch.cuda.current_device()])
        dist.all_to_all_single(torch.empty_like(ones), ones, group=group)
    dist.barrier(group=group)
    torch.cuda.synchronize()
    return True


@pytest.mark.multigpu(2)
def test_a_late_rank_is_waited_for_in_a_barrier_on_the_gpu():
    assert run_ranks(_come_late, 2, env={"LOCMOE_TIMEOUT_S": "30"}, **ON_GPUS) == [True, True]


# ---- domains --------------------------------------------------------------------------------------------------------


def _domains():
    """Tensor-parallel domains {0, 1} and {2, 3}; expert groups {0, 2} and {1, 3}; plan -> bytes between nodes."""
    from hf_locmoe.distributed.backend import group_counters, use_tp_domain

    rank = dist.get_rank()
    domain = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    tokens, rows = rank // 2, [[5, 3], [1, 4]]  # from -> to
    between = {}
    for plan in ("tp_domain", "auto", "flat"):
        group = [_group([0, 2], plan=plan), _group([1, 3], plan=plan)][rank % 2]
        use_tp_domain(group, domain)
        for dtype in (torch.float32, torch.bfloat16, torch.int16):
            numbers = torch.arange(sum(rows[tokens]), device="cuda") + 100 * tokens
            source = numbers.to(dtype).unsqueeze(1).expand(-1, 3).contiguous()
            receives = [row[tokens] for row in rows]
            output = torch.zeros(sum(receives), 3, dtype=dtype, device="cuda")
            dist.all_to_all_single(output, source, receives, rows[tokens], group=group)
            expected = [(0, 5), (100, 101)] if tokens == 0 else [(5, 8), (101, 105)]
            expected = torch.cat([torch.arange(*bounds, device="cuda") for bounds in expected])
            assert torch.equal(output[:, 1], expected.to(dtype)), f"plan {plan}, {dtype}"
        before = group_counters(group)["all_to_all_single"].bytes_inter_node
        even = torch.zeros(6, device="cuda")
        dist.all_to_all_single(even, torch.arange(6.0, device="cuda") + 100 * tokens, group=group)
        expected = torch.cat([torch.arange(3.0), torch.arange(100.0, 103.0)]) + 3 * tokens
        assert torch.equal(even.cpu(), expected), f"plan {plan}"
        between[plan] = group_counters(group)["all_to_all_single"].bytes_inter_node - before
    return between


@pytest.mark.multigpu(4)
def test_gpus_with_the_same_tokens_send_their_share():
    results = run_ranks(_domains, 4, env=TWO_NODES, backend=UNBOUND, **ON_GPUS)
    assert sum(rank["flat"] for rank in results) == 4 * 3 * 4
    assert sum(rank["tp_domain"] for rank in results) == 4 * 3 * 4 / 2


# ---- a lost rank ----------------------------------------------------------------------------------------------------

STEP_OF_DEATH = 2


def _train_and_lose_rank_3(folder):
    """Expert parallelism over the backend; rank 3 dies before its third step. What the others log is in `folder`."""
    rank = dist.get_rank()
    logging.getLogger("hf_locmoe").addHandler(logging.FileHandler(folder / f"rank{rank}.log"))
    variant = Variant(dict(fsdp_size=4, ep_size=4), dict(slices=2, backend="locmoe"), device="cuda")
    model = sharded_model(variant, full_model(variant)).train()
    for step in range(STEP_OF_DEATH + 2):
        if step == STEP_OF_DEATH:
            torch.cuda.synchronize()
            dist.barrier()
            if rank == 3:
                (folder / "lost").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
        input_ids = batches(variant, 4, step)[rank]
        model(input_ids=input_ids, labels=input_ids).loss.backward()
        model.zero_grad()
    torch.cuda.synchronize()


@pytest.mark.multigpu(4)
def test_a_lost_rank_is_named_and_ends_the_run(tmp_path):
    timeout_s = 10
    env = TWO_NODES | {"LOCMOE_TIMEOUT_S": str(timeout_s)}
    with pytest.raises(RankError) as error:
        run_ranks(_train_and_lose_rank_3, 4, tmp_path, env=env, may_die=[3], device="cuda", timeout_s=80)
    ended = time.time()
    lost = float(Path(tmp_path, "lost").read_text())
    logs = [Path(tmp_path, f"rank{rank}.log") for rank in range(3)]
    print(f"named after {[round(log.stat().st_mtime - lost, 1) for log in logs]} s, ended after {ended - lost:.1f} s")
    for rank, log in enumerate(logs):
        text = log.read_text()
        assert f"failed on rank {rank} (node {rank // 2}): lost or stalled: rank 3 (node 1)." in text, str(error.value)
        assert "in MoE layer " in text
        assert log.stat().st_mtime - lost < timeout_s
    assert error.value.kind != "timeout", "the processes went on"
    # the step that is cut short had begun some seconds after the death
    assert ended - lost < 1.5 * timeout_s
