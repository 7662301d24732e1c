# SPDX-License-Identifier: Apache-2.0
"""How the training callbacks see what a model returned, without touching the model or the Trainer."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput


class OutputTap:
    """
    Forward hooks on a module that keep what the router returned until it is taken.

    Training forwards add up; of evaluation forwards the newest stands alone, so that one that nobody takes leaves no
    trace. A tap that watches evaluation asks the module for `router_stats` where neither the caller nor the config did,
    and takes them out of the output again: the caller gets what it would have got, and a model around the module sees
    nothing to compute losses from, which would be a collective that other ranks may not take part in.

    Args:
        names (`tuple[str, ...]`): Fields of the model's output to keep.
        in_evaluation (`bool`): Whether to watch evaluation forwards too.
    """

    def __init__(self, names: tuple[str, ...], in_evaluation: bool):
        self.names = names
        self.in_evaluation = in_evaluation
        self._training: dict[str, torch.Tensor] = {}
        self._num_training_forwards = 0
        self._evaluation: dict[str, torch.Tensor] = {}
        self._asked = False

    def attach(self, module: nn.Module, owner: Any) -> None:
        """Hooks the module until `owner` is garbage-collected: a callback taken off its Trainer leaves nothing behind."""
        # The first tap to ask is the last to look: it clears the output after every other one has read it.
        handles = [module.register_forward_hook(self.after, prepend=True)]
        if self.in_evaluation:
            handles.append(module.register_forward_pre_hook(self.before, with_kwargs=True))
        weakref.finalize(owner, _remove_all, handles)

    def take_training(self) -> tuple[dict[str, torch.Tensor], int]:
        """The sums over the training forwards since the last call, and how many those were."""
        kept, num_forwards = self._training, self._num_training_forwards
        self._training, self._num_training_forwards = {}, 0
        return kept, num_forwards

    def take_evaluation(self) -> dict[str, torch.Tensor]:
        """What the newest evaluation forward returned, once."""
        kept, self._evaluation = self._evaluation, {}
        return kept

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        wanted = kwargs.get("output_router_stats")
        if wanted is None:
            wanted = module.config.output_router_stats
        self._asked = not module.training and not wanted
        if self._asked:
            kwargs = {**kwargs, "output_router_stats": True}
        return args, kwargs

    def after(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if module.training:
            if torch.is_grad_enabled():
                for name, value in self._read(output).items():
                    self._training[name] = self._training[name] + value if name in self._training else value
                self._num_training_forwards += 1
        elif self.in_evaluation:
            self._evaluation = self._read(output)
            if self._asked and isinstance(output, ModelOutput):
                return type(output)(**{name: value for name, value in output.items() if name != "router_stats"})
        return None

    def _read(self, output: Any) -> dict[str, torch.Tensor]:
        values = {name: getattr(output, name, None) for name in self.names}
        return {name: value.detach() for name, value in values.items() if isinstance(value, torch.Tensor)}


def _remove_all(handles: list) -> None:
    for handle in handles:
        handle.remove()


__all__ = ["OutputTap"]
