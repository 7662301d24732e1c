# SPDX-License-Identifier: Apache-2.0
"""The group-wise all-to-all of one process group: which plan, carried out where, counted how."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
import torch.distributed as dist

from .accelerator_watch import AcceleratorWatch
from .cost_model import PlanTable, measure
from .counters import TrafficLog
from .exchange_plans import Plan, domain_plan, two_level_plan
from .failure import Call, FailureDesk
from .topology import NodeTopology
from .work import DoneWork, EventWork, TaskThread, ThreadWork, WatchedWork


logger = logging.getLogger(__name__)

PLANS = ("auto", "flat", "two_level", "tp_domain")
# The types that gloo's all-to-all and NCCL's both know; any other travels as bytes.
_WIRE_DTYPES = frozenset(
    (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    )
)
# Plans measured by this process, by shape of group and device: a second group of the same shape need not measure.
_TABLES: dict[tuple, PlanTable] = {}


class GroupwiseAllToAll:
    """
    The all-to-all of one group.

    Args:
        topology ([`NodeTopology`]): the group's ranks and nodes.
        rank (`int`): this rank in it.
        inner (`ProcessGroup`): the group over the device's own backend.
        make_group (`Callable`): `make_group(prefix, members) -> ProcessGroup`, a plain group of some of the ranks.
        store: the group's store.
        desk ([`FailureDesk`]), traffic ([`TrafficLog`]): the group's.
        plan (`str`): one of `PLANS`.
        name (`str`): the group's name.
    """

    def __init__(
        self,
        topology: NodeTopology,
        rank: int,
        inner: dist.ProcessGroup,
        make_group: Callable[[str, tuple[int, ...]], dist.ProcessGroup],
        store,
        desk: FailureDesk,
        traffic: TrafficLog,
        plan: str,
        name: str,
    ) -> None:
        self._topology = topology
        self._rank = rank
        self._size = topology.num_ranks
        self._inner = inner
        self._make_group = make_group
        self._store = store
        self._desk = desk
        self._traffic = traffic
        self._plan = plan
        self._name = name
        self._members = {"group": inner}
        self._tables: dict[str, PlanTable] = {}
        self._thread: TaskThread | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._two_level = topology.is_rectangular and topology.num_nodes > 1 and topology.node_sizes[0] > 1
        same_node = topology.same_node(rank)
        self._near = Picker([other for other in range(self._size) if same_node[other] and other != rank])
        self._far = Picker([other for other in range(self._size) if not same_node[other]])

    def use_domain(self, group: dist.ProcessGroup) -> None:
        """`group`: the ranks that hold the same tokens as this one and pass the same inputs."""
        self._members["domain"] = group
        self._tables.clear()

    @property
    def _domain(self) -> dist.ProcessGroup | None:
        return self._members.get("domain")

    def subgroups(self) -> list[dist.ProcessGroup]:
        """The groups made for plans in several steps."""
        return [group for where, group in self._members.items() if where in ("node", "across")]

    def stop(self) -> None:
        """Drops what has not begun."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def all_to_all_single(self, output, input, output_split_sizes, input_split_sizes, *args, **kwargs):
        """As `torch.distributed.all_to_all_single`, by the group's plan."""
        output_counts, input_counts = list(output_split_sizes), list(input_split_sizes)
        uneven = bool(output_counts or input_counts)
        plan = self._choose(None if uneven else input.nbytes, input)
        call = self._desk.open_call("all_to_all_single")
        if plan == "flat":
            self._count("all_to_all_single", "group", input, input_counts, calls=1)
            wire = _on_the_wire(output, input)
            work = _native_all_to_all(self._inner, *wire, output_counts, input_counts, *args, **kwargs)
            return watch(work, call, self._desk, input.device)
        if uneven:
            output_counts = output_counts or [output.shape[0] // self._size] * self._size
            input_counts = input_counts or [input.shape[0] // self._size] * self._size
        self._check_rows("output", output, output_counts)
        self._check_rows("input", input, input_counts)
        self._traffic.add("all_to_all_single", calls=1)
        steps = self._steps(plan, *_on_the_wire(output, input), output_counts or None, input_counts or None)
        return self._start(lambda: self._carry_out(steps, "all_to_all_single"), call, (output, input), [output])

    def all_to_all(self, output_tensors, input_tensors, *args, **kwargs):
        """As `torch.distributed.all_to_all`, by the group's plan."""
        output_tensors, input_tensors = list(output_tensors), list(input_tensors)
        output_counts = [tensor.numel() for tensor in output_tensors]
        input_counts = [tensor.numel() for tensor in input_tensors]
        plan = self._choose(None, input_tensors[0])
        call = self._desk.open_call("all_to_all")
        if plan == "flat" and input_tensors[0].device.type != "cpu":
            self._count("all_to_all", "group", input_tensors[0].flatten(), input_counts, calls=1)
            if input_tensors[0].dtype not in _WIRE_DTYPES:
                output_tensors = [tensor.flatten().view(torch.uint8) for tensor in output_tensors]
                input_tensors = [tensor.flatten().view(torch.uint8) for tensor in input_tensors]
            work = self._inner.alltoall(output_tensors, input_tensors, *args, **kwargs)
            return watch(work, call, self._desk, input_tensors[0].device)
        self._traffic.add("all_to_all", calls=1)
        with torch.no_grad():
            input = torch.cat([tensor.flatten() for tensor in input_tensors])
            output = input.new_empty(sum(output_counts))

        @torch.no_grad()
        def hand_out() -> None:
            for tensor, part in zip(output_tensors, output.split(output_counts)):
                tensor.copy_(part.view_as(tensor))

        if plan == "flat":
            # gloo takes lists of equal tensors only
            self._count("all_to_all", "group", input, input_counts)
            work = _native_all_to_all(self._inner, *_on_the_wire(output, input), output_counts, input_counts)
            return WatchedWork(work, call, self._desk, hand_out)
        steps = self._steps(plan, *_on_the_wire(output, input), output_counts, input_counts)

        def exchange() -> None:
            self._carry_out(steps, "all_to_all")
            hand_out()

        return self._start(exchange, call, (*output_tensors, input, output), output_tensors)

    def _choose(self, num_bytes: int | None, tensor: torch.Tensor) -> str:
        """The plan of one exchange. All ranks must come to the same: only what they all know may decide."""
        plan = self._plan
        if plan == "auto":
            candidates = self._candidates()
            if len(candidates) == 1 or _is_capturing(tensor):
                return "flat"
            table = self._tables.get(tensor.device.type)
            if table is None:
                table = self._tables[tensor.device.type] = self._calibrate(candidates, tensor.device)
            return table.choose(num_bytes)
        if plan == "two_level" and not self._two_level:
            return "flat"
        if plan == "tp_domain" and self._domain is None:
            raise ValueError(
                "`plan` (tp_domain) needs the ranks that hold the same tokens: call `use_tp_domain(group, tp_group)` "
                "on every rank first, or set the plan to auto."
            )
        return plan

    def _candidates(self) -> tuple[str, ...]:
        two_level = ("two_level",) if self._two_level else ()
        return ("flat", *two_level, *(("tp_domain",) if self._domain is not None else ()))

    def _steps(self, plan: str, output, input, output_counts, input_counts) -> Plan:
        if plan == "two_level":
            return two_level_plan(self._topology, self._rank, output, input, output_counts, input_counts)
        assert self._domain is not None
        return domain_plan(
            self._domain.size(), self._domain.rank(), self._size, output, input, output_counts, input_counts
        )

    def _start(self, exchange: Callable[[], None], call: Call, tensors: tuple, result: list[torch.Tensor]):
        """
        Carries an exchange of several steps out without holding its caller up: on the CPU in the group's own thread,
        first come first served, as the steps wait for each other; on an accelerator on a side stream, from the
        caller's thread, so that all ranks launch their kernels in program order.
        """
        device = result[0].device
        if device.type == "cpu":
            if self._thread is None:
                self._thread = TaskThread(f"locmoe-{self._name}")
            return WatchedWork(ThreadWork(self._thread.submit(exchange), result), call, self._desk)
        stream = self._streams.setdefault(device, torch.cuda.Stream(device))
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            exchange()
            event = stream.record_event()
        for tensor in tensors:
            tensor.record_stream(stream)
        return watch(EventWork(event, tensors, result), call, self._desk, device)

    @torch.no_grad()
    def _carry_out(self, steps: Plan, collective: str) -> None:
        thread = self._thread
        for step in steps:
            group = self._group_of(step.where)
            if step.gather:
                self._traffic.add(collective, 0, self._domain_peers, 0, step.send.nbytes * self._domain_peers, 0)
                method = getattr(group, "all_gather_single", None) or group._allgather_base
                work = method(step.receive, step.send)
            else:
                self._count(collective, step.where, step.send, step.send_counts or [])
                counts = (step.receive_counts or [], step.send_counts or [])
                work = _native_all_to_all(group, step.receive, step.send, *counts)
            if work is None:
                continue
            if step.send.device.type == "cpu" and thread is not None:
                thread.wait(work, self._desk.glance)
            else:
                work.wait()

    @property
    def _domain_peers(self) -> int:
        return self._domain.size() - 1 if self._domain is not None else 0

    def _group_of(self, where: str) -> dist.ProcessGroup:
        group = self._members.get(where)
        if group is None:
            nodes = [self._topology.ranks_of_node(node) for node in range(self._topology.num_nodes)]
            node = nodes[self._topology.node_of_rank(self._rank)]
            place = node.index(self._rank)
            members = node if where == "node" else tuple(ranks[place] for ranks in nodes)
            group = self._members[where] = self._make_group(f"{where}-{members[0]}", members)
        return group

    def _calibrate(self, candidates: tuple[str, ...], device: torch.device) -> PlanTable:
        """
        Measures the plans once for each shape of group; rank 0 says whether it is known already, and hands it out.
        """
        key = (self._topology.rank_to_node, self._domain_peers, device.type)
        store = dist.PrefixStore(f"plans/{device.type}/", self._store)
        if self._rank == 0:
            known = _TABLES.get(key)
            store.set("table", known.to_json() if known is not None else "")
        text = store.get("table").decode()
        if not text:
            table = PlanTable.from_seconds(measure(candidates, lambda plan, size: self._time(plan, size, device)))
            worst = torch.tensor(
                [[cost.alpha_s, cost.beta_s_per_byte] for cost in table.costs.values()], dtype=torch.float64
            )
            worst = self._largest(worst.to(device))
            text = json.dumps(
                {plan: {"alpha_s": a, "beta_s_per_byte": b} for plan, (a, b) in zip(table.costs, worst.tolist())}
            )
        table = _TABLES[key] = PlanTable.from_json(text)
        if self._rank == 0:
            logger.info("plans of group %s on %s: %s", self._name, device.type, table)
        return table

    def _largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest value over all ranks that must agree: the group's, and those of the domain's other groups."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        for group in (self._inner, *((self._domain,) if self._domain is not None else ())):
            work = group.allreduce([values], options)
            if work is not None:
                work.wait()
        return values.cpu()

    def _time(self, plan: str, num_bytes: int, device: torch.device) -> float:
        rows = max(num_bytes // self._size, 1) * self._size
        input = torch.zeros(rows, dtype=torch.uint8, device=device)
        output = torch.empty_like(input)
        synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
        synchronize()
        start = time.perf_counter()
        if plan == "flat":
            work = _native_all_to_all(self._inner, output, input, [], [])
        else:
            steps = self._steps(plan, output, input, None, None)
            work = self._start(
                lambda: self._carry_out(steps, "calibration"), Call(0, "calibration"), (output, input), [output]
            )
        if work is not None:
            work.wait()
        synchronize()
        return time.perf_counter() - start

    def _count(self, collective: str, where: str, rows: torch.Tensor, counts: list[int], calls: int = 0) -> None:
        """Counts what this rank sends to others in an all-to-all: `counts` rows to each, or equal numbers."""
        num_rows = rows.shape[0]
        row_bytes = rows.nbytes // num_rows if num_rows else 0
        if where == "group":
            if counts:
                near, far = self._near(counts), self._far(counts)
                self._traffic.add(
                    collective,
                    calls,
                    len(near) - near.count(0),
                    len(far) - far.count(0),
                    sum(near) * row_bytes,
                    sum(far) * row_bytes,
                )
            else:
                near_ranks, far_ranks, count = self._near.size, self._far.size, num_rows // self._size * row_bytes
                self._traffic.add(collective, calls, near_ranks, far_ranks, near_ranks * count, far_ranks * count)
            return
        group = self._group_of(where)
        peers, own = group.size() - 1, group.rank()
        sent = (num_rows - (counts[own] if counts else num_rows // group.size())) * row_bytes
        if where == "across":
            self._traffic.add(collective, calls, 0, peers, 0, sent)
        else:
            self._traffic.add(collective, calls, peers, 0, sent, 0)

    def _check_rows(self, name: str, tensor: torch.Tensor, counts: list[int]) -> None:
        if not tensor.is_contiguous():
            raise ValueError(f"`{name}` must be contiguous: pass `{name}.contiguous()`.")
        rows = tensor.shape[0]
        if counts and (len(counts) != self._size or sum(counts) != rows):
            raise ValueError(
                f"`{name}_split_sizes` ({counts}) must be {self._size} numbers that add up to the rows of `{name}` "
                f"({rows}): give one number of rows per rank of the group."
            )
        if not counts and rows % self._size:
            raise ValueError(
                f"`{name}` ({rows} rows) must divide evenly over the group's {self._size} ranks: pass split sizes, or "
                "pad it."
            )


def watch(work, call: Call, desk: FailureDesk, device: torch.device) -> dist.Work:
    """
    The work to hand out for one of the inner backend. On the CPU a watched one. An accelerator's work is waited for by
    the stream and not by the host: nothing may come between, the watching is done from aside. Above all no wait with an
    end, after which NCCL gives the whole group up.
    """
    if device.type == "cpu":
        return WatchedWork(work, call, desk) if work is not None else DoneWork()
    if device.type == "cuda":
        if desk.accelerator_watch is None:
            desk.accelerator_watch = AcceleratorWatch(desk, device)
        desk.accelerator_watch.saw(call, work)
    return work if work is not None else DoneWork()


def _native_all_to_all(group: dist.ProcessGroup, *args, **kwargs):
    # torch 2.11 has the old name only, later versions deprecate it
    method = getattr(group, "all_to_all_single", None) or group.alltoall_base
    return method(*args, **kwargs)


def _on_the_wire(output: torch.Tensor, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors as the inner backend takes them: none knows all types, and an exchange only moves bytes."""
    if input.dtype in _WIRE_DTYPES:
        return output, input
    return _as_rows_of_bytes("output", output), _as_rows_of_bytes("input", input)


def _as_rows_of_bytes(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        raise ValueError(f"`{name}` must be contiguous: pass `{name}.contiguous()`.")
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:])).view(torch.uint8)


def _is_capturing(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Picker:
    """The entries of some ranks out of one per rank, at the speed of C."""

    def __init__(self, ranks: list[int]) -> None:
        self.size = len(ranks)
        self._ranks = ranks
        self._get = itemgetter(*ranks) if len(ranks) > 1 else None

    def __call__(self, values: Sequence[int]) -> tuple[int, ...]:
        if self._get is not None:
            return self._get(values)
        return tuple(values[rank] for rank in self._ranks)
