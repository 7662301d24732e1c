# SPDX-License-Identifier: Apache-2.0
"""
Which rank holds what: the three layouts, what each sends between nodes and keeps in memory, and how to build them.

On N nodes of M ranks, with W = N * M:

| layout         | dense layers                          | experts                    | what crosses nodes                 |
| -------------- | ------------------------------------- | -------------------------- | ---------------------------------- |
| `"sharded"`    | sharded over all W                    | spread over all W          | parameters, gradients, tokens      |
| `"replicated"` | sharded over a node, a copy per node  | likewise, a copy per node  | gradients                          |
| `"spread"`     | sharded over a node, a copy per node  | spread over all W          | dense gradients, non-local tokens  |

The first two are upstream's. `"spread"` cannot be said with its meshes, dense `(pp, dp_replicate, fsdp, tp)` and
expert `(pp, dp_replicate, efsdp, ep)`, because `ep` does not reach over `dp_replicate`. It needs two small things:
[`SpreadConfig`] for the sizes and [`SpreadLayoutMixin`] for the expert mesh; sharding, loading, gradient reduction and
saving stay transformers'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.distributed import DistributedConfig

from .step_traffic import LayoutGroups, Span, Traffic, Workload, parameter_traffic, token_traffic
from .topology import NodeTopology


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


LAYOUTS = ("sharded", "replicated", "spread")
_EXPERT_AXES = ("pp", "dp_replicate", "efsdp", "ep")


# ---- building -------------------------------------------------------------------------------------------------------


@dataclass(repr=False)
class SpreadConfig(DistributedConfig):
    """
    A `DistributedConfig` whose experts reach over the replicas of the dense layers: `ep_size` divides
    `dp_replicate_size * fsdp_size * tp_size`, not only `fsdp_size * tp_size`.

    `dp_replicate_size` is the number of nodes, `fsdp_size * tp_size` the ranks of a node. Give it to a class with
    [`SpreadLayoutMixin`] (all of ours, others through [`with_spread_layout`]).

    Args:
        replicate_experts (`bool`, defaults to `False`):
            Where more ranks than `ep_size` hold an expert: keep it whole on each of them. Otherwise they shard it among
            each other, which needs as many experts a rank as there are copies.
    """

    replicate_experts: bool = False

    @property
    def expert_copies(self) -> int:
        """Ranks that hold, or share, one expert."""
        return self.dp_replicate_size * self.fsdp_size * self.tp_size // self.ep_size

    @property
    def efsdp_size(self) -> int:
        """Ranks that shard one expert among each other."""
        return 1 if self.replicate_experts else self.expert_copies

    def dense_config(self) -> DistributedConfig:
        """The same without experts: what upstream can say."""
        values = {field.name: getattr(self, field.name) for field in fields(DistributedConfig)}
        return DistributedConfig(**(values | {"ep_size": 1}))

    def _validate_mesh_config(self) -> None:
        self.dense_config()  # upstream's checks, all but its rule on `ep_size`
        ep_size = self.ep_size
        world_size = self.dp_replicate_size * self.fsdp_size * self.tp_size
        if self.pp_size > 1:
            raise ValueError(f"`pp_size` ({self.pp_size}) must be 1 with experts spread over nodes: set it to 1.")
        if world_size % ep_size or ep_size % self.tp_size:
            raise ValueError(
                f"`ep_size` ({ep_size}) must divide the number of ranks ({world_size}) and be a multiple of `tp_size` "
                f"({self.tp_size}): set it to one of {_divisors(world_size, self.tp_size)}."
            )

    def expert_ranks(self) -> torch.Tensor:
        """
        Global rank of every place of the expert mesh, shape `(1, replicas, efsdp_size, ep_size)`. Copies of an expert
        are put on one node where the sizes allow it, so that keeping them equal costs nothing between nodes.
        """
        num_nodes, on_node = self.dp_replicate_size, self.fsdp_size * self.tp_size
        ranks = torch.arange(num_nodes * on_node)
        on_node_ep = self.ep_size // num_nodes
        if self.ep_size % num_nodes == 0 and on_node_ep % self.tp_size == 0:
            ranks = ranks.view(num_nodes, self.expert_copies, on_node_ep).transpose(0, 1)
        return ranks.reshape(1, -1, self.efsdp_size, self.ep_size)


class SpreadLayoutMixin:
    """
    For a transformers model class, before `PreTrainedModel`: builds the meshes of a [`SpreadConfig`], and gathers tied
    embeddings once.

    It overrides `prepare_distribute_model`, which `from_pretrained` calls first; any other config passes through.
    """

    @classmethod
    def prepare_distribute_model(cls, distributed_config, device_map=None):
        if not isinstance(distributed_config, SpreadConfig):
            return super().prepare_distribute_model(distributed_config, device_map=device_map)  # type: ignore[misc]
        # Upstream makes the dense mesh; to it there are no experts.
        _, device_map, meshes = super().prepare_distribute_model(  # type: ignore[misc]
            distributed_config.dense_config(), device_map=device_map
        )
        if meshes is None:
            return distributed_config, device_map, None
        dense_mesh = meshes.get_mesh(("pp", "dp_replicate", "fsdp", "tp"))
        return distributed_config, device_map, _spread_meshes(dense_mesh, distributed_config)

    def _resolve_parallel_plans(self, distributed_config):
        """
        Leaves tied embeddings to the root's group, tied before it is made, so that fully_shard knows both ends as one
        parameter. Upstream gives the embedding a group of its own: two groups then gather, pad and reduce one tensor, and
        where its rows do not divide each pads a copy of its own, of which only one is trained.
        """
        tp_plan, ep_plan, fsdp_plan = super()._resolve_parallel_plans(distributed_config)  # type: ignore[misc]
        # tensor parallelism shards both ends by their names
        if fsdp_plan and distributed_config.tp_size == 1 and getattr(self.config, "tie_word_embeddings", False):  # type: ignore[attr-defined]
            self.tie_weights(recompute_mapping=False)  # type: ignore[attr-defined]
            embedding, head = self.get_input_embeddings(), self.get_output_embeddings()  # type: ignore[attr-defined]
            if head is not None and head.weight is embedding.weight:
                fsdp_plan = {
                    name: style
                    for name, style in fsdp_plan.items()
                    if self.get_submodule(name) is not embedding  # type: ignore[attr-defined]
                }
        return tp_plan, ep_plan, fsdp_plan


def with_spread_layout(model_class: type) -> type:
    """`model_class`, able to be built with a [`SpreadConfig`]; itself where it already is."""
    if issubclass(model_class, SpreadLayoutMixin):
        return model_class
    attributes = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (SpreadLayoutMixin, model_class), attributes)


def _spread_meshes(dense_mesh: DeviceMesh, config: SpreadConfig) -> Any:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.distributed.utils import TransformersDeviceMesh

    class SpreadMeshes(TransformersDeviceMesh):
        """Experts that are not replicated have no such axis, where upstream looks for one beside `efsdp`."""

        def get_mesh(self, dims):
            names = (dims,) if isinstance(dims, str) else tuple(dims)
            if not config.replicate_experts and ("ep" in names or "efsdp" in names):
                names = tuple(name for name in names if name != "dp_replicate")
            return super().get_mesh(names)

    expert_mesh = DeviceMesh(dense_mesh.device_type, config.expert_ranks(), mesh_dim_names=_EXPERT_AXES)
    return SpreadMeshes(dense_mesh, expert_mesh)


def layout_config(
    layout: str,
    topology: NodeTopology,
    num_experts: int,
    tp_size: int = 1,
    ep_size: int | None = None,
    **options: Any,
) -> DistributedConfig:
    """
    The `DistributedConfig` of a layout.

    Args:
        layout (`str`): one of `LAYOUTS`; see [`choose_layout`] for `"auto"`.
        topology (`NodeTopology`): of the job.
        num_experts (`int`): experts of a layer.
        tp_size (`int`): tensor-parallel ranks, inside a node.
        ep_size (`int`, *optional*):
            ranks that hold different experts; when left out, the largest number that the layout and `num_experts` allow.
        **options: other fields of `DistributedConfig`; `ep_implementation` is `"locmoe"` unless given.

    Raises:
        ValueError: an unknown layout, nodes of different sizes where a layout needs equal ones, sizes that do not fit.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'`layout` ({layout}) must be "auto" or one of {", ".join(LAYOUTS)}: use one of these.')
    world_size = topology.num_ranks
    if layout != "sharded" and not topology.is_rectangular:
        raise ValueError(
            f"`layout` ({layout}) needs the same number of ranks on every node, and there are {topology.node_sizes}: "
            'use "sharded", or leave ranks out.'
        )
    reach = topology.node_sizes[0] if layout == "replicated" else world_size
    on_node = world_size if layout == "sharded" else topology.node_sizes[0]
    if on_node % tp_size:
        raise ValueError(
            f"`tp_size` ({tp_size}) must divide the ranks that share the dense layers ({on_node}): set it to one of "
            f"{_divisors(on_node)}."
        )
    # Upstream shards the copies of an expert; it cannot load a shard of no expert.
    is_sharded = num_experts % reach == 0
    possible = [
        size for size in _divisors(reach, tp_size) if num_experts % size == 0 and (is_sharded or layout == "spread")
    ]
    if ep_size is None:
        ep_size = max(possible, default=1)
    elif ep_size not in possible and ep_size != 1:
        raise ValueError(
            f"`ep_size` ({ep_size}) must divide `num_experts` ({num_experts}) and the {reach} ranks that layout "
            f'"{layout}" puts experts on, and be a multiple of `tp_size` ({tp_size}); without "spread", `num_experts` must '
            f"be a multiple of {reach} as well: set it to one of {sorted({1, *possible})}."
        )
    config_class: type[DistributedConfig] = DistributedConfig
    if layout == "spread" and ep_size > 1:
        config_class = SpreadConfig
        options.setdefault("replicate_experts", not is_sharded)
    return config_class(
        dp_replicate_size=1 if layout == "sharded" else topology.num_nodes,
        fsdp_size=on_node // tp_size,
        tp_size=tp_size,
        ep_size=ep_size,
        **({"ep_implementation": "locmoe"} | options),
    )


