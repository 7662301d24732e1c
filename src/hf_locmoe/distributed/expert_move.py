# SPDX-License-Identifier: Apache-2.0
"""
Experts from rank to rank: parameters and optimizer state move, the dispatch looks for them at their new place, and the
gate, which numbers experts and knows no ranks, stays as it is. So the function that a model computes is unchanged.

    stored on          rank 0   rank 1          rank 0   rank 1
    canonical          E0 E1    E2 E3    ->     E0 E2    E1 E3      expert_to_rank (0, 1, 0, 1)

A placement is the table expert -> rank of the expert-parallel group. A rank stores its experts in ascending order, so the
table says which row of a parameter is which expert. The canonical placement, that of checkpoints, is the contiguous one.

Shapes: n experts, P ranks of the group, n / P rows of a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from .expert_parallel import LocMoeEP, expert_parallel_layers
from .parallel_run import find_node_local_experts
from .topology import contiguous_placement


Placement = tuple[int, ...]


def placements_of(model: nn.Module) -> list[Placement]:
    """Where the experts of each MoE layer are: rank of the expert-parallel group, `n` entries a layer."""
    return [layer.peers.topology.expert_to_rank for layer in expert_parallel_layers(model)]


def canonical_placement(layer: LocMoeEP) -> Placement:
    """Where a checkpoint is loaded to."""
    return contiguous_placement(layer.num_experts, layer.peers.num_ranks)


def reason_not_to_move(model: nn.Module, optimizer: Any = None) -> str | None:
    """Why the experts of this model cannot move; None where they can. The same on all ranks."""
    layers = expert_parallel_layers(model)
    if not layers:
        return "the model has no experts that this package's expert parallelism spreads."
    for layer in layers:
        if layer.peers.num_ranks != dist.get_world_size():
            return (
                f"an expert has several copies: {layer.peers.num_ranks} ranks of {dist.get_world_size()} share them."
            )
        for name, parameter in layer.experts.named_parameters():
            if not _moves(parameter, layer):
                return f"`{name}` of the experts is not stored as one row for each expert of a rank."
            for key, value in _state(optimizer, parameter).items():
                if not (_moves(value, layer) or value.dim() == 0):
                    return (
                        f"the optimizer's `{key}` of the experts is not stored as one row for each expert of a rank."
                    )
    return None


@torch.no_grad()
def move_experts(model: nn.Module, placements: Sequence[Placement], optimizer: Any = None) -> int:
    """
    Moves every expert to its rank, between optimizer steps. A collective: all ranks call it with the same placements.

    Args:
        model (`nn.Module`): Spread over ranks, see [`reason_not_to_move`].
        placements (`Sequence` of tables): Of each MoE layer.
        optimizer (*optional*): Whose state goes with the parameters; torch's or Accelerate's.

    Returns:
        `int`: Experts, over all layers, that are on another rank now.
    """
    moved = 0
    for layer, new in zip(expert_parallel_layers(model), placements, strict=True):
        old = layer.peers.topology.expert_to_rank
        if old == tuple(new):
            continue
        moved += sum(before != after for before, after in zip(old, new, strict=True))
        for parameter in layer.experts.parameters():
            tensors = [parameter, parameter.grad, *_state(optimizer, parameter).values()]
            for tensor in tensors:
                if tensor is not None and tensor.dim() > 0:
                    _move_rows(_local(tensor), old, tuple(new), layer.peers.rank, layer.peers.group)
        layer.place(tuple(new))
    router_model = next((module for module in model.modules() if hasattr(type(module), "update_router_state")), None)
    if moved and router_model is not None:
        find_node_local_experts(router_model)
    return moved


@contextmanager
def canonical_experts(model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """
    Inside, the experts are where a checkpoint has them; afterwards where they were. A collective where any has moved. For
    loading and saving: stored weights and optimizer state have the canonical order.
    """
    layers = expert_parallel_layers(model)
    placements = placements_of(model)
    canonical = [canonical_placement(layer) for layer in layers]
    if placements == canonical:
        yield
        return
    move_experts(model, canonical, optimizer)
    try:
        yield
    finally:
        move_experts(model, placements, optimizer)


def _move_rows(rows: torch.Tensor, old: Placement, new: Placement, rank: int, group: Any) -> None:
    """
    Puts this rank's rows of a tensor in their new place, in place.

    Args:
        rows (`torch.Tensor` of shape `(n / P, ...)`): This rank's part.
    """
    stored = [expert for expert, owner in enumerate(old) if owner == rank]
    wanted = [expert for expert, owner in enumerate(new) if owner == rank]
    num_ranks = max(old) + 1
    leaving = [[expert for expert in stored if new[expert] == peer] for peer in range(num_ranks)]
    coming = [[expert for expert in wanted if old[expert] == peer] for peer in range(num_ranks)]
    place = {expert: index for index, expert in enumerate(stored)}
    order = torch.tensor([place[expert] for part in leaving for expert in part], device=rows.device)
    sent = rows.index_select(0, order).flatten(1) if rows.dim() > 1 else rows.index_select(0, order).unsqueeze(1)
    received = torch.empty_like(sent)
    sizes = [[len(part) for part in parts] for parts in (coming, leaving)]
    dist.all_to_all_single(received, sent, *sizes, group=group)
    arrived = {expert: index for index, expert in enumerate(expert for part in coming for expert in part)}
    order = torch.tensor([arrived[expert] for expert in wanted], device=rows.device)
    rows.copy_(received.index_select(0, order).view_as(rows))


def _moves(tensor: torch.Tensor, layer: LocMoeEP) -> bool:
    return tensor.dim() > 0 and _local(tensor).shape[0] == layer.num_local_experts


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _state(optimizer: Any, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
    if optimizer is None:
        return {}
    bare = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
    return {key: value for key, value in bare.state.get(parameter, {}).items() if isinstance(value, torch.Tensor)}


__all__ = [
    "Placement",
    "canonical_experts",
    "canonical_placement",
    "move_experts",
    "placements_of",
    "reason_not_to_move",
]
