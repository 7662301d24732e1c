# SPDX-License-Identifier: Apache-2.0
"""What the command line gives, and what is measured or read in its place."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from ..distributed.calibration import Calibration, calibrate
from ..distributed.layouts import ModelSize
from ..distributed.parallel_run import model_size
from ..distributed.step_time import LOAD_CV, Machine, step_flops
from ..distributed.step_traffic import Workload
from ..distributed.topology import NodeTopology
from .choice import make_plan
from .quantities import quantity
from .table import format_plan


# What training steps of transformers' OLMoE reached of the rate of a large product, 0.21 to 0.23; LocMoE reached 0.30 to 0.51
# on one GPU (benchmarks/results/model_step_h100_202611.md).
DEFAULT_UTILIZATION = 0.25
DEFAULT_LATENCY_INTER_S = 1e-5
DEFAULT_LATENCY_INTRA_S = 5e-6

_AUTO_CLASSES = {
    AutoModelForCausalLM: MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForImageTextToText: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModel: MODEL_MAPPING,
}


def read_model(path: str) -> tuple[Any, ModelSize]:
    """
    The config and the sizes of a transformers MoE.

    Args:
        path (`str`): a `config.json`, or a folder with one. Nothing is asked of the Hub.

    Raises:
        ValueError: no such file, or a model without experts.
    """
    if not os.path.exists(path):
        raise ValueError(f"`config` ({path}) must be a config.json or a folder with one: no such file.")
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    auto_class = next((auto for auto, known in _AUTO_CLASSES.items() if type(config) in known), None)
    if auto_class is None:
        raise ValueError(f"`config` ({path}) must be of a model that transformers can build, not {config.model_type}.")
    size = model_size(auto_class.from_config, config)
    if not size.num_experts:
        raise ValueError(
            f"`config` ({path}) must be of a model with experts, fused as transformers runs them in parallel; "
            f"{config.model_type} has none."
        )
    return config, size


def make_machine(
    size: ModelSize,
    work: Workload,
    links: dict[str, str | None],
    flops: str | None = None,
    compute_seconds: str | None = None,
    memory: str | None = None,
    overlap: float = 0.0,
    utilization: float = DEFAULT_UTILIZATION,
    measured: Calibration | None = None,
) -> Machine:
    """
    The machine as given by hand; what is not given, as measured.

    Args:
        size (`ModelSize`), work (`Workload`): what `compute_seconds` are for.
        links (`dict`): `bandwidth_inter` (of a node), `bandwidth_intra` (of a device), `latency_inter` and
            `latency_intra`, with units; `None` where not given.
        flops (`str`, *optional*): operations a second that a device sustains in training.
        compute_seconds (`str`, *optional*): in place of `flops`, seconds of a step that one device takes alone.
        memory (`str`, *optional*): of a device, for parameters, gradients and optimizer state.
        overlap (`float`): see [`Machine`].
        utilization (`float`): share of the measured rate of a matrix product that training sustains.
        measured (`Calibration`, *optional*): of this machine.

    Raises:
        ValueError: a quantity that is neither given nor measured.
    """
    missing = []
    found = measured or Calibration(math.nan)

    def rate(name: str, measured_rate: float | None) -> float:
        if links.get(name) is not None:
            return quantity(links[name], "rate", name)
        if measured_rate is None:
            missing.append(name)
        return measured_rate or math.nan

    def latency(name: str, default: float) -> float:
        if links.get(name) is not None:
            return quantity(links[name], "seconds", name)
        return found.latency_s or default

    if compute_seconds is not None:
        sustained = sum(step_flops(size, work)) / quantity(compute_seconds, "seconds", "compute_seconds")
    elif flops is not None:
        sustained = quantity(flops, "flops", "flops")
    else:
        sustained = found.product_flops_per_s * utilization
        if measured is None:
            missing.append("flops")
    machine = Machine(
        flops_per_s=sustained,
        inter_bytes_per_s=rate("bandwidth_inter", found.inter_bytes_per_s),
        intra_bytes_per_s=rate("bandwidth_intra", found.intra_bytes_per_s),
        inter_latency_s=latency("latency_inter", DEFAULT_LATENCY_INTER_S),
        intra_latency_s=latency("latency_intra", DEFAULT_LATENCY_INTRA_S),
        overlap=overlap,
        memory_bytes=math.inf if memory is None else quantity(memory, "bytes", "memory"),
    )
    if missing:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in missing)} (None) must be given or measured: give what is missing by "
            "hand, or calibrate; links are measured under `torchrun` only, with several ranks on several nodes."
        )
    return machine


_BYTES = {"float32": 4, "bfloat16": 2}
_STATE_COPIES = 4  # parameter, gradient and Adam's two moments


def plan_from_options(options: dict[str, Any]) -> str | None:
    """
    The text that `locmoe plan` prints for its options; `None` on ranks other than the first of a measurement.

    Raises:
        ValueError: an option outside of its range, or one that is missing.
    """
    for name in ("nodes", "devices_per_node", "tokens_per_rank", "accumulation_steps"):
        if options[name] < 1:
            raise ValueError(f"`{name}` ({options[name]}) must be at least 1: give a positive number.")
    for name in ("local_share", "overlap", "utilization"):
        if options[name] is not None and not 0 <= options[name] <= 1:
            raise ValueError(f"`{name}` ({options[name]}) must be within 0 and 1: give a share.")
    measured = calibrate(getattr(torch, options["dtype"])) if options["calibrate"] else None
    if measured is not None and not measured.is_first_rank:
        return None
    config, size = read_model(options["config"])
    work = Workload(
        tokens_per_rank=options["tokens_per_rank"],
        accumulation_steps=options["accumulation_steps"],
        checkpointing=options["checkpointing"],
        bytes_per_element=_BYTES[options["dtype"]],
        wire_bytes_per_element=_BYTES[options["wire_dtype"] or options["dtype"]],
        state_bytes_per_parameter=_STATE_COPIES * _BYTES[options["dtype"]],
        reduce_scatter_passes=2 if options["gloo"] or (measured is not None and measured.is_gloo) else 1,
    )
    machine = make_machine(
        size,
        work,
        {name: options[name] for name in ("bandwidth_inter", "bandwidth_intra", "latency_inter", "latency_intra")},
        flops=options["flops"],
        compute_seconds=options["compute_seconds"],
        memory=options["memory"],
        overlap=options["overlap"],
        utilization=options["utilization"] or DEFAULT_UTILIZATION,
        measured=measured,
    )
    topology = NodeTopology.from_ranks_per_node(
        options["devices_per_node"], options["nodes"] * options["devices_per_node"]
    )
    plan = make_plan(
        config, size, topology, machine, work, options["local_share"], _load_variations(options["load_cv"])
    )
    return plan.to_json() if options["json"] else format_plan(plan)


def _load_variations(pairs: list[str]) -> dict[str, float]:
    """`["hash=0.1"]` -> `{"hash": 0.1}`."""
    variations = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        try:
            variations[name] = float(value)
        except ValueError:
            name = ""
        if name not in LOAD_CV or variations[name] < 0:
            raise ValueError(
                f"`load_cv` ({pair}) must be a routing of {', '.join(LOAD_CV)} and a number: give hash=0.1."
            )
    return variations
