# SPDX-License-Identifier: Apache-2.0
"""
What a run moves while it trains to reach a node-local share: the weight of each layer's locality loss, and a bias on the
selection of experts.

Shapes: L MoE layers, S = len(RouterStat), n = num_experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

from ..distributed.parallel_run import LocalityOptions, current_parallel_run
from ..moe.baseline_gates import HashGate
from ..moe.routing import RouterStat
from .output_tap import OutputTap
from .telemetry import find_router_model, sum_over_ranks


logger = logging.get_logger(__name__)

SHARE_MOMENTUM = 0.9  # of the running node-local share: ten steps of memory
EASING = 0.05  # the locality loss eases off over this much of the share below its target
BIAS_RATE = 0.1  # of the bias for each step and unit of share that is missing
MAX_BIAS = 4.0  # in logits; cosine logits have unit variance, so a token this far off is not worth its node


class LocalityControl:
    """
    Moves the locality loss's weight and the node bias once per optimizer step. With Trainer a callback does it.

    ```python
    control = LocalityControl(model, plugin.locality_options())
    for batch in loader:
        outputs = model(**batch)
        outputs.loss.backward()
        control.update(outputs.router_stats)
        optimizer.step()
    ```

    Args:
        model: A LocMoe model that is spread over nodes.
        options ([`LocalityOptions`]): Of the run.

    Attributes:
        local_share (`torch.Tensor` of shape `(L,)`): Running node-local share of each layer's assignments, over all ranks.
            It starts again with a resumed run: ten steps.
    """

    def __init__(self, model: nn.Module, options: LocalityOptions):
        self.base_model, self.options = model.base_model, options
        self.blocks = model.sparse_blocks
        near = self.base_model.router_scope.node_local_experts
        assert near is not None, "a model whose experts are all near has no locality to control"
        self.local_share = torch.zeros(len(self.blocks), device=near.device)
        self.bias = torch.zeros(len(self.blocks), device=near.device)
        self.steps = self._updates = 0
        if options.locality_warmup_steps or options.locality_target_share is not None:
            scale = torch.ones_like(self.local_share)
            self.base_model.router_scope = replace(self.base_model.router_scope, locality_scale=scale)
        self._write()

    @torch.no_grad()
    def update(self, router_stats: torch.Tensor) -> None:
        """
        A collective: all ranks call it. No host synchronisation.

        Args:
            router_stats (`torch.Tensor` of shape `(L, S, n)`): This rank's statistics, summed over the step's micro-batches.
        """
        tokens = router_stats[:, RouterStat.TOKENS].to(self.bias.device)
        near = self.base_model.router_scope.node_local_experts
        counts = torch.stack([(tokens * near).sum(dim=-1), tokens.sum(dim=-1)])
        sum_over_ranks(counts)
        share = counts[0] / counts[1].clamp_min(1)
        momentum = min(SHARE_MOMENTUM, self._updates / (self._updates + 1))
        self.local_share.lerp_(share, 1 - momentum)
        self.steps, self._updates = self.steps + 1, self._updates + 1
        if self.options.node_bias_target is not None:
            self.bias.add_(BIAS_RATE * (self.options.node_bias_target - share)).clamp_(0, MAX_BIAS)
        self._write()

    def _write(self) -> None:
        scope, options = self.base_model.router_scope, self.options
        if scope.locality_scale is not None:
            scale = torch.ones_like(self.local_share)
            if options.locality_target_share is not None:
                scale = ((options.locality_target_share - self.local_share) / EASING).clamp(0, 1)
            if options.locality_warmup_steps:
                scale = scale * min(1.0, self.steps / options.locality_warmup_steps)
            scope.locality_scale.copy_(scale)
        if options.node_bias_target is not None:
            for bias, experts, block in zip(self.bias, scope.node_local_experts, self.blocks, strict=True):
                block.gate.node_bias = bias * experts


def locality_control_for(model: nn.Module | None) -> LocalityControl | None:
    """The control of a run for a model; None where there is nothing to control. Warns about options without effect."""
    run, router_model = current_parallel_run(), find_router_model(model)
    if run is None or router_model is None:
        return None
    options = run.locality
    asked = {
        name: value
        for name in ("locality_warmup_steps", "locality_target_share", "node_bias_target")
        if (value := getattr(options, name))
    }
    if not asked:
        return None
    reason = None
    config, is_hash = router_model.config, any(isinstance(module, HashGate) for module in router_model.modules())
    if router_model.base_model.router_scope.node_local_experts is None:
        reason = "no experts are on other nodes"
    elif is_hash:
        reason = "a hash gate has nothing to learn"
    elif config.locality_loss_coef == 0 and set(asked) - {"node_bias_target"}:
        reason = "`locality_loss_coef` is 0"
        asked.pop("node_bias_target", None)  # which works without the loss
    if reason is not None:
        named = ", ".join(f"`{name}` ({value})" for name, value in asked.items())
        logger.warning_once(f"{named} has no effect: {reason}.")
    if router_model.base_model.router_scope.node_local_experts is None or is_hash:
        return None
    return LocalityControl(router_model, options)


class LocalityCallback(TrainerCallback):
    """Moves a run's [`LocalityControl`] once per optimizer step. On by itself in every [`~transformers.Trainer`]."""

    def __init__(self):
        self.control: LocalityControl | None = None
        self._model: nn.Module | None = None
        self._tap = OutputTap(("router_stats",), in_evaluation=False)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if model is not self._model:
            self._model, self.control = model, locality_control_for(model)
            if self.control is not None:
                # a resumed run goes on with the full weight
                self.control.steps = state.global_step
                self._tap.attach(self.control.base_model, self)
        self._tap.take_training()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        sums, _ = self._tap.take_training()
        if self.control is not None and "router_stats" in sums:
            self.control.update(sums["router_stats"])


__all__ = ["LocalityCallback", "LocalityControl", "locality_control_for"]
