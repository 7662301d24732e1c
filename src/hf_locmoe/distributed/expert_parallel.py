# SPDX-License-Identifier: Apache-2.0
"""
The expert-parallel implementation "locmoe" that transformers calls.

`DistributedConfig(..., ep_implementation="locmoe")` selects it for every transformers MoE with an
`ep_dispatch_experts` plan: this file fits `dispatch.py` and `overlap.py` into transformers' `EPImplementation`.

What a run may choose is in [`ExpertParallelOptions`]. It is set once, before the model is built, with
[`set_expert_parallel_options`]; without that, from `LOCMOE_*` variables.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .adapters import ExpertAdapters
from .backend import PLAN_VARIABLE
from .dispatch import Capacity, FanOut, Peers, plan_dispatch
from .exchange_clock import ExchangeClock
from .failure import TIMEOUT_VARIABLE
from .launch_environment import RANKS_PER_NODE_VARIABLE
from .overlap import CostModel, run_sliced
from .recomputation import Recomputation
from .topology import NodeTopology


_WIRE_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class ExpertParallelOptions:
    """
    What a run may choose about expert parallelism. Nothing here changes the checkpoint.

    Args:
        slices (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Parts that a layer's tokens are cut into in training, so that transfers run under the experts'
            computation. `"auto"` decides at the first training step from sizes and measured rates, and takes 1 where
            slicing does not help. Evaluation and generation are never sliced.
        fan_out (`"auto"`, `"node"` or `"rank"`, *optional*, defaults to `"auto"`):
            `"node"` sends one copy of a token to each node and hands it on inside, `"rank"` one to each rank.
        wire_dtype (`"float32"`, `"bfloat16"`, `"float16"`, *optional*):
            Dtype of tokens, outputs and their gradients under way. Sums are in float32 whatever it is, routing
            weights and their gradients travel unchanged. The tensors' own dtype when left out.
        capacity_factor (`float`, *optional*):
            Fixed shapes in training: room for this factor times the expected rows for each rank, and the expected
            (token, expert) pairs of a rank; what does not fit is dropped. No sizes are exchanged, nothing is read back to
            the host. Dropless when left out.
        max_tokens_per_rank (`int`, *optional*):
            Most tokens a rank has in one forward, needed with `capacity_factor`: shapes must be the same on all ranks.
        remote_share (`float`, *optional*):
            Share of the assignments that is expected to leave its node, which sizes the two tiers of room under
            `capacity_factor`. When left out, `inter_node_capacity_factor` times the share under uniform routing.
        inter_node_capacity_factor (`float`, *optional*):
            Of the run, see [`~hf_locmoe.distributed.parallel_run.LocalityOptions`]; here it sizes the tiers.
        backend (`str`, *optional*):
            Process-group backend for the exchanges, for example `"locmoe"`; the mesh's own group when left out.
    """

    slices: int | Literal["auto"] = "auto"
    fan_out: Literal["auto", "node", "rank"] = "auto"
    wire_dtype: str | None = None
    capacity_factor: float | None = None
    max_tokens_per_rank: int | None = None
    remote_share: float | None = None
    inter_node_capacity_factor: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        if self.slices != "auto" and (not isinstance(self.slices, int) or self.slices < 1):
            raise ValueError(f'`slices` ({self.slices}) must be "auto" or at least 1: set 1 to turn slicing off.')
        if self.fan_out not in ("auto", *get_args(FanOut)):
            raise ValueError(f'`fan_out` ({self.fan_out}) must be "auto", "node" or "rank": use one of these.')
        if self.wire_dtype is not None and self.wire_dtype not in _WIRE_DTYPES:
            raise ValueError(
                f"`wire_dtype` ({self.wire_dtype}) must be one of {', '.join(_WIRE_DTYPES)}: use one of these, or "
                "leave it out for the tensors' own."
            )
        if self.capacity_factor is None:
            return
        if self.capacity_factor <= 0:
            raise ValueError(
                f"`capacity_factor` ({self.capacity_factor}) must be positive: 1.0 is the room that even loads need."
            )
        if self.max_tokens_per_rank is None or self.max_tokens_per_rank < 1:
            raise ValueError(
                f"`max_tokens_per_rank` ({self.max_tokens_per_rank}) must be given with `capacity_factor` "
                f"({self.capacity_factor}), whose shapes must be the same on all ranks: set it to the batch size of a "
                "rank times the longest sequence."
            )
        if self.fan_out == "node":
            raise ValueError(
                '`fan_out` ("node") has no fixed shapes: leave it on "auto" with `capacity_factor` '
                f"({self.capacity_factor})."
            )
        if self.remote_share is not None and not 0 <= self.remote_share <= 1:
            raise ValueError(f"`remote_share` ({self.remote_share}) must be within 0 .. 1: it is a share.")

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> ExpertParallelOptions:
        """Reads `LOCMOE_SLICES`, `LOCMOE_FAN_OUT`, `LOCMOE_WIRE_DTYPE`, ...: every field in capitals."""
        env = os.environ if env is None else env
        readers: dict[str, Callable[[str], Any]] = {
            "slices": lambda text: text if text == "auto" else int(text),
            "capacity_factor": float,
            "max_tokens_per_rank": int,
            "remote_share": float,
            "inter_node_capacity_factor": float,
        }
        values: dict[str, Any] = {}
        for name in (option.name for option in fields(cls)):
            text = env.get(f"LOCMOE_{name.upper()}")
            if text:
                try:
                    values[name] = readers.get(name, str)(text)
                except ValueError as error:
                    raise ValueError(
                        f"`LOCMOE_{name.upper()}` ({text}) must be a number: correct it or unset it."
                    ) from error
        return cls(**values)


_options: ExpertParallelOptions | None = None


def set_expert_parallel_options(options: ExpertParallelOptions | None) -> None:
    """Sets the options for the models that are built from now on; `None` goes back to the environment's."""
    global _options
    _options = options


def current_expert_parallel_options() -> ExpertParallelOptions:
    """The options that a model built now gets."""
    return _options or ExpertParallelOptions.from_environment()


@contextmanager
def expert_parallel_options(**changes: Any):
    """Options for the models that are built inside the `with` block: the current ones with `changes`."""
    before = _options
    set_expert_parallel_options(replace(current_expert_parallel_options(), **changes))
    try:
        yield
    finally:
        set_expert_parallel_options(before)


@dataclass
class _GroupResources:
    """What all layers of one expert-parallel group share."""

    group: Any
    node_group: Any
    topology: NodeTopology
    rank: int
    job_node_of_rank: tuple[int, ...]  # of every rank of the group
    num_layers: int = 0
    cost: CostModel | None = None
    clock: ExchangeClock | None = None


# Keyed by the mesh's group, so that the groups made for it live exactly as long.
_resources: WeakKeyDictionary[Any, dict[tuple[str | None, ...], _GroupResources]] = WeakKeyDictionary()


def job_topology() -> NodeTopology:
    """Nodes of the whole job: from the launcher's environment, or by asking the hosts through the default store."""
    world_size = dist.get_world_size()
    if by_hand := os.environ.get(RANKS_PER_NODE_VARIABLE):
        return NodeTopology.from_ranks_per_node(by_hand, world_size)
    by_environment = NodeTopology.from_environment()
    if by_environment is not None and by_environment.num_ranks == world_size:
        return by_environment
    store = dist.distributed_c10d._get_default_store()
    return NodeTopology.from_store(store, dist.get_rank(), world_size, prefix="locmoe/expert_parallel")


def _resources_of(mesh_group: Any, backend: str | None) -> _GroupResources:
    """Collective over the group the first time: makes the node's group, and with `backend` the exchange's own."""
    known = _resources.setdefault(mesh_group, {})
    # A mesh over all ranks is the default group's, of which a process that builds several models has but one: what its groups
    # are made from must not be what it was for an earlier model.
    made_from = (backend, *map(os.environ.get, (RANKS_PER_NODE_VARIABLE, PLAN_VARIABLE, TIMEOUT_VARIABLE)))
    if made_from not in known:
        ranks = dist.get_process_group_ranks(mesh_group)
        job = job_topology()
        topology = job.subset(ranks)
        rank = dist.get_group_rank(mesh_group, dist.get_rank())
        group = mesh_group
        if backend is not None:
            group = dist.new_group(ranks, backend=backend, use_local_synchronization=True)
        node_ranks = [ranks[peer] for peer in topology.ranks_of_node(topology.node_of_rank(rank))]
        node_group = None
        if 1 < len(node_ranks) < len(ranks):
            node_group = dist.new_group(node_ranks, use_local_synchronization=True)
        known[made_from] = _GroupResources(
            group, node_group, topology, rank, tuple(job.node_of_rank(member) for member in ranks)
        )
    return known[made_from]


class LocMoeEP(EPImplementation):
    """
    Expert parallelism that knows its nodes: one copy of a token per destination (see `dispatch.py`), transfers under
    the experts' computation (see `overlap.py`), dropless or with fixed shapes.

    Example: 8 experts, `DistributedConfig(fsdp_size=4, ep_size=4, ep_implementation="locmoe")`, two nodes, top-2:

    GPU             0        1    |    2        3
    node           A        A    |    B        B
    batch          B0       B1   |    B2       B3
    experts       E0 E1    E2 E3 |   E4 E5    E6 E7

    token of B0 with E4 and E6: one row 0 -> 2, handed on 2 -> 3; the two outputs are summed on 2, one row 2 -> 0.

    Under TP the ranks of a TP group hold the same batch: each sends its own share of it and the outputs are gathered.
    """

    def __init__(self, experts: torch.nn.Module, ep_mesh, tp_mesh):
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.options = current_expert_parallel_options()
        self.resources = _resources_of(ep_mesh.get_group(), self.options.backend)
        self.num_experts = self.num_local_experts * ep_mesh.size()
        self.flops_per_row = 2 * sum(
            parameter.numel() // parameter.size(0) for parameter in experts.parameters() if parameter.dim() == 3
        )
        device = torch.device(ep_mesh.device_type)
        if device.type != "cpu":
            device = torch.device(device.type, torch.accelerator.current_device_index())
        resources = self.resources
        topology = resources.topology.with_experts(self.num_experts)
        label = f"MoE layer {resources.num_layers}"
        resources.num_layers += 1
        if resources.clock is None:
            resources.clock = ExchangeClock(resources.group, device)
        self.peers = Peers(
            topology, resources.rank, resources.group, resources.node_group, device, label, resources.clock
        )
        experts.locmoe_expert_parallel = self
        self.adapters = ExpertAdapters(experts, tp_mesh.size())
        self.newest_routes: torch.Tensor | None = None  # (T, k) experts of the newest training forward
        self._slices: int | None = None  # what "auto" came to
        self._choices: tuple[FanOut, int] | None = None
        self._recomputation = Recomputation()

    @property
    def node_of_expert(self) -> tuple[int, ...]:
        """The node that every expert lives on, by the numbers of the job's nodes; `num_experts` entries."""
        return tuple(self.resources.job_node_of_rank[rank] for rank in self.peers.topology.expert_to_rank)

    def place(self, expert_to_rank: tuple[int, ...]) -> None:
        """
        From here on experts are looked for on these ranks of the group, each rank's in ascending order. The parameters have
        to be there: see `expert_move.py`.
        """
        old = self.peers
        topology = self.resources.topology.with_experts(self.num_experts, expert_to_rank)
        self.peers = Peers(
            topology, old.rank, old.group, old.node_group, old.expert_to_rank.device, old.label, old.clock
        )

    def __call__(self, hidden_states, top_k_index, top_k_weights):
        num_tokens = hidden_states.size(0)
        if self.experts.training:
            self.newest_routes = top_k_index
        # dropped ones and padding keep an expert that exists; none of them is worth a row on the wire
        top_k_index = top_k_index.masked_fill(top_k_weights == 0, self.num_experts)
        if self.tp_mesh.size() > 1:
            # A local chunk; its backward gathers the rows' gradients.
            hidden_states, top_k_index, top_k_weights = (
                DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
                .redistribute(self.tp_mesh, [Shard(0)])
                .to_local()
                for tensor in (hidden_states, top_k_index, top_k_weights)
            )
        # Without fixed shapes there are sizes to read back, so nothing to compile: one clean break of the graph.
        has_fixed_shapes = self.experts.training and self.options.capacity_factor is not None
        exchange = self._exchange if has_fixed_shapes else self._exchange_in_eager
        with self.adapters.applied(self.peers.local_experts):
            output = exchange(hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() > 1:
            output = DTensor.from_local(
                output.contiguous(),
                self.tp_mesh,
                [Shard(0)],
                shape=(num_tokens, output.size(1)),
                stride=(output.size(1), 1),
            ).full_tensor()
        return output

    def _exchange(self, hidden_states, top_k_index, top_k_weights):
        peers = self.peers
        # Not whether gradients are on: a reentrant checkpoint runs its first forward without, and the second must agree.
        is_training = self.experts.training
        # Its backward ends in the dispatch's, so an offered plan is withdrawn for certain.
        has_backward = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        recomputation = None if torch.compiler.is_compiling() else self._recomputation
        plan = recomputation.take(top_k_index) if recomputation is not None else None
        is_recomputed = plan is not None
        if plan is None:
            plan = plan_dispatch(
                top_k_index.long(),
                peers,
                self._fan_out(hidden_states, top_k_index, peers),
                self._num_slices(hidden_states, top_k_index, peers) if is_training else 1,
                self._capacity(top_k_index, peers) if is_training else None,
            )
        if is_training:
            self._choices = plan.fan_out, len(plan.slices)
        takes_choices = self._experts_take_choices(hidden_states)
        return run_sliced(
            hidden_states,
            top_k_weights,
            plan,
            peers,
            self._run_padded_experts if plan.is_padded and not takes_choices else self._run_experts,
            _WIRE_DTYPES.get(self.options.wire_dtype),
            recomputation if has_backward else None,
            is_recomputed,
            by_pair=not takes_choices,
        )

    _exchange_in_eager = torch.compiler.disable(_exchange)

    def _experts_take_choices(self, hidden_states) -> bool:
        """Whether the experts' implementation lays out, of k choices of a row, those alone that are for this rank's experts."""
        implementation = ALL_EXPERTS_FUNCTIONS.get(getattr(self.experts.config, "_experts_implementation", None))
        takes_choices = getattr(implementation, "takes_choices", None)
        return takes_choices is not None and takes_choices(self.experts, hidden_states)

    def _run_experts(self, tokens, expert_ids, weights, num_pairs):
        # Without a row the experts would drop out of the graph, and with them this rank's part in the exchanges of the
        # backward and in the reduction of the experts' gradients.
        if tokens.size(0) == 0:
            return self._run_padded_experts(tokens, expert_ids, weights, num_pairs)
        return self._call_experts(tokens, expert_ids, weights, num_pairs)

    def _run_padded_experts(self, tokens, expert_ids, weights, num_pairs):
        """With one row of zeros more for expert 0, dropped again: at least one row is for an expert of this rank."""
        num_pairs += expert_ids.size(1)
        tokens, expert_ids, weights = (
            torch.nn.functional.pad(tensor, (0, 0, 0, 1)) for tensor in (tokens, expert_ids, weights)
        )
        return self._call_experts(tokens, expert_ids, weights, num_pairs)[:-1]

    def _call_experts(self, tokens, expert_ids, weights, num_pairs):
        if getattr(self.experts, "expert_capacity", None) is not None:
            # Set by our MoE block for this rank's tokens, and they were limited to it. What arrives here is of all
            # ranks, so more than that for one expert, and none of it may be dropped.
            self.experts.expert_capacity = None
        if expert_ids.size(1) > 1:
            return self.experts_forward(tokens, expert_ids, weights, num_choices=num_pairs)
        return self.experts_forward(tokens, expert_ids, weights)

    def _cost(self, hidden_states, peers: Peers) -> CostModel:
        if self.resources.cost is None:
            self.resources.cost = CostModel.measure(peers, hidden_states.dtype)
        return self.resources.cost

    def _fan_out(self, hidden_states, top_k_index, peers: Peers) -> FanOut:
        num_top_k = top_k_index.size(1)
        is_same = num_top_k == 1 or peers.topology.num_nodes == 1 or peers.ranks_per_node == 1
        if is_same or self.options.capacity_factor is not None:
            return "rank"
        if self.options.fan_out != "auto":
            return self.options.fan_out
        return self._cost(hidden_states, peers).choose_fan_out(num_top_k, peers)

    @property
    def choices(self) -> tuple[FanOut, int] | None:
        """Fan-out and slices of the last training step, the way "auto" decided; `None` before the first."""
        return self._choices

    def _num_slices(self, hidden_states, top_k_index, peers: Peers) -> int:
        if self.options.slices != "auto":
            return self.options.slices
        if self._slices is None and torch.compiler.is_compiling():
            return 1  # a compiled graph orders the transfers itself
        if self._slices is None:
            cost = self._cost(hidden_states, peers)
            most_tokens = torch.tensor(hidden_states.size(0), device=hidden_states.device)
            dist.all_reduce(most_tokens, op=dist.ReduceOp.MAX, group=peers.group)
            self._slices = cost.choose_slices(
                int(most_tokens), self._row_bytes(hidden_states), top_k_index.size(1), self.flops_per_row, peers
            )
        return self._slices

    def _row_bytes(self, hidden_states) -> int:
        return hidden_states.size(1) * (_WIRE_DTYPES.get(self.options.wire_dtype) or hidden_states.dtype).itemsize

    def _capacity(self, top_k_index, peers: Peers) -> Capacity | None:
        options = self.options
        if options.capacity_factor is None:
            return None
        room, most_tokens = self._room(top_k_index, peers), -(-options.max_tokens_per_rank // self.tp_mesh.size())
        # a token goes to a rank once, however many of its experts are there
        node_local, remote = min(room.node_local, most_tokens), min(room.remote, most_tokens)
        return Capacity(node_local, remote, math.ceil(options.capacity_factor * most_tokens * top_k_index.size(1)))

    def _room(self, top_k_index, peers: Peers) -> Capacity:
        options = self.options
        num_tokens, num_top_k = top_k_index.shape
        most_tokens = -(-options.max_tokens_per_rank // self.tp_mesh.size())
        if num_tokens > most_tokens:
            raise ValueError(
                f"`max_tokens_per_rank` ({options.max_tokens_per_rank}) must be at least the tokens of a rank in one "
                f"forward ({num_tokens * self.tp_mesh.size()}): set it to the batch size of a rank times the longest "
                "sequence."
            )
        share, num_assignments = options.remote_share, most_tokens * num_top_k
        if share is not None or options.inter_node_capacity_factor is None:
            return fixed_capacity(num_assignments, options.capacity_factor, share, peers.topology)
        # the factor is a ceiling, not an expectation: what does not leave the node needs room inside it
        uniform = 1 - min(peers.topology.node_sizes) / peers.num_ranks
        share = min(1.0, options.inter_node_capacity_factor * uniform)
        room = fixed_capacity(num_assignments, options.capacity_factor, share, peers.topology)
        inside = fixed_capacity(num_assignments, options.capacity_factor, 0.0, peers.topology)
        return room._replace(node_local=inside.node_local)


def expert_parallel_layers(model: torch.nn.Module) -> list[LocMoeEP]:
    """The expert parallelism of a model's MoE layers, in their order; empty where the model has none of this kind."""
    layers = (getattr(module, "locmoe_expert_parallel", None) for module in model.modules())
    return [layer for layer in layers if layer is not None]


def exchange_choices(model: torch.nn.Module) -> list[dict[str, Any]]:
    """
    What "auto" goes by in each of [`expert_parallel_layers`], plain data: another measurement may come to other slices,
    which sum in another order.
    """
    return [
        {
            "cost": None if layer.resources.cost is None else asdict(layer.resources.cost),
            "slices": layer._slices,
            "measured_on": (layer.peers.topology.rank_to_node, layer.peers.expert_to_rank.device.type),
        }
        for layer in expert_parallel_layers(model)
    ]


def keep_exchange_choices(model: torch.nn.Module, choices: list[dict[str, Any]] | None) -> None:
    """Goes on with what [`exchange_choices`] gave, where the groups are as they were. All ranks call it."""
    current = exchange_choices(model)
    for layer, now, choice in zip(expert_parallel_layers(model), current, choices or []):
        if now["measured_on"] == tuple(choice["measured_on"]) and choice["cost"] is not None:
            layer.resources.cost = CostModel(**choice["cost"])
            layer._slices = choice["slices"]


def fixed_capacity(
    num_assignments: int, capacity_factor: float, remote_share: float | None, topology: NodeTopology
) -> Capacity:
    """
    Room for each rank of the sender's node and for each other rank.

    Args:
        num_assignments (`int`): (token, expert) pairs of one rank.
        capacity_factor (`float`): room over expectation.
        remote_share (`float`, *optional*): expected share that leaves the node; under uniform routing when left out.
        topology (`NodeTopology`): of the group.
    """
    num_ranks, on_node = topology.num_ranks, max(topology.node_sizes)
    off_node = num_ranks - min(topology.node_sizes)
    share = off_node / num_ranks if remote_share is None else remote_share

    def room(expected: float) -> int:
        return min(num_assignments, max(1, -int(-capacity_factor * expected // 1)))

    return Capacity(
        node_local=room(num_assignments * (1 - share) / on_node),
        remote=room(num_assignments * share / off_node) if off_node else 0,
    )
