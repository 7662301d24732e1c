# SPDX-License-Identifier: Apache-2.0
"""What one rank computes: gate, losses, capacity, experts."""