def _divisors(number: int, multiple_of: int = 1) -> list[int]:
    return [size for size in range(multiple_of, number + 1, multiple_of) if number % size == 0]


# ---- choosing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """
    What a layout's cost depends on.

    Args:
        dense_parameters (`int`): parameters outside of the experts.
        expert_parameters (`int`): parameters of all experts of all layers.
        num_moe_layers (`int`): layers with experts.
        num_experts (`int`): experts of a layer.
        num_experts_per_tok (`int`): experts a token goes to.
        hidden_size (`int`): width of a token.
        num_layers (`int`): layers, whose dense parameters travel together.
        kept_parameters (`int`):
            parameters of the head, which transformers gathers once a micro-batch; the others, twice.
        embedding_parameters (`int`): parameters that are looked up and not multiplied with.
    """

    dense_parameters: int
    expert_parameters: int
    num_moe_layers: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    num_layers: int = 0
    kept_parameters: int = 0
    embedding_parameters: int = 0

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelSize:
        """Of a transformers MoE, on any device, `meta` included, before it is sharded."""
        experts = [
            module
            for module in model.modules()
            if hasattr(module, "num_experts") and any(p.dim() == 3 for p in module.parameters(recurse=False))
        ]
        total = sum(parameter.numel() for parameter in model.parameters())
        in_experts = sum(parameter.numel() for module in experts for parameter in module.parameters())
        config = model.config.get_text_config()
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        # tied, it is one parameter, and the head's
        is_tied = head is not None and head.weight is embeddings.weight
        return cls(
            dense_parameters=total - in_experts,
            expert_parameters=in_experts,
            num_moe_layers=len(experts),
            num_experts=experts[0].num_experts if experts else 0,
            num_experts_per_tok=_experts_per_token(config) if experts else 0,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            kept_parameters=0 if head is None else head.weight.numel(),
            embedding_parameters=0 if is_tied else embeddings.weight.numel(),
        )


# As configs of transformers call it; most have the first, by name or by `attribute_map`.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def _experts_per_token(config: Any) -> int:
    for name in _EXPERTS_PER_TOKEN:
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(
        f"`num_experts_per_tok` (None) must be in the config of a MoE ({config.model_type}): set it, or one of "
        f"{', '.join(_EXPERTS_PER_TOKEN[1:])}."
    )


@dataclass(frozen=True)
class LayoutCost:
    """
    Args:
        layout (`str`): which.
        bytes_inter_node (`float`): bytes that one node sends to others in an optimizer step, as predicted.
        bytes_memory (`float`): bytes of parameters, gradients and optimizer state on one rank.
        parameters (`Traffic`): weights and gradients of a step.
        tokens (`Traffic`): tokens of a step.
    """

    layout: str
    bytes_inter_node: float
    bytes_memory: float
    parameters: Traffic = field(default_factory=Traffic)
    tokens: Traffic = field(default_factory=Traffic)


def predict_layouts(
    size: ModelSize,
    topology: NodeTopology,
    tokens_per_rank: int,
    accumulation_steps: int = 1,
    local_share: float | None = None,
    **options: Any,
) -> list[LayoutCost]:
    """
    Bytes and memory of every layout that the job can have, each as [`layout_config`] builds it.

    Counted with ring collectives: one node passes on `(W - 1) / W` of the parameters in each all-gather (two a
    micro-batch, one for the head) and in the reduce-scatter of the gradients (one a step); replicas exchange
    `2 (N - 1) / N` of the gradients once a step. A token crosses once for every other node that has one of its experts,
    and four times a layer: out and back, forward and backward; out once more when a checkpoint recomputes.

    Args:
        size (`ModelSize`): the model.
        topology (`NodeTopology`): the job.
        tokens_per_rank (`int`): tokens of one rank in one micro-batch.
        accumulation_steps (`int`): micro-batches a step.
        local_share (`float`, *optional*):
            share of the assignments that stay on their node; 1 / nodes when left out, as untrained routers have it.
        **options: other fields of [`Workload`].
    """
    work = Workload(tokens_per_rank, accumulation_steps, **options)
    return [
        layout_cost(groups, size, work, local_share) for groups in layout_groups_of_job(topology, size.num_experts)
    ]


def layout_groups_of_job(topology: NodeTopology, num_experts: int) -> list[LayoutGroups]:
    """The groups of every layout that the job can have."""
    possible = LAYOUTS if topology.is_rectangular and topology.num_nodes > 1 else LAYOUTS[:1]
    return [layout_groups(layout, topology, num_experts) for layout in possible]


def layout_groups(layout: str, topology: NodeTopology, num_experts: int) -> LayoutGroups:
    """The groups in which a layout communicates."""
    return groups_of_config(layout, layout_config(layout, topology, max(num_experts, 1)), topology)


def groups_of_config(name: str, config: DistributedConfig, topology: NodeTopology) -> LayoutGroups:
    """The groups in which a model communicates, read off the meshes of its config; without tensor parallelism."""
    dense = torch.arange(topology.num_ranks).view(config.dp_replicate_size, config.fsdp_size)
    if isinstance(config, SpreadConfig):
        experts = config.expert_ranks()[0]
    else:
        experts = dense.reshape(config.dp_replicate_size, -1, config.ep_size)

    def span(ranks: torch.Tensor) -> Span:
        return Span.of([topology.node_of_rank(rank) for rank in ranks.tolist()])

    return LayoutGroups(
        layout=name,
        num_nodes=topology.num_nodes,
        ranks_per_node=max(topology.node_sizes),
        dense_shards=span(dense[0]),
        dense_replicas=span(dense[:, 0]),
        expert_shards=span(experts[0, :, 0]),
        expert_replicas=span(experts[:, 0, 0]),
        expert_parallel=span(experts[0, 0]),
    )


def one_copy_groups(topology: NodeTopology, num_experts: int) -> LayoutGroups:
    """
    `"spread"` with one copy of each expert also where ranks outnumber experts, as in the paper's largest run: the
    ranks of a node share its experts, and nodes beyond the number of experts have none. To compare with;
    [`layout_config`] makes copies instead.
    """
    groups = layout_groups("spread", topology, num_experts)
    span = Span(topology.num_ranks, topology.num_nodes, groups.ranks_per_node)
    return replace(
        groups,
        layout="one copy",
        expert_shards=Span(),
        expert_replicas=Span(),
        expert_parallel=span,
        nodes_with_experts=min(num_experts, topology.num_nodes),
    )


def layout_cost(
    groups: LayoutGroups,
    size: ModelSize,
    work: Workload,
    local_share: float | None = None,
    picks_neighbours: bool = False,
) -> LayoutCost:
    """Bytes and memory of one layout; see [`predict_layouts`] and [`token_traffic`]."""
    parameters = parameter_traffic(groups, size, work)
    tokens = token_traffic(groups, size, work, local_share, picks_neighbours)
    of_experts = groups.expert_ranks * groups.expert_shards.num_ranks
    held = size.dense_parameters / groups.dense_shards.num_ranks + size.expert_parameters / of_experts
    return LayoutCost(
        groups.layout,
        parameters.bytes_inter_node + tokens.bytes_inter_node,
        held * work.state_bytes_per_parameter,
        parameters,
        tokens,
    )


def choose_layout(costs: list[LayoutCost], memory_limit_bytes: float | None = None) -> tuple[str, str]:
    """
    The layout that sends the fewest bytes between nodes among those that fit.

    Args:
        costs (`list[LayoutCost]`): from [`predict_layouts`].
        memory_limit_bytes (`float`, *optional*):
            memory of a rank for parameters, gradients and optimizer state; no limit when left out.

    Returns:
        the layout, and why in one sentence.
    """
    fitting = [cost for cost in costs if cost.bytes_memory <= (memory_limit_bytes or math.inf)]
    if not fitting:
        best = min(costs, key=lambda cost: cost.bytes_memory)
        return best.layout, (
            f'"{best.layout}" needs least memory, {_gigabytes(best.bytes_memory)} a rank, and no layout fits into '
            f"{_gigabytes(memory_limit_bytes)}."
        )
    best = min(fitting, key=lambda cost: cost.bytes_inter_node)
    others = ", ".join(
        f'"{cost.layout}" {_gigabytes(cost.bytes_inter_node)}' + ("" if cost in fitting else " (does not fit)")
        for cost in costs
        if cost is not best
    )
    if not others:
        return best.layout, f'"{best.layout}" is the only layout for these nodes.'
    return best.layout, (
        f'"{best.layout}" sends least between nodes, {_gigabytes(best.bytes_inter_node)} a node and step, with '
        f"{_gigabytes(best.bytes_memory)} of memory a rank; {others}."
    )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
