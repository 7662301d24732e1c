# SPDX-License-Identifier: Apache-2.0
"""
An Accelerator for loops of one's own, whose model may be spread over ranks.

    save_state(folder)
      model.safetensors          whole weights, as one process has them
      distributed_optimizer/     optimizer and router state (torch's distributed checkpoint)
      scheduler.bin, random_states_0.pkl, ...    what Accelerate writes

Accelerate knows models that it shards itself. One that transformers has sharded (`DistributedConfig`) it refuses to
prepare ("incompatible with DDP"), cannot clip and cannot save; `transformers.Trainer` goes round that on its own, a loop
cannot. Models that are not spread are Accelerate's business, unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed.fsdp import is_fsdp_managed_module

from ..distributed.parallel_run import current_parallel_run
from ..pretrained_io import CheckpointError
from .checkpoint_folder import STATE_FOLDER, is_first_rank, raise_together
from .checkpoint_state import (
    gathered_weights,
    load_optimizer_state,
    load_router_state,
    load_weights,
    optimizer_state,
    packed,
    read_packed,
    router_state,
)
from .replicas import keep_replicas_equal


class LocMoeAccelerator(Accelerator):
    """
    [`~accelerate.Accelerator`], with all its arguments, also for models that are spread over ranks.

    `prepare`, `accumulate`, `backward`, `clip_grad_norm_`, `gather_for_metrics`, `get_state_dict`, `save_state` and
    `load_state` mean what they mean on one process, and a state is loaded at any layout and number of ranks, one process
    included. `python -m hf_locmoe.launch` puts this class in the place of `accelerate.Accelerator`; a script may also name
    it.

    ```python
    LocMoePlugin().activate()
    accelerator = LocMoeAccelerator()
    model = AutoModelForCausalLM.from_pretrained(name)  # spread over the ranks
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ```
    """

    _optimizers: list[Any]
    _reading_mesh: Any = None

    # ---- preparing ----------------------------------------------------------------------------------------------

    def prepare_model(self, model, device_placement=None, evaluation_mode=False):
        if not is_spread(model):
            return super().prepare_model(model, device_placement, evaluation_mode)
        # autocast and torch.compile, but no DDP around what reduces its own gradients
        prepared = super().prepare_model(model, device_placement=False, evaluation_mode=True)
        if not evaluation_mode:
            keep_replicas_equal(self.unwrap_model(prepared), lambda: self.sync_gradients)
        return prepared

    def _prepare_device_mesh(self):
        """Ranks of a tensor-parallel group read the same batches."""
        run = current_parallel_run()
        if self.torch_device_mesh is not None or run is None or run.tp_size == 1 or self.num_processes == 1:
            return super()._prepare_device_mesh()
        if self._reading_mesh is None:
            shape = (self.num_processes // run.tp_size, run.tp_size)
            self._reading_mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("dp_shard", "tp"))
        return self._reading_mesh

    # ---- training -----------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self, model) -> Iterator[None]:
        """Leaves the reduction of gradients to the last micro-batch; between replicas, where shards could not be kept."""
        if not (is_spread(model) and is_fsdp_managed_module(self.unwrap_model(model))):
            with super().no_sync(model):
                yield
            return
        inner = self.unwrap_model(model)
        if inner.config.distributed_config.dp_replicate_size > 1:
            inner.set_requires_all_reduce(False)
        else:
            inner.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            inner.set_requires_gradient_sync(True)

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        if not any(map(is_spread, self._models)):
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self.unscale_gradients()
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        # gradients lie on several meshes, which torch's own function cannot span
        norm = self._clip_grad_norm_dtensor_aware(parameters, max_norm, norm_type=norm_type)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    # ---- saving and loading -------------------------------------------------------------------------------------

    def get_state_dict(self, model, unwrap=True):
        """Whole weights on the first rank and `{}` on the others, where the model is spread. All ranks call it."""
        if not is_spread(model):
            return super().get_state_dict(model, unwrap)
        return gathered_weights(self.unwrap_model(model), is_first_rank())

    def save_state(self, output_dir=None, safe_serialization=True, **save_model_func_kwargs):
        if not self._owns_state:
            return super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        if not safe_serialization:
            raise ValueError(
                "`safe_serialization` (False) asks for pickled weights, which `load_state` does not read: leave it out."
            )
        # Accelerate's hook: everything of the folder is known, and nothing is written yet
        with self._without_optimizers(), _registered(self.register_save_state_pre_hook(self._save_optimizers)):
            folder = super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        self.wait_for_everyone()  # a rank that goes on may look for what rank 0 still writes
        return folder

    def load_state(self, input_dir=None, load_kwargs=None, **load_model_func_kwargs):
        if not self._owns_state:
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
            return
        with (
            self._without_optimizers(),
            _registered(self.register_load_state_pre_hook(self._load_model_and_optimizers)),
        ):
            super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)

    @property
    def _owns_state(self) -> bool:
        """Whether this class saves and loads; otherwise Accelerate does."""
        if len(self._models) != 1:
            if any(map(is_spread, self._models)):
                raise ValueError(
                    f"`prepare` got {len(self._models)} models, of which one is spread over ranks: the state of one model "
                    "can be saved. Leave the models that are not trained out of `prepare`."
                )
            return False
        alone = self.num_processes == 1 and hasattr(self.unwrap_model(self._models[0]), "save_pretrained")
        return alone or is_spread(self._models[0])

    @contextmanager
    def _without_optimizers(self) -> Iterator[None]:
        """Accelerate writes the optimizer of rank 0 alone, as a pickle."""
        self._own_optimizers, self._optimizers = self._optimizers, []
        try:
            yield
        finally:
            self._optimizers = self._own_optimizers

    def _save_optimizers(self, models: list, weights: list, folder: str) -> None:
        model = self.unwrap_model(models[0])
        if weights and not isinstance(model, PreTrainedModel) and weights[0]:
            from peft import get_peft_model_state_dict

            weights[0] = get_peft_model_state_dict(model, state_dict=weights[0])
        buffers = {} if isinstance(model, PreTrainedModel) else router_state(model)
        for index, optimizer in enumerate(self._own_optimizers):
            state = {"optimizer": optimizer_state(model, optimizer), "router_state": packed(buffers)}
            dcp.save(state, checkpoint_id=_state_folder(folder, index), no_dist=self.num_processes == 1)

    def _load_model_and_optimizers(self, models: list, folder: str) -> None:
        if not models:
            return
        model = self.unwrap_model(models.pop())
        missing = [
            str(_state_folder(folder, index))
            for index in range(len(self._own_optimizers))
            if not _state_folder(folder, index).is_dir()
        ]
        error = None
        if missing:
            error = CheckpointError(
                f"`input_dir` ({folder}) has no {missing[0]}: it was saved by accelerate's own Accelerator, or with fewer "
                "optimizers. Load its weights with `from_pretrained` to go on with a fresh optimizer, or save the state "
                "once more with `LocMoeAccelerator` (`python -m hf_locmoe.launch`), on one process too."
            )
        raise_together(error)
        load_weights(model, folder)
        for index, optimizer in enumerate(self._own_optimizers):
            state = _state_folder(folder, index)
            load_optimizer_state(model, optimizer, state)
            load_router_state(model, read_packed(state, "router_state"))


def is_spread(model: Any) -> bool:
    """Whether transformers has sharded the model when it was built, and it reduces its own gradients."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def _state_folder(folder: str | os.PathLike, index: int) -> Path:
    return Path(folder, STATE_FOLDER if index == 0 else f"{STATE_FOLDER}_{index}")


@contextmanager
def _registered(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


__all__ = ["LocMoeAccelerator", "is_spread"]
