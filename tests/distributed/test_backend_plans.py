# SPDX-License-Identifier: Apache-2.0
"""Plans on real ranks: what they move, that all ranks agree on them, and that they are measured once."""

import pytest
import torch
import torch.distributed as dist

from hf_locmoe_backend import register
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "60"}


def _group(ranks=None, **options):
    from hf_locmoe.distributed.backend import LocMoeBackendOptions

    register()
    return dist.new_group(ranks, backend="locmoe", pg_options=LocMoeBackendOptions(**options))


def _exchange_unevenly(group):
    """Rank r sends (r + destination) % 3 rows of 5 numbers, and one exchange of equal parts."""
    rank, size = dist.get_group_rank(group, dist.get_rank()), group.size()
    sends = [(rank + other) % 3 for other in range(size)]
    output = torch.empty(sum(sends), 5)
    dist.all_to_all_single(output, torch.ones(sum(sends), 5) * rank, sends, sends, group=group)
    expected = torch.repeat_interleave(torch.arange(size), torch.tensor(sends)).float()
    assert torch.equal(output[:, 0], expected)
    even = torch.empty(size)
    dist.all_to_all_single(even, torch.full((size,), float(rank)), group=group)
    assert torch.equal(even, torch.arange(size).float())
    return sends


def _count():
    from hf_locmoe.distributed.backend import group_counters

    counters = {}
    for plan in ("flat", "two_level"):
        group = _group(plan=plan)
        sends = _exchange_unevenly(group)
        counters[plan] = group_counters(group)["all_to_all_single"]
        dist.send(torch.zeros(3), 3, group=group) if dist.get_rank() == 0 else None
        dist.recv(torch.zeros(3), 0, group=group) if dist.get_rank() == 3 else None
        moved = group_counters(group)
    return sends, counters, moved.get("send")


def test_counters_hold_what_was_sent():
    from hf_locmoe.distributed.counters import Traffic

    results = run_ranks(_count, 4, env=TWO_NODES, timeout_s=60)
    row, number = 5 * 4, 4
    inter = {"flat": 0, "two_level": 0}
    for rank, (sends, counters, sent) in enumerate(results):
        neighbour = rank ^ 1
        far = [other for other in range(4) if other // 2 != rank // 2]
        far_rows = sum(sends[other] for other in far)
        assert counters["flat"] == Traffic(
            calls=2,
            messages_intra_node=bool(sends[neighbour]) + 1,
            messages_inter_node=sum(bool(sends[other]) for other in far) + 2,
            bytes_intra_node=sends[neighbour] * row + number,
            bytes_inter_node=far_rows * row + 2 * number,
        )
        # counts, then rows, then the equal parts; one message to the other node each time
        assert counters["two_level"].calls == 2
        assert counters["two_level"].messages_intra_node == 3
        assert counters["two_level"].messages_inter_node == 2
        for plan in inter:
            inter[plan] += counters[plan].bytes_inter_node
        assert sent == (Traffic(1, 0, 1, 0, 12) if rank == 0 else None)
    assert inter["flat"] == inter["two_level"]


def _choose():
    from hf_locmoe.distributed import collectives
    from hf_locmoe.distributed.cost_model import PlanCost, PlanTable

    measured = []
    original = collectives.measure
    collectives.measure = lambda plans, run: measured.append(plans) or original(plans, run)
    size = dist.get_world_size()
    group = _group(plan="auto")
    tensor = torch.zeros(size, 8)
    for _ in range(3):
        dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)
    tables = [group._all_to_all._tables["cpu"].to_json()]
    # a second group of the same shape, and one with ranks that know the shape and ranks that do not
    second = _group(plan="auto")
    dist.all_to_all_single(torch.empty_like(tensor), tensor, group=second)
    tables.append(second._all_to_all._tables["cpu"].to_json())
    if dist.get_rank() % 2:
        collectives._TABLES.clear()
    third = _group(plan="auto")
    dist.all_to_all_single(torch.empty_like(tensor), tensor, group=third)
    tables.append(third._all_to_all._tables["cpu"].to_json())

    # whatever the table says, all ranks follow it, by what all of them know
    chosen = []
    third._all_to_all._tables["cpu"] = PlanTable({"flat": PlanCost(1e-3, 1e-9), "two_level": PlanCost(1e-6, 1e-6)})
    steps = third._all_to_all._steps
    third._all_to_all._steps = lambda plan, *args: chosen.append(plan) or steps(plan, *args)
    for rows in (size, size * 100_000):
        output = torch.empty(rows)
        dist.all_to_all_single(output, torch.zeros(rows), group=third)
    uneven = [0] * size
    uneven[dist.get_rank()] = 1 + dist.get_rank()
    dist.all_to_all_single(torch.empty(sum(uneven)), torch.zeros(sum(uneven)), uneven, uneven, group=third)
    return measured, tables, chosen


