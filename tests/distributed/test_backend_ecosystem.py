# SPDX-License-Identifier: Apache-2.0
"""What is built on process groups, built on "locmoe": as the default group, and as the group of one mesh axis only."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hf_locmoe_backend import register
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


pytestmark = pytest.mark.multiprocess

TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "60", "LOCMOE_PLAN": "two_level"}


def _is_ours(group):
    from hf_locmoe.distributed.backend import LocMoeProcessGroup

    return isinstance(group, LocMoeProcessGroup)


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def _batch(rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))


def _reference_gradients(size):
    model = _model()
    for rank in range(size):
        (model(_batch(rank)).square().mean() / size).backward()
    return [parameter.grad for parameter in model.parameters()]


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float32])


def _device_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "device"))
    for axis in ("node", "device"):
        assert _is_ours(mesh.get_group(axis))
        total = torch.ones(1) * dist.get_rank()
        dist.all_reduce(total, group=mesh[axis].get_group())
        assert total.item() == sum(dist.get_process_group_ranks(mesh[axis].get_group()))
    return mesh


def _dtensor(mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    whole = torch.arange(8 * 12, dtype=torch.float32).view(8, 12)
    for before, after in (
        ([Shard(0), Shard(1)], [Replicate(), Replicate()]),
        ([Shard(0), Replicate()], [Shard(1), Replicate()]),
        ([Replicate(), Shard(1)], [Replicate(), Shard(0)]),
        ([Shard(0), Shard(0)], [Shard(1), Shard(1)]),
    ):
        moved = distribute_tensor(whole, mesh, before).redistribute(mesh, after)
        assert torch.equal(moved.full_tensor(), whole)
    partial = DTensor.from_local(whole, mesh, [Partial(), Replicate()], run_check=False)
    assert torch.equal(partial.redistribute(mesh, [Shard(0), Replicate()]).full_tensor(), 2 * whole)


def _fully_shard(mesh, reshard):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = _model()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    model(_batch(dist.get_rank())).square().mean().backward()
    for parameter, expected in zip(model.parameters(), _reference_gradients(dist.get_world_size())):
        assert isinstance(parameter.grad, DTensor)
        _close(parameter.grad.full_tensor(), expected)
    return model


def _data_parallel():
    model = nn.parallel.DistributedDataParallel(_model())
    model(_batch(dist.get_rank())).square().mean().backward()
    for parameter, expected in zip(model.parameters(), _reference_gradients(dist.get_world_size())):
        _close(parameter.grad, expected)


def _checkpoint(model, folder):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    state = get_model_state_dict(model)
    before = {name: tensor.full_tensor().clone() for name, tensor in state.items()}
    dcp.save(state, checkpoint_id=folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)
    for name, tensor in get_model_state_dict(model).items():
        assert torch.equal(tensor.full_tensor(), before[name])


def _compiled():
    import torch.distributed._functional_collectives as funcol

    size, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD

    def exchange(tensor):
        moved = funcol.all_to_all_single_autograd(tensor * 2, [2] * size, [2] * size, group)
        return funcol.all_reduce(moved + 1, "sum", group)

    source = torch.arange(2.0 * size) + 100 * rank
    expected = exchange(source)
    compiled = torch.compile(exchange, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(source), expected)


def _split():
    from hf_locmoe.distributed.backend import group_topology

    world = dist.group.WORLD
    rank = dist.get_rank()
    halves = [[0, 3], [1, 2]]
    mine = next(half for half in halves if rank in half)
    split = world.split_group(mine, group_name=f"half-of-{mine[0]}")
    assert _is_ours(split)
    assert split.group_name == f"half-of-{mine[0]}"
    assert group_topology(split).global_ranks == tuple(mine)
    total = torch.ones(1) * rank
    split.allreduce([total]).wait()
    assert total.item() == sum(mine)
    assert world.split_group([other for other in range(4) if other != rank]) is None
    split.shutdown()


def _as_default_group(folder):
    register()
    dist.init_process_group("locmoe")
    try:
        assert _is_ours(dist.group.WORLD)
        assert dist.get_backend() == "locmoe"
        dist.barrier()
        mesh = _device_mesh()
        _dtensor(mesh)
        model = _fully_shard(_flat_mesh(), reshard=True)
        _fully_shard(mesh, reshard=False)  # HSDP
        _data_parallel()
        _checkpoint(model, os.path.join(folder, "checkpoint"))
        _compiled()
        _split()
        subgroup = dist.new_group([1, 3])
        if dist.get_rank() in (1, 3):
            gathered = [None, None]
            dist.all_gather_object(gathered, dist.get_rank(), group=subgroup)
            assert gathered == [1, 3]
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _flat_mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (4,))


def test_as_the_default_group():
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(_as_default_group, 4, folder, env=TWO_NODES, init=False, timeout_s=120)


def _as_expert_group_only():
    """gloo everywhere else; each half of the ranks makes its own group, without the other half."""
    import torch.distributed._functional_collectives as funcol
    from torch.distributed.device_mesh import DeviceMesh

    from hf_locmoe.distributed.backend import group_topology

    register()
    rank = dist.get_rank()
    mine = [0, 1] if rank < 2 else [2, 3]
    group = dist.new_group(mine, backend="locmoe", use_local_synchronization=True)
    assert _is_ours(group)
    assert not _is_ours(dist.group.WORLD)
    assert group_topology(group).global_ranks == tuple(mine)
    assert group_topology(group).describe_rank(1) == f"rank {mine[1]} (node {rank // 2})"
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",))
    source = torch.arange(4.0).view(2, 2).requires_grad_()
    moved = funcol.all_to_all_single_autograd(source + 10 * rank, [1, 1], [1, 1], mesh)
    moved.sum().backward()
    assert torch.equal(source.grad, torch.ones(2, 2))
    expected = torch.stack([torch.arange(4.0).view(2, 2)[rank % 2] + 10 * other for other in mine])
    assert torch.equal(moved.detach(), expected)
    _fully_shard(_flat_mesh(), reshard=True)
    dist.destroy_process_group(group)
    dist.barrier()


def test_as_the_expert_group_only():
    run_ranks(_as_expert_group_only, 4, env=TWO_NODES, timeout_s=60)


def _train_experts():
    from tests.distributed.expert_parallel_runs import Variant, compare

    for options in ({"slices": 2, "fan_out": "node"}, {"slices": 1, "fan_out": "rank"}):
        variant = Variant({"fsdp_size": 4, "ep_size": 4}, options | {"backend": "locmoe"})
        compare(variant, TOLERANCES[torch.float32])


@pytest.mark.parametrize("plan", ["flat", "two_level", "auto"])
def test_expert_parallel_training_equals_one_process_under_every_plan(plan):
    run_ranks(_train_experts, 4, env=TWO_NODES | {"LOCMOE_PLAN": plan}, timeout_s=120)
