# SPDX-License-Identifier: Apache-2.0
"""The backends that do the work: gloo, NCCL, xccl or what a device registered, built as `torch.distributed` does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, ProcessGroup


_OWN_NAME = "locmoe"


def inner_backend_names(override: str | None = None) -> dict[str, str]:
    """
    Device type -> backend name: gloo for the CPU, and for the accelerator of this machine, if there is one, its
    default.

    Args:
        override (`str`, *optional*): one backend for all devices, such as `"gloo"` or `"fake"`.
    """
    devices = ["cpu"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type != "cpu":
        devices.append(accelerator.type)
    names = {device: override or Backend.default_device_backend_map.get(device, _OWN_NAME) for device in devices}
    # A device whose default was unknown when the backend was registered got the backend itself as its default.
    return {device: name for device, name in names.items() if name != _OWN_NAME}


class InnerBackends:
    """
    The native backends of one set of ranks, one per device type, usable in several `ProcessGroup`s at once.

    Args:
        store: prefixed for this set of ranks.
        rank (`int`), size (`int`): this rank among them.
        timeout (`timedelta`): after which the backend itself gives up.
        names (`dict[str, str]`): device type -> backend name.
        global_ranks (`Sequence[int]`), group_name (`str`): for the backends' own messages.
        options: the backend's own options, such as `ProcessGroupNCCL.Options()`.
    """

    def __init__(
        self,
        store,
        rank: int,
        size: int,
        timeout: timedelta,
        names: dict[str, str],
        global_ranks: Sequence[int],
        group_name: str,
        options=None,
    ) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.names = names
        self.backends = {
            device: _build(
                name, dist.PrefixStore(f"{device}/", store), rank, size, timeout, global_ranks, group_name, options
            )
            for device, name in names.items()
        }

    def register_on(self, group: ProcessGroup) -> None:
        """Makes `group` use these backends, the accelerator's as its default."""
        for device, name in self.names.items():
            kind = Backend.backend_type_map[name]
            group._register_backend(torch.device(device), kind, self.backends[device])
            group._set_default_backend(kind)

    def as_group(self) -> ProcessGroup:
        """A plain process group over these backends."""
        group = ProcessGroup(self.store, self.rank, self.size)
        self.register_on(group)
        return group


def _build(name: str, store, rank: int, size: int, timeout: timedelta, global_ranks, group_name: str, options):
    if name == Backend.GLOO:
        backend = dist.ProcessGroupGloo(store, rank, size, timeout=timeout)
        backend._set_sequence_number_for_group()
        return backend
    if name == Backend.NCCL:
        options = _fill(options or dist.ProcessGroupNCCL.Options(), timeout, global_ranks, group_name)
        backend = dist.ProcessGroupNCCL(store, rank, size, options)
        backend._set_sequence_number_for_group()
        return backend
    if name == Backend.XCCL:
        options = _fill(options or dist.ProcessGroupXCCL.Options(), timeout, global_ranks, group_name)
        return dist.ProcessGroupXCCL(store, rank, size, options)
    plugin = Backend._plugins.get(name.upper())
    if plugin is None:
        raise RuntimeError(
            f"The inner backend `{name}` is not known to torch.distributed ({', '.join(Backend.backend_list)}): "
            "import the package that registers it before the process group is made."
        )
    if not plugin.extended_api:
        return plugin.creator_fn(store, rank, size, timeout)
    settings = dist.distributed_c10d._DistributedBackendOptions()
    settings.store = store
    settings.group_rank = rank
    settings.group_size = size
    settings.timeout = timeout
    settings.group_id = group_name
    settings.global_ranks_in_group = list(global_ranks)
    return plugin.creator_fn(settings, options)


def _fill(options, timeout: timedelta, global_ranks: Sequence[int], group_name: str):
    options._timeout = timeout
    options.global_ranks_in_group = list(global_ranks)
    options.group_name = group_name
    return options
