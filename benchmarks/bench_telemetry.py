# SPDX-License-Identifier: Apache-2.0
"""What router telemetry costs: the same training step with and without it, taking turns in one process.

Three models of the same weights train on the same batches, one step each in turn; who goes first rotates. `bare` computes
no router statistics, and so has no router losses and no balance bias; `training` has both, and nobody looks; `telemetry`
has `RoutingStatsCallback` besides, with a log event every few steps. Before a time is printed, the losses of the last two
must be equal bit for bit (on CUDA, whose sums of gradients have no fixed order, in the first step), and the logged load must be what the outputs add up to.

Shapes: T = tokens in a sequence, B = sequences in a batch.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.record import Load, Record, Spread
from benchmarks.workload import batches, build, optimizer_for, standard_library_text, token_stream
from hf_locmoe import LocMoeConfig
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.routing_log import read_records
from hf_locmoe.training.telemetry import RouterStateCallback, RoutingStatsCallback


VARIANTS = ("bare", "training", "telemetry")


class Watched:
    """A model and the callbacks' events around its steps, as Trainer raises them."""

    def __init__(self, model, callbacks: list[TrainerCallback], output_dir: Path, logging_steps: int):
        self.model = model
        self.args = TrainingArguments(str(output_dir), report_to="none", use_cpu=model.device.type == "cpu")
        self.state, self.control = TrainerState(), TrainerControl()
        self.logging_steps = logging_steps
        self.callbacks = callbacks
        self._raise("on_train_begin", model=model)

    def _raise(self, event: str, **kwargs) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self.args, self.state, self.control, **kwargs)

    def before_optimizer_step(self) -> None:
        self._raise("on_pre_optimizer_step")

    def after_optimizer_step(self) -> None:
        self.state.global_step += 1
        if self.state.global_step % self.logging_steps == 0:
            self.state.log_history.append({})
            self._raise("on_log", logs={"loss": 0.0})


def step(model, optimizer, batch: torch.Tensor, watched: Watched | None, output_router_stats: bool | None):
    """One optimizer step; returns the loss, the router statistics and the seconds it took."""
    synchronize = torch.cuda.synchronize if batch.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    output = model(batch, labels=batch, output_router_stats=output_router_stats)
    output.loss.backward()
    if watched is not None:
        watched.before_optimizer_step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if watched is not None:
        watched.after_optimizer_step()
    synchronize()
    return output.loss.detach(), output.router_stats, time.perf_counter() - start


