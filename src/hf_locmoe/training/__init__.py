# SPDX-License-Identifier: Apache-2.0
"""What a Trainer user sees: placement, telemetry and checkpoints of a run."""
