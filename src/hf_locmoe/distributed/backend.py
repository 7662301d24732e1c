# SPDX-License-Identifier: Apache-2.0
"""The process-group backend "locmoe": collectives by the device's own backend, the all-to-all by groups where it pays.

`LocMoeProcessGroup` is a Python subclass of `ProcessGroup`. It registers the native backends on itself, so that C++
code that asks for a device's backend finds one, and forwards every collective to a plain `ProcessGroup` over the same
backends: a collective left to the base class would run with the interpreter's lock held and could block gloo's
threads. Old and new names of torch's methods are all overridden; `tests/unit/distributed/test_backend.py` compares the
list with the installed torch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .collectives import PLANS, GroupwiseAllToAll, watch
from .counters import CommCounters, TrafficLog
from .failure import TIMEOUT_VARIABLE, Call, FailureDesk
from .inner_backend import InnerBackends, inner_backend_names
from .launch_environment import node_key
from .topology import NodeTopology


logger = logging.getLogger(__name__)

PLAN_VARIABLE = "LOCMOE_PLAN"
# torch's own default for gloo is half an hour, in which nobody learns that a rank was lost.
DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class LocMoeBackendOptions:
    """
    Options of one group: `new_group(..., backend="locmoe", pg_options=LocMoeBackendOptions(plan="flat"))`.

    Args:
        plan (`str`, *optional*): `"auto"`, `"flat"`, `"two_level"` or `"tp_domain"`; `LOCMOE_PLAN` when left out,
            else auto.
        timeout_s (`float`, *optional*): seconds within which a lost or stalled rank gives an error. `LOCMOE_TIMEOUT_S`
            when left out, else the group's own timeout, else 600.
        inner (`str`, *optional*): inner backend for all devices; each device's default when left out. `"fake"` lays
            out large groups in one process.
        inner_options (*optional*): options of the inner backend, such as `ProcessGroupNCCL.Options()`.
    """

    plan: str | None = None
    timeout_s: float | None = None
    inner: str | None = None
    inner_options: object = None


class LocMoeProcessGroup(dist.ProcessGroup):
    """
    One group of ranks. Made by `torch.distributed`, not by hand.

    Args:
        store: the group's store.
        rank (`int`), size (`int`): this rank in the group, and the group's ranks.
        timeout (`timedelta`): the group's timeout as `torch.distributed` gives it.
        global_ranks (`Sequence[int]`): global rank of every rank.
        name (`str`): the group's name.
        options ([`LocMoeBackendOptions`]): see there.
    """

    def __init__(
        self,
        store,
        rank: int,
        size: int,
        timeout: timedelta,
        global_ranks: Sequence[int],
        name: str,
        options: LocMoeBackendOptions,
    ) -> None:
        super().__init__(rank, size)
        self._store = store
        self._rank = rank
        self._size = size
        self._name = name
        self._options = options
        self._process = os.getpid()
        self._plan = _read_plan(options)
        timeout_s = _read_timeout(options, timeout)
        self._inner_names = inner_backend_names(options.inner)
        self.topology = self._agree_on_nodes(global_ranks, timeout_s)
        if self._plan == "two_level" and not self.topology.is_rectangular and rank == 0:
            logger.warning(
                "`plan` (two_level) has no effect on a group whose nodes differ in size (%s ranks): its exchanges are "
                "flat.",
                ", ".join(map(str, self.topology.node_sizes)),
            )
        self._desk = FailureDesk(dist.PrefixStore("failure/", store), rank, self.topology, timeout_s)
        backends = self._make_backends("inner", tuple(range(size)))
        backends.register_on(self)
        self._inner = backends.as_group()
        self._traffic = TrafficLog()
        self._ring_leaves_node = not self.topology.same_node(rank)[(rank + 1) % size]
        self._all_to_all = GroupwiseAllToAll(
            self.topology,
            rank,
            self._inner,
            lambda prefix, members: self._make_backends(prefix, members).as_group(),
            store,
            self._desk,
            self._traffic,
            self._plan,
            name,
        )

    # ---- making ----------------------------------------------------------------------------------------------------

    def _agree_on_nodes(self, global_ranks: Sequence[int], timeout_s: float) -> NodeTopology:
        """
        Every rank publishes its node and its settings and reads the others': different plans would hang, not fail.
        """
        mine = {"node": node_key(global_ranks[self._rank]), "plan": self._plan, "timeout_s": timeout_s}
        if "fake" in self._inner_names.values():
            nodes = [node_key(rank) for rank in global_ranks]
        else:
            store = dist.PrefixStore("layout/", self._store)
            store.set(str(self._rank), json.dumps(mine))
            ranks = [str(rank) for rank in range(self._size)]
            try:
                store.wait(ranks, timedelta(seconds=timeout_s))
            except RuntimeError as error:
                absent = [global_ranks[rank] for rank in range(self._size) if not store.check([str(rank)])]
                raise RuntimeError(
                    f"The process group `{self._name}` could not be made: ranks {absent} did not arrive within "
                    f"{timeout_s:g} s. Look at their logs first; if they are only slow, raise `{TIMEOUT_VARIABLE}` "
                    f"({timeout_s:g})."
                ) from error
            settings = [json.loads(text) for text in store.multi_get(ranks)]
            for field, source in (("plan", PLAN_VARIABLE), ("timeout_s", TIMEOUT_VARIABLE)):
                values = [rank_settings[field] for rank_settings in settings]
                if len(set(values)) > 1:
                    other = next(rank for rank in range(self._size) if values[rank] != values[0])
                    raise ValueError(
                        f"`{field}` ({values[0]} on rank {global_ranks[0]}, {values[other]} on rank "
                        f"{global_ranks[other]}) must be the same on all ranks of a group: set `{source}` alike "
                        "everywhere, or pass the same options."
                    )
            nodes = [rank_settings["node"] for rank_settings in settings]
        topology = NodeTopology.from_keys(nodes, {node: node.rpartition(":")[2] for node in nodes})
        return NodeTopology(topology.rank_to_node, (), tuple(global_ranks), topology.node_names)

    def _make_backends(self, prefix: str, members: Sequence[int]) -> InnerBackends:
        return InnerBackends(
            dist.PrefixStore(f"{prefix}/", self._store),
            members.index(self._rank),
            len(members),
            # our explanation comes first, then the backend's own end of patience
            timedelta(seconds=self._desk.timeout_s + self._desk.grace_s),
            self._inner_names,
            [self.topology.global_ranks[member] for member in members],
            f"{self._name}/{prefix}",
            self._options.inner_options,
        )

    def split_group(self, new_ranks, timeout=None, opts=None, group_name=None, group_desc=None, device_types=None):
        """A group of some of this group's ranks, a "locmoe" group again. All of this group's ranks call it."""
        new_ranks = list(new_ranks)
        if self._rank not in new_ranks:
            return None
        group_name = group_name or f"{self._name}:split:{'_'.join(map(str, new_ranks))}"
        group = LocMoeProcessGroup(
            dist.PrefixStore(f"split/{group_name}/", self._store),
            new_ranks.index(self._rank),
            len(new_ranks),
            timeout or timedelta(seconds=self._desk.timeout_s),
            [self.topology.global_ranks[rank] for rank in new_ranks],
            group_name,
            self._options,
        )
        group._set_group_name(group_name)
        group._set_group_desc(group_desc or f"{self.group_desc}:split")
        return group

    def merge_remote_group(self, *args, **kwargs):
        raise NotImplementedError(
            "`merge_remote_group` is not available on a `locmoe` group: merge groups of the inner backend instead."
        )

    # C++ looks the overrides up by these names.
    splitGroup = split_group
    mergeRemoteGroup = merge_remote_group

    def getBackendName(self) -> str:
        return "locmoe"

    def get_group_store(self):
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        """Seconds within which a lost or stalled rank gives an error; all ranks alike."""
        self._desk.set_timeout(timeout.total_seconds())
        self._inner.set_timeout(timeout)

    def shutdown(self) -> None:
        self._stop_watching()
        self._all_to_all.stop()
        for group in (self._inner, *self._all_to_all.subgroups()):
            group.shutdown()

    def abort(self) -> None:
        self._stop_watching()
        self._all_to_all.stop()
        for group in (self._inner, *self._all_to_all.subgroups()):
            group.abort()

    def _stop_watching(self) -> None:
        if self._desk.accelerator_watch is not None:
            self._desk.accelerator_watch.forget()

    # ---- collectives -----------------------------------------------------------------------------------------------

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError(
                f"The process group `{self._name}` was made in process {self._process} and is used in its fork "
                f"{os.getpid()}, where its connections do not work: make process groups after the fork, or start "
                "processes with spawn."
            )

    def all_to_all_single(self, output, input, output_split_sizes, input_split_sizes, *args, **kwargs):
        self._check_process()
        return self._all_to_all.all_to_all_single(
            output, input, output_split_sizes, input_split_sizes, *args, **kwargs
        )

    # torch 2.11 calls it by this name
    alltoall_base = all_to_all_single

    def alltoall(self, output_tensors, input_tensors, *args, **kwargs):
        self._check_process()
        return self._all_to_all.all_to_all(output_tensors, input_tensors, *args, **kwargs)

    def send(self, tensors, dst, tag, *args, **kwargs):
        self._check_process()
        near = self.topology.node_of_rank(dst) == self.topology.node_of_rank(self._rank)
        num_bytes, _ = _measure(tensors)
        self._traffic.add("send", 1, int(near), int(not near), num_bytes * near, num_bytes * (not near))
        call = Call(0, f"send to {self.topology.describe_rank(dst)}", self._desk.label)
        return watch(self._inner.send(tensors, dst, tag, *args, **kwargs), call, self._desk, tensors[0].device)

    def recv(self, tensors, src, tag, *args, **kwargs):
        self._check_process()
        self._traffic.add("recv", 1)
        call = Call(0, f"recv from {self.topology.describe_rank(src)}", self._desk.label)
        return watch(self._inner.recv(tensors, src, tag, *args, **kwargs), call, self._desk, tensors[0].device)

    def recv_anysource(self, tensors, tag, *args, **kwargs):
        self._check_process()
        self._traffic.add("recv", 1)
        call = Call(0, "recv from any rank", self._desk.label)
        return watch(self._inner.recv_anysource(tensors, tag, *args, **kwargs), call, self._desk, tensors[0].device)

    def _device_without_tensors(self, values: Sequence) -> torch.device:
        """Where a barrier runs: what its options say, else the backend that is the group's default."""
        chosen = next((value.device for value in values if isinstance(value, dist.BarrierOptions)), None)
        kind = chosen.type if chosen is not None else list(self._inner_names)[-1]
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())

    def _count_ring(self, collective: str, num_bytes: int, messages: int) -> None:
        if self._ring_leaves_node:
            self._traffic.add(collective, 1, 0, messages, 0, num_bytes)
        else:
            self._traffic.add(collective, 1, messages, 0, num_bytes, 0)


