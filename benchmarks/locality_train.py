# SPDX-License-Identifier: Apache-2.0
"""
Trains the rows of `bench_locality`: one process that computes what N nodes of M ranks would.

A step's global batch is dealt to the nodes as the run would deal it, the locality loss is taken over each node's tokens,
the load-balancing loss over all, and the capacity tiers over each rank's. What a parallel run adds is traffic, which the
second half of the benchmark measures on real ranks: parallel runs equal one process (tests/distributed).

Shapes: N nodes, W ranks, S sequences of a step, Q tokens of a sequence, T = S * Q, L MoE layers, n experts, k of a token.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

import torch
from transformers import AutoModelForCausalLM

from benchmarks.locality_data import Sequences
from benchmarks.locality_rows import HASH, Job, Routing, Setup, Topology, config_of
from hf_locmoe.moe.losses import locality_loss
from hf_locmoe.moe.overflow import RemoteTier
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.affinity import AffinityTable
from hf_locmoe.training.expert_placement import place_experts
from hf_locmoe.training.locality import EASING, SHARE_MOMENTUM
from hf_locmoe.training.placement import balanced_assignment


LAST_STEPS = 50  # over which shares and loads are taken
CURVE_STEPS = 50  # steps between two shares of the curve
VALIDATIONS = 6  # along a training
VALIDATION_BATCH = 128  # sequences


class RouteTap:
    """Keeps what the MoE blocks did in the newest forward: (T, n) logits with gradient, and the experts taken, (T, k)."""

    def __init__(self, model):
        self.logits: dict[int, torch.Tensor] = {}
        self.experts: dict[int, torch.Tensor] = {}
        for layer, block in enumerate(model.sparse_blocks):
            block.gate.register_forward_hook(self._keep_logits(layer))
            block.experts.register_forward_pre_hook(self._keep_experts(layer))

    def _keep_logits(self, layer: int):
        def keep(module, inputs, outputs):
            self.logits[layer] = outputs[0]

        return keep

    def _keep_experts(self, layer: int):
        def keep(module, inputs):
            self.experts[layer] = inputs[1]

        return keep

    def all_logits(self) -> torch.Tensor:
        """(L, T, n), float32."""
        return torch.stack([self.logits[layer].float() for layer in sorted(self.logits)])

    def routes(self) -> torch.Tensor:
        """(T, L, k) int64 experts, on the CPU."""
        experts = torch.stack([self.experts[layer] for layer in sorted(self.experts)], dim=1)
        return experts.to(torch.int16).cpu().long()


class TiersOfAllRanks:
    """The remote tier of every rank over its part of the tokens: stands where a block keeps its own rank's."""

    def __init__(self, near: torch.Tensor, factor: float, tokens_per_rank: int):
        self.tiers = [RemoteTier(experts, factor) for experts in near]
        self.node_local_experts = near.repeat_interleave(tokens_per_rank, dim=0)  # (T, n)

    def overflow(self, top_k_index, router_logits, token_mask=None):
        parts = zip(top_k_index.chunk(len(self.tiers)), router_logits.chunk(len(self.tiers)), strict=True)
        return torch.cat([tier.overflow(*part) for tier, part in zip(self.tiers, parts, strict=True)])