def measure(config: LocMoeConfig, data: torch.Tensor, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step by variant, warm-up left out."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    first = build(config, args.seed).to(device, dtype)
    models = {name: copy.deepcopy(first) for name in VARIANTS}
    optimizers = {name: optimizer_for(model, 1e-4) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as output_dir:
        callbacks = {"training": [RouterStateCallback()], "telemetry": [RouterStateCallback(), RoutingStatsCallback()]}
        watched = {
            name: Watched(models[name], some, Path(output_dir), args.logging_steps) for name, some in callbacks.items()
        }
        tokens, num_counted = 0, 0
        for index, batch in enumerate(data):
            batch = batch.to(device)
            losses = {}
            turn = index % len(VARIANTS)
            for name in VARIANTS[turn:] + VARIANTS[:turn]:
                losses[name], stats, taken = step(
                    models[name],
                    optimizers[name],
                    batch,
                    watched.get(name),
                    False if name == "bare" else None,
                )
                if index >= args.warmup:
                    seconds[name].append(taken)
                if name == "telemetry":
                    tokens = tokens + stats[:, RouterStat.TOKENS].double().cpu()
            comparable = device.type == "cpu" or index == 0  # CUDA adds gradients up in no fixed order
            if comparable and not torch.equal(losses["training"], losses["telemetry"]):
                raise RuntimeError(f"step {index}: telemetry changed the loss, {losses}")
            num_counted += 1
            if num_counted == args.logging_steps:
                _check_load(tokens, read_records(output_dir)[-1])
                tokens, num_counted = 0, 0
    return seconds


def _check_load(tokens: torch.Tensor, record: dict) -> None:
    logged = torch.tensor([layer["load"] for layer in record["layers"]], dtype=torch.float64)
    torch.testing.assert_close(logged, tokens / tokens.sum(dim=-1, keepdim=True), rtol=1e-5, atol=1e-5)


def rows(seconds: dict[str, list[float]]) -> list[dict]:
    """Medians, and ratios of steps on the same batch, which the machine's drift touches alike."""
    table = []
    for name, against in (("bare", None), ("training", "bare"), ("telemetry", "training")):
        row = {"variant": name, "seconds": Spread.of(seconds[name])}
        if against is not None:
            pairs = zip(seconds[name], seconds[against], strict=True)
            row |= {"against": against, "ratio": Spread.of([ours / theirs for ours, theirs in pairs])}
            row["added_ms"] = 1e3 * (row["seconds"].median - Spread.of(seconds[against]).median)
        table.append(row)
    return table


def notes(table: list[dict], device: str, logging_steps: int) -> list[str]:
    compared = "at every step" if device == "cpu" else "in the first step"
    ratio = table[-1]["ratio"]
    return [
        "`bare` computes no router statistics and so has no router losses and no balance bias; `training` has both; "
        f"`telemetry` adds `RoutingStatsCallback` with a log event every {logging_steps} steps: some ten small operations "
        "a micro-batch, and one transfer to the host and one line in a file an event.",
        f"The losses of `training` and `telemetry` were equal bit for bit {compared}, and the logged loads were those of "
        "the outputs.",
        *["The cost of telemetry is below what this run can tell: the quartiles of its ratio enclose 1."]
        * (ratio.q1 <= 1 <= ratio.q3),
    ]


def _command(argv: list[str]) -> str:
    """How to repeat it, wherever the results go."""
    kept = [word for index, word in enumerate(argv) if "--output" not in argv[max(0, index - 1) : index + 1]]
    return " ".join(["python -m benchmarks.bench_telemetry", *kept])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_telemetry", description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = device == "cuda"
    for name, value in {
        "hidden_size": 2048 if large else 256,
        "intermediate_size": 2048 if large else 1024,
        "num_layers": 6 if large else 4,
        "num_experts": 16 if large else 8,
        "vocab_size": 2048,
        "sequence_length": 1024 if large else 256,
        "batch_size": 8,
        "steps": 200 if large else 90,
        "warmup": 20 if large else 9,
        "logging_steps": 10,
        "seed": 0,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default=device)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}core", help="part of the results' file name")
    parser.add_argument("--output", type=Path, help="directory of the results (default: benchmarks/results)")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = LocMoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_experts=args.num_experts,
        max_position_embeddings=args.sequence_length,
        balance_bias_update_rate=0.01,
    )
    stream = token_stream(standard_library_text(), args.vocab_size)
    needed = args.steps * args.batch_size * args.sequence_length
    stream = stream.repeat(-(-needed // stream.numel()))
    data = batches(stream, args.batch_size, args.sequence_length, args.steps, args.seed)
    with Load() as load:
        seconds = measure(config, data, args)
    table = rows(seconds)
    chosen = {name: value for name, value in vars(args).items() if name not in ("hardware", "output", "dry")}
    record = Record(
        theme="telemetry",
        question="What does router telemetry add to a training step?",
        config={
            **chosen,
            "dtype": "bfloat16" if args.device == "cuda" else "float32",
            "threads": torch.get_num_threads(),
        },
        command=_command(sys.argv[1:] if argv is None else argv),
        rows=table,
        columns={
            "variant": "variant",
            "seconds": "seconds a step, median (quartiles)",
            "against": "against",
            "ratio": "ratio on the same batch, median (quartiles)",
            "added_ms": "difference of the medians, ms",
        },
        notes=notes(table, args.device, args.logging_steps),
        load=load.result(),
        extra={"seconds": seconds},
    )
    print(record.table())
    if not args.dry:
        print(record.write(args.hardware, **({"directory": args.output} if args.output else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
