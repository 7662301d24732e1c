# SPDX-License-Identifier: Apache-2.0
"""All layouts with all ways of routing, predicted, and one of them recommended."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..distributed.layouts import LAYOUTS, ModelSize, layout_groups_of_job, one_copy_groups
from ..distributed.step_time import (
    BREAK_EVEN_QUANTITIES,
    BreakEven,
    Machine,
    Routing,
    StepTime,
    break_even,
    predict_step,
    recommend,
    routings,
)
from ..distributed.step_traffic import Workload
from ..distributed.topology import NodeTopology
from .quantities import format_bytes, format_time


DEFAULT_LOCAL_SHARE = 0.7


def routing_of(config: Any) -> str:
    """Name of the routing that a config asks for; a learned gate for models that are not ours."""
    if config.model_type != "locmoe":
        return "switch"
    if config.gate_type == "locmoe" and config.balance_bias_update_rate:
        return "locmoe-balanced"
    return config.gate_type


@dataclass(frozen=True)
class Plan:
    """
    Args:
        model_type (`str`): of the config.
        size (`ModelSize`): the model.
        topology (`NodeTopology`): the job.
        machine (`Machine`): devices and links.
        work (`Workload`): the optimizer step.
        steps (`list[StepTime]`): every layout with every way of routing.
        best (`StepTime`): the layout to take, with the routing that it is recommended for.
        break_evens (`list[BreakEven]`): of experts inside a node and experts over nodes, for that routing.
        warnings (`list[str]`): what to think of.
    """

    model_type: str
    size: ModelSize
    topology: NodeTopology
    machine: Machine
    work: Workload
    steps: list[StepTime]
    best: StepTime
    break_evens: list[BreakEven]
    warnings: list[str]

    @property
    def choices(self) -> list[StepTime]:
        """The layouts to choose from, with the routing that the choice is for."""
        return [step for step in self.steps if step.routing == self.best.routing and step.layout in LAYOUTS]

    def fits(self, step: StepTime) -> bool:
        return step.cost.bytes_memory <= self.machine.memory_bytes

    @property
    def reason(self) -> str:
        """Why the recommended layout."""
        if not self.fits(self.best):
            return f"no layout fits into {format_bytes(self.machine.memory_bytes)}, and it needs least."
        others = sorted((step for step in self.choices if step is not self.best), key=lambda step: step.step_s)
        return "; ".join(map(self._compared, others)) + "." if others else "it is the only layout for these nodes."

    def _compared(self, other: StepTime) -> str:
        fits = "" if self.fits(other) else f", and needs {format_bytes(other.cost.bytes_memory)}, which does not fit"
        if other.step_s <= self.best.step_s:
            return f'"{other.layout}" takes {format_time(other.step_s)}{fits}'
        more = {
            "computation": other.compute_s - self.best.compute_s,
            "weights and gradients": other.parameters_s - self.best.parameters_s,
            "tokens": other.tokens_s - self.best.tokens_s,
        }
        name = max(more, key=lambda part: more[part])
        return (
            f'"{other.layout}" takes {format_time(other.step_s)}, with {format_time(more[name])} more for {name}{fits}'
        )

    def to_json(self) -> str:
        """Everything, in bytes and seconds; what has no bound is `null`."""
        content = {
            "model_type": self.model_type,
            "size": asdict(self.size),
            "num_nodes": self.topology.num_nodes,
            "devices_per_node": self.topology.node_sizes[0],
            "machine": asdict(self.machine),
            "work": asdict(self.work),
            "steps": [asdict(step) | {"step_s": step.step_s, "fits": self.fits(step)} for step in self.steps],
            "break_even": [asdict(one) for one in self.break_evens],
            "recommended": {
                "layout": self.best.layout,
                "routing": self.best.routing.name,
                "step_s": self.best.step_s,
                "reason": self.reason,
            },
            "warnings": self.warnings,
        }
        return json.dumps(_without_infinity(content), indent=2)


def make_plan(
    config: Any,
    size: ModelSize,
    topology: NodeTopology,
    machine: Machine,
    work: Workload,
    local_share: float | None = None,
    load_cv: dict[str, float] | None = None,
) -> Plan:
    """
    Predicts every layout with every way of routing and chooses a layout.

    Args:
        config: of the model.
        size (`ModelSize`), topology (`NodeTopology`), machine (`Machine`), work (`Workload`): what to plan for.
        local_share (`float`, *optional*):
            share of the assignments that LocMoE's gate keeps on their node. When it is given, the choice is for that
            gate, whatever the config has.
        load_cv (`dict`, *optional*): routing -> coefficient of variation of its experts' loads, in place of `LOAD_CV`.
    """
    ways = routings(DEFAULT_LOCAL_SHARE if local_share is None else local_share, load_cv)
    name = routing_of(config)
    if local_share is not None and not name.startswith("locmoe"):
        name = "locmoe"
    routing = next(way for way in ways if way.name == name)

    layouts = layout_groups_of_job(topology, size.num_experts)
    outnumbered = len(layouts) > 1 and size.num_experts < topology.num_nodes
    shown = [*layouts, one_copy_groups(topology, size.num_experts)] if outnumbered else layouts
    steps = [predict_step(groups, size, machine, work, way) for way in ways for groups in shown]
    best = recommend(
        [step for step in steps if step.routing == routing and step.layout in LAYOUTS], machine.memory_bytes
    )
    warnings = []
    if outnumbered:
        warnings.append(_on_outnumbered(size, topology, machine, work, ways))
    if best.cost.bytes_memory > machine.memory_bytes:
        warnings.append(f"No layout fits into {format_bytes(machine.memory_bytes)} a device: use more devices.")
    break_evens = []
    if len(layouts) > 1:
        by_name = {groups.layout: groups for groups in layouts}
        pair = by_name["replicated"], by_name["spread"]
        break_evens = [break_even(quantity, *pair, size, machine, work, routing) for quantity in BREAK_EVEN_QUANTITIES]
    return Plan(config.model_type, size, topology, machine, work, steps, best, break_evens, warnings)


def _on_outnumbered(
    size: ModelSize, topology: NodeTopology, machine: Machine, work: Workload, ways: list[Routing]
) -> str:
    num_experts, num_nodes, on_node = size.num_experts, topology.num_nodes, topology.node_sizes[0]
    by_name = {way.name: way for way in ways}

    def difference(nodes: int) -> float:
        groups = one_copy_groups(NodeTopology.from_ranks_per_node(on_node, nodes * on_node), num_experts)
        hashed, local = (
            predict_step(groups, size, machine, work, by_name[name]).step_s for name in ("hash", "locmoe-balanced")
        )
        return local / hashed - 1

    effect = f"{difference(num_nodes):+.1%} of hash routing's step"
    if num_experts > 1:
        effect += f", {difference(num_experts):+.1%} on {num_experts} nodes"
    return (
        f"`num_experts` ({num_experts}) is below the number of nodes ({num_nodes}): with one copy of each expert "
        f"{num_nodes - num_experts} nodes hold none and send all of their tokens, and locality is worth less "
        f'(locmoe-balanced: {effect}). "spread" makes copies of the experts instead.'
    )


def _without_infinity(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_infinity(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_infinity(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
