# SPDX-License-Identifier: Apache-2.0
"""
A training step on several GPUs of one host: transformers' ways to spread a MoE model beside ours.

The model has OLMoE-1B-7B's geometry, 1.3 B of 6.9 B parameters active, in bfloat16 with gradient checkpointing; weights and
tokens are random. All exchanges share one sharded model and its optimizer and take turns step by step; a second model is
sharded without expert parallelism. Before a speed is printed, each loss must be that of the whole model on one GPU.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.distributed import DistributedConfig

from benchmarks.device_profile import by_kind, heaviest, overlap, profiled
from benchmarks.gpu_models import GEOMETRIES, NUM_EXPERTS
from benchmarks.multigpu_ways import OURS, UPSTREAM, WAYS, SwitchEP, use_switch
from benchmarks.record import Record, Spread
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


WITHOUT_EP = "transformers fsdp, no expert parallelism"
PROFILED = (UPSTREAM, OURS, "ours, 2 slices")
# and one model
QUICK_WAYS = (
    UPSTREAM,
    "transformers all_to_all, our experts",
    OURS,
    "ours, 1 slice, grouped_mm experts",
    "ours, 2 slices",
    "ours, fixed shapes, 1 slice",
)
SHARE_OF_TIME = 0.7  # of a part's limit, after which no round of steps begins and no profile
SIZES = {
    "cuda": dict(
        GEOMETRIES["olmoe"], num_experts=NUM_EXPERTS["olmoe"], sequences=4, sequence=4096, warmup=1, repeats=5
    ),
    "cpu": dict(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        intermediate_size=16,
        sequences=2,
        sequence=32,
        warmup=1,
        repeats=2,
    ),
}
RUN = ("sequences", "sequence", "warmup", "repeats")


def rank_device(device: str) -> torch.device:
    return torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def fused_adamw(model, lr: float, device: torch.device) -> torch.optim.Optimizer:
    """One parameter group per mesh: a fused kernel cannot span meshes."""
    by_mesh: dict[Any, list] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        by_mesh.setdefault(mesh, []).append(parameter)
    groups = [{"params": parameters} for parameters in by_mesh.values()]
    return torch.optim.AdamW(groups, lr=lr, fused=device.type != "cpu")


def gradient_norm(model) -> float:
    """Over all parameters; one norm per mesh, as a kernel cannot span them."""
    by_mesh: dict[Any, list] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.stack([norm.float() for norm in norms]).norm().item()


def sharded(whole, config, **distributed):
    """The whole model's weights, spread over the ranks."""
    model = type(whole).from_pretrained(
        None,
        config=copy.deepcopy(config),
        state_dict=whole.state_dict(),
        distributed_config=DistributedConfig(**distributed),
        experts_implementation="grouped_mm",
        dtype=whole.dtype,
    )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Runner:
    """One rank: the models, and one training step in any of the ways."""

    def __init__(self, device: str, size: dict[str, Any], ways: tuple[str, ...] | None):
        self.device, self.world = rank_device(device), dist.get_world_size()
        self.seconds_to_build = time.perf_counter()
        geometry = {key: value for key, value in size.items() if key not in RUN}
        config = OlmoeConfig(**geometry, output_router_logits=True, pad_token_id=None, eos_token_id=None)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (size["warmup"] + size["repeats"] + 1, size["sequences"], size["sequence"])
        self.batches = torch.randint(0, size["vocab_size"], shape, generator=generator).to(self.device)
        torch.manual_seed(0)
        with torch.device(self.device):
            whole = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        whole.set_experts_implementation("grouped_mm")
        with torch.no_grad():
            ids = self.batches[0]
            self.truth = whole.train()(input_ids=ids, labels=ids, use_cache=False).loss.item()
        switch = use_switch(size["sequences"] * size["sequence"])
        spread = dict(fsdp_size=self.world)
        # On two GPUs there is no room for a second model.
        names = list(ways or [way.name for way in WAYS] + [WITHOUT_EP] * (self.world > 2))
        exchanging = sharded(whole, config, ep_size=self.world, ep_implementation=switch, **spread)
        alone = sharded(whole, config, **spread) if WITHOUT_EP in names else None
        del whole
        gc.collect()
        self.models = {name: alone if name == WITHOUT_EP else exchanging for name in names}
        self.optimizers = {id(model): fused_adamw(model, 1e-5, self.device) for model in (exchanging, alone) if model}
        synchronize(self.device)
        self.seconds_to_build = time.perf_counter() - self.seconds_to_build

    def backward(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        SwitchEP.current = name
        loss = self.models[name](input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def check(self, name: str) -> dict[str, float]:
        """The first batch with the first weights: how far the loss is from the whole model's, and the gradient's norm."""
        model = self.models[name]
        loss = self.backward(name, self.batches[0]).item()
        found = {"loss": loss, "loss_difference": abs(loss - self.truth) / self.truth, "norm": gradient_norm(model)}
        model.zero_grad(set_to_none=True)
        return found

    def step(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        optimizer = self.optimizers[id(self.models[name])]
        loss = self.backward(name, ids)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def timed_step(self, name: str, ids: torch.Tensor) -> dict[str, float]:
        on_gpu = self.device.type == "cuda"
        resident = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        synchronize(self.device)
        started = time.perf_counter()
        loss = self.step(name, ids)
        synchronize(self.device)
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() - resident if on_gpu else 0
        return {"seconds": seconds, "peak_gib": peak / 2**30, "loss": loss.item()}


def measure(device: str, size: dict[str, Any], ways: tuple[str, ...] | None, limit_s: float) -> dict[str, Any]:
    """On one rank, the ways taking turns. A way that fails the check is left out of the rest, on all ranks."""
    last_start = time.monotonic() + SHARE_OF_TIME * limit_s
    runner = Runner(device, size, ways)
    checks = {name: runner.check(name) for name in runner.models}
    names = agreed([name for name in checks if is_right(checks[name], checks[UPSTREAM])])
    steps: dict[str, list[dict]] = {name: [] for name in names}
    for number, ids in enumerate(runner.batches[1:]):
        if number > size["warmup"] and is_late(last_start):
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            steps[name].append(runner.timed_step(name, ids))
    profiles = {}
    if device == "cuda":
        for name in [name for name in PROFILED if name in names]:
            if is_late(last_start):
                break
            profile = profiled(lambda name=name: runner.step(name, runner.batches[0]))
            profiles[name] = {kind: overlap(profile, kind) for kind in ("SendRecv", "")}
            profiles[name] |= {"by_kind": by_kind(profile), "heaviest": heaviest(profile, 20)}
    slices = {
        name: [way.choices for module in runner.models[name].modules() for way in own_ways(module, name)][:1]
        for name in names
    }
    return {
        "truth": runner.truth,
        "checks": checks,
        "steps": steps,
        "profiles": profiles,
        "choices": slices,
        "seconds_to_build": runner.seconds_to_build,
    }


def own_ways(module, name: str) -> list:
    """Our exchange of this name behind an experts module."""
    way = getattr(module, "benchmark_ways", {}).get(name)
    return [way] if hasattr(way, "choices") else []


def agreed(names: list[str]) -> list[str]:
    """The names that all ranks have, in this rank's order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, names)
    return [name for name in names if all(name in others for others in everyone)]


def is_late(last_start: float) -> bool:
    """By rank 0's clock, for all ranks."""
    late = [time.monotonic() > last_start]
    dist.broadcast_object_list(late)
    return late[0]


def is_right(check: dict[str, float], baseline: dict[str, float]) -> bool:
    """Loss as the whole model's, gradient's norm as transformers' exchange's, to the table's tolerance of bfloat16."""
    rtol = TOLERANCES[torch.bfloat16]["rtol"]
    return check["loss_difference"] <= rtol and abs(check["norm"] / baseline["norm"] - 1) <= rtol


def bench_step(device: str, world_size: int, timeout_s: float, ways: tuple[str, ...] | None = None) -> list[Record]:
    """`ways`: names of those to compare; all, and a model without expert parallelism, if not given."""
    size = SIZES[device]
    ranks = run_ranks(measure, world_size, device, size, ways, timeout_s, device=device, timeout_s=timeout_s)
    tokens = world_size * size["sequences"] * size["sequence"]
    rows = [_row(name, ranks, size["warmup"], tokens) for name in ranks[0]["checks"]]
    base = _seconds(UPSTREAM, ranks, size["warmup"])
    for row in rows:
        if "seconds" in row:
            own = _seconds(row["way"], ranks, size["warmup"])
            # the median of the ratios of steps on the same batch
            row["speedup"] = statistics.median(b / o for b, o in zip(base, own, strict=True))
    record = Record(
        theme="multigpu_step" if device == "cuda" else "multigpu_step_dry",
        question="How fast does a model of OLMoE-1B-7B's size train on several GPUs of one host, by way of spreading it?",
        config={
            **size,
            "world_size": world_size,
            "layout": f"fsdp {world_size}, ep {world_size}",
            "dtype": "bfloat16",
        },
        command="",
        rows=rows,
        columns={
            "way": "",
            "tokens_s": "tokens/s",
            "speedup": "by transformers' all_to_all",
            "seconds": "seconds a step (quartiles)",
            "peak_gib": "memory of a step beyond weights and optimizer, GiB",
            "loss_difference": "loss, relative difference to one GPU",
            "norm_difference": "gradient norm, relative to all_to_all",
            "share": "all-to-all under computation",
            "nccl_share": "all NCCL under computation",
            "idle_ms": "device without a kernel in the profiled step, ms",
        },
        notes=[
            "Seconds are the slowest rank's, from barrier to the end of the device's work. The exchanges share one model and "
            "take turns.",
            "'Under computation' is the share of NCCL's device time, of one profiled step on rank 0, in which a computing "
            "kernel ran as well. Waiting for a rank that is behind counts as NCCL's time.",
            "Fixed shapes: room for 1.25 times the expected rows, and never for more than one copy of each token.",
            f"Fan-out and slices that were chosen: {ranks[0]['choices']}.",
            f"{len(base)} steps of each way after the first; {ranks[0]['seconds_to_build']:.0f} s to build and shard the model.",
        ],
        extra={"ranks": ranks},
    )
    return [record]


def _seconds(name: str, ranks: list[dict], warmup: int) -> list[float]:
    """Of each step, the slowest rank's."""
    per_rank = [[step["seconds"] for step in rank["steps"][name]] for rank in ranks]
    return [max(step) for step in zip(*per_rank, strict=True)][warmup:]


def _row(name: str, ranks: list[dict], warmup: int, tokens: int) -> dict[str, Any]:
    worst = max(rank["checks"][name]["loss_difference"] for rank in ranks)
    norms = max(abs(rank["checks"][name]["norm"] / rank["checks"][UPSTREAM]["norm"] - 1) for rank in ranks)
    row: dict[str, Any] = {"way": name, "loss_difference": worst, "norm_difference": norms}
    if name not in ranks[0]["steps"]:
        return {**row, "tokens_s": "WRONG, no speed"}
    seconds = Spread.of(_seconds(name, ranks, warmup))
    row |= {"seconds": seconds, "tokens_s": tokens / seconds.median}
    row["peak_gib"] = max(step["peak_gib"] for rank in ranks for step in rank["steps"][name][warmup:])
    if name in ranks[0]["profiles"]:
        profile = ranks[0]["profiles"][name]
        row |= {"share": profile["SendRecv"]["share"], "nccl_share": profile[""]["share"]}
        row["idle_ms"] = profile["by_kind"]["idle"]
    return row


__all__ = ["bench_step", "rank_device", "synchronize"]
