# SPDX-License-Identifier: Apache-2.0
"""The backend's surface against the installed torch, its settings, and large layouts on torch's fake backend."""

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_locmoe.distributed.backend import (
    LocMoeBackendOptions,
    LocMoeProcessGroup,
    _read_plan,
    _read_timeout,
    group_counters,
    group_topology,
    label_calls,
    use_tp_domain,
)
from hf_locmoe.distributed.counters import Traffic
from hf_locmoe.distributed.inner_backend import InnerBackends
from hf_locmoe_backend import register


def methods_that_return_work():
    """By the signatures that pybind11 writes into the docstrings."""
    for name in dir(dist.ProcessGroup):
        signature = getattr(getattr(dist.ProcessGroup, name), "__doc__", None) or ""
        if "-> torch._C._distributed_c10d.Work" in signature or "-> c10d::Work" in signature:
            yield name


def test_every_collective_of_this_torch_is_overridden():
    """One left to the base class runs with the interpreter's lock held, and deadlocks against gloo's threads."""
    names = set(methods_that_return_work())
    assert {"allreduce", "alltoall", "barrier", "send", "recv"} <= names, "the signatures changed: read them anew"
    # native coalescing belongs to the backend that is registered on the group
    left_out = {name for name in names if name not in vars(LocMoeProcessGroup)} - {"_end_coalescing"}
    assert not left_out


def test_what_creates_groups_is_overridden():
    assert {"split_group", "merge_remote_group", "splitGroup", "mergeRemoteGroup"} <= vars(LocMoeProcessGroup).keys()


def test_importing_torch_alone_stays_light():
    """The entry point's module imports neither the package nor transformers."""
    code = (
        "import sys, hf_locmoe_backend; hf_locmoe_backend.register(); hf_locmoe_backend.register(); import torch;"
        "assert 'locmoe' in torch.distributed.Backend.backend_list;"
        "assert torch.distributed.Backend.default_device_backend_map['cpu'] == 'gloo';"
        "assert not {'hf_locmoe', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_settings(monkeypatch):
    monkeypatch.delenv("LOCMOE_PLAN", raising=False)
    monkeypatch.delenv("LOCMOE_TIMEOUT_S", raising=False)
    default = dist.default_pg_timeout
    assert _read_plan(LocMoeBackendOptions()) == "auto"
    assert _read_timeout(LocMoeBackendOptions(), default) == 600
    assert _read_timeout(LocMoeBackendOptions(), timedelta(seconds=7)) == 7
    monkeypatch.setenv("LOCMOE_PLAN", "flat")
    monkeypatch.setenv("LOCMOE_TIMEOUT_S", "12.5")
    assert _read_plan(LocMoeBackendOptions()) == "flat"
    assert _read_plan(LocMoeBackendOptions(plan="two_level")) == "two_level"
    assert _read_timeout(LocMoeBackendOptions(), timedelta(seconds=7)) == 12.5
    assert _read_timeout(LocMoeBackendOptions(timeout_s=3), default) == 3
    monkeypatch.setenv("LOCMOE_PLAN", "fast")
    with pytest.raises(ValueError, match=r"`plan` \(fast\) must be one of auto, flat, two_level, tp_domain"):
        _read_plan(LocMoeBackendOptions())
    monkeypatch.setenv("LOCMOE_TIMEOUT_S", "soon")
    with pytest.raises(ValueError, match=r"`LOCMOE_TIMEOUT_S` \(soon\) must be a positive number of seconds"):
        _read_timeout(LocMoeBackendOptions(), default)


@pytest.fixture
def world_of_256(monkeypatch):
    monkeypatch.setenv("LOCMOE_RANKS_PER_NODE", "8")
    register()
    dist.init_process_group("fake", rank=21, world_size=256, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_256_ranks_in_one_process(world_of_256):
    source = torch.zeros(512, 4)
    sent = {}
    for plan in ("flat", "two_level"):
        group = dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(plan=plan, inner="fake"))
        topology = group_topology(group)
        assert (topology.num_nodes, topology.node_sizes[0]) == (32, 8)
        assert topology.describe_rank(21) == "rank 21 (node 2)"
        dist.all_to_all_single(torch.empty_like(source), source, group=group)
        dist.all_reduce(torch.zeros(256), group=group)
        sent[plan] = group_counters(group)
    chunk = 2 * 4 * 4
    assert sent["flat"]["all_to_all_single"] == Traffic(1, 7, 248, 7 * chunk, 248 * chunk)
    # two levels: 31 messages of 8 chunks between nodes, 7 of 32 chunks inside
    assert sent["two_level"]["all_to_all_single"] == Traffic(1, 7, 31, 7 * 32 * chunk, 31 * 8 * chunk)
    assert sent["flat"]["all_reduce"] == Traffic(1, 2 * 255, 0, 2 * 255 * 256 * 4 // 256, 0)


def test_uneven_splits_and_expert_groups_are_counted(world_of_256):
    ranks = list(range(5, 256, 16))  # 16 ranks, one of every second node
    assert 21 in ranks
    group = dist.new_group(ranks, backend="locmoe", pg_options=LocMoeBackendOptions(inner="fake"))
    assert group_topology(group).num_nodes == 16
    counts = [3] * 16
    counts[0] = 0
    dist.all_to_all_single(torch.empty(45, 2), torch.zeros(45, 2), counts, counts, group=group)
    assert group_counters(group)["all_to_all_single"] == Traffic(1, 0, 14, 0, 14 * 3 * 2 * 4)


def test_functions_for_our_groups_refuse_others(world_of_256):
    for function in (group_counters, group_topology):
        with pytest.raises(
            ValueError, match=rf"`{function.__name__}` needs a group of backend `locmoe` and got one of `fake`"
        ):
            function(dist.group.WORLD)
    with pytest.raises(ValueError, match="`use_tp_domain` needs"):
        use_tp_domain(dist.group.WORLD, dist.group.WORLD)
    label_calls(dist.group.WORLD, "nothing happens")


def test_a_plan_that_needs_a_domain_says_so(world_of_256):
    group = dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(plan="tp_domain", inner="fake"))
    with pytest.raises(ValueError, match=r"call `use_tp_domain\(group, tp_group\)` on every rank first"):
        dist.all_to_all_single(torch.zeros(256), torch.zeros(256), group=group)


def test_an_unknown_inner_backend_is_named():
    with pytest.raises(RuntimeError, match="The inner backend `carrier_pigeon` is not known"):
        InnerBackends(dist.HashStore(), 0, 1, timedelta(seconds=5), {"cpu": "carrier_pigeon"}, [0], "group")
