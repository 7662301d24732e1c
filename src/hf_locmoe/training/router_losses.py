# SPDX-License-Identifier: Apache-2.0
"""
The router losses of a trainer that computes the loss itself.

A causal model adds them to the loss that it makes of its labels. With `label_smoothing_factor` or `compute_loss_func`
Trainer keeps the labels to itself, and TRL's trainers project the decoder's hidden states with a head of their own: the
router would train on nothing, or on the load balance that TRL computes for every MoE alike (over all layers pooled and a
rank's tokens alone, without locality).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from ..modeling_locmoe import LocMoeCausalLMOutputWithPast, share_of_step


logger = logging.get_logger(__name__)


def add_router_losses(trainer: Any) -> None:
    """
    Makes `trainer.compute_loss` add the router losses of a training forward of a LocMoe causal model whose own forward has
    not. Nothing changes for other models. Idempotent.
    """
    model = _causal_model(trainer.model)
    if model is None or "compute_loss" in vars(trainer):
        return
    if getattr(trainer, "aux_loss_enabled", False):
        trainer.aux_loss_enabled = False  # TRL's own; its coefficient is the config's, which ours goes by
    trainer.compute_loss = _with_router_losses(trainer, model, trainer.compute_loss)


def labels_for_smoothing(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """
    The inputs whose labels Trainer smooths, one token on where it will not do that itself: it knows a causal model by its
    class's name, and a sharded one bears another ("FSDPOlmoeForCausalLM").

    Args:
        model (`PreTrainedModel` or `PeftModel`): Unwrapped.
        inputs (`dict`): With `labels` of shape `(B, Q)`.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    names, name = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()), type(inner).__name__
    if name in names or name.removeprefix("FSDP") not in names:
        return inputs
    labels = torch.nn.functional.pad(inputs["labels"][..., 1:], (0, 1), value=-100)
    return {**inputs, "labels": labels}


def _with_router_losses(trainer: Any, causal_model: Any, compute_loss: Callable) -> Callable:
    def with_router_losses(model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, stats, has_them = inputs.get("labels"), [], []
        hooks = [
            # ahead of the head, which hands them on without their graph
            causal_model.base_model.register_forward_hook(lambda module, args, output: stats.append(_stats(output))),
            causal_model.register_forward_hook(lambda module, args, output: has_them.append(_has_loss(output))),
        ]
        try:
            returned = compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            for hook in hooks:
                hook.remove()
        stats = [statistics for statistics in stats if statistics is not None and statistics.requires_grad]
        if not causal_model.training or any(has_them) or not stats or labels is None:
            return returned
        if len(stats) > 1:
            logger.warning_once(
                f"{type(trainer).__name__} runs the model {len(stats)} times for a loss: the router losses are left out."
            )
            return returned
        loss, outputs = returned if return_outputs else (returned, None)
        weighted = causal_model.weighted_router_loss(*causal_model.router_losses(stats[0]))
        loss = loss + _weight(trainer, labels, num_items_in_batch) * weighted.to(loss.device)
        return (loss, outputs) if return_outputs else loss

    return with_router_losses


def _weight(trainer: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor | float:
    """As Trainer weighs a micro-batch's loss: the ranks' losses are averaged, and it divides by no count that is given."""
    share = share_of_step(labels, num_items_in_batch)
    if num_items_in_batch is None or not trainer.args.average_tokens_across_devices:
        return share
    return share * (trainer.accelerator.num_processes // trainer.get_tp_size())


def _causal_model(model: Any) -> Any:
    """The LocMoe causal model itself or under an adapter; None for another one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner if hasattr(inner, "weighted_router_loss") and hasattr(inner, "lm_head") else None


def _stats(output: Any) -> torch.Tensor | None:
    return getattr(output, "router_stats", None)


def _has_loss(output: Any) -> bool:
    return isinstance(output, LocMoeCausalLMOutputWithPast) and output.loss is not None


__all__ = ["add_router_losses"]
