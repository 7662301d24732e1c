# SPDX-License-Identifier: Apache-2.0
"""The ways to bring tokens to their experts that are compared on several GPUs, behind one set of weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers.distributed.expert_parallel import AllToAllEP, EPImplementation, EPImplementationInterface

from hf_locmoe.distributed.expert_parallel import LocMoeEP, expert_parallel_options


OUR_EXPERTS = "capacity_bmm"


@dataclass(frozen=True)
class Way:
    """
    Args:
        name (`str`): in the table.
        options (`dict`, *optional*): of our exchange; transformers' own `all_to_all` if not given.
        fixed_shapes (`bool`): whether `options` are completed by the tokens a rank may have.
        experts (`str`): the experts implementation.
    """

    name: str
    options: dict[str, Any] | None = field(default=None, hash=False)
    fixed_shapes: bool = False
    experts: str = OUR_EXPERTS

    def make(self, experts, ep_mesh, tp_mesh, max_tokens: int):
        if self.options is None:
            return AllToAllEP(experts, ep_mesh, tp_mesh)
        options = dict(self.options, max_tokens_per_rank=max_tokens) if self.fixed_shapes else self.options
        with expert_parallel_options(**options):
            return LocMoeEP(experts, ep_mesh, tp_mesh)


UPSTREAM = "transformers all_to_all"
OURS = "ours, 1 slice"
WAYS = (
    Way(UPSTREAM, experts="grouped_mm"),
    Way("transformers all_to_all, our experts"),
    Way(OURS, dict(slices=1)),
    Way("ours, 1 slice, grouped_mm experts", dict(slices=1), experts="grouped_mm"),
    Way("ours, 2 slices", dict(slices=2)),
    Way("ours, auto", dict(slices="auto")),
    Way('ours, 2 slices, backend "locmoe"', dict(slices=2, backend="locmoe")),
    Way("ours, fixed shapes, 1 slice", dict(slices=1, capacity_factor=1.25), fixed_shapes=True),
    Way("ours, fixed shapes, 2 slices", dict(slices=2, capacity_factor=1.25), fixed_shapes=True),
)


class SwitchEP(EPImplementation):
    """All ways at once, one of which is `current`: they share weights, optimizer and memory, and can take turns."""

    current = UPSTREAM
    max_tokens = 0

    def __init__(self, experts, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.ways = {way.name: way.make(experts, ep_mesh, tp_mesh, SwitchEP.max_tokens) for way in WAYS}
        self.implementations = {way.name: way.experts for way in WAYS}
        experts.benchmark_ways = self.ways

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        self.experts.config._experts_implementation = self.implementations[SwitchEP.current]
        return self.ways[SwitchEP.current](hidden_states, top_k_index, top_k_weights)


def use_switch(max_tokens: int) -> str:
    """Makes the switch known to transformers; the name for `DistributedConfig.ep_implementation`."""
    SwitchEP.max_tokens = max_tokens
    EPImplementationInterface.register("benchmark_switch", SwitchEP)
    return "benchmark_switch"


__all__ = ["OURS", "OUR_EXPERTS", "UPSTREAM", "WAYS", "SwitchEP", "Way", "use_switch"]
