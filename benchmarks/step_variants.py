# SPDX-License-Identifier: Apache-2.0
"""What `bench_step` runs: the sizes, the layouts that it compares, and how a model gets into one.

World size W = nodes N x ranks a node M. Upstream's layouts, by the letters of the results:

* a: dense layers sharded over all ranks, experts spread over all ranks: tokens cross nodes.
* b: dense layers sharded over all ranks, experts spread inside a node, each sharded again over its copies on the others.
* c: everything sharded over all ranks, no expert parallelism.
* d: a copy of the whole model per node, sharded inside the node: only gradients cross. Upstream's advice for many nodes.

And the one that its meshes cannot say:

* s: a copy of the dense layers per node, sharded inside the node, experts spread over all ranks: dense gradients and
  non-local tokens cross.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import OlmoeConfig, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from benchmarks import workload
from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_options
from hf_locmoe.distributed.layouts import SpreadConfig
from tests.tolerances import TOLERANCES


@dataclass(frozen=True)
class Setup:
    """Everything that decides what is computed. Tokens a step and rank: `sequences_per_rank * sequence_length`.

    Architectures: `olmoe` is transformers' own, `locmoe` the same with our gate, `locmoe-hash` the same with a balanced hash
    of the token id for a gate, which training does not move: every step has the same, even load.
    """

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
    def losses_per_rank(self) -> bool:
        """Whether router losses are taken over a rank's tokens (transformers' models) or over those of all ranks (ours)."""
        return self.architecture == "olmoe"

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
        wire_dtype: dtype of the tokens under way, of the `locmoe` exchange only.
    """

    name: str
    letter: str
    exchange: str
    upstream: bool
    wire_dtype: str = "float32"

    @property
    def rtol(self) -> float:
        """How far the losses may be from one process's, relatively; the ranks' sums are taken in another order."""
        return TOLERANCES[getattr(torch, self.wire_dtype)]["rtol"]

    @property
    def layout(self) -> str:
        return {
            "a": "fsdp W, ep W",
            "b": "fsdp W, ep M",
            "c": "fsdp W, no ep",
            "d": "replicate N, fsdp M, ep M",
            "s": "dense: replicate N, fsdp M; ep W",
            "": "no layout: nothing is exchanged",
        }[self.letter]

    @property
    def is_layout(self) -> bool:
        """Whether this is a way to train one model; else every rank trains by itself, as a floor for the times."""
        return bool(self.letter)

    def distributed_config(self, setup: Setup) -> DistributedConfig | None:
        """Who holds what; `None` for a rank alone."""
        world, node = setup.world_size, setup.ranks_per_node
        sizes = {
            "a": {"fsdp_size": world, "ep_size": world},
            "b": {"fsdp_size": world, "ep_size": node},
            "c": {"fsdp_size": world, "ep_size": 1},
            "d": {"dp_replicate_size": setup.nodes, "fsdp_size": node, "ep_size": node},
            "s": {"dp_replicate_size": setup.nodes, "fsdp_size": node, "ep_size": world},
        }
        if not self.is_layout:
            return None
        config_class = SpreadConfig if self.letter == "s" else DistributedConfig
        return config_class(**sizes[self.letter], ep_implementation=self.exchange)


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("a", "a", "all_to_all", upstream=True),
        Variant("b", "b", "all_to_all", upstream=True),
        Variant("c", "c", "all_to_all", upstream=True),
        Variant("d", "d", "all_to_all", upstream=True),
        Variant("a-locmoe", "a", "locmoe", upstream=False),
        Variant("b-locmoe", "b", "locmoe", upstream=False),
        Variant("d-locmoe", "d", "locmoe", upstream=False),
        Variant("s-flat", "s", "all_to_all", upstream=False),
        Variant("s-locmoe", "s", "locmoe", upstream=False),
        Variant("s-locmoe-bf16", "s", "locmoe", upstream=False, wire_dtype="bfloat16"),
        Variant("alone", "", "none", upstream=False),
    )
}


# c and b-locmoe are left out: the layouts are the slowest everywhere, and the other rows need the time
DEFAULT_VARIANTS = [name for name in VARIANTS if name not in ("c", "b-locmoe")]


def model_config(setup: Setup) -> PreTrainedConfig:
    """The architecture under test, router losses included: without them all tokens of a layer end up on one expert within
    a few steps."""
    sizes = {
        "vocab_size": setup.vocab_size,
        "hidden_size": setup.hidden_size,
        "intermediate_size": setup.moe_intermediate_size,
        "num_hidden_layers": setup.num_hidden_layers,
        "num_attention_heads": setup.num_attention_heads,
        "num_experts": setup.num_experts,
        "num_experts_per_tok": setup.num_experts_per_tok,
        "max_position_embeddings": setup.sequence_length,
        "pad_token_id": None,
        "eos_token_id": None,
        "use_cache": False,
    }
    if setup.architecture == "olmoe":
        return OlmoeConfig(**sizes, output_router_logits=True)
    gate_type = {"locmoe": "locmoe", "locmoe-hash": "hash"}.get(setup.architecture)
    if gate_type is None:
        raise ValueError(f"`architecture` ({setup.architecture}) must be olmoe, locmoe or locmoe-hash.")
    # OLMoE in everything but the gate and its losses
    return LocMoeConfig(**sizes, gate_type=gate_type, gated_mlp=True, hidden_act="silu", qk_norm="full")


def build(setup: Setup, variant: Variant | None = None) -> PreTrainedModel:
    """The model in one process, or the same model with the same weights as the variant distributes it."""
    if variant is None:
        return workload.build(model_config(setup), setup.seed)
    with expert_parallel_options(wire_dtype=variant.wire_dtype):
        return workload.build(model_config(setup), setup.seed, variant.distributed_config(setup))
