# SPDX-License-Identifier: Apache-2.0
"""
Measures what `locality_train` trained: real ranks on the emulated cluster, the library's own layouts, exchange, placement of
batches and capacity tiers, the interfaces' own counters. All variants live in the same processes and take turns step by
step, as in `bench_step`.

Training goes on where it ended, with the smallest learning rate of its schedule: what is measured are training steps of a
trained router. The placement of batches starts with the statistics of the trained run, as a resumed run does.

Shapes: L MoE layers, n experts, T tokens of a rank, k experts of a token.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import workload
from benchmarks.bench_step import _keep_priority
from benchmarks.cluster import Cluster, Counters, Link, run_on_nodes
from benchmarks.gloo_device import share_gloo_device
from benchmarks.locality_data import load
from benchmarks.locality_jobs import unpack
from benchmarks.locality_rows import ROUTINGS, Routing, Setup, Topology, config_of
from benchmarks.locality_train import load_cv
from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.distributed.dispatch import Peers
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import find_node_local_experts
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.batch_placement import BatchPlacement, batch_placement_for
from hf_locmoe.training.locality import locality_control_for
from hf_locmoe.training.telemetry import sum_over_ranks


LEARNING_RATE = 1e-5
TEXT_SEED = 77  # of the order in which the training text is read, another one than any training's


@dataclass(frozen=True)
class Variant:
    """
    One row of the measured table.

    Args:
        routing: name of a row of `ROUTINGS`, whose checkpoint is used.
        layout: `LocMoePlugin.layout`; `"alone"`: every rank by itself, nothing exchanged.
        exchange: `LocMoePlugin.ep_implementation`.
        wire_dtype: of tokens under way; float32 if not given.
    """

    routing: str
    layout: str = "spread"
    exchange: str = "locmoe"
    wire_dtype: str | None = None

    @property
    def name(self) -> str:
        if self.layout == "alone":
            return "alone"
        parts = [self.routing]
        parts += ["bfloat16 on the wire"] if self.wire_dtype == "bfloat16" else []
        parts += [f"upstream's {self.layout}"] if self.exchange != "locmoe" else []
        return ", ".join(parts)

    @property
    def is_upstream(self) -> bool:
        return self.exchange != "locmoe" and self.layout != "alone"

    @property
    def is_checked(self) -> bool:
        """Whether its cross-entropy has to be that of one process: no token is turned away."""
        return self.layout != "alone" and ROUTINGS[self.routing].inter_node_capacity_factor is None

    @property
    def rtol(self) -> float:
        return 2e-3 if self.wire_dtype == "bfloat16" else 1e-5

    def plugin(self, topology: Topology) -> LocMoePlugin:
        """What a user sets for this row."""
        routing = ROUTINGS[self.routing]
        is_ours = self.exchange == "locmoe"
        return LocMoePlugin(
            layout=self.layout,
            ep_implementation=self.exchange,
            ranks_per_node=str(topology.ranks_per_node),
            wire_dtype=self.wire_dtype,
            batch_placement="micro_batch" if routing.places_batches and is_ours else "off",
            locality_target_share=routing.target_share(topology),
            inter_node_capacity_factor=routing.inter_node_capacity_factor,
            timeout_s=120,
        )


def variants(routings: list[str], wire_rows: list[str]) -> list[Variant]:
    """The rows in our layout; some with half the bytes of a row on the wire; upstream's layouts; a rank alone."""
    return [
        *(Variant(name) for name in routings),
        *(Variant(name, wire_dtype="bfloat16") for name in wire_rows),
        Variant("hash", "sharded", "all_to_all"),
        Variant("none", "sharded", "all_to_all"),
        Variant("none", "replicated", "all_to_all"),
        Variant("none", "alone", "none"),
    ]


# ---- one rank -------------------------------------------------------------------------------------------------------


