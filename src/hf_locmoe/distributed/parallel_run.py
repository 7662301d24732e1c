# SPDX-License-Identifier: Apache-2.0
"""
The parallel run that models built from now on belong to.

A Trainer script says `from_pretrained(name)` or `from_config(config)` and nothing of ranks. The run's plugin says the rest
here, once, before the model is built; [`ParallelRunMixin`] on a model class then shards what the script asks for. Nothing of
it reaches `config.json`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from .adapters import fit_adapters_to_spread_models
from .expert_parallel import (
    ExpertParallelOptions,
    expert_parallel_layers,
    expert_parallel_options,
    job_topology,
)
from .layouts import ModelSize, SpreadLayoutMixin, choose_layout, layout_config, predict_layouts
from .one_process_start import one_process_start, one_tensor_at_a_time
from .router_scope import RouterScope


logger = logging.get_logger(__name__)


BATCH_PLACEMENTS = ("off", "micro_batch", "step")


@dataclass(frozen=True)
class LocalityOptions:
    """
    What a run does to keep tokens on their node. Without effect where the experts are on one node.

    Args:
        batch_placement (`str`, defaults to `"micro_batch"`): Among which samples a rank's are chosen: those of all ranks in
            a micro-batch, in an optimizer step (`"step"`: all accumulation steps), or none but its own (`"off"`).
        domain_column (`str`, *optional*): A column of the batches, of shape `(B,)`, int64, that names each sample's domain;
            statistics then go by domain in the place of token ids.
        expert_placement_steps (`int`, defaults to 0): Optimizer steps between two placements of the experts, which move with
            their optimizer state to the node that most of their tokens are computed on; 0 for none.
        locality_warmup_steps (`int`, defaults to 0): Steps over which the locality loss rises to its full weight.
        locality_target_share (`float`, *optional*): Node-local share of a layer's tokens from which its locality loss rests.
        node_bias_target (`float`, *optional*): Node-local share that a bias on the selection of experts steers to, in
            training; no bias if not given.
        inter_node_capacity_factor (`float`, *optional*): A rank's assignments to experts of other nodes, in training, are at
            most this factor times those of uniform routing; no limit if not given.
    """

    batch_placement: str = "micro_batch"
    domain_column: str | None = None
    expert_placement_steps: int = 0
    locality_warmup_steps: int = 0
    locality_target_share: float | None = None
    node_bias_target: float | None = None
    inter_node_capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if self.batch_placement not in BATCH_PLACEMENTS:
            raise ValueError(
                f"`batch_placement` ({self.batch_placement}) must be one of {', '.join(map(repr, BATCH_PLACEMENTS))}: use "
                "one of these."
            )
        for name in ("expert_placement_steps", "locality_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be 0 or more: 0 turns it off.")
        for name in ("locality_target_share", "node_bias_target"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` ({value}) must be above 0 and at most 1: it is a share; or leave it out.")
        factor = self.inter_node_capacity_factor
        if factor is not None and factor < 0:
            raise ValueError(
                f"`inter_node_capacity_factor` ({factor}) must be 0 or more: 1.0 is what uniform routing sends off a node."
            )


@dataclass(frozen=True)
class ParallelRun:
    """
    How a run spreads its models.

    Args:
        layout (`str`, defaults to `"auto"`): One of `layouts.LAYOUTS`, or `"auto"`: the one predicted to send the fewest
            bytes between nodes among those that fit into memory.
        tp_size (`int`, defaults to 1): Tensor-parallel ranks, inside a node.
        ep_size (`int`, *optional*): Ranks that hold different experts; as many as possible if not given.
        ep_implementation (`str`, defaults to `"locmoe"`): A name in transformers' `EPImplementationInterface`.
        tokens_per_rank (`int`, defaults to 8192): Tokens of a rank in a micro-batch, for `"auto"`.
        accumulation_steps (`int`, defaults to 1): Micro-batches in a step, for `"auto"`.
        memory_limit_bytes (`float`, *optional*): Memory of a rank for parameters, gradients and optimizer state, for
            `"auto"`; no limit if not given.
        options ([`ExpertParallelOptions`], *optional*): Of the exchange; the environment's if not given.
        config_overrides (`tuple` of pairs, defaults to none): Fields of a [`LocMoeConfig`] and their values in this run.
            They are not saved with the model.
        locality ([`LocalityOptions`]): How tokens are kept on their node.
    """

    layout: str = "auto"
    tp_size: int = 1
    ep_size: int | None = None
    ep_implementation: str = "locmoe"
    tokens_per_rank: int = 8192
    accumulation_steps: int = 1
    memory_limit_bytes: float | None = None
    options: ExpertParallelOptions | None = None
    config_overrides: tuple[tuple[str, Any], ...] = ()
    locality: LocalityOptions = LocalityOptions()

    def override(self, config: Any) -> Any:
        """A config for this run: the same one where nothing is overridden, or where it is another architecture's."""
        if not self.config_overrides or not hasattr(config, "for_run"):
            return config
        return config.for_run(**dict(self.config_overrides))

    def distributed_config(self, size: ModelSize) -> DistributedConfig | None:
        """The `DistributedConfig` for a model of this size; None for one without experts, which is not ours to spread."""
        if size.num_experts == 0:
            return None
        topology = job_topology()
        layout = self.layout
        if layout == "auto":
            costs = predict_layouts(size, topology, self.tokens_per_rank, self.accumulation_steps)
            layout, reason = choose_layout(costs, self.memory_limit_bytes)
            if dist.get_rank() == 0:
                logger.warning(f"layout: {reason}")
        return layout_config(
            layout,
            topology,
            size.num_experts,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            ep_implementation=self.ep_implementation,
        )


