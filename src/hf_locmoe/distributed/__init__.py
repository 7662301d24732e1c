# SPDX-License-Identifier: Apache-2.0
"""What moves between ranks: tensors and process groups; knows no model."""