def _forward(method: str, collective: str, payload: int, sent: Callable[[int, int], tuple[int, int]]):
    """
    A method that hands a collective on to the inner group.

    Args:
        method (`str`): name of the method of `ProcessGroup`.
        collective (`str`): name in `torch.distributed`, for counters and messages.
        payload (`int`): which argument holds what this rank gives or, for a reduce-scatter, gets.
        sent (`Callable`): `(bytes of the payload, ranks) -> (bytes, messages)` that a rank of a ring sends.
    """

    def call(self: LocMoeProcessGroup, *args, **kwargs):
        self._check_process()
        num_bytes, tensor = _measure(args[payload] if len(args) > payload else None)
        self._count_ring(collective, *sent(num_bytes, self._size))
        record = self._desk.open_call(collective)
        values = (*args, *kwargs.values())
        if tensor is None:
            tensor = _measure(values)[1]
        device = tensor.device if tensor is not None else self._device_without_tensors(values)
        return watch(getattr(self._inner, method)(*args, **kwargs), record, self._desk, device)

    call.__name__ = method
    call.__doc__ = f"`torch.distributed.{collective}` by the inner backend."
    return call


def _passed_on(num_bytes: int, size: int) -> tuple[int, int]:
    return (num_bytes, 1) if size > 1 else (0, 0)


