# SPDX-License-Identifier: Apache-2.0
"""`locmoe plan`: memory, bytes and step time of every layout and way of routing, on paper, and which layout to take."""

from .options import plan_from_options


__all__ = ["plan_from_options"]
