# SPDX-License-Identifier: Apache-2.0
"""
Trained parameters of a spread model that FSDP does not manage, kept the same on the ranks that hold copies of them.

PEFT adds adapters to a model that is sharded already. What it leaves whole is the same on all ranks; what it shards for tensor
parallelism is the same on the ranks that hold the same shard:

    tp     0  1    0  1
    rank   0  1    2  3      a whole parameter: {0, 1, 2, 3}      a shard: {0, 2} and {1, 3}

Each rank has the gradient of its own batch, or of its own experts over many batches, so that the mean over all copies is
that of one process. The ranks of a tensor-parallel group read one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def keep_replicas_equal(model: Any, is_last_micro_batch: Callable[[], bool]) -> None:
    """
    Gives all copies of such parameters the first rank's values, and from here on their mean gradient. All ranks call it.

    Args:
        model (`PreTrainedModel` or an adapter model on one): Spread over ranks.
        is_last_micro_batch (callable): Whether the backward that is under way ends an optimizer step: the mean is taken once,
            of what the micro-batches before have added up.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        groups = _groups_with_copies(model, parameter)
        if groups is None:
            continue
        for group in groups:
            dist.broadcast(_local(parameter.data), group_src=0, group=group)
        if not getattr(parameter, "_is_averaged", False):
            parameter.register_post_accumulate_grad_hook(_average_over(groups, is_last_micro_batch))
            parameter._is_averaged = True


def _groups_with_copies(model: Any, parameter: torch.Tensor) -> list[Any] | None:
    """The groups over which, one after the other, copies are reached; None for a parameter that FSDP manages."""
    if not isinstance(parameter.data, DTensor):
        return [dist.group.WORLD]
    if parameter.device_mesh.mesh_dim_names != ("tp",):
        return None
    meshes = (model._mesh_manager.get_mesh(axis) for axis in ("fsdp", "dp_replicate"))
    return [mesh.get_group() for mesh in meshes if mesh.size() > 1]


def _average_over(groups: list[Any], is_last_micro_batch: Callable[[], bool]) -> Callable[[torch.Tensor], None]:
    def average(parameter: torch.Tensor) -> None:
        if not is_last_micro_batch():
            return
        gradient = _local(parameter.grad)
        for group in groups:
            dist.all_reduce(gradient, op=dist.ReduceOp.SUM, group=group)
            gradient.div_(dist.get_world_size(group))

    return average


def _local(tensor: Any) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


__all__ = ["keep_replicas_equal"]
