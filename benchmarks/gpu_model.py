# SPDX-License-Identifier: Apache-2.0
"""Training steps of a whole model beside transformers' own of the same size, in bfloat16."""

from __future__ import annotations

import contextlib
import importlib.util
import math
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
from benchmarks.gpu_timing import launch_us, matmul_rate
from benchmarks.record import Record, Spread
from hf_locmoe import loss_locmoe, rotary_locmoe
from hf_locmoe.norm_locmoe import LocMoeRMSNorm


STEPS = 4
PAIRS = 6  # steps with and without router losses, in turn
COLUMNS = {
    "model": "model",
    "sequences": "sequences",
    "step_s": "seconds a step",
    "host_s": "of it until the host has launched all",
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


def _timed_step(model, optimizer, ids: torch.Tensor, **kwargs) -> tuple[float, float, float]:
    """One training step: seconds until the device has finished, until the host has launched all of it, and the loss."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    outputs = model(input_ids=ids, labels=ids, use_cache=False, **kwargs)
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if getattr(outputs, "router_stats", None) is not None:
        model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
    launched = time.perf_counter()
    torch.cuda.synchronize()
    finished = time.perf_counter()
    loss = float(outputs.loss.detach())
    if not math.isfinite(loss):
        raise AssertionError("the loss is not finite")
    return finished - started, launched - started, loss


def _batch(model, batch_size: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch_size, SEQUENCE), device=DEVICE)


def train(model, optimizer, batch_size: int, steps: int = STEPS, **kwargs) -> dict:
    """Times `steps` steps after two to warm up."""
    torch.cuda.reset_peak_memory_stats()
    results = [_timed_step(model, optimizer, _batch(model, batch_size), **kwargs) for _ in range(steps + 2)]
    times, host_times, losses = zip(*results[2:])
    return _row(batch_size, times, host_times, losses[-1])


def _row(batch_size: int, times, host_times, loss: float) -> dict:
    spread = Spread.of(list(times))
    return {
        "sequences": batch_size,
        "step_s": spread,
        "host_s": Spread.of(list(host_times)),
        "tokens_s": batch_size * SEQUENCE / spread.median,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "loss": loss,
    }


def train_in_turn(model, optimizer, batch_size: int, pairs: int = PAIRS) -> tuple[dict, dict, dict]:
    """
    Steps with and without router losses and statistics, in turn, since a card's clock moves by more than they take: both rows,
    and of the pairs' ratios of times, minus 1, median and quartiles, with the kernels' time and number of a step of each.
    """
    kinds = ({}, {"output_router_stats": False})
    for kwargs in kinds:
        _timed_step(model, optimizer, _batch(model, batch_size), **kwargs)
    torch.cuda.reset_peak_memory_stats()
    results: tuple[list, list] = ([], [])
    for pair in range(pairs):
        order = (0, 1) if pair % 2 else (1, 0)
        for kind in order:
            results[kind].append(_timed_step(model, optimizer, _batch(model, batch_size), **kinds[kind]))
    rows = [_row(batch_size, *list(zip(*result))[:2], result[-1][2]) for result in results]
    share = Spread.of([with_[0] / without[0] - 1 for with_, without in zip(*results)])
    totals = [profile(model, optimizer, batch_size, **kwargs)[-1] for kwargs in kinds]
    names = ("with router losses and statistics", "without")
    kernels = {name: {"ms": total[1], "kernels": total[2]} for name, total in zip(names, totals)}
    return rows[0], rows[1], {"share_of_step": share, **kernels}


def profile(model, optimizer, batch_size: int, **kwargs) -> list[tuple[str, float, int]]:
    """The kernels that take the most of a training step: name, milliseconds, launches; the last line is all of them."""
    ids = _batch(model, batch_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
    # calls of the runtime are events, too, and take no time of the device
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    lines = [(event.key[:160], round(event.self_device_time_total / 1000, 2), event.count) for event in events]
    milliseconds = sum(event.self_device_time_total for event in events) / 1000
    return [*lines[:30], ("all", round(milliseconds, 2), sum(count for *_, count in lines))]


class _Steps:
    """The rows of one pair of models."""

    def __init__(self, size: str, rate: float):
        self.size, self.rate = size, rate
        self.rows: list[dict] = []

    def row(self, name: str, model, optimizer, batch_size: int, **kwargs) -> None:
        self.add(name, train(model, optimizer, batch_size, **kwargs))

    def add(self, name: str, measured: dict) -> None:
        result = {"model": name, "size": self.size, **measured}
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
    _enable_checkpointing(model)
    return model, optimizer


def _enable_checkpointing(model) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _with_liger(steps: _Steps, model, optimizer) -> None:
    """The other model with Liger's norm, rotary positions and loss, where that package is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return
    _enable_checkpointing(model)
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_mixtral

        apply_liger_kernel_to_mixtral(swiglu=False, model=model)
        steps.row("transformers' Mixtral, grouped_mm, Liger's norm, rotary positions and loss", model, optimizer, 4)
    except Exception:  # another package's; the rows that count are there
        traceback.print_exc()


def _steps_of(size: str, rate: float, profiles: dict, quick: bool) -> tuple[list[dict], dict]:
    """Theirs, ours, theirs again; `quick` leaves out what other parts explain. Also the price of router losses."""
    steps, title = _Steps(size, rate), TITLES[size]
    router: dict = {}
    for turn in ("", ", again"):
        model, optimizer = _trained(size, ours=False)
        steps.row(f"{title}, grouped_mm{turn}", model, optimizer, 4)
        model.gradient_checkpointing_disable()
        steps.row(f"{title}, grouped_mm, no checkpointing{turn}", model, optimizer, 1, steps=2 * STEPS)
        if turn:
            profiles[f"{size}, {title}, no checkpointing"] = profile(model, optimizer, 1)
            if size == "mixtral" and not quick:  # Liger knows Mixtral, and no OLMoE
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
        with_router, without, router = train_in_turn(model, optimizer, 4)
        steps.add("LocMoE, capacity 1.0", with_router)
        steps.add("LocMoE, capacity 1.0, no router losses or statistics, in turn with the row before", without)
        print(router, flush=True)
        for part in () if quick else PLAIN:
            with plain_parts(part):
                steps.row(f"LocMoE, capacity 1.0, transformers' {part}", model, optimizer, 4, steps=2)
        model.gradient_checkpointing_disable()
        steps.row("LocMoE, capacity 1.0, no checkpointing", model, optimizer, 1, steps=2 * STEPS)
        set_capacity(model, None)
        steps.row("LocMoE, dropless, no checkpointing", model, optimizer, 1, steps=2 * STEPS)
        profiles[f"{size}, LocMoE, dropless, no checkpointing"] = profile(model, optimizer, 1)
        del model, optimizer
        release()
    steps.compare()
    for name, lines in profiles.items():
        print(f"{name}: {lines[-1][1]} ms in {lines[-1][2]} kernels", flush=True)
    return steps.rows, router


def _launch_costs(size: str) -> dict[str, Spread]:
    """Microseconds of the host for a product of all experts, grouped and batched, of which a layer has six a step."""
    geometry, num_experts = GEOMETRIES[size], NUM_EXPERTS[size]
    num_rows, width = SEQUENCE * geometry["num_experts_per_tok"], geometry["hidden_size"]
    options = dict(device=DEVICE, dtype=torch.bfloat16)
    rows = torch.randn(num_rows, width, **options)
    weights = torch.randn(num_experts, width, geometry["intermediate_size"], **options)
    ends = torch.arange(1, num_experts + 1, device=DEVICE, dtype=torch.int32) * (num_rows // num_experts)
    by_expert = rows.unflatten(0, (num_experts, -1))
    return {
        "grouped": launch_us(lambda: torch.nn.functional.grouped_mm(rows, weights, offs=ends)),
        "batched": launch_us(lambda: torch.bmm(by_expert, weights)),
    }


def _step_record(size: str, theme: str, part: str, quick: bool) -> Record:
    rate, profiles = matmul_rate(), {}
    rows, router = _steps_of(size, rate, profiles, quick)
    return Record(
        theme=theme,
        question=f"How fast does a LocMoE of the {TITLES[size]}'s size train beside transformers' {TITLES[size]}?",
        config={
            **GEOMETRIES[size],
            "num_experts": NUM_EXPERTS[size],
            "sequence": SEQUENCE,
            "matmul_tflops": rate / 1e12,
        },
        command=f"python -m benchmarks.bench_gpu --parts {part}{' --quick' if quick else ''}",
        rows=rows,
        columns=COLUMNS,
        extra={"profiles_ms": profiles, "router": router, "launch_us": _launch_costs(size)},
    )


def bench_model(quick: bool = False) -> Record:
    """OLMoE-1B-7B's size."""
    return _step_record("olmoe", "model_step", "model", quick)


def bench_mixtral(quick: bool = False) -> Record:
    """A Mixtral with 8 experts, top-1."""
    return _step_record("mixtral", "model_step_mixtral", "mixtral", quick)


# of the compiled models: sequences, whether with activation checkpointing, and what to call that
COMPILED = ((1, False, "no checkpointing"), (4, True, "checkpointing"))


def _compile_layers(model) -> None:
    """Each decoder layer by itself: one compilation serves all layers. Afresh, so that shapes stay what the compiler knows."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile()


def bench_compiled(quick: bool = False) -> Record:
    """
    OLMoE's size with each decoder layer compiled, and in eager mode; `quick` leaves the latter out. OLMoE's router losses break
    the graph of its layer (they are recorded by hooks), so it goes without.
    """
    steps = _Steps("olmoe", matmul_rate())
    for ours, title in ((False, "OLMoE, grouped_mm, no router losses"), (True, "LocMoE")):
        model, optimizer = _trained("olmoe", ours)
        if not ours:
            model.config.output_router_logits = False
        for mode in ("compiled",) if quick else ("eager", "compiled"):
            for batch_size, checkpointed, how in COMPILED:
                if checkpointed:
                    _enable_checkpointing(model)
                else:
                    model.gradient_checkpointing_disable()
                for capacity in (None, 1.0) if ours else (None,):
                    name = title
                    if ours:
                        set_capacity(model, capacity)
                        name += ", dropless" if capacity is None else f", capacity {capacity}"
                    if mode == "compiled":
                        _compile_layers(model)
                    started = time.monotonic()
                    row = {
                        "mode": mode,
                        **train(model, optimizer, batch_size, steps=STEPS if checkpointed else 2 * STEPS),
                    }
                    row["with_warm_up_s"] = time.monotonic() - started
                    if mode == "compiled":
                        row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                    row["kernels_ms"], row["kernels"] = profile(model, optimizer, batch_size)[-1][1:]
                    steps.add(f"{name}, {how}, {mode}", row)
        del model, optimizer
        release()
    for row in steps.rows:
        theirs = (other for other in steps.rows if other["model"].startswith("OLMoE"))
        same = next(o for o in theirs if (o["mode"], o["sequences"]) == (row["mode"], row["sequences"]))
        row["speedup"] = row["tokens_s"] / same["tokens_s"]
    return Record(
        theme="model_step_compiled",
        question="What does torch.compile make of a training step of LocMoE and OLMoE, OLMoE-1B-7B's size?",
        config={**GEOMETRIES["olmoe"], "num_experts": 64, "sequence": SEQUENCE, "matmul_tflops": steps.rate / 1e12},
        command=f"python -m benchmarks.bench_gpu --parts compiled{' --quick' if quick else ''}",
        rows=steps.rows,
        columns={**COLUMNS, "speedup": "by OLMoE in the same mode", "graphs": "graphs", "kernels_ms": "kernels, ms"},
        notes=[
            "The layers are compiled, not embeddings, head, loss and optimizer, which are the same in both modes. In the compiled "
            "layer the gate, the layout, the gathering, the weighted activation and the sums of the experts are our kernels, "
            "custom operators that the compiler takes as they are; norms, rotary positions and additions it fuses itself, the "
            "products are torch's.",
        ],
    )


__all__ = ["bench_compiled", "bench_mixtral", "bench_model", "plain_parts", "train", "train_in_turn"]