class Nodes:
    """One row on one topology: which node computes which sample and holds which expert, and what comes of it."""

    def __init__(self, setup: Setup, routing: Routing, topology: Topology, num_domains: int):
        self.setup, self.routing, self.topology = setup, routing, topology
        num_layers, num_experts = setup.num_hidden_layers, setup.num_experts
        self.experts_per_node = num_experts // topology.nodes
        self.node_of_expert = (torch.arange(num_experts) // self.experts_per_node).repeat(num_layers, 1)  # (L, n)
        num_keys = num_domains if routing.by_domain else setup.vocab_size
        self.table = AffinityTable(num_layers, num_keys, num_experts, topology.nodes)
        self.target_share = routing.target_share(topology)
        self.running_share: torch.Tensor | None = None  # (L,)
        self.seen: dict[str, list] = defaultdict(list)

    def on_node(self) -> torch.Tensor:
        """(L, n, N) whether an expert lives on a node."""
        return torch.nn.functional.one_hot(self.node_of_expert, self.topology.nodes).bool()

    def keys(self, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        """(S, Q) token ids or (S, 1) domains: what samples are dealt by."""
        return domain.unsqueeze(1) if self.routing.by_domain else input_ids

    def deal(self, input_ids: torch.Tensor, domain: torch.Tensor) -> torch.Tensor:
        """(S,) the node that computes each sample: where most of its tokens would stay, or as they were read."""
        even = len(input_ids) // self.topology.nodes
        if not self.routing.places_batches:
            return torch.arange(len(input_ids)) // even
        scores = self.table.node_scores(self.keys(input_ids, domain), self.on_node())
        return torch.from_numpy(balanced_assignment(scores.numpy(), [even] * self.topology.nodes))

    def limit(self, model) -> None:
        """Gives the blocks their remote tiers, where the experts are now."""
        factor = self.routing.inter_node_capacity_factor
        if factor is None:
            return
        node_of_rank = torch.arange(self.topology.world_size) // self.topology.ranks_per_node
        tokens = self.setup.sequences * self.setup.sequence_length // self.topology.world_size
        for nodes, block in zip(self.node_of_expert, model.sparse_blocks, strict=True):
            near = (nodes == node_of_rank.unsqueeze(1)).to(model.device)
            block.remote_tier = TiersOfAllRanks(near, factor, tokens)

    def locality_loss(self, logits: torch.Tensor, node: torch.Tensor) -> torch.Tensor:
        """Of (L, T, n) logits, with the (S,) node of each sample: mean over layers and nodes, as the ranks' mean is."""
        num_nodes = self.topology.nodes
        by_sample = logits.softmax(-1).unflatten(1, (len(node), -1)).sum(2)  # (L, S, n)
        is_on = torch.nn.functional.one_hot(node, num_nodes).T.to(by_sample)  # (N, S)
        tokens = is_on.sum(1) * (logits.shape[1] // len(node))
        near = self.on_node().transpose(1, 2).to(logits.device)  # (L, N, n)
        prob_sum = torch.einsum("ms,lsn->lmn", is_on, by_sample)
        share = self.routing.locality_remote_share
        losses = locality_loss(prob_sum, tokens.expand(len(logits), -1), near, share).mean(dim=1)  # (L,)
        if self.target_share is not None and self.running_share is not None:
            scale = ((self.target_share - self.running_share) / EASING).clamp(0, 1)
            losses = losses * scale.to(losses.device)
        return losses.mean()

    def local_share(self, routes: torch.Tensor, node_of_token: torch.Tensor) -> torch.Tensor:
        """(L,) share of the (T, L, k) assignments whose expert is on the token's node."""
        return (self._node_of(routes) == node_of_token.view(-1, 1, 1)).float().mean(dim=(0, 2))

    def _node_of(self, routes: torch.Tensor) -> torch.Tensor:
        return self.node_of_expert.unsqueeze(0).expand(len(routes), -1, -1).gather(2, routes)

    def rank_load_cv(self, routes: torch.Tensor) -> float:
        """How unevenly the ranks are loaded with (T, L, k) assignments, mean over layers."""
        slot = self.node_of_expert.argsort(dim=1, stable=True).argsort(dim=1)  # a node's experts, rank after rank
        rank = slot * self.topology.world_size // self.setup.num_experts
        return load_cv(rank.unsqueeze(0).expand(len(routes), -1, -1).gather(2, routes), self.topology.world_size)

    def learn(self, model, keys: torch.Tensor, routes: torch.Tensor, node_of_token: torch.Tensor, step: int) -> None:
        """After an optimizer step: the statistics, and at intervals a new placement of the experts."""
        if not self.routing.keeps_statistics:
            return
        if self.target_share is not None:
            share = self.local_share(routes, node_of_token)
            momentum = min(SHARE_MOMENTUM, (step - 1) / step)
            self.running_share = share if self.running_share is None else self.running_share.lerp(share, 1 - momentum)
        self.table.update(keys, routes, node_of_token)
        every = self.routing.expert_placement_steps
        if every and step % every == 0:
            for layer, mass in enumerate(self.table.expert_node_mass):
                placed = place_experts(mass.numpy(), self.experts_per_node, self.node_of_expert[layer].numpy())
                self.seen["moved"].append(float((self.node_of_expert[layer] != torch.from_numpy(placed)).sum()))
                self.node_of_expert[layer] = torch.from_numpy(placed)
            self.limit(model)

    def placement(self) -> dict:
        """What a measurement on real ranks needs beside the checkpoint."""
        return {"node_of_expert": self.node_of_expert.clone(), "table": self.table.state_dict()}


def load_cv(places: torch.Tensor, num_places: int) -> float:
    """Standard deviation over mean of how often each place occurs in (T, L, k), mean over layers."""
    loads = (
        torch.nn.functional.one_hot(places.transpose(0, 1).flatten(1), num_places).sum(dim=1).float()
    )  # (L, places)
    return (loads.std(dim=-1, correction=0) / loads.mean(dim=-1)).mean().item()


@dataclass
class Trained:
    """What came of a job: a flat dict for each of its rows, and of one process the checkpoint and placements."""

    results: list[dict]
    state_dict: dict[str, torch.Tensor] = field(default_factory=dict)
    placements: list[dict] = field(default_factory=list)


class Training:
    """
    A job under way, step by step.

    Args:
        job ([`Job`]): What is trained and which rows are read off it.
        setup ([`Setup`]): Sizes; `steps` decides the schedule.
        data (`dict[str, Sequences]`): `train` and `validation`.
        device (`str`): Of the model; the placement's bookkeeping is on the CPU.
    """

    def __init__(self, job: Job, setup: Setup, data: dict[str, Sequences], device: str):
        self.job, self.setup, self.data, self.device = job, setup, data, device
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(job.seed)
        config = config_of(setup, job.leader)
        self.model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").to(device).train()
        if job.leader.gate == HASH:
            counts = torch.bincount(data["train"].input_ids.long().flatten(), minlength=setup.vocab_size)
            for block in self.model.sparse_blocks:
                block.gate.balance_by_frequency(counts)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=setup.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=self.is_accelerated
        )
        warmup = max(1, setup.steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda s: min((s + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, s / setup.steps)))),
        )
        self.tap = RouteTap(self.model)
        self.rows = [Nodes(setup, routing, topology, len(data["train"].domains)) for routing, topology in job.rows]
        self.rows[0].limit(self.model)
        self.order = data["train"].batches(setup.sequences, setup.steps, 1000 + job.seed)
        self.curve: list[dict] = []
        self.last: dict[str, list[float]] = defaultdict(list)

    @property
    def is_accelerated(self) -> bool:
        return self.device.startswith("cuda")

    def step(self, step: int) -> None:
        """Optimizer step number `step`, from 1."""
        part, leader = self.data["train"], self.rows[0]
        chosen = self.order[step - 1]
        input_ids, domain = part.input_ids[chosen].long(), part.domain[chosen].long()
        dealt = [row.deal(input_ids, domain) for row in self.rows]
        if self.job.is_led:  # in the order of the ranks that compute them
            by_rank = dealt[0].argsort(stable=True)
            input_ids, domain, dealt = input_ids[by_rank], domain[by_rank], [dealt[0][by_rank]]
        batch = input_ids.to(self.device)
        with self._autocast():
            outputs = self.model(batch, labels=batch)
        loss = outputs.loss
        if self.job.leader.locality_loss_coef:
            node = dealt[0].to(self.device)
            loss = loss + self.job.leader.locality_loss_coef * leader.locality_loss(self.tap.all_logits(), node)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_router_state(outputs.router_stats)

        is_last, is_shown = step > self.setup.steps - LAST_STEPS, step % CURVE_STEPS == 0
        if not (is_last or is_shown or any(row.routing.keeps_statistics for row in self.rows)):
            return
        routes = self.tap.routes()
        tokens_each = len(routes) // len(input_ids)
        for row, node in zip(self.rows, dealt, strict=True):
            node_of_token = node.repeat_interleave(tokens_each)
            if is_last or is_shown:
                share = row.local_share(routes, node_of_token)
                row.seen["curve"].append([step, round(share.mean().item(), 4)])
            if is_last:
                row.seen["local_share"].append(share.mean().item())
                row.seen["layers"].append(share)
                row.seen["rank_load_cv"].append(row.rank_load_cv(routes))
            keys = row.keys(input_ids, domain)
            row.learn(
                self.model,
                keys.repeat_interleave(tokens_each // keys.shape[1], 1).flatten(),
                routes,
                node_of_token,
                step,
            )
        if is_last:
            self.last["load_cv"].append(load_cv(routes, self.setup.num_experts))
            sums = outputs.router_stats.sum(dim=(0, 2)).tolist()
            for name, stat in (("dropped", RouterStat.DROPPED), ("rerouted", RouterStat.REROUTED)):
                self.last[name].append(sums[stat] / sums[RouterStat.TOKENS])

    def run(self) -> Trained:
        """All steps."""
        started = time.perf_counter()
        shown = {round(self.setup.steps * part / VALIDATIONS) for part in range(1, VALIDATIONS + 1)}
        for step in range(1, self.setup.steps + 1):
            self.step(step)
            if step in shown:
                self.curve.append({"step": step, "validation_loss": self.validation_loss()})
        common = {
            "seed": self.job.seed,
            "validation_loss": self.curve[-1]["validation_loss"],
            **{name: fmean(values) for name, values in self.last.items()},
            "curve": self.curve,
            "seconds": round(time.perf_counter() - started, 1),
        }
        return Trained(
            [{**self._of_row(row), **common} for row in self.rows],
            {name: tensor.cpu() for name, tensor in self.model.state_dict().items()},
            [row.placement() for row in self.rows],
        )

    def _of_row(self, row: Nodes) -> dict:
        return {
            "routing": row.routing.name,
            "topology": str(row.topology),
            "local_share": fmean(row.seen["local_share"]),
            "local_share_by_layer": torch.stack(row.seen["layers"]).mean(0).tolist(),
            "rank_load_cv": fmean(row.seen["rank_load_cv"]),
            "local_share_curve": [point for point in row.seen["curve"] if point[0] % CURVE_STEPS == 0],
            "experts_moved": sum(row.seen["moved"]),
        }

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a token over the whole validation part, without anything that is done for locality."""
        self.model.eval()
        part, losses = self.data["validation"], []
        for rows in torch.arange(len(part.input_ids)).split(VALIDATION_BATCH):
            batch = part.input_ids[rows].long().to(self.device)
            with self._autocast():
                losses.append(self.model(batch, labels=batch).loss * len(rows))
        self.model.train()
        return (torch.stack(losses).sum() / len(part.input_ids)).item()

    def _autocast(self):
        return torch.autocast("cuda" if self.is_accelerated else "cpu", torch.bfloat16, enabled=self.is_accelerated)


def rate(training: Training, seconds: float, synchronize: Callable[[], None]) -> float:
    """Steps a second of a training, warmed up first."""
    for step in (1, 2, 3):
        training.step(step)
    synchronize()
    started, step = time.perf_counter(), 3
    while time.perf_counter() - started < seconds and step < training.setup.steps:
        step += 1
        training.step(step)
        synchronize()
    return (step - 3) / (time.perf_counter() - started)


__all__ = ["VALIDATIONS", "Nodes", "Trained", "Training", "load_cv", "rate"]
