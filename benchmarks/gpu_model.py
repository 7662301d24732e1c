# SPDX-License-Identifier: Apache-2.0
"""
A whole model beside transformers' own of the same size: training steps, prefill and decoding, in bfloat16.

Both have OLMoE-1B-7B's geometry (1.3 B of 6.9 B parameters active); weights and tokens are random.
"""

from __future__ import annotations

import gc
import time

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, StaticCache

from benchmarks.gpu_timing import matmul_rate
from benchmarks.record import Record, Spread
from hf_locmoe import LocMoeConfig


DEVICE = "cuda"
GEOMETRY = dict(
    vocab_size=50304,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=16,
    num_key_value_heads=16,
    num_experts=64,
    num_experts_per_tok=8,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
EXPERT_SIZE = 1024
SEQUENCE = 4096
STEPS = 4


def build(name: str) -> torch.nn.Module:
    """`"olmoe"` with transformers' grouped_mm, or `"locmoe"` with ours."""
    torch.manual_seed(0)
    if name == "olmoe":
        config = OlmoeConfig(**GEOMETRY, intermediate_size=EXPERT_SIZE, output_router_logits=True)
    else:
        size = dict(intermediate_size=EXPERT_SIZE, moe_intermediate_size=EXPERT_SIZE)
        config = LocMoeConfig(**GEOMETRY, **size, gated_mlp=True, hidden_act="silu", qk_norm="full")
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm" if name == "olmoe" else "capacity_bmm")
    return model


def active_flops(sequence: int) -> float:
    """Operations a token and training step needs: 6 for each active parameter, and causal attention."""
    d, layers = GEOMETRY["hidden_size"], GEOMETRY["num_hidden_layers"]
    experts = GEOMETRY["num_experts_per_tok"] * 3 * d * EXPERT_SIZE
    parameters = layers * (4 * d * d + experts) + d * GEOMETRY["vocab_size"]
    return 6 * parameters + 6 * layers * d * sequence


def set_capacity(model, factor: float | None) -> None:
    """Every MoE layer's capacity factor in training; None for dropless."""
    for block in model.sparse_blocks:
        block.capacity_rule.mode, block.capacity_rule.factor = (
            ("dropless", 1.0) if factor is None else ("factor", factor)
        )


def train(model, optimizer, batch_size: int, **kwargs) -> dict:
    """Times `STEPS` steps after two to warm up."""
    vocab_size = model.config.vocab_size
    batches = [torch.randint(0, vocab_size, (batch_size, SEQUENCE), device=DEVICE) for _ in range(STEPS + 2)]
    times = []
    torch.cuda.reset_peak_memory_stats()
    for ids in batches:
        torch.cuda.synchronize()
        started = time.perf_counter()
        outputs = model(input_ids=ids, labels=ids, use_cache=False, **kwargs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if getattr(outputs, "router_stats", None) is not None:
            model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
        if not torch.isfinite(outputs.loss):
            raise AssertionError("the loss is not finite")
    spread = Spread.of(times[2:])
    return {
        "sequences": batch_size,
        "step_s": spread,
        "tokens_s": batch_size * SEQUENCE / spread.median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": float(outputs.loss.detach()),
    }


def profile(model, optimizer) -> list[tuple[str, float]]:
    """The kernels that take the most of a training step: name and milliseconds."""
    ids = torch.randint(0, model.config.vocab_size, (4, SEQUENCE), device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return [(event.key[:90], round(event.self_device_time_total / 1000, 2)) for event in events[:25]]


def bench_model() -> Record:
    rate = matmul_rate()
    rows, profiles = [], {}

    def row(name, model, optimizer, batch_size, **kwargs):
        result = {"model": name, **train(model, optimizer, batch_size, **kwargs)}
        result["utilisation"] = result["tokens_s"] * active_flops(SEQUENCE) / rate
        rows.append(result)
        print(result, flush=True)

    for name in ("olmoe", "locmoe"):
        model = build(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if name == "olmoe":
            row("OLMoE, grouped_mm", model, optimizer, 4)
        else:
            for factor in (None, 1.25, 1.0):
                set_capacity(model, factor)
                row(f"LocMoE, {'dropless' if factor is None else f'capacity {factor}'}", model, optimizer, 4)
            row("LocMoE, capacity 1.0, no router losses or statistics", model, optimizer, 4, output_router_stats=False)
        profiles[name] = profile(model, optimizer)
        model.gradient_checkpointing_disable()
        row(f"{rows[-1]['model'].split(',')[0]}, no checkpointing", model, optimizer, 1)
        if name == "locmoe":
            set_capacity(model, None)
            row("LocMoE, dropless, no checkpointing", model, optimizer, 1)
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    baseline = {sequences: next(r["tokens_s"] for r in rows if r["sequences"] == sequences) for sequences in (4, 1)}
    for result in rows:
        result["speedup"] = result["tokens_s"] / baseline[result["sequences"]]
    return Record(
        theme="model_step",
        question="How fast does a LocMoE of OLMoE-1B-7B's size train beside transformers' OLMoE?",
        config={**GEOMETRY, "moe_intermediate_size": EXPERT_SIZE, "sequence": SEQUENCE, "matmul_tflops": rate / 1e12},
        command="python -m benchmarks.bench_gpu --parts model",
        rows=rows,
        columns={
            "model": "model",
            "sequences": "sequences",
            "step_s": "seconds a step",
            "tokens_s": "tokens/s",
            "speedup": "by OLMoE",
            "utilisation": "share of the GEMM ceiling",
            "peak_gib": "peak memory, GiB",
        },
        extra={"profiles_ms": profiles},
    )


def bench_compiled() -> Record:
    """One sequence without checkpointing, in eager mode and compiled, each model beside itself and the other."""
    rate = matmul_rate()
    rows = []
    for name, title in (("olmoe", "OLMoE, grouped_mm"), ("locmoe", "LocMoE, dropless")):
        torch.compiler.reset()
        model = build(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                model.compile()
            row = {"model": f"{title}, {mode}", **train(model, optimizer, 1)}
            row["utilisation"] = row["tokens_s"] * active_flops(SEQUENCE) / rate
            row["speedup"] = row["tokens_s"] / next(
                (r["tokens_s"] for r in rows if mode in r["model"]), row["tokens_s"]
            )
            rows.append(row)
            print(row, flush=True)
        del model, optimizer
        gc.collect()
        torch.cuda.empty_cache()
    return Record(
        theme="model_step_compiled",
        question="What does torch.compile make of a training step of LocMoE and OLMoE, OLMoE-1B-7B's size?",
        config={**GEOMETRY, "moe_intermediate_size": EXPERT_SIZE, "sequence": SEQUENCE, "matmul_tflops": rate / 1e12},
        command="python -m benchmarks.bench_gpu --parts compiled",
        rows=rows,
        columns={
            "model": "model",
            "sequences": "sequences",
            "step_s": "seconds a step",
            "tokens_s": "tokens/s",
            "speedup": "by OLMoE in the same mode",
            "utilisation": "share of the GEMM ceiling",
            "peak_gib": "peak memory, GiB",
        },
    )


@torch.no_grad()
def generate_times(model, batch_size: int, prompt: int, steps: int = 20) -> dict:
    """Prefill, and one decoding step with a static cache: eager, and as a CUDA graph."""
    ids = torch.randint(0, model.config.vocab_size, (batch_size, prompt), device=DEVICE)
    results = {"batch": batch_size, "prompt": prompt}

    def prefill():
        cache = StaticCache(config=model.config, max_cache_len=prompt + 64)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return cache

    def clock(run, repeats):
        run()
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return Spread.of(times)

    results["prefill_s"] = clock(prefill, 5)
    cache = prefill()
    token = ids[:, :1].clone()
    position = torch.full((batch_size, 1), prompt, device=DEVICE)
    mask = torch.ones(batch_size, prompt + 1, dtype=torch.int64, device=DEVICE)

    def decode():
        return model(input_ids=token, attention_mask=mask, position_ids=position, past_key_values=cache).logits

    results["decode_s"] = clock(decode, steps)
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            decode()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            decode()
        results["decode_graph_s"] = clock(graph.replay, steps)
    except RuntimeError as error:
        results["decode_graph_s"], results["graph_error"] = "no graph", str(error)[:300]
    return results


def bench_inference() -> Record:
    rows = []
    for name in ("olmoe", "locmoe"):
        model = build(name).eval()
        model.config.output_router_logits = False
        for batch_size, prompt in ((1, 2048), (64, 256)):
            rows.append({"model": name, **generate_times(model, batch_size, prompt)})
            print(rows[-1], flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return Record(
        theme="inference",
        question="Prefill and decoding of a LocMoE of OLMoE-1B-7B's size beside transformers' OLMoE, static cache",
        config={**GEOMETRY, "moe_intermediate_size": EXPERT_SIZE, "dtype": "bfloat16"},
        command="python -m benchmarks.bench_gpu --parts inference",
        rows=rows,
        columns={
            "model": "model",
            "batch": "batch",
            "prompt": "prompt",
            "prefill_s": "prefill, s",
            "decode_s": "decoding step, eager, s",
            "decode_graph_s": "decoding step, CUDA graph, s",
        },
    )


__all__ = ["bench_compiled", "bench_inference", "bench_model"]
