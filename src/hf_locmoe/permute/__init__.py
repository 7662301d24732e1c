# SPDX-License-Identifier: Apache-2.0
"""Rows of tokens brought into another order on one rank: by expert in `moe`, by destination in `distributed`."""
