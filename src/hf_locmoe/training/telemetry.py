# SPDX-License-Identifier: Apache-2.0
"""
What the router does while a model trains: sums on the device, a few numbers in the Trainer's log, everything in a file.

What the model returns is the only source. Forward hooks keep the `router_stats` of the decoder and the losses of the whole
model, and the callbacks collect them once per micro-batch: the hooks run once per forward whatever activation checkpointing
recomputes, trace under `torch.compile` without a graph break, and cost no host synchronisation. The numbers come to the
host once per log event.

Shapes: L = MoE layers, S = len(RouterStat), n = num_experts, k = num_experts_per_tok, T = tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..moe.capacity import effective_capacity_factor
from ..moe.losses import load_balancing_loss
from ..moe.overflow import CapacityRule
from ..moe.routing import RouterStat
from .output_tap import OutputTap
from .routing_log import append_record, discard_records_after
from .traffic import TrafficStats


logger = logging.get_logger(__name__)

TELEMETRY_ENV = "LOCMOE_TELEMETRY"
LOSS_NAMES = ("router_aux_loss", "locality_loss")
MEAN_METRICS = ("load_cv", "drop_rate", "reroute_rate", "aux_loss", "entropy", "cosine")
MODEL_FACTS = ("hidden_size", "num_experts", "num_experts_per_tok", "gate_type")


class RoutingStats:
    """
    Sums of router statistics and router losses over forwards, on the device.

    Every entry is a sum over tokens or over forwards, so micro-batches and ranks add up, and every metric is a ratio of
    sums taken at the end: the mean over ranks of a ratio would not be the ratio of the whole batch.

    ```python
    stats = RoutingStats()
    for batch in batches:
        outputs = model(**batch, output_router_stats=True)
        stats.update(outputs.router_stats)
    stats.all_reduce()
    print(stats.summary()["overall"])
    ```
    """

    def __init__(self):
        # L * S * n statistics, the losses, the forwards that returned losses, the forwards
        self._sums: torch.Tensor | None = None
        self._shape: torch.Size | None = None

    def update(
        self, router_stats: torch.Tensor, losses: dict[str, torch.Tensor] | None = None, num_forwards: int = 1
    ) -> None:
        """
        Adds one forward, or the sums over several.

        Args:
            router_stats (`torch.Tensor` of shape `(L, S, n)`): The model's output; detached here.
            losses (`dict[str, torch.Tensor]`, *optional*): The scalars `router_aux_loss` and `locality_loss`, both or none.
            num_forwards (`int`, *optional*, defaults to 1): How many forwards the tensors are sums of.
        """
        flat = router_stats.detach().float()
        scalars = [
            torch.as_tensor(losses[name]).detach().float() if losses else flat.new_zeros(()) for name in LOSS_NAMES
        ]
        scalars += [flat.new_full((), num_forwards if losses else 0), flat.new_full((), num_forwards)]
        flat = torch.cat([flat.flatten(), torch.stack([scalar.to(flat.device) for scalar in scalars])])
        if self._sums is None:
            # counts leave float32's integers after 2^24 tokens; not every device has float64
            dtype = torch.float64 if flat.device.type in ("cpu", "cuda") else torch.float32
            self._shape = router_stats.shape
            self._sums = torch.zeros_like(flat, dtype=dtype)
        self._sums.add_(flat.to(self._sums.device))

    def __bool__(self) -> bool:
        """Whether any forward was ever added. Equal on all ranks, which decides about a collective."""
        return self._sums is not None

    def reset(self) -> None:
        """Back to zero, keeping the device buffer."""
        if self._sums is not None:
            self._sums.zero_()

    def all_reduce(self) -> None:
        """Sums over all ranks, in place, with one collective; nothing on one process. All ranks have to call it."""
        if self._sums is not None:
            sum_over_ranks(self._sums)

    def summary(self) -> dict[str, Any]:
        """
        The metrics, with one transfer to the host.

        Returns:
            `dict`: `tokens` (routed by each layer) and `forwards` (micro-batches), over whatever was added; `overall`, by
            the names of the Trainer's log; `layers`, one dict a layer:

            - `load`: each expert's share of the assignments, n floats summing to 1; `load_cv`: its standard deviation
              over its mean; `max_load`: the greatest share times n, 1.0 where balanced;
            - `drop_rate` and `reroute_rate`: shares of the assignments; `dropped`: by the expert wanted, n shares;
            - `aux_loss`: the load-balancing loss of all the tokens at once, lower than the mean over their batches;
            - `entropy`: mean entropy of a token's distribution, in units of log n; `probability`: the mean distribution,
              n floats; `cosine`: mean cosine of a token with its expert's gate weight (0 for a gate without weights).

            Overall values are means over layers, except `routing/max_load`, the worst layer's; the losses are means over
            the forwards that returned them, and left out where none did.
        """
        if self._sums is None or self._shape is None:
            return {"tokens": 0, "forwards": 0, "overall": {}, "layers": []}
        values = self._sums.cpu().double()
        num_scalars = len(LOSS_NAMES) + 2
        *losses, loss_forwards, forwards = values[-num_scalars:].tolist()
        layers = [_layer_summary(rows) for rows in values[:-num_scalars].view(self._shape)]
        overall: dict[str, float] = {}
        if loss_forwards:
            overall |= {name: loss / loss_forwards for name, loss in zip(LOSS_NAMES, losses, strict=True)}
        for name in MEAN_METRICS:
            overall[f"routing/{name}"] = sum(layer[name] for layer in layers) / len(layers)
        overall["routing/max_load"] = max(layer["max_load"] for layer in layers)
        return {
            "tokens": max(layer.pop("tokens") for layer in layers),
            "forwards": round(forwards),
            "overall": overall,
            "layers": layers,
        }


def _layer_summary(rows: torch.Tensor) -> dict[str, Any]:
    """One layer's metrics from its (S, n) sums, float64 on the host."""
    num_experts = rows.shape[-1]
    num_tokens = rows[RouterStat.PROB_SUM].sum().clamp_min(1)  # a softmax sums to one
    num_assignments = rows[RouterStat.TOKENS].sum().clamp_min(1)
    load = rows[RouterStat.TOKENS] / num_assignments
    dropped = rows[RouterStat.DROPPED] / num_assignments
    entropy = rows[RouterStat.ENTROPY_SUM].sum() / num_tokens
    return {
        "tokens": round(num_tokens.item()),
        "load": load.tolist(),
        "load_cv": (load.std(correction=0) * num_experts).item(),
        "max_load": (load.amax() * num_experts).item(),
        "dropped": dropped.tolist(),
        "drop_rate": dropped.sum().item(),
        "reroute_rate": (rows[RouterStat.REROUTED].sum() / num_assignments).item(),
        "aux_loss": load_balancing_loss(rows[RouterStat.PROB_SUM], rows[RouterStat.TOKENS], num_tokens).item(),
        "entropy": entropy.item() / math.log(num_experts) if num_experts > 1 else 0.0,
        "probability": (rows[RouterStat.PROB_SUM] / num_tokens).tolist(),
        "cosine": (rows[RouterStat.COS_SUM].sum() / num_tokens).item(),
    }


