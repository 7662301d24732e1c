# SPDX-License-Identifier: Apache-2.0
"""The one place that touches transformers' Auto classes and registries."""

from __future__ import annotations

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer import DEFAULT_CALLBACKS

from .configuration_locmoe import LocMoeConfig
from .model_card import write_model_card
from .modeling_locmoe import (
    LocMoeForCausalLM,
    LocMoeForSequenceClassification,
    LocMoeForTokenClassification,
    LocMoeModel,
    LocMoePreTrainedModel,
)
from .moe.experts import capacity_bmm_experts_forward
from .training.checkpoint_folder import ResumeGuardCallback
from .training.telemetry import RouterStateCallback, RoutingStatsCallback
from .training.trainer_card import ModelCardCallback, let_trainer_write_our_card


try:
    from transformers.distributed.expert_parallel import EPImplementationInterface
except ImportError:  # transformers before 5.23, or a torch without torch.distributed: no expert parallelism
    EPImplementationInterface = None


MODEL_CLASSES = {
    AutoModel: LocMoeModel,
    AutoModelForCausalLM: LocMoeForCausalLM,
    AutoModelForSequenceClassification: LocMoeForSequenceClassification,
    AutoModelForTokenClassification: LocMoeForTokenClassification,
}


CALLBACKS = [ResumeGuardCallback, RouterStateCallback, RoutingStatsCallback, ModelCardCallback]


def register() -> None:
    """
    Makes `AutoConfig`, `AutoModel` and the task classes know `model_type: locmoe`, and transformers the experts
    implementation `"capacity_bmm"` and the expert-parallel implementation `"locmoe"`. Idempotent.
    """
    AutoConfig.register(LocMoeConfig.model_type, LocMoeConfig, exist_ok=True)
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(LocMoeConfig, model_class, exist_ok=True)
    ALL_EXPERTS_FUNCTIONS.register("capacity_bmm", capacity_bmm_experts_forward)
    if EPImplementationInterface is not None:
        from .distributed.expert_parallel import LocMoeEP
        from .training.locality import LocalityCallback

        EPImplementationInterface.register("locmoe", LocMoeEP)
        if LocalityCallback not in DEFAULT_CALLBACKS:
            DEFAULT_CALLBACKS.append(LocalityCallback)
    # `transformers serve` and TRL look `config.architectures[0]` up as an attribute of the transformers module
    for model_class in MODEL_CLASSES.values():
        setattr(transformers, model_class.__name__, model_class)
    # Trainer's label smoothing and the text-generation pipeline know a causal model by this table of names
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(LocMoeConfig.model_type, LocMoeForCausalLM.__name__)
    # ahead of the trackers' callbacks, which read the logs that the second writes
    for callback in CALLBACKS:
        if callback not in DEFAULT_CALLBACKS:
            DEFAULT_CALLBACKS.append(callback)
    LocMoePreTrainedModel.model_card_writer = staticmethod(write_model_card)
    let_trainer_write_our_card()


__all__ = ["register"]