def test_auto_measures_once_and_all_ranks_agree():
    results = run_ranks(_choose, 4, env=TWO_NODES, timeout_s=120)
    for measured, tables, chosen in results:
        assert measured == [("flat", "two_level")]
        assert len(set(tables)) == 1
        assert tables == results[0][1]
        assert chosen == ["two_level"]


def _never_measure():
    from hf_locmoe.distributed import collectives

    collectives.measure = None
    groups = [_group([0, 1]), _group([2, 3]), _group([0, 2]), _group([1, 3]), _group([0, 1, 2])]
    tensor = torch.zeros(12)
    for group in groups:
        if isinstance(group, dist.ProcessGroup):
            dist.all_to_all_single(torch.empty_like(tensor), tensor, group=group)


def test_nothing_is_measured_where_flat_is_all_there_is():
    """One node, one rank a node, nodes of different size."""
    run_ranks(_never_measure, 4, env=TWO_NODES, timeout_s=60)


def _domains(plan):
    """Tensor-parallel domains {0, 1} and {2, 3}; expert groups {0, 2} and {1, 3}."""
    from hf_locmoe.distributed.backend import group_counters, use_tp_domain

    rank = dist.get_rank()
    domain = next(
        group for group in (dist.new_group([0, 1]), dist.new_group([2, 3])) if isinstance(group, dist.ProcessGroup)
    )
    groups = [_group([0, 2], plan=plan), _group([1, 3], plan=plan)]
    group = groups[rank % 2]
    use_tp_domain(group, domain)
    tokens = rank // 2
    rows = [[5, 3], [1, 4]]  # from -> to
    for dtype in (torch.float32, torch.int16):
        source = (torch.arange(sum(rows[tokens])) + 100 * tokens).to(dtype).unsqueeze(1).expand(-1, 3).contiguous()
        receives = [row[tokens] for row in rows]
        output = torch.zeros(sum(receives), 3, dtype=dtype)
        dist.all_to_all_single(output, source, receives, rows[tokens], group=group)
        expected = (
            [torch.arange(5), torch.arange(100, 101)] if tokens == 0 else [torch.arange(5, 8), torch.arange(101, 105)]
        )
        assert torch.equal(output[:, 1], torch.cat(expected).to(dtype))
    even = torch.zeros(6)
    dist.all_to_all_single(even, torch.arange(6.0) + 100 * tokens, group=group)
    assert torch.equal(even, torch.cat([torch.arange(3.0), torch.arange(100.0, 103.0)]) + 3 * tokens)
    return group_counters(group)["all_to_all_single"]


@pytest.mark.parametrize("plan", ["tp_domain", "auto", "flat"])
def test_ranks_with_the_same_tokens_send_their_share(plan):
    traffic = run_ranks(_domains, 4, plan, env=TWO_NODES, timeout_s=60)
    between = sum(rank.bytes_inter_node for rank in traffic)
    once = (3 + 1) * 3 * (4 + 2) + 2 * 3 * 4
    if plan != "auto":
        assert between == once * (1 if plan == "tp_domain" else 2)
