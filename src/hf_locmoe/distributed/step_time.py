# SPDX-License-Identifier: Apache-2.0
"""
How long an optimizer step takes in each layout and with each way of routing, from sizes and from an alpha-beta model of
the machine: seconds of an exchange = rounds * latency + bytes / rate (Hockney, 1994). Pure functions; nothing is run.

    step = computation + weights and gradients + tokens - what is hidden

    computation            6 operations a parameter and token (8 where activations are recomputed), experts at the load
                           of the busiest rank
    weights and gradients  `step_traffic.parameter_traffic` over links and latencies
    tokens                 `step_traffic.token_traffic`, as long as the busiest direction of a node's link takes
    hidden                 `overlap` times the shorter of computation and exchanges
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from .layouts import LayoutCost, ModelSize, layout_cost
from .step_traffic import LayoutGroups, Traffic, Workload


@dataclass(frozen=True)
class Machine:
    """
    What devices and links do.

    Args:
        flops_per_s (`float`): operations a second that one device sustains in training, not its peak.
        inter_bytes_per_s (`float`): bytes a second that one node sends to others, in one direction.
        intra_bytes_per_s (`float`): bytes a second that one device sends inside its node.
        inter_latency_s (`float`): seconds of a message between nodes without bytes.
        intra_latency_s (`float`): seconds of a message inside a node without bytes.
        overlap (`float`): share of the shorter of computation and exchanges that runs under the longer; 0 to 1.
        memory_bytes (`float`): of a device, for parameters, gradients and optimizer state.
    """

    flops_per_s: float
    inter_bytes_per_s: float
    intra_bytes_per_s: float
    inter_latency_s: float = 0.0
    intra_latency_s: float = 0.0
    overlap: float = 0.0
    memory_bytes: float = math.inf

    def seconds(self, traffic: Traffic, ranks_per_node: int) -> float:
        """Of this traffic, one message after another."""
        return (
            traffic.bytes_inter_node / self.inter_bytes_per_s
            + traffic.bytes_intra_node / ranks_per_node / self.intra_bytes_per_s
            + traffic.rounds_inter_node * self.inter_latency_s
            + traffic.rounds_intra_node * self.intra_latency_s
        )


@dataclass(frozen=True)
class Routing:
    """
    A way of routing, as far as time depends on it.

    Args:
        name (`str`): to print.
        local_share (`float`, *optional*):
            share of the assignments that stay on their node, on nodes that have experts; uniform when left out.
        load_cv (`float`): coefficient of variation of the experts' loads, in the tokens of all ranks.
        picks_neighbours (`bool`): whether the experts of a token follow each other, as our hash gate's do.
        busiest_rank (`float`, *optional*): load of the busiest rank over the mean, where it was counted.
        busiest_node (`float`, *optional*): load of the busiest node over the mean, where it was counted.
    """

    name: str
    local_share: float | None = None
    load_cv: float = 0.0
    picks_neighbours: bool = False
    busiest_rank: float | None = None
    busiest_node: float | None = None

    def busiest(self, num_parts: int, experts_of_part: float) -> float:
        """
        Expected load of the busiest of several ranks or nodes over their mean, as of independent normal loads: the
        largest of m is expected at the quantile `(m - 3/8) / (m + 1/4)` (Blom, 1958). A part with several experts varies
        less.
        """
        spread = self.load_cv / math.sqrt(max(experts_of_part, 1.0))
        return min(1 + spread * NormalDist().inv_cdf((num_parts - 0.375) / (num_parts + 0.25)), num_parts)


# Loads as measured, benchmarks/results/gates_h100_202611.md: hash, learned gate, cosine gate without and with balance bias.
LOAD_CV = {"hash": 0.043, "switch": 0.498, "locmoe": 0.491, "locmoe-balanced": 0.086}


def routings(local_share: float, load_cv: dict[str, float] | None = None) -> list[Routing]:
    """Hash and Switch, which spread tokens uniformly over nodes, and LocMoe's gate at a node-local share."""
    return [
        Routing(name, local_share if name.startswith("locmoe") else None, cv, picks_neighbours=name == "hash")
        for name, cv in (LOAD_CV | (load_cv or {})).items()
    ]


@dataclass(frozen=True)
class StepTime:
    """
    An optimizer step as predicted, in seconds of the slowest rank.

    Args:
        groups (`LayoutGroups`): the layout.
        cost (`LayoutCost`): its bytes and memory.
        routing (`Routing`): the way of routing.
        local_share (`float`): mean share of the assignments that stay on their node.
        busiest_rank (`float`): load of the busiest rank over the mean of the ranks with experts.
        compute_s (`float`): computation.
        parameters_s (`float`): exchange of weights and gradients.
        tokens_s (`float`): exchange of tokens.
        hidden_s (`float`): of the exchanges, what computation hides, or the reverse.
    """

    groups: LayoutGroups
    cost: LayoutCost
    routing: Routing
    local_share: float
    busiest_rank: float
    compute_s: float
    parameters_s: float
    tokens_s: float
    hidden_s: float

    @property
    def layout(self) -> str:
        return self.groups.layout

    @property
    def step_s(self) -> float:
        return self.compute_s + self.parameters_s + self.tokens_s - self.hidden_s