def sum_over_ranks(tensor: torch.Tensor) -> None:
    """All-reduces in place over the default process group, where there is one of more than one rank."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)


def find_router_model(model: nn.Module | None) -> nn.Module | None:
    """The module inside `model` (PEFT, DDP or compiled, or the model itself) that routes; None where there is none."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if hasattr(type(module), "update_router_state")), None)


class RouterStateCallback(TrainerCallback):
    """
    Moves the router's own state (balance bias, running mean, critical capacity) once per optimizer step.

    On by itself in every [`~transformers.Trainer`]; a hand-written loop calls `model.update_router_state` instead. Does
    nothing for models without such state.
    """

    def __init__(self):
        self._model: nn.Module | None = None
        self._router_model: nn.Module | None = None
        self._tap = OutputTap(("router_stats", "router_hidden_sum"), in_evaluation=False)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model is not self._model:
            self._model, self._router_model = model, find_router_model(model)
            if self._router_model is not None and not _has_router_state(self._router_model.config):
                self._router_model = None
            if self._router_model is not None:
                self._tap.attach(self._router_model.base_model, self)
        self._tap.take_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        sums, num_forwards = self._tap.take_training()
        if self._router_model is None or not num_forwards:
            return
        if "router_stats" not in sums:
            raise ValueError(
                "`output_router_stats` (False) must be None or True in training with `balance_bias_update_rate` > 0, "
                "`gate_centering` or `capacity_mode='critical'`, which are moved by those statistics: leave "
                "`output_router_stats` unset."
            )
        for value in sums.values():
            sum_over_ranks(value)
        self._router_model.update_router_state(**sums)


