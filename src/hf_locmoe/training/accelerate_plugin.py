# SPDX-License-Identifier: Apache-2.0
"""`LocMoePlugin`: everything a run on several ranks decides, and a checkpoint does not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

from ..distributed.expert_parallel import ExpertParallelOptions, job_topology
from ..distributed.layouts import LAYOUTS, ModelSize
from ..distributed.parallel_run import LocalityOptions, ParallelRun, set_parallel_run
from ..distributed.topology import NodeTopology
from .batch_placement import PlacedBatches, batch_placement_for


PREFIX = "LOCMOE_"
_OVERRIDES = (
    "router_aux_loss_coef",
    "locality_loss_coef",
    "capacity_mode",
    "expert_capacity_factor",
    "balance_bias_update_rate",
)


@dataclass
class LocMoePlugin:
    """
    A run's choices. From code, from a YAML file ([`LocMoePlugin.from_yaml`]) or from `LOCMOE_*` variables
    ([`LocMoePlugin.from_environment`]: every field in capitals, `LOCMOE_EP_SIZE` for example).

    With the launcher (`python -m hf_locmoe.launch script.py ...`) there is nothing to call. In a loop of your own:

    ```python
    plugin = LocMoePlugin(ranks_per_node="8")
    plugin.activate()
    accelerator = LocMoeAccelerator()
    model = AutoModelForCausalLM.from_pretrained(name)  # sharded
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    ```

    Args:
        layout (`str`, defaults to `"auto"`): `"sharded"`, `"replicated"`, `"spread"` (see docs/distributed.md), or the one
            predicted to send the fewest bytes between nodes.
        ep_size (`int`, *optional*): Ranks that hold different experts; as many as possible if not given.
        tp_size (`int`, defaults to 1): Tensor-parallel ranks, inside a node.
        ep_implementation (`str`, defaults to `"locmoe"`): How tokens reach their experts; `"all_to_all"` is transformers'.
        ranks_per_node (`str`, *optional*): `"2"`, or `"4,2,2"` for uneven nodes: overrides what the launcher or the hosts
            say, to emulate nodes on one machine.
        slices, fan_out, wire_dtype, capacity_factor, max_tokens_per_rank, remote_share: See
            [`~hf_locmoe.distributed.expert_parallel.ExpertParallelOptions`].
        backend (`str`, defaults to `"locmoe"`): Process-group backend of the exchange, which names a lost rank and counts
            what crosses nodes; the default group's with `"none"`.
        tokens_per_rank (`int`, defaults to 8192): Tokens of a rank in a micro-batch, for `layout="auto"`.
        accumulation_steps (`int`, defaults to 1): Micro-batches in a step, for `layout="auto"`.
        memory_limit_gb (`float`, *optional*): Memory of a rank for parameters, gradients and optimizer state, for
            `layout="auto"`, in GB.
        timeout_s (`float`, defaults to 600): Seconds after which a collective that waits for a lost rank fails.
        router_aux_loss_coef, locality_loss_coef, balance_bias_update_rate, capacity_mode, expert_capacity_factor
            (*optional*): Used in this run in the place of the checkpoint's.
        batch_placement, domain_column, expert_placement_steps, locality_warmup_steps, locality_target_share,
            node_bias_target, inter_node_capacity_factor: What keeps tokens on their node, see
            [`~hf_locmoe.distributed.parallel_run.LocalityOptions`].
        async_save (`bool`, defaults to `False`): Whether checkpoints are written while training goes on.
        telemetry (`bool`, defaults to `True`): Whether routing is logged.
    """

    layout: str = "auto"
    ep_size: int | None = None
    tp_size: int = 1
    ep_implementation: str = "locmoe"
    ranks_per_node: str | None = None
    slices: str = "auto"
    fan_out: str = "auto"
    wire_dtype: str | None = None
    capacity_factor: float | None = None
    max_tokens_per_rank: int | None = None
    remote_share: float | None = None
    backend: str | None = "locmoe"
    tokens_per_rank: int = 8192
    accumulation_steps: int = 1
    memory_limit_gb: float | None = None
    timeout_s: float = 600.0
    router_aux_loss_coef: float | None = None
    locality_loss_coef: float | None = None
    balance_bias_update_rate: float | None = None
    capacity_mode: str | None = None
    expert_capacity_factor: float | None = None
    batch_placement: str = "micro_batch"
    domain_column: str | None = None
    expert_placement_steps: int = 0
    locality_warmup_steps: int = 0
    locality_target_share: float | None = None
    node_bias_target: float | None = None
    inter_node_capacity_factor: float | None = None
    async_save: bool = False
    telemetry: bool = True

    def __post_init__(self):
        if self.layout not in ("auto", *LAYOUTS):
            raise ValueError(
                f"`layout` ({self.layout}) must be one of {', '.join(map(repr, ('auto', *LAYOUTS)))}: use one of these."
            )
        for name in ("ep_size", "tp_size", "tokens_per_rank", "accumulation_steps", "memory_limit_gb", "timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` ({value}) must be positive: set it to 1 or more, or leave it out.")
        self.expert_parallel_options()
        self.locality_options()

    # ---- where the choices come from ----------------------------------------------------------------------------

    @classmethod
    def from_environment(cls, env: Mapping[str, str] | None = None) -> LocMoePlugin:
        """Reads `LOCMOE_*`. An empty value is as if the variable were not there."""
        env = os.environ if env is None else env
        given = {field.name: env.get(PREFIX + field.name.upper()) for field in fields(cls)}
        return cls(**{name: _parsed(name, text, PREFIX + name.upper()) for name, text in given.items() if text})

    @classmethod
    def from_yaml(cls, path: str | os.PathLike) -> LocMoePlugin:
        """Reads a YAML mapping of fields."""
        values = yaml.safe_load(Path(path).read_text()) or {}
        known = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or (unknown := sorted(set(values) - set(known))):
            found = f"the unknown fields {unknown}" if isinstance(values, dict) else f"a {type(values).__name__}"
            raise ValueError(
                f"`{path}` holds {found} and must map some of these fields to values: {', '.join(known)}."
            )
        return cls(**{name: _parsed(name, str(value), name) for name, value in values.items() if value is not None})

    def to_environment(self) -> dict[str, str]:
        """The same choices as `LOCMOE_*` variables, those that differ from the defaults."""
        default = LocMoePlugin()
        return {
            PREFIX + name.upper(): str(int(value) if isinstance(value, bool) else value)
            for name, value in asdict(self).items()
            if value is not None and value != getattr(default, name)
        }

    # ---- what they yield ----------------------------------------------------------------------------------------

    def activate(self) -> None:
        """
        From here on, models that are built (`from_pretrained`, `from_config`) are spread over the ranks. Before
        the accelerator and before the model.
        """
        if self.ranks_per_node is not None:
            os.environ[PREFIX + "RANKS_PER_NODE"] = str(self.ranks_per_node)
        os.environ[PREFIX + "TIMEOUT_S"] = str(self.timeout_s)
        os.environ[PREFIX + "ASYNC_SAVE"] = str(int(self.async_save))
        os.environ[PREFIX + "TELEMETRY"] = str(int(self.telemetry))
        set_parallel_run(self.parallel_run())

    def deactivate(self) -> None:
        """Models that are built from here on are whole on every rank."""
        set_parallel_run(None)

    def expert_parallel_options(self) -> ExpertParallelOptions:
        slices: Any = self.slices if self.slices == "auto" else int(self.slices)
        return ExpertParallelOptions(
            slices=slices,
            fan_out=self.fan_out,  # type: ignore[arg-type]
            wire_dtype=self.wire_dtype,
            capacity_factor=self.capacity_factor,
            max_tokens_per_rank=self.max_tokens_per_rank,
            remote_share=self.remote_share,
            inter_node_capacity_factor=self.inter_node_capacity_factor,
            backend=None if self.backend in (None, "none") else self.backend,
        )

    def locality_options(self) -> LocalityOptions:
        return LocalityOptions(**{field.name: getattr(self, field.name) for field in fields(LocalityOptions)})

    def parallel_run(self) -> ParallelRun:
        overrides = {name: getattr(self, name) for name in _OVERRIDES if getattr(self, name) is not None}
        return ParallelRun(
            layout=self.layout,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            ep_implementation=self.ep_implementation,
            tokens_per_rank=self.tokens_per_rank,
            accumulation_steps=self.accumulation_steps,
            memory_limit_bytes=None if self.memory_limit_gb is None else self.memory_limit_gb * 1e9,
            options=self.expert_parallel_options(),
            config_overrides=tuple(overrides.items()),
            locality=self.locality_options(),
        )

    def place_batches(self, loader: Any, model: Any) -> Any:
        """
        A prepared dataloader whose samples are dealt to the nodes of their experts, for a loop of your own; the loader itself
        where there is nothing to place. After the model, on all ranks; [`LocMoeTrainer`] does it by itself.

        Args:
            loader (iterable): Gives dicts of tensors with one entry per sample.
            model: The model that is trained, spread over the ranks.

        Raises:
            ValueError: With `batch_placement="step"`, for which the loop would have to hand over a step's micro-batches at
                once: use "micro_batch".
        """
        if self.batch_placement == "step":
            raise ValueError(
                "`batch_placement` ('step') needs all micro-batches of a step at once, which a dataloader does not give: use "
                "'micro_batch' in a loop of your own."
            )
        placement = batch_placement_for(model)
        return loader if placement is None else PlacedBatches(loader, placement)

    def topology(self) -> NodeTopology:
        """Nodes and ranks of the job; with the default process group initialised, or by hand."""
        return job_topology()

    def distributed_config(self, size: ModelSize) -> DistributedConfig:
        """transformers' `DistributedConfig` for a model of this size ([`ModelSize.of`])."""
        return self.parallel_run().distributed_config(size)

    def parallelism_config(self, distributed_config: DistributedConfig):
        """Accelerate's `ParallelismConfig` of the dense layers' mesh."""
        from accelerate.parallelism_config import ParallelismConfig

        return ParallelismConfig(
            dp_replicate_size=distributed_config.dp_replicate_size,
            dp_shard_size=distributed_config.fsdp_size,
            tp_size=distributed_config.tp_size,
        )

    def override(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """A copy of a checkpoint's config with this run's coefficients and capacity."""
        return self.parallel_run().override(config)


def _parsed(name: str, text: str, shown_as: str) -> Any:
    """A field's value from text, by the field's type."""
    hint = str(get_type_hints(LocMoePlugin)[name])
    try:
        if "bool" in hint:
            return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
        if "int" in hint:
            return int(text)
        if "float" in hint:
            return float(text)
    except (KeyError, ValueError) as error:
        kind = "1 or 0" if "bool" in hint else "a number"
        raise ValueError(f"`{shown_as}` ({text}) must be {kind}: correct it or leave it out.") from error
    return text


__all__ = ["LocMoePlugin"]
