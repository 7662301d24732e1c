# SPDX-License-Identifier: Apache-2.0
"""
Every collective of the inner backend through "locmoe", against the same call on it, under every plan: gloo here, NCCL in
`test_nccl_backend.py`. Tensors are on torch's default device, which is the inner backend's.
"""

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "60"}
DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
)


def _make_group(backend, plan=None):
    if backend != "locmoe":
        return dist.new_group(backend=backend)
    from hf_locmoe.distributed.backend import LocMoeBackendOptions
    from hf_locmoe_backend import register

    register()
    return dist.new_group(backend="locmoe", pg_options=LocMoeBackendOptions(plan=plan))


def _data(*shape, rank=None, dtype=torch.float32):
    """Other numbers on every rank, small enough for any type."""
    rank = dist.get_rank() if rank is None else rank
    numbers = torch.arange(torch.Size(shape).numel(), device="cpu").view(shape) * 3 + rank * 7
    return (numbers % 11).to(dtype).to(torch.get_default_device())


def _has_ended(work):
    """After it was waited for; a GPU's host did not wait."""
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()
    return work.is_completed()


# ---- one function per collective: group -> tensors to compare ------------------------------------------------------


def _all_reduce(group):
    out = []
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN, dist.ReduceOp.PRODUCT):
        tensor = _data(5)
        dist.all_reduce(tensor, op=op, group=group)
        out.append(tensor)
    tensor = _data(4)
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work.wait()
    assert _has_ended(work)
    return [*out, tensor]


def _broadcast(group):
    tensors = [_data(3), _data(2, 2)]
    dist.broadcast(tensors[0], src=1, group=group)
    work = dist.broadcast(tensors[1], src=0, group=group, async_op=True)
    work.wait()
    return tensors


def _reduce(group):
    tensor = _data(4)
    dist.reduce(tensor, dst=1, group=group)
    return [tensor if dist.get_rank() == 1 else torch.zeros(1)]


def _all_gather(group):
    out = [torch.zeros(3) for _ in range(dist.get_world_size())]
    dist.all_gather(out, _data(3), group=group)
    single = torch.zeros(3 * dist.get_world_size())
    dist.all_gather_into_tensor(single, _data(3), group=group)
    return [*out, single]


def _reduce_scatter(group):
    size = dist.get_world_size()
    out = torch.zeros(2)
    dist.reduce_scatter(out, [_data(2) + other for other in range(size)], group=group)
    single = torch.zeros(2)
    dist.reduce_scatter_tensor(single, _data(2 * size), group=group)
    return [out, single]


def _gather_and_scatter(group):
    size, rank = dist.get_world_size(), dist.get_rank()
    gathered = [torch.zeros(3) for _ in range(size)] if rank == 1 else None
    dist.gather(_data(3), gathered, dst=1, group=group)
    scattered = torch.zeros(3)
    dist.scatter(scattered, [_data(3) + other for other in range(size)] if rank == 0 else None, src=0, group=group)
    return [*(gathered or []), scattered]


def _coalesced(group):
    tensors = [_data(3), _data(2, 2)]
    with dist._coalescing_manager(group=group):
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
    return tensors


def _send_and_receive(group):
    size, rank = dist.get_world_size(), dist.get_rank()
    out = torch.zeros(4)
    right, left = (rank + 1) % size, (rank - 1) % size
    # NCCL connects two ranks in their first call, and waits for the other there: not all may send first.
    if rank % 2 == 0:
        sent = dist.isend(_data(4), right, group=group)
        dist.recv(out, left, group=group)
        sent.wait()
    else:
        received = dist.irecv(out, left, group=group)
        received.wait()
        dist.send(_data(4), right, group=group)
    batched = torch.zeros(4)
    operations = [dist.P2POp(dist.isend, _data(4), right, group), dist.P2POp(dist.irecv, batched, left, group)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [out, batched]


def _barrier(group):
    dist.barrier(group=group)
    dist.barrier(group=group, async_op=True).wait()
    return []


def _objects(group):
    size, rank = dist.get_world_size(), dist.get_rank()
    gathered = [None] * size
    dist.all_gather_object(gathered, {"rank": rank}, group=group)
    shared = [f"from {rank}", rank]
    dist.broadcast_object_list(shared, src=1, group=group)
    scattered = [None]
    dist.scatter_object_list(scattered, list(range(size)) if rank == 0 else None, src=0, group=group)
    return [torch.tensor([entry["rank"] for entry in gathered]), torch.tensor([shared[1], scattered[0]])]


def _all_to_all_even(group):
    size = dist.get_world_size()
    results = []
    for dtype in DTYPES:
        for shape in ((size * 3,), (size, 2, 3), (0, 4)):
            output = torch.zeros(shape, dtype=dtype)
            if isinstance(group, tuple):
                output.copy_(_reference_all_to_all(_data(*shape).to(dtype), None))
            else:
                dist.all_to_all_single(output, _data(*shape, dtype=dtype), group=group)
            results.append(output.cpu().to(torch.complex128))
    return results


def _splits(seed):
    """[from][to] -> rows, some of them zero, the same on all ranks."""
    size = dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 4, (size, size), generator=generator, device="cpu")
    if seed == 1:
        rows[0] = 0  # rank 0 sends nothing
    if seed == 2:
        rows[:, 1] = 0  # rank 1 receives nothing
    if seed == 3:
        rows[:] = 0
        rows[:, 2 % size] = 2  # all for one
    if seed == 4:
        rows[:] = 0
    return rows.tolist()