class RoutingStatsCallback(TrainerCallback):
    """
    Logs what the router does, in training and in evaluation, for every model that returns `router_stats`.

    On by itself in every [`~transformers.Trainer`]. The Trainer's log, and with it every tracker and `trainer_state.json`,
    gets `router_aux_loss`, `locality_loss`, `routing/load_cv` (also per layer), `routing/max_load`, `routing/drop_rate`,
    `routing/entropy`, `routing/cosine` and, where one is in force, the capacity factor `routing/capacity`; with the
    prefix of the evaluation for evaluations. `<output_dir>/routing_stats.jsonl` gets all layers and experts.
    Training values cover all micro-batches of all ranks since the log before. On several ranks they have `comm/...`, and on
    several nodes `routing/local_share`, for the expert exchange of every architecture (see [`TrafficStats`]).

    Off with `trainer.remove_callback(RoutingStatsCallback)`, or `LOCMOE_TELEMETRY=0` in the environment.
    """

    def __init__(self):
        self.enabled = os.environ.get(TELEMETRY_ENV, "1").strip().lower() not in ("0", "false", "off", "no")
        self._model: nn.Module | None = None
        self._router_model: nn.Module | None = None
        self._stats_tap = OutputTap(("router_stats",), in_evaluation=True)
        self._loss_tap = OutputTap(LOSS_NAMES, in_evaluation=False)
        self._training = RoutingStats()
        self._evaluation = RoutingStats()
        self._traffic = TrafficStats()
        self._writes_file = True

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._watch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._watch(model)
        self._collect_training()
        self._training.reset()
        self._traffic.watch(model if self.enabled else None, self._router_model)
        if self._router_model is not None and state.is_world_process_zero:
            self._try_file(discard_records_after, args.output_dir, state.global_step)

    def _watch(self, model: nn.Module | None) -> None:
        if self.enabled and model is not self._model:
            self._model, self._router_model = model, find_router_model(model)
            if self._router_model is not None:
                self._stats_tap.attach(self._router_model.base_model, self)
                self._loss_tap.attach(model, self)

    def on_step_begin(self, args, state, control, **kwargs):
        self._traffic.begin_step()

    def on_step_end(self, args, state, control, **kwargs):
        self._traffic.end_step()

    def on_substep_end(self, args, state, control, **kwargs):
        self._collect_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._collect_training()

    def _collect_training(self) -> None:
        stats, num_forwards = self._stats_tap.take_training()
        losses, _ = self._loss_tap.take_training()
        if "router_stats" in stats:
            self._training.update(stats["router_stats"], losses, num_forwards)
        self._traffic.collect(stats.get("router_stats"))

    def on_prediction_step(self, args, state, control, **kwargs):
        stats = self._stats_tap.take_evaluation()
        if "router_stats" in stats:
            self._evaluation.update(stats["router_stats"])

    def on_log(self, args, state, control, logs=None, **kwargs):
        # Only the Trainer's own events: all ranks reach them, and there is a collective ahead.
        logs = {} if logs is None else logs
        if "loss" in logs:
            metrics = self._flush_training(args, state)
        elif "train_loss" in logs:  # the end of training: what came after the last log is for the file alone
            self._flush_training(args, state)
            return
        elif (prefix := _evaluation_prefix(logs)) is not None:
            metrics = self._flush(self._evaluation, prefix, args, state)
        else:
            return
        logs.update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
        if metrics is not None and (prefix := _evaluation_prefix(metrics)) is not None:
            metrics.update(self._flush(self._evaluation, prefix, args, state))

    def _flush_training(self, args, state) -> dict[str, float]:
        traffic, shares = self._traffic.flush(args.device)
        metrics = self._flush(self._training, "train", args, state, traffic, shares)
        if not metrics:  # a model that returned no router statistics
            return traffic | {f"routing/layer_{index}/local_share": share for index, share in enumerate(shares)}
        return metrics

    def _flush(
        self,
        stats: RoutingStats,
        kind: str,
        args,
        state,
        traffic: dict[str, float] | None = None,
        local_shares: Sequence[float] = (),
    ) -> dict[str, float]:
        """Reduces, writes and clears `stats`; returns what belongs in the Trainer's log."""
        if self._router_model is None or not stats:
            return {}
        stats.all_reduce()
        summary = stats.summary()
        stats.reset()
        if not summary["forwards"]:
            return {}
        config, layers = self._router_model.config, summary["layers"]
        has_remote_tier = any(block.remote_tier is not None for block in self._router_model.sparse_blocks)
        metrics = _logged_metrics(summary["overall"], config, has_remote_tier)
        capacity = _capacity_factor(self._router_model, summary["tokens"] / summary["forwards"])
        if capacity is not None:
            metrics["routing/capacity"] = capacity
        metrics |= traffic or {}
        for layer, share in zip(layers, local_shares):
            layer["local_share"] = share
        if state.is_world_process_zero:
            for layer, index in zip(layers, config.sparse_layers, strict=True):
                layer["layer"] = index
            record = {"kind": kind, "step": state.global_step, "epoch": state.epoch, **summary, "overall": metrics}
            record["model"] = {name: getattr(config, name) for name in MODEL_FACTS}
            self._try_file(append_record, args.output_dir, _rounded(record))
        if kind == "train":
            for index, layer in zip(config.sparse_layers, layers, strict=True):
                for name in ("load_cv", "local_share"):
                    if name in layer:
                        metrics[f"routing/layer_{index}/{name}"] = layer[name]
            return metrics
        return {f"{kind}_{name}": value for name, value in metrics.items()}

    def _try_file(self, write, *arguments) -> None:
        """A full disk is no reason to lose a run: telemetry gives up its file and says so."""
        if not self._writes_file:
            return
        try:
            write(*arguments)
        except OSError as error:
            self._writes_file = False
            logger.warning(f"Routing statistics are no longer written to {arguments[0]}: {error}.")


