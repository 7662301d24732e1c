# SPDX-License-Identifier: Apache-2.0
"""The routing of a run as figures and a page: what `locmoe report` writes."""

from .run import ReportError
from .write import write_report


__all__ = ["ReportError", "write_report"]
