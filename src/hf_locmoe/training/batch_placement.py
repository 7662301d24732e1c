# SPDX-License-Identifier: Apache-2.0
"""
Which node computes which sample: each global batch is dealt so that tokens find their experts on their own node.

Who computes a sample changes traffic and not mathematics: the samples of the batch, the number a rank computes, the loss
and the gradients stay what they were. (The locality loss is the exception by its meaning: it is about who computes what.)

    read      rank 0: a b   rank 1: C D   rank 2: c D   rank 3: a C      domains; a, b, c have experts on node 0
    computed  rank 0: a b   rank 1: c a   rank 2: C D   rank 3: D C

Every rank scores the samples it read with a table that is the same everywhere, tells the scores to the others, and all come
to the same assignment; then the samples that change node travel, as token ids: a thousandth of what their hidden states
would.

Shapes: B samples of a rank's micro-batch, S of all, Q tokens, L MoE layers, n experts, N nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils import logging

from ..distributed.expert_move import Placement, move_experts, reason_not_to_move
from ..distributed.expert_parallel import LocMoeEP, expert_parallel_layers, job_topology
from ..distributed.parallel_run import LocalityOptions, current_parallel_run
from .affinity import AffinityTable
from .expert_placement import expert_ranks, place_experts
from .placement import balanced_assignment


logger = logging.get_logger(__name__)

# Of a step, over all ranks, that the statistics see: what takes a few milliseconds on one core.
SAMPLED_TOKENS = 16384
SAMPLED_ASSIGNMENTS = 131072  # tokens * layers * experts of a token
MAX_DOMAINS = 1024
PADDING = {"labels": -100}  # of other fields 0

Batch = dict[str, Any]


class BatchPlacement:
    """
    Deals samples to nodes, and gathers the statistics that this and the placement of experts go by. Made on all ranks
    together.

    Args:
        layers (`list[LocMoeEP]`): The expert parallelism of the model's MoE layers.
        options ([`LocalityOptions`]): Of the run.
        vocab_size (`int`): Of the model.
    """

    def __init__(self, layers: list[LocMoeEP], options: LocalityOptions, vocab_size: int):
        self.layers, self.options = layers, options
        tp_rank = layers[0].tp_mesh.get_local_rank()
        tp_ranks = [None] * dist.get_world_size()
        dist.all_gather_object(tp_ranks, tp_rank)
        # the ranks of a tensor-parallel group hold the same samples: each deals with its likes of the other groups
        members = [rank for rank, place in enumerate(tp_ranks) if place == tp_rank]
        self.group = dist.new_group(members, backend="gloo", use_local_synchronization=True)
        self.rank = members.index(dist.get_rank())
        self.job = job_topology()
        self.topology = self.job.subset(members)
        num_keys = MAX_DOMAINS if options.domain_column else vocab_size
        self.table = AffinityTable(len(layers), num_keys, layers[0].num_experts, self.topology.num_nodes)
        self._on_node: torch.Tensor | None = None
        self._placed_by: list[Any] = []
        self._keys: torch.Tensor | None = None  # of the newest micro-batch that was handed out, one for each token
        self._copied: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        self._has_warned = False
        self._experts_placed_at = 0

    def place_experts_if_due(self, model: torch.nn.Module, optimizer: Any, step: int) -> None:
        """[`BatchPlacement.place_experts`] every `expert_placement_steps`: all ranks call it before a step, with its number."""
        every = self.options.expert_placement_steps
        if every and step % every == 0 and step != self._experts_placed_at:
            self._experts_placed_at = step
            self.place_experts(model, optimizer)

    def place_experts(self, model: torch.nn.Module, optimizer: Any = None) -> int:
        """
        Moves the experts to the nodes that most of their tokens are computed on, between two optimizer steps. A collective.

        Args:
            model: That this placement was made for.
            optimizer (*optional*): Whose state moves with them.

        Returns:
            `int`: Experts that moved to another rank, over all layers.
        """
        if self.table.is_empty:
            return 0
        if (reason := reason_not_to_move(model, optimizer)) is not None:
            if dist.get_rank() == 0:
                logger.warning_once(
                    f"`expert_placement_steps` ({self.options.expert_placement_steps}) has no effect: {reason}"
                )
            return 0
        wanted = [self._wanted_placements()]
        dist.broadcast_object_list(wanted, src=0)
        moved = move_experts(model, wanted[0], optimizer)
        if moved and dist.get_rank() == 0:
            logger.info(f"{moved} experts of {len(self.layers)} layers moved to the nodes of their tokens.")
        return moved

    def _wanted_placements(self) -> list[Placement]:
        """By the statistics so far; a rank of the expert-parallel group for each expert of each layer."""
        first = [self.topology.ranks_of_node(node)[0] for node in range(self.topology.num_nodes)]
        column = {self.job.node_of_rank(self.topology.global_ranks[rank]): node for node, rank in enumerate(first)}
        placements = []
        for layer, counted in zip(self.layers, self.table.expert_node_mass.numpy(), strict=True):
            topology = layer.peers.topology
            on_node = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]
            # the group's nodes by their own numbers
            mass = counted[:, [column[layer.resources.job_node_of_rank[ranks[0]]] for ranks in on_node]]
            current = np.array([topology.node_of_rank(rank) for rank in topology.expert_to_rank])
            slots = [layer.num_local_experts * len(ranks) for ranks in on_node]
            placements.append(expert_ranks(place_experts(mass, slots, current), mass.sum(axis=1), topology))
        return placements

    def place(self, batches: list[Batch]) -> list[Batch]:
        """
        The micro-batches that this rank computes in a step, for those it read. A collective: all ranks call it together.

        Args:
            batches (`list[dict]`): As the loader gave them. Every field is a tensor whose first dimension is the samples'.

        Returns:
            `list[dict]`: As many micro-batches of as many samples.
        """
        parts, reason = self._parts(batches, self._where_experts_are())
        mine = {"parts": [part.described() for part in parts], "reason": reason, "routes": self._routes()}
        everyone: list[Any] = [None] * self.topology.num_ranks
        dist.all_gather_object(everyone, mine, group=self.group)
        self._learn([other["routes"] for other in everyone])
        if self.options.batch_placement != "off":
            reason = next((other["reason"] for other in everyone if other["reason"] is not None), None)
            reason = reason or _difference([other["parts"] for other in everyone])
            if reason is None:
                for index, part in enumerate(parts):
                    self._deal(part, [other["parts"][index] for other in everyone])
                batches = [batch for part in parts for batch in part.batches()]
            elif not self._has_warned and dist.get_rank() == 0:
                self._has_warned = True
                logger.warning(f"Samples stay on the ranks that read them: {reason}")
        self._keys = self._keys_of(batches[-1]) if batches else None
        return batches

    def settle(self) -> None:
        """
        Takes what the newest steps have shown into the table now, ahead of the next step: what is saved of the table is then
        what the next step goes by. A collective.
        """
        known = []
        while (routes := self._routes()) is not None:
            known.append(routes)
        everyone: list[Any] = [None] * self.topology.num_ranks
        dist.all_gather_object(everyone, known, group=self.group)
        for step in range(max(map(len, everyone))):
            self._learn([routes[step] if step < len(routes) else None for routes in everyone])

    def _learn(self, routes: list[Any]) -> None:
        """All ranks' tokens in one update: the table decays once a step, and no rank weighs more than another."""
        seen = [(rank, *of_rank) for rank, of_rank in enumerate(routes) if of_rank is not None]
        if not seen:
            return
        ranks, keys, experts = zip(*seen, strict=True)
        nodes = np.repeat([self.topology.node_of_rank(rank) for rank in ranks], [len(part) for part in keys])
        keys, experts = (torch.from_numpy(np.concatenate(parts)).long() for parts in (keys, experts))
        self.table.update(keys, experts, torch.from_numpy(nodes))

    # ---- what is known ------------------------------------------------------------------------------------------

    def _routes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Keys (m,) and experts (m, L, k) of a sample of a micro-batch computed here; from an accelerator a step late."""
        routes = [layer.newest_routes for layer in self.layers]
        keys, self._keys = self._keys, None
        newest = None
        if keys is not None and all(route is not None and len(route) == len(keys) for route in routes):
            num_tokens = len(keys) * self.topology.num_ranks
            num_assignments = num_tokens * len(routes) * routes[0].shape[1]
            stride = max(1, num_tokens // SAMPLED_TOKENS, -(-num_assignments // SAMPLED_ASSIGNMENTS))
            experts = torch.stack([route[::stride] for route in routes], dim=1)
            newest = _started_copy(keys[::stride]), _started_copy(experts), _event_on(experts)
        if newest is not None and newest[2] is None:
            ready = newest
        else:  # so that the host never waits for the step that it has just queued
            ready, self._copied = self._copied, newest
        if ready is None:
            return None
        keys, experts, event = ready
        if event is not None:
            event.synchronize()
        return keys.numpy().astype(np.int32), experts.numpy().astype(np.int16)

    def _keys_of(self, batch: Batch) -> torch.Tensor | None:
        """(B * Q,) the key of every token."""
        input_ids = batch.get("input_ids")
        if input_ids is None:
            return None
        if self.options.domain_column is None:
            return input_ids.flatten()
        return batch[self.options.domain_column].repeat_interleave(input_ids[0].numel())

    def _where_experts_are(self) -> torch.Tensor:
        """(L, n, N) whether a token computed on that node finds the expert there; gathered anew after experts moved."""
        peers = [layer.peers for layer in self.layers]
        if self._on_node is None or any(now is not then for now, then in zip(peers, self._placed_by, strict=True)):
            tables: list[Any] = [None] * self.topology.num_ranks
            dist.all_gather_object(tables, [layer.node_of_expert for layer in self.layers], group=self.group)
            first = [self.topology.ranks_of_node(node)[0] for node in range(self.topology.num_nodes)]
            number = [self.job.node_of_rank(self.topology.global_ranks[rank]) for rank in first]
            self._on_node = torch.stack(
                [torch.tensor(tables[rank]) == node for rank, node in zip(first, number, strict=True)], dim=-1
            )
            self._placed_by = peers
        return self._on_node

    # ---- dealing ------------------------------------------------------------------------------------------------

    def _parts(self, batches: list[Batch], on_node: torch.Tensor) -> tuple[list[_Part], str | None]:
        """What is dealt together, and why it cannot be."""
        for batch in batches:
            if (reason := _reason_not_to_move(batch, self.options.domain_column)) is not None:
                return [], reason
        together = [batches] if self.options.batch_placement == "step" else [[batch] for batch in batches]
        parts: list[_Part] = []
        if not batches:
            return parts, None
        shares = self.table.node_shares(on_node)
        for group in filter(None, together):
            scores = []
            for batch in group:
                keys, mask = batch["input_ids"], batch.get("attention_mask")
                if self.options.domain_column is not None:
                    keys, mask = batch[self.options.domain_column].view(-1, 1), None
                mask = None if mask is None else mask.cpu()
                scores.append(self.table.node_scores(keys.cpu(), on_node, mask, shares))
            parts.append(_Part(group, torch.cat(scores).numpy()))
        return parts, None

    def _deal(self, part: _Part, described: list[dict[str, Any]]) -> None:
        """Moves the samples of one part, in place."""
        source = np.repeat(np.arange(len(described)), [len(other["scores"]) for other in described])
        node_of_rank = np.array(self.topology.rank_to_node)
        scores = np.concatenate([other["scores"] for other in described]).astype(np.float64)
        # of two equal ways the one that moves less
        scores[np.arange(len(source)), node_of_rank[source]] += 1e-6 * np.abs(scores).max(initial=1.0)
        counts = np.bincount(node_of_rank[source], minlength=self.topology.num_nodes)
        target = target_ranks(source, balanced_assignment(scores, counts.tolist()), node_of_rank)
        part.pad_to(max(other["length"] for other in described))
        rows = part.rows()
        moving = source != target
        leaving, coming = moving & (source == self.rank), moving & (target == self.rank)
        if not moving.any():
            return
        own = np.flatnonzero(source == self.rank)
        # what leaves, by target; on the other side it arrives by source: both keep the samples' order
        order = np.argsort(target[leaving], kind="stable")
        place = np.flatnonzero(leaving[own])
        num_ranks, row_bytes = len(described), rows.shape[1]
        sent = rows[torch.from_numpy(place[order])].flatten()
        send_sizes = (np.bincount(target[leaving], minlength=num_ranks) * row_bytes).tolist()
        recv_sizes = (np.bincount(source[coming], minlength=num_ranks) * row_bytes).tolist()
        received = torch.empty(sum(recv_sizes), dtype=torch.uint8)
        dist.all_to_all_single(received, sent, recv_sizes, send_sizes, group=self.group)
        rows[torch.from_numpy(place)] = received.view(-1, row_bytes)
        part.take(rows)


def target_ranks(source: np.ndarray, node: np.ndarray, node_of_rank: np.ndarray) -> np.ndarray:
    """
    The rank that computes each sample: the one that read it where its node is right, else one of that node whose own samples
    leave; every rank keeps its number.

    Args:
        source (`np.ndarray` of shape `(S,)`): Rank that read each sample.
        node (`np.ndarray` of shape `(S,)`): Node it was dealt to; as many to a node as its ranks read.
        node_of_rank (`np.ndarray` of shape `(num_ranks,)`): Node of every rank.
    """
    target = source.copy()
    stays = node_of_rank[source] == node
    for number in np.unique(node):
        free = source[~stays & (node_of_rank[source] == number)]
        target[~stays & (node == number)] = np.sort(free, kind="stable")
    return target


class _Part:
    """Micro-batches whose samples are dealt together, as one batch."""

    def __init__(self, batches: list[Batch], scores: np.ndarray):
        self.sizes = [len(batch["input_ids"]) for batch in batches]
        self.devices = {name: value.device for name, value in batches[0].items()}
        self.length = max(batch["input_ids"].shape[1] for batch in batches)
        self.scores = scores
        padded = [_padded(batch, self.length) for batch in batches]
        self.fields = {name: torch.cat([batch[name] for batch in padded]).cpu() for name in sorted(padded[0])}
        lengths = {batch["input_ids"].shape[1] for batch in batches}
        self.can_pad = "attention_mask" in self.fields
        self.is_ragged = len(lengths) > 1

    def described(self) -> dict[str, Any]:
        """What the other ranks have to know, and to find equal to theirs."""
        shapes = {
            name: (
                str(value.dtype),
                *(["length", *value.shape[2:]] if _has_length(value, self.length) else value.shape[1:]),
            )
            for name, value in self.fields.items()
        }
        return {"scores": self.scores, "length": self.length, "shapes": shapes, "ragged": self.is_ragged}

    def pad_to(self, length: int) -> None:
        self.fields, self.length = _padded(self.fields, length), length

    def rows(self) -> torch.Tensor:
        """(B, bytes of a sample) uint8."""
        flat = [value.contiguous().view(len(value), -1).view(torch.uint8) for value in self.fields.values()]
        return torch.cat(flat, dim=1)

    def take(self, rows: torch.Tensor) -> None:
        """The inverse of [`_Part.rows`]."""
        start = 0
        for name, value in self.fields.items():
            width = value[0].numel() * value.itemsize
            piece = rows[:, start : start + width].contiguous()
            self.fields[name] = piece.view(value.dtype).view(value.shape)
            start += width

    def batches(self) -> list[Batch]:
        pieces = {name: value.to(self.devices[name]).split(self.sizes) for name, value in self.fields.items()}
        return [{name: values[index] for name, values in pieces.items()} for index in range(len(self.sizes))]


def _has_length(value: torch.Tensor, length: int) -> bool:
    return value.dim() > 1 and value.shape[1] == length


def _padded(batch: Batch, length: int) -> Batch:
    """Samples as long as `length`: their tokens masked, their labels ignored."""
    missing = length - batch["input_ids"].shape[1]
    if not missing:
        return dict(batch)
    old = batch["input_ids"].shape[1]
    return {
        name: torch.nn.functional.pad(value, [0, 0] * (value.dim() - 2) + [0, missing], value=PADDING.get(name, 0))
        if _has_length(value, old)
        else value
        for name, value in batch.items()
    }


def _reason_not_to_move(batch: Any, domain_column: str | None) -> str | None:
    """Why the samples of a batch cannot be told apart; None where they can."""
    if not hasattr(batch, "items"):
        return f"a batch is a {type(batch).__name__} and not a dict of tensors."
    input_ids = batch.get("input_ids")
    if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
        return "a batch has no `input_ids` of shape (batch, sequence)."
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor) or value.dim() == 0 or len(value) != len(input_ids):
            return f"the field `{name}` of a batch is no tensor with one entry per sample."
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != input_ids.shape:
        return "the `attention_mask` of a batch is not of shape (batch, sequence)."
    if domain_column is not None and (domain_column not in batch or batch[domain_column].dim() != 1):
        return f"`domain_column` ({domain_column}) is no field of shape (batch,) of the batches: name one that is."
    return None


def _difference(described: list[list[dict[str, Any]]]) -> str | None:
    """Why the ranks' batches do not go together; None where they do. Every rank finds the same."""
    if len({len(parts) for parts in described}) > 1:
        return "ranks read different numbers of micro-batches."
    for parts in zip(*described, strict=True):
        if any(part["shapes"] != parts[0]["shapes"] for part in parts):
            return "the ranks' batches have different fields, dtypes or shapes."
        differ = len({part["length"] for part in parts}) > 1 or any(part["ragged"] for part in parts)
        if differ and "attention_mask" not in parts[0]["shapes"]:
            return "sequences differ in length and have no `attention_mask`, without which they cannot be padded."
    return None


