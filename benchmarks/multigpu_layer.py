# SPDX-License-Identifier: Apache-2.0
"""
The exchange of one MoE layer on several GPUs, forward and backward, in a profile: how much of the communication lies under
the experts' computation, what the host waits for, and which kinds of kernels the device's time goes to.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.device_profile import KINDS, OTHER, DeviceProfile, by_kind, heaviest, overlap, profiled, together
from benchmarks.gpu_models import GEOMETRIES, NUM_EXPERTS
from benchmarks.multigpu_step import rank_device, synchronize
from benchmarks.multigpu_ways import OUR_EXPERTS, UPSTREAM, WAYS, Way
from benchmarks.record import Record, Spread
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


ALONE = "no exchange: our experts on as many rows"
ALONE_UPSTREAM = "no exchange: grouped_mm experts on as many rows"
LAYER_WAYS = (*WAYS, Way("ours, 4 slices", dict(slices=4)))
SIZES = {
    "cuda": {
        "hidden_size": GEOMETRIES["olmoe"]["hidden_size"],
        "intermediate_size": GEOMETRIES["olmoe"]["intermediate_size"],
        "num_experts": NUM_EXPERTS["olmoe"],
        "num_experts_per_tok": GEOMETRIES["olmoe"]["num_experts_per_tok"],
        "tokens": 16384,
        "repeats": 10,
    },
    "cpu": {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "tokens": 64,
        "repeats": 2,
    },
}
PROFILED_PASSES = 3


class Layer:
    """One rank's experts and tokens. The routing is random and even, other on each rank."""

    def __init__(self, device: str, size: dict[str, Any]):
        self.device, self.size = rank_device(device), size
        world, rank = dist.get_world_size(), dist.get_rank()
        config = OlmoeConfig(**{key: value for key, value in size.items() if key not in ("tokens", "repeats")})
        config._experts_implementation = "grouped_mm"
        generator = torch.Generator(self.device).manual_seed(rank)

        def draw(*shape):
            return torch.randn(*shape, device=self.device, dtype=torch.bfloat16, generator=generator)

        with torch.device("meta"):
            self.experts = OlmoeExperts(config)
        self.experts.act_fn = type(self.experts.act_fn)()
        num_local = size["num_experts"] // world
        for name, parameter in list(self.experts.named_parameters()):
            weight = draw(num_local, *parameter.shape[1:]) * parameter.shape[-1] ** -0.5
            setattr(self.experts, name, torch.nn.Parameter(weight))
        self.experts.num_experts, self.experts._is_expert_parallel = num_local, True
        tokens, top_k = size["tokens"], size["num_experts_per_tok"]
        self.states = draw(tokens, size["hidden_size"]).requires_grad_()
        scores = torch.rand(tokens, size["num_experts"], device=self.device, generator=generator)
        weights, self.index = scores.softmax(1).topk(top_k)
        self.weights = (weights / weights.sum(1, keepdim=True)).bfloat16().requires_grad_()
        self.grad = draw(tokens, size["hidden_size"])
        mesh = dist.init_device_mesh(device, (world, 1), mesh_dim_names=("ep", "tp"))
        # with the implementation of the experts
        self.calls: dict[str, tuple[Callable, str]] = {
            way.name: (way.make(self.experts, mesh["ep"], mesh["tp"], tokens), way.experts) for way in LAYER_WAYS
        }
        self.calls |= {ALONE: (self.alone, OUR_EXPERTS), ALONE_UPSTREAM: (self.alone, "grouped_mm")}

    def alone(self, states, index, weights):
        """As many (token, expert) pairs as arrive on average, without anything travelling."""
        return self.experts(states, index % self.experts.num_experts, weights)

    def forward(self, name: str) -> torch.Tensor:
        call, self.experts.config._experts_implementation = self.calls[name]
        return call(self.states, self.index, self.weights)

    def backward(self, output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, [self.states, self.weights, *self.experts.parameters()], self.grad)

    def passes(self, name: str, count: int = 1) -> tuple[torch.Tensor, ...]:
        for _ in range(count):
            output = self.forward(name)
            result = (output.detach(), *self.backward(output))
        return result


def relative_difference(found: tuple, expected: tuple) -> float:
    """The largest over the tensors: norm of the difference by norm of what is expected."""
    pairs = zip(found, expected, strict=True)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in pairs)


