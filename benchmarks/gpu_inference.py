# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding of a model beside transformers' own of the same size, in bfloat16."""

from __future__ import annotations

import time

import torch
from transformers import StaticCache

from benchmarks.gpu_models import DEVICE, GEOMETRIES, NUM_EXPERTS, build, release
from benchmarks.record import Record, Spread


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


@torch.no_grad()
def launches(model, batch_size: int, length: int) -> int:
    """Kernels of one forward pass."""
    ids = torch.randint(0, model.config.vocab_size, (batch_size, length), device=DEVICE)
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def bench_inference(quick: bool = False) -> Record:
    """OLMoE, LocMoE, OLMoE again, `quick` or not."""
    rows = []
    for name, ours, implementation in (
        ("OLMoE, grouped_mm", False, None),
        ("LocMoE, capacity_bmm", True, None),
        ("LocMoE, grouped_mm", True, "grouped_mm"),
        ("OLMoE, grouped_mm, again", False, None),
    ):
        if implementation is None:
            model = None
            release()
            model = build("olmoe", ours).eval()
        else:
            model.set_experts_implementation(implementation)
        model.config.output_router_logits = False
        for batch_size, prompt in ((1, 2048), (64, 256)):
            row = {"model": name, **generate_times(model, batch_size, prompt)}
            if batch_size == 1:
                row["launches"] = launches(model, batch_size, prompt)
            rows.append(row)
            print(row, flush=True)
    return Record(
        theme="inference",
        question="Prefill and decoding of a LocMoE of OLMoE-1B-7B's size beside transformers' OLMoE, static cache",
        config={**GEOMETRIES["olmoe"], "num_experts": NUM_EXPERTS["olmoe"], "dtype": "bfloat16"},
        command="python -m benchmarks.bench_gpu --parts inference",
        rows=rows,
        columns={
            "model": "model",
            "batch": "batch",
            "prompt": "prompt",
            "prefill_s": "prefill, s",
            "launches": "kernels of a prefill",
            "decode_s": "decoding step, eager, s",
            "decode_graph_s": "decoding step, CUDA graph, s",
        },
    )


__all__ = ["bench_inference"]