_run: ParallelRun | None = None
_is_building = False

# arguments of `from_pretrained` that say where a checkpoint is: the configuration's file and the weights'
_OF_THE_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)
# and those that are not for the configuration alone, which transformers itself gives to both
_OF_THE_MODEL = (
    "attn_implementation",
    "device_map",
    "dtype",
    "experts_implementation",
    "quantization_config",
    "state_dict",
    "torch_dtype",
)


def set_parallel_run(run: ParallelRun | None) -> None:
    """Sets the run for the models that are built from now on; None: models are whole, on every rank."""
    global _run
    _run = run


def current_parallel_run() -> ParallelRun | None:
    """The run that a model built now belongs to; None for a part of a model that is being built."""
    return None if _is_building else _run


def _in_distributed_job() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    # the script has not touched its devices yet: Accelerate initialises the default group as it would for Trainer
    from accelerate import PartialState

    return PartialState().num_processes > 1


def leave_job() -> None:
    """Ends the run and its process groups: a gloo process that leaves them behind is aborted at exit now and then."""
    set_parallel_run(None)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _building(run: ParallelRun) -> Iterator[None]:
    """Inside, models are built as transformers builds them: heads build their decoder with `from_config`, for example."""
    global _is_building
    changes = {} if run.options is None else vars(run.options)
    with expert_parallel_options(**changes):
        _is_building = True
        try:
            yield
        finally:
            _is_building = False


