# SPDX-License-Identifier: Apache-2.0
"""The one table of tolerances: `torch.testing.assert_close(actual, expected, **TOLERANCES[dtype])`."""

import torch


TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}
