# SPDX-License-Identifier: Apache-2.0
"""Training steps of a whole model beside transformers' own of the same size, in bfloat16."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import traceback
from collections.abc import Iterator
from unittest import mock

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.gpu_models import (
    DEVICE,
    GEOMETRIES,
    NUM_EXPERTS,
    SEQUENCE,
    TITLES,
    active_flops,
    build,
    release,
    set_capacity,
)
from benchmarks.gpu_timing import matmul_rate
from benchmarks.record import Record, Spread
from hf_locmoe import loss_locmoe, rotary_locmoe
from hf_locmoe.norm_locmoe import LocMoeRMSNorm


STEPS = 4
COLUMNS = {
    "model": "model",
    "sequences": "sequences",
    "step_s": "seconds a step",
    "tokens_s": "tokens/s",
    "speedup": "by the other model's",
    "utilisation": "share of the GEMM ceiling",
    "peak_gib": "peak memory, GiB",
}
# what the decoder's dense part is in transformers' form, one by one and all of it
PLAIN = {"norm": (LocMoeRMSNorm, "forward", LlamaRMSNorm.forward), "rotary": (rotary_locmoe, "rotate", None)}
PLAIN["loss"] = (loss_locmoe, "cross_entropy_rows", None)


@contextlib.contextmanager
def plain_parts(*names: str) -> Iterator[None]:
    """The decoder with transformers' forms of norm, rotary positions or loss."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(*PLAIN[name]))
        yield


def train(model, optimizer, batch_size: int, steps: int = STEPS, **kwargs) -> dict:
    """Times `steps` steps after two to warm up."""
    vocab_size = model.config.vocab_size
    batches = [torch.randint(0, vocab_size, (batch_size, SEQUENCE), device=DEVICE) for _ in range(steps + 2)]
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