def _started_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor
    return tensor.detach().to("cpu", non_blocking=True)


def _event_on(tensor: torch.Tensor) -> Any:
    if tensor.device.type == "cpu":
        return None
    event = torch.Event(tensor.device.type)
    event.record()
    return event


# ---- where it is used -----------------------------------------------------------------------------------------------


def batch_placement_for(model: torch.nn.Module) -> BatchPlacement | None:
    """
    The placement of a run for a model that is spread over ranks; None where there is nothing to place: no run, no experts
    on other nodes, `batch_placement="off"` without placement of experts. All ranks call it together.
    """
    run = current_parallel_run()
    layers = expert_parallel_layers(model)
    if run is None or not layers:
        return None
    options = run.locality
    if options.batch_placement == "off" and not options.expert_placement_steps:
        return None
    if layers[0].peers.topology.num_nodes == 1:
        return None
    return BatchPlacement(layers, options, model.get_input_embeddings().num_embeddings)


class PlacedBatches:
    """
    A prepared dataloader whose micro-batches are dealt to the nodes of their experts.

    Args:
        loader (iterable): Gives this rank's micro-batches, the same number on all ranks.
        placement ([`BatchPlacement`]): Of the model.
    """

    def __init__(self, loader: Iterable[Batch], placement: BatchPlacement):
        self.loader, self.placement = loader, placement

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            yield self.placement.place([batch])[0]


__all__ = ["BatchPlacement", "PlacedBatches", "batch_placement_for", "target_ranks"]
