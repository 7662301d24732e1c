# SPDX-License-Identifier: Apache-2.0
"""
What `bench_locality` compares: the sizes, the rows of its table, and the trainings that they need.

A row that neither pulls tokens (a locality loss) nor turns them away (a capacity tier) changes who computes what and nothing
that is computed. All rows of this kind with the same gate are read off one training, for every topology: [`jobs`].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hf_locmoe import LocMoeConfig
from hf_locmoe.training.locality import EASING


@dataclass(frozen=True)
class Topology:
    """N nodes of M ranks."""

    nodes: int
    ranks_per_node: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """From `2x2`."""
        nodes, _, ranks = text.partition("x")
        if not (nodes.isdigit() and ranks.isdigit() and int(nodes) > 1 and int(ranks) > 0):
            raise ValueError(
                f"`topology` ({text}) must be nodes x ranks of a node, two nodes or more: 2x2, for example."
            )
        return cls(int(nodes), int(ranks))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.ranks_per_node}"

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Setup:
    """Everything that decides what is trained, the same on every topology. Tokens a step: `sequences * sequence_length`."""

    vocab_size: int = 1024
    hidden_size: int = 128
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_experts: int = 8
    sequences: int = 64
    sequence_length: int = 128
    steps: int = 2000
    lr: float = 2e-3


Fields = tuple[tuple[str, object], ...]

HASH: Fields = (("gate_type", "hash"),)
SWITCH: Fields = (("gate_type", "switch"),)
PAPER: Fields = (("gate_affinity", "mean"), ("gate_relu", True), ("gate_noise_std", 0.01))
COSINE: Fields = (("balance_bias_update_rate", 0.02),)
MU = 0.03
PLACEMENT_STEPS = 100
TIER = 0.3  # two nodes: at most 0.15 leave; four: 0.225
AIMS = {2: 0.85, 4: 0.7}  # node-local share by number of nodes


@dataclass(frozen=True)
class Routing:
    """
    One row: a gate, and what is done for locality.

    Args:
        name: as in the table.
        gate: fields of `LocMoeConfig`.
        locality_loss_coef: mu; 0 for none.
        locality_remote_share: eps, the remote share that the loss asks for.
        places_batches: whether samples are dealt to the nodes of their experts.
        by_domain: whether they are dealt by a domain column in the place of token ids.
        stops_at_aim: whether a layer's locality loss eases off above the aim of `AIMS`.
        expert_placement_steps: steps between two placements of the experts; 0 for none.
        inter_node_capacity_factor: of the remote tier; `None` for no limit.
    """

    name: str
    gate: Fields
    locality_loss_coef: float = 0.0
    places_batches: bool = False
    expert_placement_steps: int = 0
    inter_node_capacity_factor: float | None = None
    locality_remote_share: float = 0.1
    by_domain: bool = False
    stops_at_aim: bool = False

    def target_share(self, topology: Topology) -> float | None:
        """`locality_target_share`: the loss has its full weight up to the aim."""
        return round(AIMS[topology.nodes] + EASING, 3) if self.stops_at_aim else None

    @property
    def changes_training(self) -> bool:
        """Whether the parameters depend on who computes what."""
        return self.locality_loss_coef > 0 or self.inter_node_capacity_factor is not None

    @property
    def keeps_statistics(self) -> bool:
        return self.places_batches or self.expert_placement_steps > 0


FULL = Routing("loss + batches", COSINE, MU, True)

ROUTINGS = {
    routing.name: routing
    for routing in (
        Routing("hash", HASH),
        Routing("switch", SWITCH),
        Routing("paper: loss", PAPER, 0.01),
        Routing("none", COSINE),
        Routing("loss", COSINE, MU),
        FULL,
        replace(FULL, name="loss + batches + experts", expert_placement_steps=PLACEMENT_STEPS),
        replace(
            FULL,
            name="loss + batches + experts + tiers",
            expert_placement_steps=PLACEMENT_STEPS,
            inter_node_capacity_factor=TIER,
        ),
        Routing("all local", COSINE, 0.0, True, 0, 0.0),
        # ablations
        Routing("batches", COSINE, places_batches=True),
        Routing("experts", COSINE, expert_placement_steps=PLACEMENT_STEPS),
        Routing("batches + experts", COSINE, places_batches=True, expert_placement_steps=PLACEMENT_STEPS),
        Routing("batches + tiers", COSINE, 0.0, True, 0, TIER),
        Routing("hash + batches", HASH, places_batches=True),
        Routing("hash + batches + experts", HASH, places_batches=True, expert_placement_steps=PLACEMENT_STEPS),
        Routing("switch + loss + batches", SWITCH, MU, True),
        Routing("paper: loss + batches", PAPER, MU, True),
        replace(FULL, name="loss 0.01 + batches", locality_loss_coef=0.01),
        replace(FULL, name="loss 0.1 + batches", locality_loss_coef=0.1),
        replace(FULL, name="loss 0.1 to the aim + batches", locality_loss_coef=0.1, stops_at_aim=True),
        replace(FULL, name="loss eps 0.02 + batches", locality_remote_share=0.02),
        replace(FULL, name="loss + batches by domain", by_domain=True),
    )
}
REFERENCE = {COSINE: "none", SWITCH: "switch", HASH: "hash"}  # the same gate without locality


@dataclass(frozen=True)
class Job:
    """
    One training.

    Args:
        rows: the rows that are read off it, each with its topology; one alone where it changes the training.
        seed: of weights, order of the text, noise.
    """

    rows: tuple[tuple[Routing, Topology], ...]
    seed: int

    @property
    def leader(self) -> Routing:
        """Gate and losses of the training."""
        return self.rows[0][0]

    @property
    def is_led(self) -> bool:
        """Whether the parameters depend on who computes what, as `rows[0]` says it."""
        return self.leader.changes_training

    @property
    def name(self) -> str:
        topology = f" {self.rows[0][1]}" if self.is_led else ""
        return f"{self.leader.name}{topology} seed {self.seed}"


def jobs(routings: Iterable[Routing], topologies: Iterable[Topology], seeds: Iterable[int]) -> list[Job]:
    """The trainings that give every row for every topology and seed; those that keep the most statistics first."""
    routings, topologies = list(routings), list(topologies)
    groups: dict[object, list[tuple[Routing, Topology]]] = {}
    for routing in routings:
        for topology in topologies:
            key = (routing.name, topology) if routing.changes_training else routing.gate
            groups.setdefault(key, []).append((routing, topology))
    found = [Job(tuple(rows), seed) for seed in seeds for rows in groups.values()]
    return sorted(found, key=lambda job: -len(job.rows))


def config_of(setup: Setup, routing: Routing) -> LocMoeConfig:
    """The architecture of a row: the same for all in everything but the gate."""
    return LocMoeConfig(
        vocab_size=setup.vocab_size,
        hidden_size=setup.hidden_size,
        intermediate_size=setup.moe_intermediate_size,
        moe_intermediate_size=setup.moe_intermediate_size,
        num_hidden_layers=setup.num_hidden_layers,
        num_attention_heads=setup.num_attention_heads,
        num_experts=setup.num_experts,
        max_position_embeddings=setup.sequence_length,
        tie_word_embeddings=True,
        locality_loss_coef=routing.locality_loss_coef,
        locality_remote_share=routing.locality_remote_share,
        use_cache=False,
        **dict(routing.gate),
    )


__all__ = ["ROUTINGS", "REFERENCE", "Job", "Routing", "Setup", "Topology", "config_of", "jobs"]
