# SPDX-License-Identifier: Apache-2.0
"""What a model that is trained from nothing starts from: the values that rank 0 alone would have drawn, on all ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

from .deferred_init import InitializationRecorder, RecordedTensor


logger = logging.get_logger(__name__)


def one_process_start(build: Callable[[], Any]) -> tuple[Any, dict[str, torch.Tensor | RecordedTensor]]:
    """
    The state dict of the model that `build` gives on rank 0, without holding it: large tensors are made when they are asked
    for (see `deferred_init.py`). A model that cannot be built so is built whole, on every rank. A collective.

    Args:
        build (`Callable`): Builds the model on the CPU, with the global generator; may be called twice.

    Returns:
        The model, whose large tensors may be without values, and its state dict. The global generator is where it would be
        after `build` on the ranks that were seeded like rank 0, and where it was on the others.
    """
    own = torch.get_rng_state()
    first = own.clone()
    share_first_ranks(first)
    torch.set_rng_state(first)
    recorder, model, why = InitializationRecorder(), None, "the ranks drew different things"
    try:
        with recorder.recording():
            model = build()
    except Exception as error:  # also what is the script's own mistake: the whole model raises it again
        why = f"{type(error).__name__}: {error}"
    outcomes = _everybodys(bytes([model is not None]) + recorder.fingerprint)
    is_recorded = model is not None and len(set(outcomes)) == 1
    if not is_recorded:
        torch.set_rng_state(own)
        model = build()
        # whoever knows why says it, and only one
        if dist.get_rank() == next((rank for rank, outcome in enumerate(outcomes) if not outcome[0]), 0):
            logger.warning(
                f"{type(model).__name__} cannot be initialised shard by shard ({why}), so every rank holds all of it for a "
                f"moment: where that is too much, save it once on one process and load the checkpoint."
            )
    elif not torch.equal(own, first):
        torch.set_rng_state(own)
    state_dict = {}
    for name, tensor in model.state_dict().items():
        state_dict[name] = recorder.recorded(tensor) if is_recorded else None
        if state_dict[name] is None:
            share_first_ranks(tensor)
            state_dict[name] = tensor
    return model, state_dict


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """
    transformers loads in order and in this thread. Its worker threads would have to wait for each other, and the allocator
    keeps what each of them has had.
    """
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def share_first_ranks(tensor: torch.Tensor) -> None:
    """Overwrites a tensor, on whatever device, with rank 0's."""
    shared = _reachable(tensor)
    dist.broadcast(shared, src=0)
    if shared is not tensor:
        tensor.copy_(shared)


def _everybodys(message: bytes) -> list[bytes]:
    """By rank; as long on every rank."""
    mine = _reachable(torch.tensor(list(message), dtype=torch.uint8))
    everybodys = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everybodys, mine)
    return [bytes(theirs.tolist()) for theirs in everybodys]


def _reachable(tensor: torch.Tensor) -> torch.Tensor:
    """
    The tensor where the default group can have it. In a job on GPUs that group is often NCCL's alone, which takes nothing that
    is on the CPU: then the way is over the rank's own accelerator, bound as transformers binds it.
    """
    if f"{tensor.device.type}:" in dist.get_backend_config():
        return tensor
    accelerator = torch.accelerator.current_accelerator()
    index = int(os.environ.get("LOCAL_RANK", torch.accelerator.current_device_index()))
    return tensor.to(torch.device(accelerator.type, index))


__all__ = ["one_process_start", "one_tensor_at_a_time", "share_first_ranks"]