class Runner:
    """One variant on one rank: its model, and a training step as the library takes it."""

    def __init__(self, variant: Variant, topology: Topology, run: dict[str, Any], seed: int = 0):
        self.variant, self.topology = variant, topology
        routing = ROUTINGS[variant.routing]
        config = config_of(Setup(**run["setup"]), routing)
        config.gate_noise_std = 0.0  # so that one process routes the same
        # a model may take tensors over as they are, and several variants start from the same ones
        state_dict = {name: tensor.clone() for name, tensor in run["state_dict"].items()}
        self.placement: BatchPlacement | None = None
        plugin = None if variant.layout == "alone" else variant.plugin(topology)
        if plugin is None:
            config.router_loss_scope = "micro_batch"
            self.model = one_process(config, state_dict)
        else:
            plugin.activate()
            self.model = from_checkpoint(config, state_dict, run["placement"]["node_of_expert"], topology)
            if routing.places_batches and not variant.is_upstream:
                self.placement = batch_placement_for(self.model)
                self.placement.table.load_state_dict(run["placement"]["table"])
        self.control = None if plugin is None else locality_control_for(self.model)
        if plugin is not None:
            plugin.deactivate()
        self.optimizer = workload.optimizer_for(self.model, LEARNING_RATE)
        self.routes: dict[int, torch.Tensor] = {}
        for layer, block in enumerate(self.model.sparse_blocks):
            block.experts.register_forward_pre_hook(self._keep(layer))

    def _keep(self, layer: int):
        def keep(module, inputs):
            self.routes[layer] = inputs[1]

        return keep

    def step(self, input_ids: torch.Tensor) -> Any:
        """A training step on what this rank read; the model's outputs."""
        batch = {"input_ids": input_ids, "labels": input_ids}
        if self.placement is not None:
            batch = self.placement.place([batch])[0]
        outputs = self.model(**batch)
        outputs.loss.backward()
        stats = outputs.router_stats.clone()
        if self.control is not None:
            self.control.update(stats)
        if self.variant.layout != "alone":
            sum_over_ranks(stats)
        self.model.update_router_state(stats)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return outputs

    def cross_entropy(self, outputs: Any) -> float:
        """Of the newest step, without the router losses."""
        with torch.no_grad():
            router = self.model.weighted_router_loss(outputs.router_aux_loss, outputs.locality_loss)
            return (outputs.loss - router).item()

    def near(self) -> torch.Tensor:
        """(L, n) whether an expert is on this rank's node."""
        num_layers, num_experts = len(self.model.sparse_blocks), self.model.config.num_experts
        if self.variant.layout in ("alone", "replicated"):
            return torch.ones(num_layers, num_experts, dtype=torch.bool)
        return self.model.base_model.router_scope.node_local_experts

    def taken(self) -> torch.Tensor:
        """(T, L, k) experts of the newest step."""
        return torch.stack([self.routes[layer] for layer in sorted(self.routes)], dim=1)

    def local_share(self) -> float:
        """Share of this rank's assignments whose expert is on its node."""
        taken = self.taken()
        return self.near().unsqueeze(0).expand(len(taken), -1, -1).gather(2, taken).float().mean().item()