def step_flops(size: ModelSize, work: Workload) -> tuple[float, float]:
    """
    Operations of one rank in a step, of the dense layers and of the experts, at an even load: 2 a parameter and token
    forward, 4 backward (Kaplan et al., arXiv 2001.08361, section 2.1), and 2 more where activations are recomputed.
    Attention's products of tokens with tokens are left out.
    """
    per_parameter = (8 if work.checkpointing else 6) * work.tokens_per_rank * work.accumulation_steps
    active = size.expert_parameters * size.num_experts_per_tok / max(size.num_experts, 1)
    return per_parameter * (size.dense_parameters - size.embedding_parameters), per_parameter * active


def predict_step(
    groups: LayoutGroups, size: ModelSize, machine: Machine, work: Workload, routing: Routing
) -> StepTime:
    """One layout with one way of routing."""
    cost = layout_cost(groups, size, work, routing.local_share, routing.picks_neighbours)
    busiest_rank = routing.busiest_rank or routing.busiest(groups.expert_parts, size.num_experts / groups.expert_parts)
    busiest_node = routing.busiest_node or routing.busiest(groups.expert_nodes, size.num_experts / groups.expert_nodes)

    dense_flops, expert_flops = step_flops(size, work)
    of_holders = groups.expert_parallel.num_nodes / groups.expert_nodes
    compute_s = (dense_flops + expert_flops * of_holders * busiest_rank) / machine.flops_per_s

    local_share = groups.mean_local_share(routing.local_share, size)
    # The busiest direction of a link and the busiest rank of a node are what an exchange waits for.
    slowest_link = groups.busiest_direction(routing.local_share, size, busiest_node) / (1 - local_share or 1)
    waited_for = replace(
        cost.tokens,
        bytes_inter_node=cost.tokens.bytes_inter_node * slowest_link,
        bytes_intra_node=cost.tokens.bytes_intra_node * busiest_rank,
    )
    parameters_s = machine.seconds(cost.parameters, groups.ranks_per_node)
    tokens_s = machine.seconds(waited_for, groups.ranks_per_node)
    return StepTime(
        groups=groups,
        cost=cost,
        routing=routing,
        local_share=local_share,
        busiest_rank=busiest_rank,
        compute_s=compute_s,
        parameters_s=parameters_s,
        tokens_s=tokens_s,
        hidden_s=machine.overlap * min(compute_s, parameters_s + tokens_s),
    )


# ---- where one layout gets better than another ------------------------------------------------------------------------


@dataclass(frozen=True)
class BreakEven:
    """
    Which of two layouts is faster, along one quantity.

    Args:
        quantity (`str`): what was varied: `"local_share"`, `"inter_bytes_per_s"` or `"tokens_per_rank"`.
        first (`str`): the faster layout at the low end.
        turns (`list[tuple[float, str]]`): where they take the same time, and which is faster from there on.
    """

    quantity: str
    first: str
    turns: list[tuple[float, str]]


_RANGES = {"local_share": (0.0, 1.0), "inter_bytes_per_s": (1e6, 1e13), "tokens_per_rank": (1.0, 1e9)}
BREAK_EVEN_QUANTITIES = tuple(_RANGES)
_GRID = 64  # intervals of the range that are searched for a turn
_BISECTIONS = 40


def break_even(
    quantity: str,
    inside: LayoutGroups,
    over: LayoutGroups,
    size: ModelSize,
    machine: Machine,
    work: Workload,
    routing: Routing,
) -> BreakEven:
    """
    The local share, the bandwidth between nodes or the tokens a rank and micro-batch at which two layouts are equal,
    all else as given.

    Args:
        quantity (`str`): which of the three.
        inside (`LayoutGroups`): the layout that keeps experts inside a node, `"replicated"`.
        over (`LayoutGroups`): the one that spreads them over nodes, `"spread"`.
    """
    low, high = _RANGES[quantity]

    def at(place: float) -> float:
        """From 0 .. 1 into the range."""
        return low * (high / low) ** place if low > 0 else low + (high - low) * place

    def faster(place: float) -> str:
        value = at(place)
        setting = (machine, work, routing)
        if quantity == "local_share":
            setting = (machine, work, replace(routing, local_share=value))
        elif quantity == "inter_bytes_per_s":
            setting = (replace(machine, inter_bytes_per_s=value), work, routing)
        else:
            setting = (machine, replace(work, tokens_per_rank=value), routing)  # type: ignore[arg-type]
        spreading = predict_step(over, size, *setting).step_s < predict_step(inside, size, *setting).step_s
        return over.layout if spreading else inside.layout

    found = [faster(index / _GRID) for index in range(_GRID + 1)]
    turns = []
    for index in range(_GRID):
        if found[index] != found[index + 1]:
            left, right = index / _GRID, (index + 1) / _GRID
            for _ in range(_BISECTIONS):
                middle = (left + right) / 2
                left, right = (middle, right) if faster(middle) == found[index] else (left, middle)
            turns.append((at(right), found[index + 1]))
    return BreakEven(quantity, found[0], turns)


def recommend(steps: Sequence[StepTime], memory_bytes: float) -> StepTime:
    """The fastest among the layouts that fit into the memory; where none does, the one that needs least."""
    fitting = [step for step in steps if step.cost.bytes_memory <= memory_bytes]
    if fitting:
        return min(fitting, key=lambda step: step.step_s)
    return min(steps, key=lambda step: step.cost.bytes_memory)
