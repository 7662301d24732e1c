# SPDX-License-Identifier: Apache-2.0
"""A run's folder made by hand, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.routing_log import append_record
from hf_locmoe.training.telemetry import RoutingStats


NUM_EXPERTS, LAYERS = 4, (1, 3)
# Of three log events: a slow one, then 6 and 10 seconds a step.
TIMES = [
    {"step_s": 100.0, "computation_s": 90.0, "exchange_s": 20.0, "overlap_s": 10.0, "idle_s": 1.0},
    {"step_s": 6.0, "computation_s": 4.0, "exchange_s": 3.0, "overlap_s": 1.0, "idle_s": 0.0},
    {"step_s": 10.0, "computation_s": 6.0, "exchange_s": 5.0, "overlap_s": 1.0, "idle_s": 1.0},
]


def tiny_model(**overrides) -> LocMoeForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=48, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=4)
    shape |= dict(num_experts=NUM_EXPERTS, mlp_only_layers=[0, 2], max_position_embeddings=32)
    return LocMoeForCausalLM(LocMoeConfig(**{**shape, **overrides}))


def record(kind: str, step: int, loads: list[float], gate_type: str = "locmoe", cosine: float = 0.2) -> dict[str, Any]:
    """A line of the routing log whose layers all have these loads."""
    sums = torch.zeros(len(LAYERS), len(RouterStat), NUM_EXPERTS)
    tokens = 1000 * torch.tensor(loads) / sum(loads)
    sums[:, RouterStat.TOKENS] = sums[:, RouterStat.PROB_SUM] = tokens
    sums[:, RouterStat.COS_SUM] = cosine * tokens
    sums[:, RouterStat.ENTROPY_SUM] = tokens
    stats = RoutingStats()
    stats.update(sums)
    summary = stats.summary()
    for layer, index in zip(summary["layers"], LAYERS, strict=True):
        layer["layer"] = index
    facts = {"hidden_size": 32, "num_experts": NUM_EXPERTS, "num_experts_per_tok": 1, "gate_type": gate_type}
    return {"kind": kind, "step": step, "epoch": None, **summary, "model": facts}


def make_run(
    path: Path, eval_losses: list[float] = (3.0, 2.5, 2.0), gate_type: str = "locmoe", state: bool = True, times=()
) -> Path:
    """Three log events and three evaluations; no checkpoint. `times` as of a run on several ranks."""
    path.mkdir(parents=True)
    log = []
    for index, loss in enumerate(eval_losses):
        step = 10 * (index + 1)
        timed = {f"time/{name}": value for name, value in times[index].items()} if times else {}
        log.append({"loss": loss + 0.1, "step": step, **timed})
        log.append({"eval_loss": loss, "eval_runtime": 1.0, "step": step})
        append_record(path, record("train", step, [4, 2, 1, index], gate_type))
        append_record(path, record("eval", step, [1, 1, 1, 1], gate_type))
    if state:
        (path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return path