def one_process(config: Any, state_dict: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The trained model on one rank."""
    model = AutoModelForCausalLM.from_config(config, experts_implementation=workload.EXPERTS_IMPLEMENTATION)
    model.load_state_dict(state_dict)
    return model.train()


def from_checkpoint(
    config: Any, state_dict: dict[str, torch.Tensor], node_of_expert: torch.Tensor, topology: Topology
) -> PreTrainedModel:
    """
    The trained model spread over the ranks by the active plugin, its experts on the nodes where they were placed.

    The ranks of a node hold its experts in their order. A checkpoint names experts canonically; here its rows are put in the
    order in which the ranks hold them, and the exchange is told who holds which.
    """
    ranks = rank_of_expert(node_of_expert, topology)
    is_moved = not torch.equal(ranks, ranks.sort(dim=1).values)
    if is_moved:
        state_dict = permuted(state_dict, ranks.argsort(dim=1, stable=True))
    model = LocMoeForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=state_dict,
        dtype=torch.float32,
        experts_implementation=workload.EXPERTS_IMPLEMENTATION,
    ).train()
    if is_moved:
        for layer, placed in zip(expert_parallel_layers(model), ranks.tolist(), strict=True):
            peers = layer.peers
            layer.peers = Peers(
                peers.topology.with_experts(config.num_experts, placed),
                peers.rank,
                peers.group,
                peers.node_group,
                peers.expert_to_rank.device,
                peers.label,
                peers.clock,
            )
        find_node_local_experts(model)
    return model


def rank_of_expert(node_of_expert: torch.Tensor, topology: Topology) -> torch.Tensor:
    """(L, n) node of every expert to the rank that holds it: a node's experts in their order, rank after rank."""
    slot = node_of_expert.argsort(dim=1, stable=True).argsort(dim=1)
    return slot * topology.world_size // node_of_expert.shape[1]


def permuted(state_dict: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every layer's experts in the (L, n) order."""
    found = dict(state_dict)
    for name, tensor in state_dict.items():
        if ".mlp.experts." in name:
            layer = int(name.split(".layers.")[1].split(".")[0])
            found[name] = tensor[order[layer]]
    return found


def truth(run: dict[str, Any], routing: Routing, batch: torch.Tensor) -> float:
    """Cross-entropy of one process on the whole first batch."""
    config = config_of(Setup(**run["setup"]), routing)
    config.gate_noise_std = 0.0
    model = one_process(config, run["state_dict"])
    with torch.no_grad():
        logits = model(input_ids=batch).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()


def worker(job: dict[str, Any], output: Path) -> None:
    """One rank: all variants, taking turns. Rank 0 writes what was measured."""
    torch.set_num_threads(1)
    _keep_priority()
    share_gloo_device()  # or the threads of all variants' groups take time from each
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    topology = Topology(**job["topology"])
    rank, steps = dist.get_rank(), job["warmup"] + job["repeats"]
    runs = unpack(Path(job["trained"]))
    chosen = [Variant(**values) for values in job["variants"]]
    setup = Setup(**runs[f"{topology} {chosen[0].routing}"]["setup"])
    part = load(Path(job["data"]), setup.sequence_length)["train"]
    rounds = part.input_ids[part.batches(setup.sequences, steps, TEXT_SEED)].long()
    runners = {v.name: Runner(v, topology, runs[f"{topology} {v.routing}"]) for v in chosen}
    del runs
    found = {name: {key: [] for key in ("seconds", "sent", "loss", "share", "cv", "turned")} for name in runners}
    names = list(runners)
    for index, batch in enumerate(rounds):
        mine = batch.chunk(topology.world_size)[rank]
        first = index % len(names)
        for name in names[first:] + names[:first]:
            runner = runners[name]
            dist.barrier()
            before, started = Counters.read(), time.perf_counter()
            outputs = runner.step(mine)
            elapsed = time.perf_counter() - started
            dist.barrier()
            seen = found[name]
            seen["sent"].append((Counters.read() - before).tx_bytes)
            seen["seconds"].append(elapsed)
            seen["loss"].append(runner.cross_entropy(outputs))
            seen["share"].append(runner.local_share())
            taken = [torch.empty_like(runner.taken()) for _ in range(topology.world_size)]
            dist.all_gather(taken, runner.taken())
            seen["cv"].append(load_cv(torch.cat(taken), setup.num_experts))
            tokens, dropped, rerouted = (
                outputs.router_stats[:, stat].sum().item()
                for stat in (RouterStat.TOKENS, RouterStat.DROPPED, RouterStat.REROUTED)
            )
            seen["turned"].append((dropped + rerouted) / tokens)
    everyone: list[Any] = [None] * topology.world_size
    dist.all_gather_object(everyone, found)
    if rank == 0:
        output.write_text(json.dumps({name: merge(name, everyone, topology) for name in names}))
    dist.barrier()
    dist.destroy_process_group()


def merge(name: str, everyone: list[dict], topology: Topology) -> dict[str, list[float]]:
    """Per step: the slowest rank's seconds, the busiest node's bytes, means of the rest."""

    def per_step(key: str):
        return list(zip(*(rank[name][key] for rank in everyone), strict=True))

    # the ranks of a node read the same interface a moment apart: the first rank of each node speaks for it
    return {
        "seconds": [max(step) for step in per_step("seconds")],
        "sent": [max(step[:: topology.ranks_per_node]) for step in per_step("sent")],
        **{key: [statistics.fmean(step) for step in per_step(key)] for key in ("loss", "share", "cv", "turned")},
    }


# ---- the cluster ----------------------------------------------------------------------------------------------------


def measure(
    topology: Topology,
    chosen: list[Variant],
    links: list[Link],
    trained: Path,
    data: Path,
    warmup: int,
    repeats: int,
) -> dict[str, dict]:
    """Per link and variant what [`merge`] gives; the cluster is built once and its links reshaped."""
    job = {
        "topology": asdict(topology),
        "variants": [asdict(variant) for variant in chosen],
        "trained": str(trained.resolve()),
        "data": str(data.resolve()),
        "warmup": warmup,
        "repeats": repeats,
    }
    measured = {}
    with tempfile.TemporaryDirectory() as scratch, Cluster(topology.nodes, links[0]) as cluster:
        for link in links:
            cluster.shape(link)
            output = Path(scratch, "measured.json")
            command = [sys.executable, *"-m torch.distributed.run -m benchmarks.bench_locality --worker".split()]
            command += [str(output), "--job", json.dumps(job)]
            result = run_on_nodes(cluster, command, topology.ranks_per_node, timeout_s=1800)
            if result.status:
                raise RuntimeError(f"the run at {link} failed with status {result.status}:\n{result.text()}")
            measured[str(link)] = json.loads(output.read_text())
    return measured
