# SPDX-License-Identifier: Apache-2.0
"""
PEFT's adapters on layers that are sharded inside a node and replicated over nodes.

PEFT 0.21 (`tuners_utils._get_in_out_features`) takes any mesh with an axis beside "fsdp" for tensor parallelism and gives LoRA
the shape of the rank's shard. The axis of the replicas, "dp_replicate", shards nothing either: the layer computes all of its
outputs, and LoRA has to as well.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch.distributed.tensor import DTensor


_AXES_THAT_SPLIT_NO_COMPUTATION = {"pp", "dp_replicate", "fsdp"}


def fit_adapters_to_replicas() -> None:
    """
    Corrects the shapes of LoRA for the adapters that are made from here on, where the script has imported PEFT. Idempotent.
    Versions of PEFT without the method that is replaced take the layer's own shape.
    """
    lora = sys.modules.get("peft.tuners.lora.layer")
    method = getattr(lora.LoraLayer, "_get_in_out_features", None) if lora is not None else None
    if method is None or getattr(method, "_knows_replicas", False):
        return

    @functools.wraps(method)
    def get_in_out_features(self, module):
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and isinstance(weight, DTensor):
            mesh = weight.device_mesh
            split = {name for name, size in zip(mesh.mesh_dim_names or (), mesh.shape) if size > 1}
            if split <= _AXES_THAT_SPLIT_NO_COMPUTATION:
                return module.in_features, module.out_features
        return method(self, module)

    get_in_out_features._knows_replicas = True  # type: ignore[attr-defined]
    lora.LoraLayer._get_in_out_features = get_in_out_features  # type: ignore[union-attr]


__all__ = ["fit_adapters_to_replicas"]
