# SPDX-License-Identifier: Apache-2.0
"""
A Trainer whose checkpoints are whole, and resume at any layout.

    checkpoint-N/
      config.json, model.safetensors, ...   weights and router state: one process loads them with from_pretrained
      distributed_optimizer/                optimizer, scheduler, RNG of every rank, run (torch's distributed checkpoint)
      trainer_state.json, scheduler.pt      what transformers' Trainer writes
      locmoe_checkpoint.json                the files and their sizes, written last

Rank 0 gathers and writes the weights; all ranks write their pieces of the optimizer. Nothing has its final name before
everything is written (see `checkpoint_folder`), so a run may be killed at any moment.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils import logging

from ..distributed.expert_move import canonical_experts, move_experts, placements_of, reason_not_to_move
from ..distributed.expert_parallel import exchange_choices, keep_exchange_choices
from ..distributed.parallel_run import current_parallel_run
from ..pretrained_io import CheckpointError
from .batch_placement import BatchPlacement, batch_placement_for
from .checkpoint_folder import (
    STATE_FOLDER,
    damage_of,
    is_first_rank,
    keep_only,
    last_checkpoint,
    open_staging,
    prune,
    publish,
    raise_together,
    tidy,
    without_upstream_refusal,
)
from .checkpoint_state import (
    detached_from,
    gathered_weights,
    load_optimizer_state,
    load_router_state,
    load_scheduler_state,
    load_weights,
    one_process_view,
    optimizer_state,
    packed,
    read_packed,
    router_state,
)
from .replicas import keep_replicas_equal
from .router_losses import add_router_losses, labels_for_smoothing


logger = logging.get_logger(__name__)

ASYNC_ENV = "LOCMOE_ASYNC_SAVE"


class LocMoeTrainer(Trainer):
    """
    [`~transformers.Trainer`], with all its arguments, for models that are spread over ranks.

    `save_strategy`, `save_total_limit`, `load_best_model_at_end` and `resume_from_checkpoint` mean what they mean on one
    process. A checkpoint resumes at the layout it was saved with, bit for bit, and at any other one, one process included.
    `python -m hf_locmoe.launch` puts this class in the place of `transformers.Trainer`; a script may also name it. Models
    that are not spread over several ranks (DDP, FSDP, DeepSpeed) are saved as `Trainer` does it.

    With `LOCMOE_ASYNC_SAVE=1` training goes on while a checkpoint is written from a copy in the CPU's memory. It appears
    when it is whole; the next save and the end of training wait for it. `on_save` callbacks run before that.
    """

    def __init__(self, model=None, args=None, *positional, **named):
        self._write: _BackgroundWrite | None = None
        self._write_group: dist.ProcessGroup | None = None
        self._placement: BatchPlacement | None = None
        self._placed_model: Any = None
        with without_upstream_refusal(args):
            super().__init__(model, args, *positional, **named)

    # ---- which node computes which sample ---------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        placement = self.batch_placement()
        if placement is not None:
            placement.place_experts_if_due(self.model, self.optimizer, self.state.global_step)
            batches = placement.place(batches)
        return batches, num_items_in_batch

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        if (column := _domain_column()) is not None and column not in columns:
            columns.append(column)

    def _prepare_inputs(self, inputs):
        column = _domain_column()
        if column in inputs and column not in inspect.signature(self.model.forward).parameters:
            # it has told the placement what it says and is nothing to the model
            inputs = {name: value for name, value in inputs.items() if name != column}
        return super()._prepare_inputs(inputs)

    def batch_placement(self) -> BatchPlacement | None:
        """The run's placement of batches and its statistics; None where there is nothing to place. All ranks call it."""
        if self.model is not self._placed_model:
            self._placed_model = self.model
            self._placement = batch_placement_for(self.model)
            if self._placement is not None and not self._loss_is_over_the_step():
                self._placement.options = replace(self._placement.options, batch_placement="off")
        return self._placement

    def _loss_is_over_the_step(self) -> bool:
        """Whether a step's loss is one mean over all its targets, wherever they are computed."""
        if self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices:
            return True
        if is_first_rank() and current_parallel_run().locality.batch_placement != "off":
            logger.warning(
                "Samples stay on the ranks that read them: with `average_tokens_across_devices` (False), or a model without "
                "`num_items_in_batch`, a sample's weight in the loss depends on the rank that computes it. Set "
                "`average_tokens_across_devices` to True, or `batch_placement` to 'off'."
            )
        return False

    def _sync_replicated_trainable_parameters(self, model):
        # upstream leaves out what PEFT shards for tensor parallelism
        keep_replicas_equal(self.accelerator.unwrap_model(model), lambda: self.accelerator.sync_gradients)

    # ---- the loss ----------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.label_smoother is not None and self.compute_loss_func is None and "labels" in inputs:
            inputs = labels_for_smoothing(self.accelerator.unwrap_model(model), inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # ---- saving -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        if not self._owns_state:
            super()._save_checkpoint(model, trial)
            return
        self._finish_write()
        placements = placements_of(self.model)
        with canonical_experts(self.model, self.optimizer):
            self._save_canonical(placements, trial)

    def _save_canonical(self, placements, trial) -> None:
        """The experts are where a checkpoint has them; `placements` are where they belong."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = open_staging(run_dir, name)
        self._note_best_checkpoint(run_dir)
        weights = gathered_weights(self.model, is_first_rank())
        state = None if self.args.save_only_model else self._state_to_save(placements)
        if is_first_rank():
            self._export_callbacks()
        job = _CheckpointJob(self, staging, weights, run_dir)
        if os.environ.get(ASYNC_ENV, "0").lower() in ("1", "true"):
            job.weights = detached_from(self.model, weights)
            self._write = _BackgroundWrite(job, state, self._group_for_writing())
            return
        error = _error_of(job.write_files) if is_first_rank() else None
        raise_together(error)
        if state is not None:
            dcp.save(state, checkpoint_id=staging / STATE_FOLDER, no_dist=self.args.world_size == 1)
        raise_together(_error_of(job.publish) if is_first_rank() else None)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(job.final))

    def _save(self, output_dir=None, state_dict=None):
        if not self.is_distributed_loading_by_transformers:
            super()._save(output_dir, state_dict)
            return
        weights = gathered_weights(self.model, is_first_rank())
        error = None
        if is_first_rank():
            error = _error_of(lambda: _one_process_trainer(self)._save(output_dir, weights))
        raise_together(error)

    def save_model(self, output_dir=None, _internal_call=False):
        if self._owns_state:
            self._finish_write()
        super().save_model(output_dir, _internal_call)

    def _state_to_save(self, placements: list[tuple[int, ...]]) -> dict[str, Any]:
        run = {
            "global_step": self.state.global_step,
            "total_batch_size": self.get_total_train_batch_size(self.args),
            "world_size": self.args.world_size,
        }
        try:
            state = optimizer_state(self.model, self.optimizer)
        except NotImplementedError as error:
            raise ValueError(
                f"`optim` ({self.args.optim}) keeps state that cannot be saved for a model spread over ranks ({error}): "
                "use another optimizer, or pass `--save_only_model`."
            ) from error
        buffers = {} if isinstance(self.model, PreTrainedModel) else router_state(self.model)
        placement = self.batch_placement()
        if placement is not None:
            placement.settle()
        statistics = None if placement is None else {**placement.table.state_dict(), "expert_to_rank": placements}
        return {
            "placement": packed(statistics),
            "optimizer": state,
            "router_state": packed(buffers),
            "scheduler": packed(self.lr_scheduler.state_dict()),
            "run": packed(run),
            f"rng.{self.args.process_index}": self._packed_rng_state(),
            f"exchange.{self.args.process_index}": packed(exchange_choices(self.model)),
        }

    def _packed_rng_state(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            return next(Path(folder).iterdir()).read_bytes()

    def _note_best_checkpoint(self, run_dir: str) -> None:
        best = self.state.best_global_step
        if not best or self.args.save_strategy not in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST):
            return
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{best}")
        if best == self.state.global_step or os.path.exists(folder):
            self.state.best_model_checkpoint = folder

    def _export_callbacks(self) -> None:
        """As upstream does before it writes the trainer's state."""
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                if isinstance(self.state.stateful_callbacks[name], list):
                    self.state.stateful_callbacks[name].append(callback.state())
                else:
                    self.state.stateful_callbacks[name] = callback.state()

    def _group_for_writing(self) -> dist.ProcessGroup | None:
        """A group of its own: the collectives of a save must not mix with those of training."""
        if self.args.world_size > 1 and self._write_group is None:
            self._write_group = dist.new_group(backend="gloo")
        return self._write_group

    def _finish_write(self) -> None:
        """Waits for the checkpoint that is being written. All ranks call it."""
        if self._write is None:
            return
        write, self._write = self._write, None
        raise_together(_error_of(write.wait))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(write.job.final))

    def _finalize_training(self, trial, num_train_samples, start_time):
        if self._owns_state:
            self._finish_write()
            best = self.state.best_model_checkpoint
            if best is not None and self.args.save_total_limit == 1 and is_first_rank():
                # ahead of upstream, which leaves a half checkpoint when it is killed
                keep_only(self._get_output_dir(trial), best)
        return super()._finalize_training(trial, num_train_samples, start_time)

    # ---- resuming -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if self._owns_state:
            error = _error_of(lambda: tidy(self.args.output_dir)) if is_first_rank() else None
            raise_together(error)
            resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        add_router_losses(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _checkpoint_to_resume(self, given: str | bool | None) -> str | None:
        """The folder, after all that can be wrong with it was looked for, on every rank alike."""
        if isinstance(given, str) and given.lower() in ("true", "false") and not os.path.isdir(given):
            given = given.lower() == "true"  # as a command line gives it
        if not given:
            return None
        folder: str | None = None if given is True else os.fspath(given)
        error: Exception | None = None
        if given is True:
            found = [last_checkpoint(self.args.output_dir)] if is_first_rank() else [None]
            if self.args.world_size > 1:
                dist.broadcast_object_list(found, src=0)
            folder = found[0]
            if folder is None:
                error = CheckpointError(
                    f"`resume_from_checkpoint` (True) finds no checkpoint in `output_dir` ({self.args.output_dir}): give a "
                    "checkpoint's folder, or leave it out to start a new run."
                )
        if error is None and (reason := self._reason_not_to_resume(Path(folder))):
            error = CheckpointError(f"`resume_from_checkpoint` ({folder}) cannot be resumed: {reason}")
        raise_together(error)
        return folder

    def _reason_not_to_resume(self, folder: Path) -> str | None:
        if (damage := damage_of(folder)) is not None:
            return f"{damage}. Resume from another checkpoint."
        if not (folder / TRAINER_STATE_NAME).is_file():
            return (
                f"it has no {TRAINER_STATE_NAME}. Load it with `from_pretrained` to start a new run from its weights."
            )
        if (folder / STATE_FOLDER).is_dir() or self.args.save_only_model:
            return None
        if (folder / OPTIMIZER_NAME).is_file():
            if not self.is_distributed_loading_by_transformers:
                return None
            return (
                f"its optimizer state ({OPTIMIZER_NAME}) was saved by transformers' Trainer, for one process. Resume it "
                "there with `python -m hf_locmoe.launch` and save once, or pass `--save_only_model` to go on with a fresh "
                "optimizer."
            )
        return "it has no optimizer state. Pass `--save_only_model` to go on with a fresh optimizer."

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self._owns_state and _is_transformers_model(self.model):
            self._load_weights(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not (self._owns_state and _is_transformers_model(self.model)):
            super()._load_best_model()
            return
        best = self.state.best_model_checkpoint
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        raise_together(None if os.path.isdir(best) else CheckpointError(f"The best checkpoint ({best}) is gone."))
        self._load_weights(best)

    def _load_weights(self, checkpoint: str) -> None:
        with canonical_experts(self.model):
            load_weights(self.model, checkpoint)
        if (state := Path(checkpoint, STATE_FOLDER)).is_dir():
            load_router_state(self.model, read_packed(state, "router_state"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        folder = Path(checkpoint or "", STATE_FOLDER)
        if checkpoint is None or not self._owns_state or not folder.is_dir():
            if not self.is_distributed_loading_by_transformers:  # with a fresh optimizer, as `--save_only_model` says
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        with canonical_experts(self.model, self.optimizer):
            load_optimizer_state(self.model, self.optimizer, folder)
        load_scheduler_state(self.lr_scheduler, read_packed(folder, "scheduler"), self.optimizer)
        placement, statistics = self.batch_placement(), read_packed(folder, "placement")
        if placement is not None and statistics is not None:
            placement.table.load_state_dict(statistics)
            self._place_experts_again(statistics.get("expert_to_rank", []))
        run, batch_size = read_packed(folder, "run"), self.get_total_train_batch_size(self.args)
        if run["world_size"] == self.args.world_size:
            keep_exchange_choices(self.model, read_packed(folder, f"exchange.{self.args.process_index}"))
        if run["total_batch_size"] != batch_size and not self.args.ignore_data_skip and is_first_rank():
            logger.warning(
                f"A step takes {batch_size} samples and took {run['total_batch_size']} when {checkpoint} was saved: "
                f"{run['global_step']} steps of the new size are skipped in the data, not what was trained on. Choose "
                "`per_device_train_batch_size` and `gradient_accumulation_steps` for the same product with the number of "
                "data-parallel ranks to go on where it stopped."
            )

    def _place_experts_again(self, placements: list[tuple[int, ...]]) -> None:
        """As they were when the checkpoint was saved, by the same ranks; of others the run decides anew."""
        if not current_parallel_run().locality.expert_placement_steps or reason_not_to_move(
            self.model, self.optimizer
        ):
            return
        now = placements_of(self.model)
        if [(len(table), max(table)) for table in placements] == [(len(table), max(table)) for table in now]:
            move_experts(self.model, placements, self.optimizer)

    def _load_rng_state(self, checkpoint):
        folder = Path(checkpoint or "", STATE_FOLDER)
        if checkpoint is None or not self._owns_state or not folder.is_dir():
            super()._load_rng_state(checkpoint)
            return
        if read_packed(folder, "run")["world_size"] != self.args.world_size:
            logger.info("The random states of another number of ranks are left alone.")
            return
        with tempfile.TemporaryDirectory() as unpacked:
            name = "rng_state.pth" if self.args.world_size <= 1 else f"rng_state_{self.args.process_index}.pth"
            torch.save(read_packed(folder, f"rng.{self.args.process_index}"), Path(unpacked, name))
            super()._load_rng_state(unpacked)

    @property
    def _owns_state(self) -> bool:
        """Whether this class saves and resumes; otherwise transformers' Trainer does."""
        alone = self.args.world_size == 1 and not (self.is_deepspeed_enabled or self.is_fsdp_enabled)
        return self.is_distributed_loading_by_transformers or alone


def _domain_column() -> str | None:
    """The column of a run's batches that names domains."""
    run = current_parallel_run()
    return None if run is None else run.locality.domain_column


# ---- writing --------------------------------------------------------------------------------------------------------


class _CheckpointJob:
    """What rank 0 writes of one checkpoint, with nothing of the trainer that changes while training goes on."""

    def __init__(self, trainer: LocMoeTrainer, staging: Path, weights: dict[str, torch.Tensor], run_dir: str):
        self.staging, self.weights, self.run_dir = staging, weights, run_dir
        self.final = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
        self.limit, self.best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        self.trainer = _one_process_trainer(trainer)
        self.trainer.state = copy.deepcopy(trainer.state)
        self.scheduler = None if trainer.args.save_only_model else copy.deepcopy(trainer.lr_scheduler.state_dict())

    def write_files(self) -> None:
        self.trainer._save(str(self.staging), self.weights)
        self.weights = {}
        if self.scheduler is not None:
            torch.save(self.scheduler, self.staging / SCHEDULER_NAME)
            self.trainer._save_scaler(str(self.staging))
        self.trainer.state.save_to_json(str(self.staging / TRAINER_STATE_NAME))

    def publish(self) -> None:
        args = self.trainer.args
        facts = {"format": 1, "global_step": self.trainer.state.global_step, "world_size": args.world_size}
        publish(self.staging, facts)
        prune(self.run_dir, self.limit, self.best)


class _BackgroundWrite:
    """A checkpoint that is written while training goes on."""

    def __init__(self, job: _CheckpointJob, state: dict[str, Any] | None, group: Any):
        self.job = job
        self._saved = None
        if state is not None:
            folder = job.staging / STATE_FOLDER
            self._saved = dcp.async_save(state, checkpoint_id=folder, process_group=group, no_dist=group is None)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint")
        self._thread.start()

    def _write(self) -> None:
        self._error = _error_of(self._write_all)

    def _write_all(self) -> None:
        if is_first_rank():
            self.job.write_files()
        if self._saved is not None:
            self._saved.result()  # on rank 0: after all ranks have written theirs
        if is_first_rank():
            self.job.publish()

    def wait(self) -> None:
        self._thread.join()
        if self._error is not None:
            raise self._error


def _one_process_trainer(trainer: LocMoeTrainer) -> Any:
    """The trainer as one process has it, so that upstream's `_save` writes without collectives."""
    view = copy.copy(trainer)
    view.model = one_process_view(trainer.model)
    view.is_distributed_loading_by_transformers = False
    return view


def _error_of(function) -> Exception | None:
    try:
        function()
    except Exception as error:  # is raised again, on every rank
        return error
    return None


def _is_transformers_model(model: Any) -> bool:
    """Or an adapter on one: something whose files we know."""
    return hasattr(model, "save_pretrained")


__all__ = ["LocMoeTrainer"]
