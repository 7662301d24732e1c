# SPDX-License-Identifier: Apache-2.0
"""
PEFT's adapters on a model that is spread over ranks. PEFT 0.21 takes such a model wrongly in four places, for which it has no
registry; each is one method, replaced by [`fit_adapters_to_spread_models`]:

* `LoraLayer._get_in_out_features` gives LoRA the shape of a rank's shard where the mesh has another axis than "fsdp". The
  layer computes all of its outputs, or, under tensor parallelism, PEFT itself shards what it is given whole.
* `ParamWrapper._activate_lora` (`target_parameters`) adds LoRA to a parameter with torch's parametrizations, before the
  module gathers its shards and outside of where its weights are this rank's alone. Of experts that are spread, this rank's
  are adapted inside of their expert parallelism instead: see [`ExpertAdapters`].
* `PeftModel.save_pretrained` gathers the whole base model on every rank and leaves it out again. It is handed the adapter's
  own weights, see [`adapter_weights`].
* `BaseTuner._check_merge_allowed` lets adapters be merged into shards, which ends in the midst of it.

LoRA of experts has whole factors on every rank, small beside the experts, and in PEFT's own format:

    A   (r n, in)    rows of expert 0, expert 1, ...          rank 0 uses  E0 E1      of A and B
    B   (out, r n)   columns by r, then by expert             rank 1 uses        E2 E3

A rank's gradient has its own experts' rows alone, for the tokens of all ranks. The mean over all ranks, which is taken of
everything that is in no shard, makes it that of one process.

Shapes: n experts, P ranks of the expert-parallel group, n / P experts of a rank.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


# What is added to a parameter of n experts: (n, rows, r), (n, r, columns) and the scale of their product.
Factors = tuple[torch.Tensor, torch.Tensor, float]


class ExpertAdapters:
    """
    What adapters add to one layer's experts in the forward that is under way.

    Args:
        experts (`nn.Module`): The module with the experts' parameters.
        copies_of_batch (`int`): Ranks that hold the same batch and compute a share of it each (tensor parallelism).
    """

    def __init__(self, experts: nn.Module, copies_of_batch: int = 1) -> None:
        self._experts = experts
        self._copies_of_batch = copies_of_batch
        self._added: dict[str, list[Factors]] = {}

    @contextmanager
    def added(self, parameter_name: str, factors: list[Factors]) -> Iterator[None]:
        """Inside, these products are part of the parameter, of all experts of the layer in their own order."""
        self._added[parameter_name] = factors
        try:
            yield
        finally:
            del self._added[parameter_name]

    @contextmanager
    def applied(self, expert_ids: torch.Tensor) -> Iterator[None]:
        """
        Inside, the experts' weights are the adapted ones.

        Args:
            expert_ids (`torch.Tensor` of shape `(n / P,)`, int64): Which experts the rows of the local weights are.
        """
        parameters = self._experts._parameters
        weights = {name: parameters[name] for name in self._added}
        for name, weight in weights.items():
            # in `_parameters`, where transformers puts the local weights too
            parameters[name] = self._adapted(weight, self._added[name], expert_ids)  # type: ignore[assignment]
        try:
            yield
        finally:
            parameters.update(weights)

    def _adapted(self, weight: Any, added: Sequence[Factors], expert_ids: torch.Tensor) -> torch.Tensor:
        # in the parameter's dtype also under autocast, as on one process
        with torch.autocast(weight.device.type, enabled=False):
            for left, right, scale in added:
                factors = (
                    self._whole_gradient(factor.index_select(0, expert_ids).to(weight.dtype))
                    for factor in (left, right)
                )
                weight = torch.baddbmm(weight, *factors, alpha=scale)
        return weight

    def _whole_gradient(self, factor: torch.Tensor) -> torch.Tensor:
        """Of which the mean over ranks is taken as if each rank had computed its whole batch."""
        if self._copies_of_batch > 1 and factor.requires_grad:
            factor.register_hook(lambda gradient: gradient * self._copies_of_batch)
        return factor


def adapter_weights(model: Any, on_this_rank: bool = True) -> dict[str, torch.Tensor]:
    """
    What an adapter model trains, and adapters that rest, whole and on the CPU, by the names of the model's state dict. Under
    tensor parallelism, where PEFT shards adapters, all ranks call it; otherwise there is nothing to gather.

    Args:
        model (`PeftModel`): The model.
        on_this_rank (`bool`): Whether this rank gets them; the others get `{}`.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefix = getattr(model.base_model, "prefix", "\0")  # "lora_"
    weights = {}
    for name, tensor in model.state_dict().items():
        if name in trained or prefix in name:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if on_this_rank:
                weights[name] = whole.cpu()
    return weights


