# SPDX-License-Identifier: Apache-2.0
"""LocMoE for Hugging Face Transformers: importing this package registers the architecture."""

from .configuration_locmoe import LocMoeConfig
from .modeling_locmoe import (
    LocMoeForCausalLM,
    LocMoeForSequenceClassification,
    LocMoeForTokenClassification,
    LocMoeModel,
    LocMoePreTrainedModel,
)
from .registration import register


__version__ = "0.1.0"

register()

__all__ = [
    "LocMoeConfig",
    "LocMoeForCausalLM",
    "LocMoeForSequenceClassification",
    "LocMoeForTokenClassification",
    "LocMoeModel",
    "LocMoePreTrainedModel",
]
