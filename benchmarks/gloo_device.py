# SPDX-License-Identifier: Apache-2.0
"""
One gloo device for all process groups of a process.

Every gloo group of torch has a device of its own, with a thread that wakes up a hundred times a second. A training has a
handful; a benchmark that keeps all its variants in the same processes has a hundred and more, and their threads take a fifth
of a core from each rank: time that no variant by itself would lose.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def share_gloo_device() -> None:
    """From now on this process's gloo groups share a device, on the interface of `GLOO_SOCKET_IFNAME`, if that is set."""
    own = c10d.ProcessGroupGloo
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    device = own.create_device(interface=interface) if interface else own.create_default_device()

    class SharedGloo(own):
        def __init__(self, store, rank: int, size: int, timeout: timedelta = c10d.default_pg_timeout):
            options = own._Options()
            options._devices = [device]
            options._threads = 2
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    c10d.ProcessGroupGloo = dist.ProcessGroupGloo = SharedGloo


__all__ = ["share_gloo_device"]
