# SPDX-License-Identifier: Apache-2.0
"""What this machine does, measured in seconds: products on a device, and links where there is a process group."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import median

import torch
import torch.distributed as dist

from .dispatch import Peers
from .expert_parallel import job_topology
from .overlap import CostModel, _measure


# Products large enough for the device's rate; a few of them take well under a second.
_SIDE = {"cpu": 1024}
_SIDE_OF_ACCELERATORS = 8192
_LEAST_LATENCY_S = 1e-7
_REPEATS = 9  # one measurement takes a fraction of a second and swings by a third


@dataclass(frozen=True)
class Calibration:
    """
    Args:
        product_flops_per_s (`float`): operations a second of one device in a large matrix product.
        inter_bytes_per_s (`float`, *optional*): of a node to others; `None` where no second node was there.
        intra_bytes_per_s (`float`, *optional*): of a device inside its node; `None` without a second rank on it.
        latency_s (`float`, *optional*): of a message without bytes.
        is_gloo (`bool`): whether the links were measured with gloo.
        is_first_rank (`bool`): whether this process is the one to tell.
    """

    product_flops_per_s: float
    inter_bytes_per_s: float | None = None
    intra_bytes_per_s: float | None = None
    latency_s: float | None = None
    is_gloo: bool = False
    is_first_rank: bool = True


def calibrate(dtype: torch.dtype = torch.float32) -> Calibration:
    """
    Measures the accelerator, or the CPU with the threads that torch has; and links between the ranks of the process
    group, which is made for the time of the measurement under `torchrun`. Collective over all ranks; the slowest counts.

    Args:
        dtype (`torch.dtype`): of the matrix product.
    """
    device = _device_of_rank()
    with _process_group() as has_group:
        product_s = torch.tensor(_product_seconds(device, dtype), dtype=torch.float64, device=device)
        flops = 2 * _side(device) ** 3
        if not has_group:
            return Calibration(flops / product_s.item())
        dist.all_reduce(product_s, op=dist.ReduceOp.MAX)
        topology, rank = job_topology(), dist.get_rank()
        peers = Peers(topology.with_experts(topology.num_ranks), rank, dist.group.WORLD, device=device)
        measured = [CostModel.measure(peers) for _ in range(_REPEATS)]
        cost = CostModel(*(median(getattr(one, field.name) for one in measured) for field in fields(CostModel)))
        return Calibration(
            product_flops_per_s=flops / product_s.item(),
            inter_bytes_per_s=cost.remote_bytes_per_s * max(topology.node_sizes) if topology.num_nodes > 1 else None,
            intra_bytes_per_s=cost.node_local_bytes_per_s if max(topology.node_sizes) > 1 else None,
            latency_s=max(cost.latency_s / (topology.num_ranks - 1), _LEAST_LATENCY_S),
            is_gloo=f"{device.type}:gloo" in dist.get_backend_config(),
            is_first_rank=rank == 0,
        )


@contextlib.contextmanager
def _process_group() -> Iterator[bool]:
    """Whether there is a process group of several ranks; under `torchrun` it is made, and taken down again."""
    if dist.is_initialized() or not dist.is_torchelastic_launched():
        yield dist.is_initialized() and dist.get_world_size() > 1
        return
    dist.init_process_group()
    try:
        yield dist.get_world_size() > 1
    finally:
        dist.destroy_process_group()


def _device_of_rank() -> torch.device:
    """The accelerator that the launcher means for this process, made the current one; else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(torch.accelerator.current_accelerator().type, index)


def _side(device: torch.device) -> int:
    return _SIDE.get(device.type, _SIDE_OF_ACCELERATORS)


def _product_seconds(device: torch.device, dtype: torch.dtype) -> float:
    factors = torch.ones(_side(device), _side(device), dtype=dtype, device=device)
    return _measure(lambda: factors @ factors, device).best_s
