# SPDX-License-Identifier: Apache-2.0
"""
What a training step moves between ranks: the share of the tokens that stay on their node, the bytes that travel, and the
time that it takes.

Shapes: L = MoE layers, S = len(RouterStat), n = num_experts, k = num_experts_per_tok, T = tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.backend import LocMoeProcessGroup, group_counters
from ..distributed.counters import Traffic
from ..distributed.exchange_clock import ExchangeClock, ExchangeTimes
from ..moe.routing import RouterStat


if TYPE_CHECKING:
    from ..distributed.expert_parallel import LocMoeEP


TRAFFIC_NAMES = ("bytes_inter_node", "bytes_intra_node", "messages_inter_node", "messages_intra_node")
TIME_NAMES = ("step_s", "computation_s", "exchange_s", "overlap_s", "idle_s")
_ALIGN_AFTER_S = 300.0  # clocks that differ by ten millionths are then 3 ms apart


class TrafficStats:
    """
    Sums over the optimizer steps since the last reading; nothing on one process.

    Bytes and messages are the counters of the "locmoe" groups that a rank uses: those of the expert exchange, and the
    default group if it is one. Collectives of groups of another backend are not in them. Times are those of the expert
    exchange on any backend, see [`ExchangeClock`]. What happens between steps, such as an evaluation, is in neither.
    """

    def __init__(self):
        self._layers: list[LocMoeEP] = []
        self._base_model: nn.Module | None = None
        self._groups: list[LocMoeProcessGroup] = []
        self._clock: ExchangeClock | None = None
        self._node = 0
        # of the layers' experts: the nodes, and on the device which are this one's
        self._homes: list[tuple[int, ...]] = []
        self._near: torch.Tensor | None = None
        self._assignments: torch.Tensor | None = None  # (2, L): those for an expert of the token's node, and all
        self._traffic = Traffic()
        self._at_begin: Traffic | None = None
        self._num_steps = 0

    def watch(self, model: nn.Module | None, router_model: nn.Module | None) -> None:
        """
        All ranks call it.

        Args:
            model (`nn.Module`, *optional*): What is trained.
            router_model (`nn.Module`, *optional*): The module in it that returns `router_stats`, where there is one.
        """
        self.reset()
        self._layers, self._groups, self._base_model, self._clock, self._near = [], [], None, None, None
        if model is None or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        self._base_model = None if router_model is None else router_model.base_model
        if any(hasattr(module, "locmoe_expert_parallel") for module in model.modules()):
            # not every transformers has what this module imports
            from ..distributed.expert_parallel import expert_parallel_layers, job_topology

            self._layers = expert_parallel_layers(model)
            self._node = job_topology().node_of_rank(dist.get_rank())
        groups = [dist.group.WORLD]
        for layer in self._layers:
            groups += [layer.resources.group, layer.resources.node_group]
        self._groups = [group for group in dict.fromkeys(groups) if isinstance(group, LocMoeProcessGroup)]
        clocks = dict.fromkeys(layer.resources.clock for layer in self._layers)
        if len(clocks) == 1:
            (self._clock,) = clocks
            self._clock.reset()
            self._clock.align()

    def reset(self) -> None:
        """Back to zero."""
        self._assignments, self._traffic, self._at_begin, self._num_steps = None, Traffic(), None, 0
        if self._clock is not None:
            self._clock.reset()

    def collect(self, router_stats: torch.Tensor | None) -> None:
        """
        Adds what was routed since the last call, by the experts' nodes as they are now: once per micro-batch.

        Args:
            router_stats (`torch.Tensor` of shape `(L, S, n)`, *optional*): This rank's sums. Without them, for models that
                return none, the newest routes of the expert-parallel layers are counted.
        """
        if router_stats is not None:
            near = None if self._base_model is None else self._base_model.router_scope.node_local_experts
            if near is None:
                return
            tokens = router_stats[:, RouterStat.TOKENS]
            counts = torch.stack([(tokens * near.to(tokens.device)).sum(-1), tokens.sum(-1)])
        else:
            counts = self._count_routes()
            if counts is None:
                return
        counts = counts.to(_sum_dtype(counts.device))
        self._assignments = counts if self._assignments is None else self._assignments + counts

    def _count_routes(self) -> torch.Tensor | None:
        routes = [layer.newest_routes for layer in self._layers]
        if not routes or any(route is None for route in routes) or len(set(self._layers[0].node_of_expert)) < 2:
            return None
        homes = [tuple(layer.node_of_expert) for layer in self._layers]
        if homes != self._homes or self._near is None:  # lists are copied to the device, which is waited for
            near = [[home == self._node for home in layer] for layer in homes]
            self._homes, self._near = homes, torch.tensor(near, device=routes[0].device)
        local = [mine[route.long()].sum() for mine, route in zip(self._near, routes, strict=True)]
        return torch.stack(
            [torch.stack(local), torch.stack([local[0].new_full((), route.numel()) for route in routes])]
        )

    def begin_step(self) -> None:
        """Where an optimizer step begins."""
        if self._groups:
            self._at_begin = self._read()
        if self._clock is not None:
            self._clock.begin_step()

    def end_step(self) -> None:
        """Where it ends; what lies between two steps is not counted."""
        if self._clock is not None:
            self._clock.end_step()
        if self._groups and self._at_begin is not None:
            self._traffic += self._read() - self._at_begin
            self._at_begin = None
            self._num_steps += 1

    def _read(self) -> Traffic:
        return sum((group_counters(group).total for group in self._groups), Traffic())

    def flush(self, device: torch.device) -> tuple[dict[str, float], list[float]]:
        """
        Sums over ranks with one collective, and starts again at zero. All ranks have to call it.

        Args:
            device (`torch.device`): One that the default group reduces on.

        Returns:
            The metrics by the names of the Trainer's log, `comm/*` per optimizer step and summed over ranks, `time/*` per
            optimizer step and the mean over ranks, and the node-local share of each layer's assignments. Empty where
            nothing was measured.
        """
        times = ExchangeTimes() if self._clock is None else self._clock.read()
        sums: dict[str, torch.Tensor] = {}
        if self._assignments is not None:
            sums["assignments"] = self._assignments.to(device)
        if self._num_steps:
            values = [getattr(self._traffic, name) for name in TRAFFIC_NAMES]
            sums["traffic"] = torch.tensor(values, dtype=_sum_dtype(device), device=device)
        if times.num_steps:
            assert self._clock is not None
            values = [*_seconds(times), self._clock.seconds_since_alignment]
            sums["times"] = torch.tensor(values, dtype=_sum_dtype(device), device=device)
        num_steps = self._num_steps
        self.reset()
        if not sums:
            return {}, []
        flat = torch.cat([tensor.flatten() for tensor in sums.values()])
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in sums.values()]
        totals = dict(zip(sums, (part.tolist() for part in flat.split(sizes)), strict=True))
        metrics: dict[str, Any] = {}
        shares: list[float] = []
        if "traffic" in totals:
            metrics |= {
                f"comm/{name}": value / num_steps for name, value in zip(TRAFFIC_NAMES, totals["traffic"], strict=True)
            }
        if "times" in totals:
            *seconds, age = (value / dist.get_world_size() for value in totals["times"])
            metrics |= {
                f"time/{name}": value / times.num_steps for name, value in zip(TIME_NAMES, seconds, strict=True)
            }
            if age > _ALIGN_AFTER_S:  # the mean of all ranks, so that all agree
                assert self._clock is not None
                self._clock.align()
        if "assignments" in totals:
            counts = totals["assignments"]
            num_layers = len(counts) // 2
            shares = [
                near / max(total, 1) for near, total in zip(counts[:num_layers], counts[num_layers:], strict=True)
            ]
            metrics["routing/local_share"] = sum(shares) / len(shares)
        return metrics, shares


def _seconds(times: ExchangeTimes) -> list[float]:
    """By [`TIME_NAMES`]."""
    computation_s, overlap_s = times.step_s - times.wait_s, times.exchange_s - times.wait_s
    return [times.step_s, computation_s, times.exchange_s, overlap_s, times.idle_s]


def _sum_dtype(device: torch.device) -> torch.dtype:
    # counts leave float32's integers after 2^24; not every device has float64
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


__all__ = ["TIME_NAMES", "TRAFFIC_NAMES", "TrafficStats"]