def _sent_round(num_bytes: int, size: int) -> tuple[int, int]:
    return num_bytes * (size - 1), size - 1


def _reduced_round(num_bytes: int, size: int) -> tuple[int, int]:
    return 2 * num_bytes * (size - 1) // size, 2 * (size - 1)


# method of ProcessGroup (newest names first, then what they were called before) -> collective, payload argument, ring
_COLLECTIVES = {
    "allreduce": ("all_reduce", 0, _reduced_round),
    "allreduce_coalesced": ("all_reduce_coalesced", 0, _reduced_round),
    "broadcast": ("broadcast", 0, _passed_on),
    "reduce": ("reduce", 0, _passed_on),
    "gather": ("gather", 1, _passed_on),
    "scatter": ("scatter", 0, _passed_on),
    "allgather": ("all_gather", 1, _sent_round),
    "all_gather_single": ("all_gather_into_tensor", 1, _sent_round),
    "_allgather_base": ("all_gather_into_tensor", 1, _sent_round),
    "allgather_coalesced": ("all_gather_coalesced", 1, _sent_round),
    "all_gather_single_coalesced": ("all_gather_into_tensor_coalesced", 1, _sent_round),
    "allgather_into_tensor_coalesced": ("all_gather_into_tensor_coalesced", 1, _sent_round),
    "reduce_scatter": ("reduce_scatter", 0, _sent_round),
    "reduce_scatter_single": ("reduce_scatter_tensor", 0, _sent_round),
    "_reduce_scatter_base": ("reduce_scatter_tensor", 0, _sent_round),
    "reduce_scatter_single_coalesced": ("reduce_scatter_tensor_coalesced", 0, _sent_round),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter_tensor_coalesced", 0, _sent_round),
    "barrier": ("barrier", 0, lambda num_bytes, size: (0, 2 * (size - 1))),
}
for _method, _row in _COLLECTIVES.items():
    if hasattr(dist.ProcessGroup, _method):
        setattr(LocMoeProcessGroup, _method, _forward(_method, *_row))


