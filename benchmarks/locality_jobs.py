# SPDX-License-Identifier: Apache-2.0
"""
Runs the trainings of `bench_locality` at the same time, several processes on each device, and packs what comes of them.

A small model is bound by the launches of its kernels, so one process leaves most of a GPU idle. With a budget of seconds
all processes first train for a moment side by side, and the number of steps, the same for all rows, follows from that.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import queue
import statistics
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.locality_data import load
from benchmarks.locality_rows import Job, Setup
from benchmarks.locality_train import VALIDATIONS, Training, rate


PILOT_S = 8.0
PILOT_WAIT_S = 90.0  # for the slowest worker to come that far
FINISH_S = 12.0  # for building models, validating for the last time, packing
SPARE = 0.93  # of what the pilot promises
FILE_BYTES = 15e6  # most that a packed file holds


@dataclass(frozen=True)
class Plan:
    """
    How jobs are run.

    Args:
        data: the token file.
        scratch: folder for what is packed later.
        saved_seed: of the runs whose checkpoints are kept.
        saved_rows: whose checkpoints are kept.
        workers_per_device: processes on each GPU, or on the CPU.
        deadline_s: on `time.monotonic`'s clock, after which no job is waited for; infinite for none.
        finish_s: on the same clock, when all should be done; infinite for no limit to the steps.
    """

    data: Path
    scratch: Path
    saved_seed: int
    saved_rows: tuple[str, ...]
    workers_per_device: int
    deadline_s: float = math.inf
    finish_s: float = math.inf


def devices() -> list[str]:
    """Every visible GPU, or the CPU."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def steps_within(
    rates: list[float], num_jobs: int, num_workers: int, seconds: float, most: int, validation_steps: float = 0.0
) -> int:
    """
    Steps of every job that fit into a time.

    Args:
        rates: steps a second of each worker while all of them train.
        num_jobs, num_workers: jobs are taken one after another by whoever is free.
        seconds: for all of it.
        most: not more than this.
        validation_steps: of training that take as long as all validations of a job.

    Raises:
        ValueError: where not even ten steps fit.
    """
    rounds = math.ceil(num_jobs / num_workers)
    steps = SPARE * seconds * min(statistics.fmean(rates) / rounds, min(rates)) - validation_steps
    if steps < 10:
        raise ValueError(
            f"`budget_s` leaves {seconds:.0f} s for {num_jobs} trainings, which is {steps:.1f} steps for each: give more "
            "time, or fewer rows or seeds."
        )
    return min(most, int(steps) // 10 * 10)


def run_jobs(jobs: list[Job], setup: Setup, plan: Plan) -> tuple[list[dict], list[str], dict[str, Any]]:
    """
    Trains all jobs.

    Returns:
        The rows' results, what failed or was not waited for (one text each), and what was decided: steps, workers, rates.
    """
    plan.scratch.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    places = devices()
    count = min(len(places) * plan.workers_per_device, len(jobs))
    is_piloted = math.isfinite(plan.finish_s)
    num_validated = len(load(plan.data, setup.sequence_length)["validation"].input_ids)
    tasks, answers, barrier = context.Queue(), context.Queue(), context.Barrier(count)
    workers = [
        context.Process(
            target=_work,
            args=(
                places[index % len(places)],
                jobs[index] if is_piloted else None,
                setup,
                plan,
                tasks,
                answers,
                barrier,
            ),
            daemon=True,
        )
        for index in range(count)
    ]
    for worker in workers:
        worker.start()
    decided: dict[str, Any] = {"workers": count, "devices": len(places), "jobs": len(jobs)}
    try:
        if is_piloted:
            rates = []
            for kind, value in _answers(answers, workers, count, plan.deadline_s):
                if kind == "failed":
                    raise RuntimeError(f"a worker failed before the first job:\n{value}")
                rates.append(value)
            seconds = plan.finish_s - FINISH_S - time.monotonic()
            # a forward is a third of a step
            validation_steps = VALIDATIONS * num_validated / (3 * setup.sequences)
            steps = steps_within(rates, len(jobs), count, seconds, setup.steps, validation_steps)
            setup = replace(setup, steps=steps)
            decided["steps a second of a worker"] = [round(value, 1) for value in sorted(rates)]
            print(f"{setup.steps} steps each: {count} workers at {statistics.fmean(rates):.1f} steps/s", flush=True)
        decided["steps"] = setup.steps
        for job in jobs:
            tasks.put((job, setup))
        for _ in workers:
            tasks.put(None)
        results, failed, open_jobs = [], [], {job.name for job in jobs}
        for kind, value in _answers(answers, workers, len(jobs), plan.deadline_s):
            name, *found = value
            open_jobs.discard(name)
            if kind == "failed":
                failed.append(f"{name}: {found[0]}")
            else:
                results += found[0]
            print(f"{'FAILED ' if kind == 'failed' else ''}{name}; {len(open_jobs)} left", flush=True)
        failed += [f"{name}: not finished in time" for name in sorted(open_jobs)]
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.terminate()
    return results, failed, decided


def _answers(answers: Any, workers: list, count: int, deadline_s: float) -> Iterator[tuple[str, Any]]:
    """As many answers, fewer where the deadline passes or no worker is left."""
    while count and time.monotonic() < deadline_s:
        try:
            yield answers.get(timeout=1.0)
            count -= 1
        except queue.Empty:
            if not any(worker.is_alive() for worker in workers) and answers.empty():
                return


def _work(device: str, pilot: Job | None, setup: Setup, plan: Plan, tasks: Any, answers: Any, barrier: Any) -> None:
    """One process: pilots with the others, then trains until no job is left."""
    torch.set_num_threads(1)
    is_cuda = device.startswith("cuda")
    if is_cuda:
        torch.cuda.set_device(device)
    data = load(plan.data, setup.sequence_length)
    if pilot is not None:
        try:
            training = Training(pilot, setup, data, device)
            training.step(1)  # compiles the kernels
            barrier.wait(timeout=PILOT_WAIT_S)
            answers.put(("rate", rate(training, PILOT_S, torch.cuda.synchronize if is_cuda else lambda: None)))
            del training
        except Exception:  # what fails here would fail in every job
            answers.put(("failed", traceback.format_exc(limit=8)))
            return
    while (task := tasks.get()) is not None:
        job, decided = task
        try:
            trained = Training(job, decided, data, device).run()
            if job.seed == plan.saved_seed:
                for result, placement in zip(trained.results, trained.placements, strict=True):
                    if result["routing"] in plan.saved_rows:
                        saved = {
                            "result": result,
                            "setup": vars(decided),
                            "placement": placement,
                            "training": job.name,
                        }
                        path = plan.scratch / f"{result['topology']} {result['routing']}.pt"
                        torch.save({**saved, "state_dict": compressed(trained.state_dict)}, path)
            answers.put(("done", (job.name, trained.results)))
        except Exception:  # the other jobs go on
            answers.put(("failed", (job.name, traceback.format_exc(limit=4))))


# ---- what is kept ---------------------------------------------------------------------------------------------------


def compressed(state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Experts in eight bits with a scale for each row of a matrix, the rest in bfloat16; what is no float as it is."""
    packed: dict[str, Any] = {}
    for name, tensor in state_dict.items():
        if tensor.dim() == 3:
            scale = tensor.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
            packed[name] = ((tensor / scale).round().to(torch.int8), scale)
        elif tensor.dim() == 2 and tensor.is_floating_point():
            packed[name] = tensor.to(torch.bfloat16)
        else:
            packed[name] = tensor
    return packed


def restored(packed: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The float32 tensors of [`compressed`], to its accuracy."""
    found = {}
    for name, value in packed.items():
        if isinstance(value, tuple):
            found[name] = value[0] * value[1]
        else:
            found[name] = value.float() if value.is_floating_point() else value
    return found


def pack(scratch: Path, output: Path) -> list[Path]:
    """The kept runs in few files below the size that travels. Runs that share a training share its checkpoint."""
    parts: list[dict[str, Any]] = [{"runs": {}, "state_dicts": {}}]
    size = 0.0
    by_training: dict[str, list[tuple[str, dict]]] = {}
    for path in sorted(scratch.glob("*.pt")):
        run = torch.load(path)
        by_training.setdefault(run["training"], []).append((path.stem, run))
    for training, runs in by_training.items():
        weights = runs[0][1].pop("state_dict")
        tables = sum(table.numel() for _, run in runs for table in run["placement"]["table"].values())
        bytes_of = sum(t.numel() * t.itemsize for value in weights.values() for t in _tensors(value)) + 4 * tables
        if size and size + bytes_of > FILE_BYTES:
            parts.append({"runs": {}, "state_dicts": {}})
            size = 0.0
        size += bytes_of
        parts[-1]["state_dicts"][training] = weights
        parts[-1]["runs"].update({name: {k: v for k, v in run.items() if k != "state_dict"} for name, run in runs})
    paths = []
    for index, part in enumerate(parts):
        paths.append(output / f"locality_runs_{index}.pt")
        torch.save(part, paths[-1])
    return paths


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return value if isinstance(value, tuple) else (value,)


def unpack(directory: Path) -> dict[str, dict[str, Any]]:
    """Kept runs by `"<topology> <row>"`: `result`, `setup`, `placement`, `state_dict`."""
    runs: dict[str, dict[str, Any]] = {}
    for path in sorted(directory.glob("locality_runs_*.pt")):
        part = torch.load(path)
        for name, run in part["runs"].items():
            runs[name] = {**run, "state_dict": restored(part["state_dicts"][run["training"]])}
    return runs


def write_results(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


__all__ = ["Plan", "compressed", "devices", "pack", "restored", "run_jobs", "steps_within", "unpack", "write_results"]