class ParallelRunMixin(SpreadLayoutMixin):
    """For a transformers model class, before `PreTrainedModel`: `from_pretrained` and `from_config` shard for the run."""

    config_class: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        run = current_parallel_run()
        if run is None or kwargs.get("distributed_config") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
        config = kwargs.get("config")
        if config is None:
            config, kwargs = _read_config(cls.config_class, pretrained_model_name_or_path, kwargs)
        kwargs["config"] = config = run.override(config)
        if not _in_distributed_job():
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
        if kwargs.pop("device_map", None) is not None and dist.get_rank() == 0:
            logger.warning("`device_map` has no effect in a parallel run: the layout places the parameters.")
        with _building(run):
            distributed_config = run.distributed_config(model_size(cls, config))
            if distributed_config is None:
                return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
            check_tied_vocabulary(config, distributed_config)
            kwargs["distributed_config"] = distributed_config
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)  # type: ignore[misc]
        join_run(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        if mesh_manager is not None:  # a checkpoint may be an adapter, which is added before `from_pretrained` returns
            fit_adapters_to_spread_models()
            leave_experts_out_of_tensor_parallel_plan(model)
        return model

    def save_pretrained(self, *args, **kwargs):
        if kwargs.get("state_dict") is not None:  # gathered by the caller, maybe on one rank alone
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        from .expert_move import canonical_experts  # which imports this file

        with canonical_experts(self):  # type: ignore[arg-type]
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _from_config(cls, config, **kwargs):
        run = current_parallel_run()
        if run is None:
            return super()._from_config(config, **kwargs)  # type: ignore[misc]
        config = run.override(config)
        if not _in_distributed_job():
            return super()._from_config(config, **kwargs)  # type: ignore[misc]
        with _building(run):
            distributed_config = run.distributed_config(model_size(cls, config))
            build = functools.partial(super()._from_config, config, **kwargs)  # type: ignore[misc]
            if distributed_config is None:
                return build()
            check_tied_vocabulary(config, distributed_config)
            source, state_dict = one_process_start(build)
            with one_tensor_at_a_time():
                model = cls.from_pretrained(
                    None,
                    config=source.config,
                    state_dict=state_dict,
                    distributed_config=distributed_config,
                    dtype=source.dtype,
                )
        model.train(source.training)
        join_run(model)
        return model


def _read_config(config_class: Any, path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration with those of the arguments of `from_pretrained` that are its fields, and the arguments left."""
    mine = {name: value for name, value in kwargs.items() if name not in _OF_THE_MODEL}
    config, left = config_class.from_pretrained(path, return_unused_kwargs=True, **mine)
    kept = {*left, *_OF_THE_MODEL, *_OF_THE_HUB}
    return config, {name: value for name, value in kwargs.items() if name in kept}


def check_tied_vocabulary(config: Any, distributed_config: DistributedConfig) -> None:
    """
    Refuses what torch's fully_shard trains wrongly under tensor parallelism: tied embeddings in shards of unequal height, of
    which each end is padded by itself, so the two drift apart. Without it they are one parameter, see `layouts.py`.
    """
    shards = distributed_config.fsdp_size * distributed_config.tp_size
    is_tied = getattr(config, "tie_word_embeddings", False)
    if is_tied and distributed_config.tp_size > 1 and config.vocab_size % shards:
        fitting = -(-config.vocab_size // shards) * shards
        raise ValueError(
            f"`vocab_size` ({config.vocab_size}) must be divisible by the ranks that share the dense layers ({shards}) with "
            f"`tie_word_embeddings` (True) and `tp_size` ({distributed_config.tp_size}): resize the embeddings to {fitting} on "
            "one process, or leave out `tp_size`."
        )


def for_parallel_run(model_class: type) -> type:
    """`model_class`, sharding for the run; itself where it already does."""
    if issubclass(model_class, ParallelRunMixin):
        return model_class
    attributes = {"__module__": model_class.__module__, "__doc__": model_class.__doc__}
    return type(model_class.__name__, (ParallelRunMixin, model_class), attributes)


def spread_every_model() -> None:
    """
    Makes every transformers model class shard for the run, not only ours. Idempotent.

    A script names classes that transformers looks up itself, so the one place to meet them all is
    `PreTrainedModel.from_pretrained` and `_from_config`, which transformers' own Auto classes call; there is no registry to
    plug into.
    """
    for name in ("from_pretrained", "_from_config"):
        original = PreTrainedModel.__dict__.get(name)
        if not isinstance(original, classmethod):
            raise RuntimeError(
                f"`PreTrainedModel.{name}` is no class method in this version of transformers: load other architectures "
                f"with `distributed_config=` or use a version that this package is tested with."
            )
        if not getattr(original.__func__, "_spreads_models", False):
            setattr(PreTrainedModel, name, classmethod(_spreading(name, original.__func__)))


def _spreading(name: str, original: Callable) -> Callable:
    @functools.wraps(original)
    def build(cls, *args, **kwargs):
        if current_parallel_run() is None or issubclass(cls, ParallelRunMixin) or not _in_distributed_job():
            return original(cls, *args, **kwargs)
        return getattr(for_parallel_run(cls), name)(*args, **kwargs)

    build._spreads_models = True  # type: ignore[attr-defined]
    return build


def model_size(model_class: type, config: Any) -> ModelSize:
    """Parameters and experts of the model that `config` describes, without memory for it."""
    with torch.device("meta"):
        return ModelSize.of(model_class(config))


def join_run(model: Any) -> None:
    """What a sharded model has to know of the run: whose router statistics it shares, and which experts are near."""
    base_model = model.base_model
    if not hasattr(base_model, "router_scope"):
        return
    topology = job_topology()
    base_model.router_scope = RouterScope(num_nodes=topology.num_nodes, node=topology.node_of_rank(dist.get_rank()))
    factor = (_run or ParallelRun()).locality.inter_node_capacity_factor
    near = find_node_local_experts(model)
    if factor is None:
        return
    if near is not None:
        model.limit_inter_node(near, factor)
    elif dist.get_rank() == 0:
        logger.warning(f"`inter_node_capacity_factor` ({factor}) has no effect: no experts are on other nodes.")


def leave_experts_out_of_tensor_parallel_plan(model: Any) -> None:
    """
    Drops the experts' rules from the plan of a model that is sharded already. Transformers leaves them there where expert
    parallelism has taken their place, and PEFT shards adapters by them, which it can do for linear layers alone.
    """
    experts = tuple(f"{name}." for name in model.ep_plan)
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if not f"{name}.".startswith(experts)}


def find_node_local_experts(model: Any) -> torch.Tensor | None:
    """
    Tells a sharded LocMoe model which experts live on this rank's node, and tells the caller: boolean of shape `(L, n)`,
    None where all do. To be called again when experts have moved. No collective.
    """
    scope, layers = model.base_model.router_scope, expert_parallel_layers(model)
    if layers:
        nodes = [layer.node_of_expert for layer in layers]
    elif model.config.distributed_config.ep_size > 1:  # another implementation, whose placement is contiguous
        ranks = dist.get_process_group_ranks(model._mesh_manager.get_mesh("ep").get_group())
        job = job_topology()
        placed = job.subset(ranks).with_experts(model.config.num_experts)
        nodes = [tuple(job.node_of_rank(ranks[rank]) for rank in placed.expert_to_rank)] * len(model.sparse_blocks)
    else:
        return None
    if len(set(nodes[0])) == 1:
        return None
    near = torch.tensor([[node == scope.node for node in layer] for layer in nodes], device=model.device)
    model.base_model.router_scope = replace(scope, node_local_experts=near)
    for experts, block in zip(near, model.sparse_blocks, strict=True):
        if block.remote_tier is not None:
            block.remote_tier.place(experts)
    return near


__all__ = [
    "BATCH_PLACEMENTS",
    "LocalityOptions",
    "ParallelRun",
    "ParallelRunMixin",
    "check_tied_vocabulary",
    "current_parallel_run",
    "for_parallel_run",
    "find_node_local_experts",
    "join_run",
    "leave_job",
    "set_parallel_run",
    "spread_every_model",
]