def host_sync_error(layer: Layer, name: str) -> str:
    """What torch says where the host waits for the device; nothing where it does not."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.passes(name)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def profile_directions(layer: Layer, name: str) -> dict[str, DeviceProfile]:
    """Some forward passes, and then their backward passes."""
    outputs: list[torch.Tensor] = []
    dist.barrier()
    forward = profiled(lambda: outputs.extend(layer.forward(name) for _ in range(PROFILED_PASSES)))
    dist.barrier()
    return {
        "forward": forward,
        "backward": profiled(lambda: [layer.backward(outputs.pop()) for _ in range(PROFILED_PASSES)]),
    }


def measure(device: str, size: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """On one rank: per way, what the profile and the clock say."""
    layer, found = Layer(device, size), {}
    expected = layer.passes(UPSTREAM)
    for name in layer.calls:
        entry: dict[str, Any] = {"difference": relative_difference(layer.passes(name), expected)}
        layer.passes(name, 2)
        seconds = []
        for _ in range(size["repeats"]):
            dist.barrier()
            synchronize(layer.device)
            started = time.perf_counter()
            layer.passes(name)
            synchronize(layer.device)
            seconds.append(time.perf_counter() - started)
        entry["seconds"] = seconds
        if device == "cuda":
            profiles = profile_directions(layer, name)
            profile = together(*profiles.values())
            entry |= overlap(profile, "SendRecv")
            entry["directions"] = {
                direction: {"by_kind": by_kind(half), "heaviest": heaviest(half, 15)}
                for direction, half in profiles.items()
            }
            entry["host_waits"] = profile.host_waits / PROFILED_PASSES
            entry["copies_to_host"] = profile.copies_to_host / PROFILED_PASSES
            # A rank that raises here leaves the others waiting: only where none is expected to.
            if "fixed shapes" in name:
                entry["sync_error"] = host_sync_error(layer, name)
        found[name] = entry
    return found


def bench_layer(device: str, world_size: int, timeout_s: float) -> list[Record]:
    size = SIZES[device]
    ranks = run_ranks(measure, world_size, device, size, device=device, timeout_s=timeout_s)
    rows = []
    for name in ranks[0]:
        entries = [rank[name] for rank in ranks]
        row: dict[str, Any] = {"way": name}
        if name not in (ALONE, ALONE_UPSTREAM):
            row["difference"] = max(entry["difference"] for entry in entries)
        if row.get("difference", 0.0) <= TOLERANCES[torch.bfloat16]["rtol"]:
            slowest = [max(pass_) for pass_ in zip(*(entry["seconds"] for entry in entries), strict=True)]
            row["ms"] = Spread.of([1e3 * seconds for seconds in slowest])
        if "share" in entries[0]:
            for key in ("nccl_ms", "compute_ms"):
                row[key] = max(entry[key] for entry in entries) / PROFILED_PASSES
            row["share"] = [min(entry["share"] for entry in entries), max(entry["share"] for entry in entries)]
            for key in ("host_waits", "copies_to_host"):
                row[key] = max(entry[key] for entry in entries)
            row["sync_error"] = entries[0].get("sync_error", "")
        rows.append(row)
    record = Record(
        theme="multigpu_overlap" if device == "cuda" else "multigpu_overlap_dry",
        question="How much of one MoE layer's exchange lies under the experts' computation, and what does the host wait for?",
        config={**size, "world_size": world_size, "dtype": "bfloat16"},
        command="",
        rows=rows,
        columns={
            "way": "",
            "ms": "forward + backward, ms (quartiles)",
            "nccl_ms": "all-to-all on the device, ms",
            "compute_ms": "computation on the device, ms",
            "share": "all-to-all under computation, least and most of the ranks",
            "host_waits": "waits of the host a pass",
            "copies_to_host": "copies to the host a pass",
            "sync_error": "torch's sync debug mode",
            "difference": "output and gradients, relative difference to all_to_all",
        },
        notes=[
            "'no exchange' says what is not the exchange's: the experts' own waits for the device, and their time.",
            "A pass is forward and backward of one layer. A copy to the host is what a host read of sizes is; the one of a "
            "dropless layer brings all sizes of all slices.",
            "NCCL's time holds the wait for ranks that are behind.",
        ],
        extra={"ranks": ranks},
    )
    return [record, *([breakdown(ranks, record.config)] if device == "cuda" else [])]


def breakdown(ranks: list[dict[str, dict[str, Any]]], config: dict[str, Any]) -> Record:
    """What the device's time of each way is made of, in each direction."""
    rows = []
    for direction in ("forward", "backward"):
        for name in ranks[0]:
            found = [rank[name]["directions"][direction]["by_kind"] for rank in ranks]
            row = {kind: statistics.mean(each[kind] for each in found) / PROFILED_PASSES for kind in found[0]}
            # of the rank that waits for no other
            row["exchange"] = min(each["exchange"] for each in found) / PROFILED_PASSES
            rows.append({"way": name, "direction": direction, **row})
    return Record(
        theme="multigpu_layer",
        question="What is the device's time in one MoE layer made of, in milliseconds a pass?",
        config=config,
        command="",
        rows=rows,
        columns={
            "way": "",
            "direction": "",
            **{kind: kind for kind in KINDS},
            OTHER: OTHER,
            "busy": "some kernel runs",
            "idle": "none runs",
        },
        notes=[
            "Kernels are told apart by their names. Our row gathers and sums serve the way to the ranks and the way to the "
            "experts; how many of each, and the heaviest kernels by name, are in the JSON.",
            "Mean of the ranks; the exchange's is the least of them, the others wait for a rank that is behind.",
            "The profiler makes the host slower, and with it 'none runs'.",
        ],
        extra={name: {rank: ranks[rank][name]["directions"] for rank in (0, len(ranks) - 1)} for name in ranks[0]},
    )


__all__ = ["bench_layer"]