def profile(model, optimizer, batch_size: int) -> list[tuple[str, float, int]]:
    """The kernels that take the most of a training step: name, milliseconds, launches; the last line is all of them."""
    ids = torch.randint(0, model.config.vocab_size, (batch_size, SEQUENCE), device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    lines = [(event.key[:160], round(event.self_device_time_total / 1000, 2), event.count) for event in events]
    total = ("all", round(sum(milliseconds for _, milliseconds, _ in lines), 2), sum(count for *_, count in lines))
    return [*lines[:30], total]


class _Steps:
    """The rows of one pair of models."""

    def __init__(self, size: str, rate: float):
        self.size, self.rate = size, rate
        self.rows: list[dict] = []

    def row(self, name: str, model, optimizer, batch_size: int, **kwargs) -> None:
        result = {"model": name, "size": self.size, **train(model, optimizer, batch_size, **kwargs)}
        result["utilisation"] = result["tokens_s"] * active_flops(self.size) / self.rate
        self.rows.append(result)
        print(result, flush=True)

    def compare(self) -> None:
        """By the mean of the other model's turns with as many sequences, before and after ours."""
        for result in self.rows:
            others = [
                row["tokens_s"]
                for row in self.rows
                if row["model"].startswith(TITLES[self.size]) and row["sequences"] == result["sequences"]
            ]
            result["speedup"] = result["tokens_s"] / (sum(others) / len(others))


def _trained(size: str, ours: bool):
    model = build(size, ours).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, optimizer


def _with_liger(steps: _Steps, model, optimizer) -> None:
    """The other model with Liger's norm, rotary positions and loss, where that package is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_mixtral

        apply_liger_kernel_to_mixtral(swiglu=False, model=model)
        steps.row("transformers' Mixtral, grouped_mm, Liger's norm, rotary positions and loss", model, optimizer, 4)
    except Exception:  # another package's; the rows that count are there
        traceback.print_exc()


def _steps_of(size: str, rate: float, profiles: dict) -> list[dict]:
    """Theirs, ours, theirs again."""
    steps, title = _Steps(size, rate), TITLES[size]
    for turn in ("", ", again"):
        model, optimizer = _trained(size, ours=False)
        steps.row(f"{title}, grouped_mm{turn}", model, optimizer, 4)
        model.gradient_checkpointing_disable()
        steps.row(f"{title}, grouped_mm, no checkpointing{turn}", model, optimizer, 1)
        if turn and size == "mixtral":  # Liger knows Mixtral, and no OLMoE
            _with_liger(steps, model, optimizer)
        del model, optimizer
        release()
        if turn:
            break
        model, optimizer = _trained(size, ours=True)
        steps.row("LocMoE, dropless", model, optimizer, 4)
        profiles[f"{size}, LocMoE, dropless"] = profile(model, optimizer, 4)
        set_capacity(model, 1.25)
        steps.row("LocMoE, capacity 1.25", model, optimizer, 4)
        set_capacity(model, 1.0)
        steps.row("LocMoE, capacity 1.0", model, optimizer, 4)
        steps.row(
            "LocMoE, capacity 1.0, no router losses or statistics", model, optimizer, 4, output_router_stats=False
        )
        if size == "olmoe":
            for part in PLAIN:
                with plain_parts(part):
                    steps.row(f"LocMoE, capacity 1.0, transformers' {part}", model, optimizer, 4, steps=2)
        model.gradient_checkpointing_disable()
        steps.row("LocMoE, capacity 1.0, no checkpointing", model, optimizer, 1)
        set_capacity(model, None)
        steps.row("LocMoE, dropless, no checkpointing", model, optimizer, 1)
        profiles[f"{size}, LocMoE, dropless, no checkpointing"] = profile(model, optimizer, 1)
        del model, optimizer
        release()
    steps.compare()
    return steps.rows


def _step_record(size: str, theme: str, part: str) -> Record:
    rate, profiles = matmul_rate(), {}
    rows = _steps_of(size, rate, profiles)
    return Record(
        theme=theme,
        question=f"How fast does a LocMoE of the {TITLES[size]}'s size train beside transformers' {TITLES[size]}?",
        config={
            **GEOMETRIES[size],
            "num_experts": NUM_EXPERTS[size],
            "sequence": SEQUENCE,
            "matmul_tflops": rate / 1e12,
        },
        command=f"python -m benchmarks.bench_gpu --parts {part}",
        rows=rows,
        columns=COLUMNS,
        extra={"profiles_ms": profiles},
    )


def bench_model() -> Record:
    """OLMoE-1B-7B's size."""
    return _step_record("olmoe", "model_step", "model")


def bench_mixtral() -> Record:
    """A Mixtral with 8 experts, top-1."""
    return _step_record("mixtral", "model_step_mixtral", "mixtral")


def bench_compiled() -> Record:
    """OLMoE's size, one sequence without checkpointing, in eager mode and compiled, each model beside the other."""
    rate = matmul_rate()
    rows = []
    for ours, title in ((False, "OLMoE, grouped_mm"), (True, "LocMoE, dropless")):
        torch.compiler.reset()
        model = build("olmoe", ours).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for mode in ("eager", "compiled"):
            if mode == "compiled":
                model.compile()
            row = {"model": f"{title}, {mode}", **train(model, optimizer, 1)}
            row["utilisation"] = row["tokens_s"] * active_flops("olmoe") / rate
            row["speedup"] = row["tokens_s"] / next(
                (r["tokens_s"] for r in rows if mode in r["model"]), row["tokens_s"]
            )
            rows.append(row)
            print(row, flush=True)
        del model, optimizer
        release()
    return Record(
        theme="model_step_compiled",
        question="What does torch.compile make of a training step of LocMoE and OLMoE, OLMoE-1B-7B's size?",
        config={**GEOMETRIES["olmoe"], "num_experts": 64, "sequence": SEQUENCE, "matmul_tflops": rate / 1e12},
        command="python -m benchmarks.bench_gpu --parts compiled",
        rows=rows,
        columns={**COLUMNS, "speedup": "by OLMoE in the same mode"},
    )


__all__ = ["bench_compiled", "bench_mixtral", "bench_model", "plain_parts", "train"]