def _all_to_all_uneven(group):
    rank = dist.get_rank()
    results = []
    for seed in range(5):
        rows = _splits(seed)
        sends, receives = rows[rank], [row[rank] for row in rows]
        for dtype in (torch.float32, torch.bfloat16, torch.int16):
            output = torch.zeros(sum(receives), 3, dtype=dtype)
            source = _data(sum(sends), 3, dtype=dtype)
            if isinstance(group, tuple):
                output = _reference_all_to_all(source, rows)
            else:
                dist.all_to_all_single(output, source, receives, sends, group=group)
            results.append(output.double())
    return results


def _all_to_all_lists(group):
    rank, size = dist.get_rank(), dist.get_world_size()
    sources = [_data(other + 1, 2) + rank * 10 + other for other in range(size)]
    if isinstance(group, tuple):
        flat = torch.cat([source.flatten() for source in sources])
        rows = [[2 * (other + 1) for other in range(size)] for _ in range(size)]
        outputs = [part.view(rank + 1, 2) for part in _reference_all_to_all(flat, rows).split(rows[0][rank])]
        return [*outputs, *outputs, *outputs]
    results = [[torch.zeros(rank + 1, 2) for _ in range(size)] for _ in range(3)]
    dist.all_to_all(results[0], sources, group=group)
    dist.all_to_all(results[1], sources, group=group, async_op=True).wait()
    dist.all_to_all(results[2], sources, group=group, async_op=True).get_future().wait()
    return [output for outputs in results for output in outputs]


def _many_in_flight(group):
    """Works waited for in another order than they were begun, with other collectives between them."""
    size, rank = dist.get_world_size(), dist.get_rank()
    outputs, works = [], []
    for turn in range(6):
        output = torch.zeros(size, 4)
        source = _data(size, 4) + turn
        works.append(dist.all_to_all_single(output, source, group=group, async_op=True))
        outputs.append(output)
        total = torch.ones(2) * (rank + turn)
        works.append(dist.all_reduce(total, group=group, async_op=True))
        outputs.append(total)
        rows = _splits(turn % 4)
        output = torch.zeros(sum(row[rank] for row in rows), 2)
        receives = [row[rank] for row in rows]
        # the caller keeps neither tensor nor splits
        works.append(
            dist.all_to_all_single(output, _data(sum(rows[rank]), 2), receives, rows[rank], group=group, async_op=True)
        )
        outputs.append(output)
    for work in reversed(works):
        work.wait()
    return outputs


def _futures(group):
    size = dist.get_world_size()
    output = torch.zeros(size, 2)
    future = dist.all_to_all_single(output, _data(size, 2), group=group, async_op=True).get_future()
    value = future.wait()
    total = _data(3)
    chained = dist.all_reduce(total, group=group, async_op=True).get_future().then(lambda done: done.value()[0] * 2)
    return [output, value[0], chained.wait()]


def _functional(group):
    import torch.distributed._functional_collectives as funcol

    size, rank = dist.get_world_size(), dist.get_rank()
    rows = _splits(0)
    receives = [row[rank] for row in rows]
    return [
        funcol.wait_tensor(tensor)
        for tensor in (
            funcol.all_reduce(_data(4), "sum", group),
            funcol.all_gather_tensor(_data(2, 2), 0, group),
            funcol.reduce_scatter_tensor(_data(size * 2), "sum", 0, group),
            funcol.all_to_all_single(_data(size * 2), None, None, group),
            funcol.all_to_all_single(_data(sum(rows[rank]), 2), receives, rows[rank], group),
            funcol.broadcast(_data(3), 1, group),
            *funcol.all_reduce_coalesced([_data(2), _data(3)], "sum", group),
            *funcol.all_gather_into_tensor_coalesced([_data(2), _data(3)], group),
            *funcol.reduce_scatter_tensor_coalesced([_data(size), _data(size * 2)], "sum", [0, 0], group),
        )
    ]


