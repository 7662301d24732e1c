# SPDX-License-Identifier: Apache-2.0
"""The text that `locmoe plan` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..distributed.step_time import BreakEven, StepTime
from .choice import Plan
from .quantities import format_bytes, format_time


def format_plan(plan: Plan) -> str:
    """What `locmoe plan` prints."""
    size, machine, work, routing = plan.size, plan.machine, plan.work, plan.best.routing
    limit = "" if math.isinf(machine.memory_bytes) else f", {format_bytes(machine.memory_bytes)}"
    head = [
        f"{plan.model_type}: {size.dense_parameters / 1e9:.3g} B dense and {size.expert_parameters / 1e9:.3g} B expert "
        f"parameters; {size.num_moe_layers} layers of {size.num_experts} experts, {size.num_experts_per_tok} a token",
        f"{plan.topology.num_nodes} nodes of {plan.topology.node_sizes[0]} devices; {work.tokens_per_rank:,} tokens a rank "
        f"and micro-batch, {work.accumulation_steps} micro-batch{'es' if work.accumulation_steps > 1 else ''} a step",
        f"device: {machine.flops_per_s:.3g} operations/s{limit}; inside a node: {format_bytes(machine.intra_bytes_per_s)}/s a "
        f"device, {format_time(machine.intra_latency_s)}; between nodes: {format_bytes(machine.inter_bytes_per_s)}/s a node, "
        f"{format_time(machine.inter_latency_s)}; {machine.overlap:.0%} hidden",
    ]
    layouts = [
        ("layout", "experts over", "memory", "sent by a node", "inside it", "compute", "weights", "tokens", "step"),
        *(
            (
                step.layout,
                _experts_over(step),
                format_bytes(step.cost.bytes_memory) + ("" if plan.fits(step) else " (!)"),
                format_bytes(step.cost.bytes_inter_node),
                format_bytes(step.cost.parameters.bytes_intra_node + step.cost.tokens.bytes_intra_node),
                format_time(step.compute_s),
                format_time(step.parameters_s),
                format_time(step.tokens_s),
                format_time(step.step_s),
            )
            for step in plan.steps
            if step.routing == routing
        ),
    ]
    by_routing: dict[str, list[StepTime]] = {}
    for step in plan.steps:
        by_routing.setdefault(step.routing.name, []).append(step)
    names = [step.layout for step in next(iter(by_routing.values()))]
    ways = [
        ("routing", *(f"{name}: stays, busiest, step" for name in names)),
        *(
            (name, *(f"{step.local_share:.2f}  {step.busiest_rank:.2f}  {format_time(step.step_s)}" for step in steps))
            for name, steps in by_routing.items()
        ),
    ]
    best = f'Recommended: "{plan.best.layout}", {format_time(plan.best.step_s)} a step with routing {routing.name}: {plan.reason}'
    return "\n\n".join(
        [
            "\n".join(head),
            f"Layouts, routing {routing.name}; memory of a device, (!) does not fit\n" + _columns(layouts),
            "By routing: share of the assignments that stay on their node, load of the busiest rank over the mean, step\n"
            + _columns(ways),
            *(["\n".join(map(_break_even_line, plan.break_evens))] if plan.break_evens else []),
            *(f"Warning: {warning}" for warning in plan.warnings),
            best,
        ]
    )


def _experts_over(step: StepTime) -> str:
    span = step.groups.expert_parallel
    if span.num_ranks == 1:
        return "none, gathered"
    return f"{span.num_ranks} ranks, {span.num_nodes} node{'s' if span.num_nodes > 1 else ''}"


_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "local_share": ("local share", "{:.3f}".format),
    "inter_bytes_per_s": ("bandwidth of a node to others", lambda value: f"{format_bytes(value)}/s"),
    "tokens_per_rank": ("tokens a rank and micro-batch", "{:,.0f}".format),
}


def _break_even_line(one: BreakEven) -> str:
    name, shown = _SHOWN[one.quantity]
    turns = "".join(f', from {shown(value)} "{layout}"' for value, layout in one.turns)
    return f'Break-even by {name}: "{one.first}"{turns}' + ("" if one.turns else " throughout")


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
