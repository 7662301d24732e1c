# SPDX-License-Identifier: Apache-2.0
"""The model card of a Trainer's run: its measured values, and the Trainer writing our card for our models."""

from __future__ import annotations

import datetime
import functools
import inspect
import math
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.utils import logging

from ..model_card import CARD_NAME, is_hub_name, write_model_card
from ..modeling_locmoe import LocMoeForCausalLM, LocMoePreTrainedModel


logger = logging.get_logger(__name__)

_NOT_METRICS = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens"}


def facts_of_run(args, state, model) -> dict[str, Any]:
    """
    What a Trainer's run knows for a card.

    Args:
        args (`TrainingArguments`): The run.
        state (`TrainerState`): Its log, with the measured values.
        model (`LocMoePreTrainedModel`): What was trained.

    Returns:
        `dict`: Arguments of [`~hf_locmoe.model_card.build_model_card`]: `metrics` of the evaluation that the final weights
        had, `training`, `hardware` and `date`. Only what is known.
    """
    facts: dict[str, Any] = {"architecture": type(model)}
    metrics = _final_evaluation(args, state)
    if isinstance(model, LocMoeForCausalLM) and "loss" in metrics and "perplexity" not in metrics:
        metrics = {"perplexity": math.exp(min(metrics["loss"], 700.0)), **metrics}
    if metrics:
        facts["metrics"] = metrics
    if state.global_step > 0:
        facts |= {"training": _training_facts(args, state), "hardware": _hardware(args), "date": datetime.date.today()}
    return facts


def _final_evaluation(args, state) -> dict[str, float]:
    """The last evaluation; of the weights that `load_best_model_at_end` put back, where none came after that."""
    ends = [index for index, entry in enumerate(state.log_history) if "train_runtime" in entry and "loss" not in entry]
    evaluations = [(index, entry) for index, entry in enumerate(state.log_history) if "eval_runtime" in entry]
    if ends and args.load_best_model_at_end and state.best_global_step is not None:
        best = [(index, entry) for index, entry in evaluations if entry["step"] == state.best_global_step]
        evaluations = [pair for pair in evaluations if pair[0] > ends[-1]] or best
    if not evaluations:
        return {}
    metrics = {
        name.removeprefix("eval_"): value for name, value in evaluations[-1][1].items() if name.startswith("eval_")
    }
    return {name: value for name, value in metrics.items() if name not in _NOT_METRICS and not name.startswith("mem_")}


def _training_facts(args, state) -> dict[str, Any]:
    warmup = args.warmup_steps
    losses = [entry["train_loss"] for entry in state.log_history if "train_loss" in entry]
    shares = [entry["routing/local_share"] for entry in state.log_history if "routing/local_share" in entry]
    sent = [entry["comm/bytes_inter_node"] for entry in state.log_history if "comm/bytes_inter_node" in entry]
    timed = [entry for entry in state.log_history if "time/step_s" in entry]
    batch_size = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    return {
        "optimizer steps": f"{state.global_step:,}",
        "epochs": None if state.epoch is None else f"{state.epoch:.2f}",
        "tokens": f"{state.num_input_tokens_seen:,}" if state.num_input_tokens_seen else None,
        "samples a step": f"{batch_size} ({args.train_batch_size} a device, {args.world_size} ranks, "
        f"{args.gradient_accumulation_steps} accumulated)",
        "mean training loss": losses[-1] if losses else None,
        "node-local share of the assignments, last logged": f"{shares[-1]:.1%}" if shares else None,
        "counted traffic between nodes, last logged": f"{sent[-1]:,.0f} bytes a step" if sent else None,
        "time of a step, last logged": _time_of_step(timed[-1]) if timed else None,
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "warm-up": (f"{warmup:g} of the steps" if warmup < 1 else f"{warmup:g} steps") if warmup else None,
        "weight decay": f"{args.weight_decay:g}",
        "precision": "bf16 mixed" if args.bf16 else "fp16 mixed" if args.fp16 else None,
        "seed": args.seed,
        "software": f"transformers {transformers.__version__}, torch {torch.__version__}",
    }


def _time_of_step(entry: dict[str, float]) -> str:
    step_s = entry["time/step_s"]
    waiting = (entry["time/exchange_s"] - entry["time/overlap_s"]) / step_s
    return f"{step_s:.3g} s, {waiting:.1%} of it waiting for the exchange of tokens"