# ---- what is replaced in PEFT ---------------------------------------------------------------------------------------


def fit_adapters_to_spread_models() -> None:
    """Corrects PEFT, where it is installed, for the adapters that are made from here on. Idempotent."""
    try:
        from peft import PeftModel
        from peft.tuners.lora import layer as lora
        from peft.tuners.tuners_utils import BaseTuner
    except ImportError:
        return
    for owner, name, replacement in (
        (lora.LoraLayer, "_get_in_out_features", _shape_of_the_computation),
        # versions without it have no LoRA on parameters
        (getattr(lora, "ParamWrapper", None), "_activate_lora", _added_inside_expert_parallelism),
        (PeftModel, "save_pretrained", _saved_without_the_base_model),
        (BaseTuner, "_check_merge_allowed", _not_merged_into_shards),
    ):
        original = getattr(owner, name, None)
        if original is not None and not getattr(original, "_knows_spread_models", False):
            replaced: Any = functools.wraps(original)(replacement(original))
            replaced._knows_spread_models = True
            setattr(owner, name, replaced)


def _shape_of_the_computation(original):
    def get_in_out_features(self, module):
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            return module.in_features, module.out_features
        return original(self, module)

    return get_in_out_features


def _added_inside_expert_parallelism(original):
    def activate_lora(self, active_adapters):
        adapters = [name for name in active_adapters or () if name in self.lora_A]
        parameter = self.get_param()
        if not adapters or not isinstance(parameter, DTensor):
            return original(self, active_adapters)
        layer = getattr(self.get_base_layer(), "locmoe_expert_parallel", None)
        if layer is None or parameter.dim() != 3 or not hasattr(self, "get_delta_factors"):
            raise ValueError(
                f"`target_parameters` ({self.parameter_name}) names a parameter of {parameter.dim()} dimensions that is "
                "spread over ranks: LoRA on it needs expert parallelism (`ep_size` above 1, `ep_implementation` "
                '"locmoe"), weights of three dimensions, one matrix for each expert, and PEFT 0.21 or later. Leave it out, '
                "or train the adapter on one process."
            )
        return layer.adapters.added(self.parameter_name, [self.get_delta_factors(name) for name in adapters])

    return activate_lora


def _not_merged_into_shards(original):
    def check_merge_allowed(self):
        if _is_spread(self.model):
            raise ValueError(
                "An adapter cannot be merged into a model that is spread over ranks: save the adapter, and merge it on one "
                "process, with `PeftModel.from_pretrained(base_model, folder).merge_and_unload()`."
            )
        return original(self)

    return check_merge_allowed


def _saved_without_the_base_model(original):
    def save_pretrained(self, *args, **kwargs):
        given = kwargs.get("state_dict") is not None or kwargs.get("save_embedding_layers") is True
        if _is_spread(self) and not given and not _adapts_embeddings(self):
            kwargs["state_dict"] = adapter_weights(self)
        return original(self, *args, **kwargs)

    return save_pretrained


def _adapts_embeddings(model: Any) -> bool:
    """Then PEFT saves the embeddings, too, which all ranks gather."""
    return any(
        hasattr(module, "base_layer") for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )


def _is_spread(model: Any) -> bool:
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


__all__ = ["ExpertAdapters", "adapter_weights", "fit_adapters_to_spread_models"]