def _has_router_state(config) -> bool:
    return config.balance_bias_update_rate > 0 or config.gate_centering or config.capacity_mode == "critical"


def _logged_metrics(overall: dict[str, float], config, has_remote_tier: bool) -> dict[str, float]:
    """What the Trainer's log gets: without what this config leaves constant, with one load-balancing loss."""
    metrics = {"router_aux_loss": overall["routing/aux_loss"], **overall}
    del metrics["routing/aux_loss"]
    if config.gate_type == "hash":  # has no weights to be at an angle with
        del metrics["routing/cosine"]
    if config.capacity_overflow != "next_best" and not has_remote_tier:
        del metrics["routing/reroute_rate"]
    return metrics


def _evaluation_prefix(metrics: dict[str, Any]) -> str | None:
    """The `metric_key_prefix` of an evaluation, which the Trainer gives to every key; its timing is always there."""
    return next((key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")), None)


def _capacity_factor(model: nn.Module, tokens_per_forward: float) -> float | None:
    """The mean over layers of the capacity in force, as a multiple of the mean load; None where nothing is bounded."""
    num_tokens = round(tokens_per_forward)
    factors = []
    for rule in model.modules():
        if isinstance(rule, CapacityRule) and (capacity := rule.capacity(num_tokens)) is not None:
            factors.append(effective_capacity_factor(capacity, num_tokens, rule.num_experts, rule.top_k))
    return sum(factors) / len(factors) if factors else None


def _rounded(value: Any) -> Any:
    """Six significant digits for every float; None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


__all__ = ["RouterStateCallback", "RoutingStats", "RoutingStatsCallback", "find_router_model"]