def _measure(value) -> tuple[int, torch.Tensor | None]:
    """Bytes in a tensor or in lists of tensors, and the first of them."""
    if isinstance(value, torch.Tensor):
        return value.nbytes, value
    num_bytes, first = 0, None
    if isinstance(value, (list, tuple)):
        for item in value:
            more, tensor = _measure(item)
            num_bytes += more
            first = tensor if first is None else first
    return num_bytes, first


# ---- what others call -----------------------------------------------------------------------------------------------


def create_process_group(backend_options, options: LocMoeBackendOptions | None = None) -> LocMoeProcessGroup:
    """What `torch.distributed` calls for a group of backend "locmoe": the extended creator of `register_backend`."""
    if not isinstance(options, LocMoeBackendOptions):
        options = LocMoeBackendOptions(inner_options=options)
    size = backend_options.group_size
    return LocMoeProcessGroup(
        backend_options.store,
        backend_options.group_rank,
        size,
        backend_options.timeout,
        list(backend_options.global_ranks_in_group) or list(range(size)),
        str(backend_options.group_id),
        options,
    )


def group_counters(group: dist.ProcessGroup) -> CommCounters:
    """
    What this rank has sent in `group` so far.

    Raises:
        ValueError: a group of another backend, which does not count.
    """
    return _own(group, "group_counters")._traffic.read()


def group_topology(group: dist.ProcessGroup) -> NodeTopology:
    """Ranks and nodes of `group`, as its ranks agreed on them. `ValueError` for a group of another backend."""
    return _own(group, "group_topology").topology


def use_tp_domain(group: dist.ProcessGroup, tp_group: dist.ProcessGroup) -> None:
    """
    Tells a "locmoe" group that the ranks of `tp_group` hold the same tokens and always pass it the same tensors and
    splits, so that each need send its share only. Called on every rank, before the group's first exchange.
    """
    _own(group, "use_tp_domain")._all_to_all.use_domain(tp_group)


def label_calls(group: dist.ProcessGroup, label: str | None) -> None:
    """
    Names the place in the model that the next collectives of `group` belong to, such as `model.layers.3.mlp`: errors
    say it. One assignment; nothing for a group of another backend.
    """
    if isinstance(group, LocMoeProcessGroup):
        group._desk.label = label


def _own(group: dist.ProcessGroup, function: str) -> LocMoeProcessGroup:
    if not isinstance(group, LocMoeProcessGroup):
        raise ValueError(
            f"`{function}` needs a group of backend `locmoe` and got one of `{dist.get_backend(group)}`: make it with "
            '`new_group(ranks, backend="locmoe")`.'
        )
    return group


def _read_plan(options: LocMoeBackendOptions) -> str:
    plan = options.plan or os.environ.get(PLAN_VARIABLE) or "auto"
    if plan not in PLANS:
        raise ValueError(
            f"`plan` ({plan}) must be one of {', '.join(PLANS)}: change it in `LocMoeBackendOptions` or "
            f"`{PLAN_VARIABLE}`."
        )
    return plan


def _read_timeout(options: LocMoeBackendOptions, timeout: timedelta) -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if options.timeout_s is not None:
        timeout_s = options.timeout_s
    elif text is not None:
        try:
            timeout_s = float(text)
        except ValueError:
            timeout_s = 0.0
    else:
        chosen = timeout != dist.default_pg_timeout
        timeout_s = timeout.total_seconds() if chosen else DEFAULT_TIMEOUT_S
    if not timeout_s > 0:
        raise ValueError(f"`{TIMEOUT_VARIABLE}` ({text}) must be a positive number of seconds: set it to, say, 300.")
    return timeout_s
