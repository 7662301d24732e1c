# SPDX-License-Identifier: Apache-2.0
"""The decoder's RMS norm: transformers' on the CPU, torch's fused kernels on CUDA."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class LocMoeRMSNorm(LlamaRMSNorm):
    """
    As [`~transformers.models.llama.modeling_llama.LlamaRMSNorm`], with the same parameter `weight`.

    On CUDA it is torch's fused RMS norm, one pass over the hidden states forward and few backward where the eager form
    takes some ten in float32; torch.compile takes the same form apart again, so that compiled and eager models round at
    the same places. It multiplies with the weight before it rounds to the dtype of the hidden states,
    Llama's form after, so in bfloat16 the two differ by a rounding and in float32 by none. Where weight and hidden states
    differ in dtype (a float32 model under autocast) the product with the weight stays apart and the dtype of the result
    is Llama's.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not hidden_states.is_cuda:
            return super().forward(hidden_states)
        if torch.is_autocast_enabled("cuda"):
            with torch.autocast("cuda", enabled=False):
                return self._fused(hidden_states)
        return self._fused(hidden_states)

    def _fused(self, hidden_states: torch.Tensor) -> torch.Tensor:
        same_dtype = self.weight.dtype == hidden_states.dtype
        normed = torch.nn.functional.rms_norm(
            hidden_states, self.weight.shape, self.weight if same_dtype else None, self.variance_epsilon
        )
        return normed if same_dtype else self.weight * normed


__all__ = ["LocMoeRMSNorm"]
