# SPDX-License-Identifier: Apache-2.0
"""The layouts that `bench_step` compares, and how a model gets into one.

World size W = nodes N x ranks a node M. Upstream's layouts, by the letters of the results:

* a: dense layers sharded over all ranks, experts spread over all ranks: tokens cross nodes.
* b: dense layers sharded over all ranks, experts spread inside a node, each sharded again over its copies on the others.
* c: everything sharded over all ranks, no expert parallelism.
* d: a copy of the whole model per node, sharded inside the node: only gradients cross. Upstream's advice for many nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, set_seed
from transformers.distributed import DistributedConfig


if TYPE_CHECKING:
    from benchmarks.bench_step import Setup


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Args:
        name: short, as on the command line.
        letter: which layout, see above.
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
        }[self.letter]

    def distributed_config(self, setup: Setup) -> dict[str, Any]:
        """Arguments of `DistributedConfig`."""
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


def build_single(setup: Setup) -> nn.Module:
    """The model in one process, initialised from the seed."""
    set_seed(setup.seed)
    # grouped_mm: batched_mm copies the weights per token, gigabytes here
    return AutoModelForCausalLM.from_config(model_config(setup), experts_implementation="grouped_mm").train()


def build(variant: Variant, setup: Setup) -> nn.Module:
    """The same model, same weights, sharded as the variant says. Called on every rank, in the same order."""
    single = build_single(setup)
    return (
        type(single)
        .from_pretrained(
            None,
            config=model_config(setup),
            state_dict=single.state_dict(),
            distributed_config=DistributedConfig(**variant.distributed_config(setup)),
            experts_implementation="grouped_mm",
        )
        .train()
    )
