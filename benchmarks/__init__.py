# SPDX-License-Identifier: Apache-2.0
"""Measurements, one file per question; see README.md. Nothing in the package imports this."""