def _hardware(args) -> str:
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type.upper()
    return f"{args.world_size} x {name}" if args.world_size > 1 else name


class ModelCardCallback(TrainerCallback):
    """
    Keeps the card in `output_dir` up to date where a run ends and before checkpoints are pushed.

    On by itself in every [`~transformers.Trainer`]; only for our models, and never over a README.md that a person wrote.
    """

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._write(args, state, model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if any("train_loss" in entry for entry in state.log_history):  # after training: values of the final weights
            self._write(args, state, model)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        self._write(args, state, model)

    def _write(self, args, state, model) -> None:
        if isinstance(model, LocMoePreTrainedModel) and args.should_save and state.is_world_process_zero:
            try:
                write_model_card(args.output_dir, model.config, **facts_of_run(args, state, model))
            except (OSError, ValueError) as error:  # a card is no reason to lose a run
                logger.warning(f"The model card was not written to {args.output_dir}: {error}.")


def let_trainer_write_our_card() -> None:
    """
    Makes [`~transformers.Trainer.create_model_card`], and with it `push_to_hub`, write our card for our models.

    Works around `Trainer.push_to_hub` (transformers/trainer.py), which calls `self.create_model_card` after the last
    callback and before the upload: there is no door but the method. Other models, adapters (whose card is PEFT's) and
    Trainers with a method of their own (TRL) are untouched. Idempotent.

    Raises:
        RuntimeError: `create_model_card` is not the method that this was written for.
    """
    upstream = Trainer.create_model_card
    if hasattr(upstream, "writes_locmoe_card"):
        return
    signature = inspect.signature(upstream)
    unknown = {"language", "license", "tags", "model_name", "finetuned_from", "dataset_tags"} - set(
        signature.parameters
    )
    if unknown:
        raise RuntimeError(
            f"transformers {transformers.__version__} has no `Trainer.create_model_card({', '.join(sorted(unknown))})`, "
            "which hf_locmoe's model card builds on: install a version that hf_locmoe's pyproject.toml allows."
        )

    @functools.wraps(upstream)
    def create_model_card(self, *args, **kwargs):
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, LocMoePreTrainedModel):
            upstream(self, *args, **kwargs)
        elif self.is_world_process_zero():
            given = signature.bind(self, *args, **kwargs).arguments
            given.pop("self")
            _write_card_of(self, model, given)

    create_model_card.writes_locmoe_card = True  # type: ignore[attr-defined]
    Trainer.create_model_card = create_model_card  # type: ignore[method-assign]


def _write_card_of(trainer: Trainer, model: LocMoePreTrainedModel, given: dict[str, Any]) -> None:
    """What the caller of `create_model_card` said, what transformers finds out by itself, and what was measured."""
    summary = TrainingSummary.from_trainer(trainer, **given)
    names, types = _listed(summary.dataset), _listed(summary.dataset_tags)
    details = _listed(summary.dataset_metadata)
    evaluation_data = (
        {"name": names[0], "type": types[0], **(details[0] if details else {})} if names and types else None
    )
    # what transformers inferred may be a local folder or a builder's name, which is no reason to fail
    base_model = given.get("finetuned_from") or (
        summary.finetuned_from if is_hub_name(summary.finetuned_from) else None
    )
    datasets = types if given.get("dataset_tags") else [name for name in types if is_hub_name(name)]
    path = write_model_card(
        trainer.args.output_dir,
        model.config,
        **facts_of_run(trainer.args, trainer.state, model),
        model_id=trainer.hub_model_id or summary.model_name,
        language=summary.language,
        license=summary.license,
        tags=summary.tags,
        base_model=base_model,
        datasets=datasets or None,
        evaluation_data=evaluation_data,
    )
    if path is None:
        logger.warning(f"{CARD_NAME} in {trainer.args.output_dir} was written by a person and is left as it is.")


def _listed(value: Any) -> list[Any]:
    """transformers fills these fields with a value, a list of values, or a list of None."""
    return [entry for entry in (value if isinstance(value, list) else [value]) if entry]


__all__ = ["ModelCardCallback", "facts_of_run", "let_trainer_write_our_card"]
