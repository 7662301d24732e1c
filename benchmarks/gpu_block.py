# SPDX-License-Identifier: Apache-2.0
"""
The experts of one MoE layer, forward and backward in bfloat16, beside transformers' and beside their limit.

The limit is what the layer would take if its tokens came laid out by expert, all experts with the same number: batched
matrix products and a fused activation. Everything above it is routing, permutation and uneven loads.

Shapes: T tokens, d = hidden_size, f = moe_intermediate_size, n = num_experts, k = num_experts_per_tok.
"""

from __future__ import annotations

from unittest import mock

import torch

from benchmarks.gpu_timing import matmul_rate, relative_error, timed_ms
from benchmarks.record import Record
from hf_locmoe import LocMoeConfig
from hf_locmoe.layers_locmoe import LocMoeSparseMoeBlock
from hf_locmoe.moe import experts as experts_module
from hf_locmoe.moe import gate, routing
from hf_locmoe.moe.kernels import ACTIVATIONS, weighted_activation
from hf_locmoe.moe.overflow import limit_to_capacity


# tokens, d, f, n, k, gated
SHAPES = {
    "2560 → 10240 GeLU, 16 experts, top-1": (16384, 2560, 10240, 16, 1, False),
    "4096 → 14336 SwiGLU, 8 experts, top-2": (4096, 4096, 14336, 8, 2, True),
    "2048 → 1024 SwiGLU, 64 experts, top-8": (8192, 2048, 1024, 64, 8, True),
    "2048 → 768 SwiGLU, 128 experts, top-8": (8192, 2048, 768, 128, 8, True),
}
MAX_RELATIVE_ERROR = 1e-2


def make_block(d: int, f: int, n: int, k: int, gated: bool) -> LocMoeSparseMoeBlock:
    """One MoE block of random weights."""
    config = LocMoeConfig(
        hidden_size=d,
        moe_intermediate_size=f,
        intermediate_size=f,
        num_hidden_layers=1,
        num_attention_heads=16,
        num_experts=n,
        num_experts_per_tok=k,
        gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        capacity_mode="factor",
        expert_capacity_factor=1.0,
    )
    config._experts_implementation = "capacity_bmm"
    with torch.device("cuda"):
        block = LocMoeSparseMoeBlock(config, 0).to(torch.bfloat16)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    block.gate.e_score_correction_bias = torch.zeros(n, device="cuda")
    return block.train()


def measure(shape: str, rate: float) -> dict:
    """One row of the table."""
    num_tokens, d, f, n, k, gated = SHAPES[shape]
    torch.manual_seed(0)
    block = make_block(d, f, n, k, gated)
    experts, parameters = block.experts, list(block.experts.parameters())
    capacity = num_tokens * k // n
    x = torch.randn(num_tokens, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    logits = torch.randn(num_tokens, n, device="cuda")
    index = routing.stable_top_k(logits, k)
    weights = logits.softmax(-1).gather(-1, index)
    limited = limit_to_capacity(index, weights, logits, capacity)
    direction = torch.randn_like(x)

    def step(implementation, index, weights, capacity=None):
        experts.config._experts_implementation, experts.expert_capacity = implementation, capacity
        weights = weights.to(x.dtype).detach().requires_grad_()
        output = experts(x, index, weights)
        output.backward(direction)
        results = [output.detach(), x.grad, weights.grad, *(p.grad for p in parameters)]
        for tensor in (x, *parameters):
            tensor.grad = None
        return results

    def without_kernels(run):
        with (
            mock.patch.object(experts_module, "_kernels_run_on", return_value=False),
            mock.patch.object(routing, "route_sums", None),
            mock.patch.object(routing, "top_k_of_router", None),
            mock.patch.object(gate, "pool_affinity", None),
        ):
            return run()

    variants = {
        "grouped_mm": lambda: step("grouped_mm", index, weights),
        "dropless": lambda: step("capacity_bmm", index, weights),
        "capacity": lambda: step("capacity_bmm", limited.top_k_index, limited.top_k_weights, capacity),
    }
    variants["capacity_plain"] = lambda: without_kernels(variants["capacity"])
    errors = {}
    for name, reference in {"dropless": "grouped_mm", "capacity": "capacity_plain"}.items():
        pairs = zip(variants[name](), variants[reference]())
        errors[name] = max(relative_error(actual, expected) for actual, expected in pairs)
        if not errors[name] < MAX_RELATIVE_ERROR:
            raise AssertionError(f"{shape}: {name} differs from {reference} by {errors[name]:.2g}")

    rows = torch.randn(num_tokens * k, d, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ones = torch.ones(num_tokens, k, device="cuda", dtype=torch.bfloat16).requires_grad_()
    in_order = torch.arange(num_tokens * k, device="cuda")
    grad_rows = torch.randn_like(rows)

    def limit():
        inner = experts_module._ExpertLinear.apply(rows, experts_module._first_weight(experts), None)
        inner = weighted_activation(inner, ones, in_order, ACTIVATIONS[experts.config.hidden_act], gated)
        experts_module._ExpertLinear.apply(inner, experts.down_proj, None).backward(grad_rows)
        for tensor in (rows, ones, *parameters):
            tensor.grad = None

    hidden_states = x.detach().view(1, num_tokens, d).requires_grad_()

    def whole_block():
        experts.config._experts_implementation = "capacity_bmm"
        output, stats, *_ = block(hidden_states, output_router_stats=True)
        torch.autograd.backward([output, stats[0].sum()], [direction.view_as(output), None])
        for tensor in (hidden_states, *parameters):
            tensor.grad = None

    variants |= {"limit": limit, "block": whole_block, "block_plain": lambda: without_kernels(whole_block)}
    times = {name: timed_ms(run) for name, run in variants.items()}
    again = timed_ms(limit)
    flops = 3 * 2 * num_tokens * k * d * f * (3 if gated else 2)
    return {
        "shape": shape,
        "tokens": num_tokens,
        **times,
        "limit_again": again,
        "capacity_of_limit": times["limit"].median / times["capacity"].median,
        "dropless_of_limit": times["limit"].median / times["dropless"].median,
        "dropless_speedup": times["grouped_mm"].median / times["dropless"].median,
        "capacity_speedup": times["grouped_mm"].median / times["capacity"].median,
        "limit_of_ceiling": flops / (times["limit"].median / 1000) / rate,
        "max_relative_error": max(errors.values()),
    }


def bench_block(quick: bool = False) -> Record:
    """All shapes, `quick` or not."""
    rate = matmul_rate()
    rows = []
    for shape in SHAPES:
        rows.append(measure(shape, rate))
        print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    return Record(
        theme="moe_block",
        question="How far is one MoE block, forward and backward in bfloat16, from the limit of its matrix products?",
        config={"capacity_factor": 1.0, "dtype": "bfloat16", "matmul_tflops": rate / 1e12},
        command="python -m benchmarks.bench_gpu --parts block",
        rows=rows,
        columns={
            "shape": "shape",
            "tokens": "tokens",
            "grouped_mm": "transformers' grouped_mm, ms",
            "dropless": "dropless, ms",
            "dropless_speedup": "speed-up",
            "capacity_plain": "capacity 1.0, plain torch, ms",
            "capacity": "capacity 1.0, ms",
            "limit": "limit, ms",
            "capacity_of_limit": "capacity: share of the limit",
            "dropless_of_limit": "dropless: share of the limit",
            "block": "with gate, capacity and statistics, ms",
            "block_plain": "the same in plain torch, ms",
        },
    )


__all__ = ["bench_block"]
