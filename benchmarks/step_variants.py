# SPDX-License-Identifier: Apache-2.0
"""What `bench_step` runs: the sizes, the layouts that it compares, and how a model gets into one.

World size W = nodes N x ranks a node M. Upstream's layouts, by the letters of the results:

* a: dense layers sharded over all ranks, experts spread over all ranks: tokens cross nodes.
* b: dense layers sharded over all ranks, experts spread inside a node, each sharded again over its copies on the others.
* c: everything sharded over all ranks, no expert parallelism.
* d: a copy of the whole model per node, sharded inside the node: only gradients cross. Upstream's advice for many nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import OlmoeConfig, PreTrainedConfig, PreTrainedModel

from benchmarks import workload


@dataclass(frozen=True)
class Setup:
    """Everything that decides what is computed. Tokens a step and rank: `sequences_per_rank * sequence_length`."""

    nodes: int = 2
    ranks_per_node: int = 2
    architecture: str = "olmoe"
    vocab_size: int = 2048
    hidden_size: int = 256
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_experts: int = 8
    num_experts_per_tok: int = 1
    sequences_per_rank: int = 4
    sequence_length: int = 256
    lr: float = 3e-4
    seed: int = 0
    warmup: int = 3
    repeats: int = 12

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def steps(self) -> int:
        return self.warmup + self.repeats

    def batches(self) -> torch.Tensor:
        """(steps, world_size * sequences_per_rank, sequence_length) int64, the same in every process."""
        stream = workload.token_stream(workload.standard_library_text(), self.vocab_size)
        size = self.world_size * self.sequences_per_rank
        return workload.batches(stream, size, self.sequence_length, self.steps, self.seed)


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        name: short, as on the command line.
        letter: which layout, see above; empty for a rank that trains alone.
        exchange: how tokens reach their experts, a name registered with transformers' `EPImplementationInterface`.
        upstream: whether transformers alone can do it.
    """

    name: str
    letter: str
    exchange: str
    upstream: bool

    @property
    def layout(self) -> str:
        return {
            "a": "fsdp W, ep W",
            "b": "fsdp W, ep M",
            "c": "fsdp W, no ep",
            "d": "replicate N, fsdp M, ep M",
            "": "no layout: nothing is exchanged",
        }[self.letter]

    @property
    def is_layout(self) -> bool:
        """Whether this is a way to train one model; else every rank trains by itself, as a floor for the times."""
        return bool(self.letter)

    def distributed_config(self, setup: Setup) -> dict[str, Any] | None:
        """Arguments of `DistributedConfig`, `None` for a rank alone."""
        if not self.is_layout:
            return None
        world, node = setup.world_size, setup.ranks_per_node
        return {
            "a": {"fsdp_size": world, "ep_size": world},
            "b": {"fsdp_size": world, "ep_size": node},
            "c": {"fsdp_size": world, "ep_size": 1},
            "d": {"dp_replicate_size": setup.nodes, "fsdp_size": node, "ep_size": node},
        }[self.letter] | {"ep_implementation": self.exchange}


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("a", "a", "all_to_all", upstream=True),
        Variant("b", "b", "all_to_all", upstream=True),
        Variant("c", "c", "all_to_all", upstream=True),
        Variant("d", "d", "all_to_all", upstream=True),
        Variant("alone", "", "none", upstream=False),
    )
}


def is_available(variant: Variant, setup: Setup) -> bool:
    """Whether this variant can run here and is worth a default run: c is known to be the slowest everywhere."""
    return variant.letter != "c"


def model_config(setup: Setup) -> PreTrainedConfig:
    """The architecture under test, without router losses: upstream computes them per rank, so no layout would agree
    with one process."""
    if setup.architecture != "olmoe":
        raise ValueError(f"`architecture` ({setup.architecture}) must be olmoe.")
    return OlmoeConfig(
        vocab_size=setup.vocab_size,
        hidden_size=setup.hidden_size,
        intermediate_size=setup.moe_intermediate_size,
        num_hidden_layers=setup.num_hidden_layers,
        num_attention_heads=setup.num_attention_heads,
        num_experts=setup.num_experts,
        num_experts_per_tok=setup.num_experts_per_tok,
        max_position_embeddings=setup.sequence_length,
        pad_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )


def build(setup: Setup, variant: Variant | None = None) -> PreTrainedModel:
    """The model in one process, or the same model with the same weights as the variant distributes it."""
    distributed = None if variant is None else variant.distributed_config(setup)
    return workload.build(model_config(setup), setup.seed, distributed)
