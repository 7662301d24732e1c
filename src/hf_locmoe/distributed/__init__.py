# SPDX-License-Identifier: Apache-2.0
"""What moves between ranks: tensors and process groups; knows no model."""

from hf_locmoe_backend import register


# `import torch` has done this where the package is installed; a bare checkout on the path has no entry point.
register()
