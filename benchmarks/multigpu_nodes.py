# SPDX-License-Identifier: Apache-2.0
"""
Two emulated nodes of two GPUs each: the plans of the backend, and both fan-outs of a MoE layer's exchange, give the same;
what each of them moves between and inside nodes, by the backend's counters. The link is the same everywhere, so no time is
measured.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from benchmarks.multigpu_layer import Layer, relative_difference
from benchmarks.multigpu_step import rank_device
from benchmarks.record import Record
from hf_locmoe.distributed.backend import LocMoeBackendOptions, group_counters, group_topology, use_tp_domain
from hf_locmoe.distributed.counters import Traffic
from hf_locmoe.distributed.expert_parallel import LocMoeEP, expert_parallel_options
from hf_locmoe_backend import register
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


WIDTH = 2048
ROWS = {"cuda": 1024, "cpu": 4}
LAYER = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "tokens": 512,
    "repeats": 1,
}


def splits(size: int, scale: int) -> list[list[int]]:
    """Rows from each rank to each, some of them none."""
    return [[(source + 2 * target) % 3 * scale for target in range(size)] for source in range(size)]


def exchange(group, device: torch.device, scale: int, rank: int, size: int) -> list[torch.Tensor]:
    """An exchange of equal parts and one of uneven ones, in bfloat16: what this rank gets."""
    generator = torch.Generator(device).manual_seed(rank)
    rows = splits(size, scale)
    sends, receives = rows[rank], [row[rank] for row in rows]
    results = []
    for out_rows, in_rows, sizes in (
        (size * scale, size * scale, ()),
        (sum(receives), sum(sends), (receives, sends)),
    ):
        sent = torch.randn(in_rows, WIDTH, device=device, generator=generator).bfloat16()
        received = torch.empty(out_rows, WIDTH, device=device, dtype=torch.bfloat16)
        dist.all_to_all_single(received, sent, *sizes, group=group)
        results.append(received)
    return results


def moved(traffic: Traffic) -> dict[str, float]:
    return {
        "messages_inter": traffic.messages_inter_node,
        "mb_inter": traffic.bytes_inter_node / 1e6,
        "messages_intra": traffic.messages_intra_node,
        "mb_intra": traffic.bytes_intra_node / 1e6,
    }


def make_group(ranks: list[int], plan: str):
    return dist.new_group(
        ranks, backend="locmoe", use_local_synchronization=True, pg_options=LocMoeBackendOptions(plan=plan)
    )


def plans(device: torch.device, scale: int) -> dict[str, dict[str, Any]]:
    """Every plan against the device's own backend."""
    rank, size = dist.get_rank(), dist.get_world_size()
    found = {}
    expected = exchange(None, device, scale, rank, size)
    for plan in ("flat", "two_level", "auto"):
        group = make_group(list(range(size)), plan)
        equal = all(map(torch.equal, exchange(group, device, scale, rank, size), expected))
        found[f"all-to-all, {plan}"] = {"equal": equal, "difference": 0.0 if equal else 1.0}
        found[f"all-to-all, {plan}"] |= moved(group_counters(group)["all_to_all_single"])
    # ranks of a node as a tensor-parallel domain: the same tokens on both, one group for each place in the node
    node, place = divmod(rank, 2)
    domain = dist.new_group([2 * node, 2 * node + 1], use_local_synchronization=True)
    for plan in ("flat", "tp_domain"):
        group = make_group(list(range(place, size, 2)), plan)
        if group_topology(group).num_nodes != size // 2:
            raise AssertionError("the group does not span the emulated nodes")
        use_tp_domain(group, domain)
        got = exchange(group, device, scale, node, size // 2)
        if plan == "flat":
            reference = got
        equal = all(map(torch.equal, got, reference))
        found[f"all-to-all among TP domains, {plan}"] = {"equal": equal, "difference": 0.0 if equal else 1.0}
        found[f"all-to-all among TP domains, {plan}"] |= moved(group_counters(group)["all_to_all_single"])
    return found


def fan_outs(device: str) -> dict[str, dict[str, Any]]:
    """One copy of a token per rank and one per node, through the backend, against transformers' all_to_all."""
    layer, found = Layer(device, LAYER), {}
    expected = layer.passes("transformers all_to_all")
    mesh = dist.init_device_mesh(device, (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))
    for fan_out in ("rank", "node"):
        with expert_parallel_options(slices=2, fan_out=fan_out, backend="locmoe"):
            # a group of its own, so that the counters are its own
            call = LocMoeEP(layer.experts, mesh["ep"], mesh["tp"])
        name = f"MoE layer, 2 slices, fan-out {fan_out}"
        layer.calls[name] = call, "grouped_mm"
        before = group_counters(call.peers.group).get("all_to_all_single", Traffic())
        difference = relative_difference(layer.passes(name), expected)
        traffic = group_counters(call.peers.group)["all_to_all_single"] - before
        equal = difference <= TOLERANCES[torch.bfloat16]["rtol"]
        found[name] = {"equal": equal, "difference": difference, **moved(traffic)}
    return found


def measure(device: str) -> dict[str, dict[str, Any]]:
    register()
    return plans(rank_device(device), ROWS[device]) | fan_outs(device)


def bench_nodes(device: str, world_size: int, timeout_s: float) -> list[Record]:
    env = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "60"}
    ranks = run_ranks(measure, world_size, device, env=env, device=device, timeout_s=timeout_s)
    rows = []
    for name in ranks[0]:
        entries = [rank[name] for rank in ranks]
        row = {"way": name, "equal": "yes" if all(entry["equal"] for entry in entries) else "NO"}
        row["difference"] = max(entry["difference"] for entry in entries)
        for key in ("messages_inter", "mb_inter", "messages_intra", "mb_intra"):
            row[key] = sum(entry[key] for entry in entries)
        rows.append(row)
    record = Record(
        theme="multigpu_nodes" if device == "cuda" else "multigpu_nodes_dry",
        question="Do the plans and fan-outs give the same over NCCL on emulated nodes, and what do they move?",
        config={"world_size": world_size, "nodes": 2, "rows": ROWS[device], "width": WIDTH, "layer": str(LAYER)},
        command="",
        rows=rows,
        columns={
            "way": "",
            "equal": "equal",
            "difference": "largest relative difference",
            "messages_inter": "messages between nodes",
            "mb_inter": "MB between nodes",
            "messages_intra": "messages inside nodes",
            "mb_intra": "MB inside nodes",
        },
        notes=[
            "All ranks together, by the backend's counters: two exchanges of bfloat16 rows, one of equal and one of uneven "
            "parts, or forward and backward of a layer. The plans must agree bit for bit with the device's own backend.",
            "The hop inside the node of fan-out 'node' goes over the node's own group, which does not count.",
            "Nodes are emulated on one host: the group logic is what is shown, nothing about a link.",
        ],
        extra={"ranks": ranks},
    )
    return [record]


__all__ = ["bench_nodes"]