def _autograd(group):
    import torch.distributed._functional_collectives as funcol
    import torch.distributed.nn.functional as dist_nn

    size, rank = dist.get_world_size(), dist.get_rank()
    rows = _splits(0)
    receives = [row[rank] for row in rows]
    source = _data(sum(rows[rank]), 2).requires_grad_()
    output = funcol.all_to_all_single_autograd(source, receives, rows[rank], group)
    (output * _data(*output.shape)).sum().backward()
    even = _data(size, 2).requires_grad_()
    result = dist_nn.all_to_all_single(torch.zeros(size, 2), even, group=group)
    (result * _data(*result.shape)).sum().backward()
    return [output.detach(), source.grad, result.detach(), even.grad]


def _all_to_all_plain(group):
    """The types that every inner backend knows, even and uneven, by the reference's own exchange."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows, results = _splits(0), []
    sends, receives = rows[rank], [row[rank] for row in rows]
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64):
        output = torch.zeros(size, 5, dtype=dtype)
        dist.all_to_all_single(output, _data(size, 5, dtype=dtype), group=group)
        uneven = torch.zeros(sum(receives), 3, dtype=dtype)
        dist.all_to_all_single(uneven, _data(sum(sends), 3, dtype=dtype), receives, sends, group=group)
        results += [output, uneven]
    return results


COLLECTIVES = (
    _all_reduce,
    _broadcast,
    _reduce,
    _all_gather,
    _reduce_scatter,
    _gather_and_scatter,
    _coalesced,
    _send_and_receive,
    _barrier,
    _objects,
    _all_to_all_plain,
    _all_to_all_even,
    _all_to_all_uneven,
    _all_to_all_lists,
    _many_in_flight,
    _futures,
    _functional,
    _autograd,
)


def _reference_all_to_all(source, rows):
    """By all-gather, which every backend has for every type: what each rank sends, cut out."""
    size, rank = dist.get_world_size(), dist.get_rank()
    everything = [None] * size
    dist.all_gather_object(everything, source.cpu().to(torch.complex64 if source.is_complex() else torch.float64))
    parts = []
    for other in range(size):
        sends = rows[other] if rows else [source.shape[0] // size] * size
        parts.append(everything[other].split(sends)[rank])
    return torch.cat(parts).to(source.dtype).to(source.device)


def compare(plans, inner="gloo", device="cpu"):
    """Collective by collective, the inner backend and every plan; returns how many tensors were compared."""
    torch.set_default_device(torch.device(device, torch.cuda.current_device()) if device == "cuda" else device)
    reference = _make_group(inner)
    groups = {plan: _make_group("locmoe", plan) for plan in plans}
    compared = 0
    for collective in COLLECTIVES:
        # No inner backend knows all types, and gloo lists of equal tensors only.
        by_hand = collective in (_all_to_all_even, _all_to_all_uneven, _all_to_all_lists)
        expected = collective(("by hand",) if by_hand else reference)
        for plan, group in groups.items():
            found = collective(group)
            assert len(found) == len(expected)
            for position, (ours, theirs) in enumerate(zip(found, expected)):
                message = f"{collective.__name__}[{position}] under plan {plan}"
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda text: f"{message}: {text}")
                compared += 1
    return compared


@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.many_ranks)])
def test_every_collective_gives_what_gloo_gives(world_size):
    results = run_ranks(compare, world_size, ("flat", "two_level", "auto"), env=TWO_NODES, timeout_s=120)
    assert min(results) > 200


def test_ranks_scattered_over_nodes():
    """Nodes that are no runs of ranks, as SLURM's cyclic distribution gives."""
    env = {"LOCMOE_TIMEOUT_S": "60", "GROUP_RANK": ["0", "1", "0", "1"], "LOCAL_WORLD_SIZE": "2"}
    run_ranks(compare, 4, ("two_level",), env=env, timeout_s=120)


def test_nodes_of_different_size_fall_back_to_flat():
    env = TWO_NODES | {"LOCMOE_RANKS_PER_NODE": "2,1"}
    run_ranks(compare, 3, ("two_level", "auto"), env=env, timeout_s=120)
