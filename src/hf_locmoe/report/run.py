# SPDX-License-Identifier: Apache-2.0
"""What a run left behind: the Trainer's log, the routing log and the newest checkpoint, read from its folder."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..training.routing_log import ROUTING_LOG_NAME, read_records


STARVED_SHARE = 0.1
"""An expert is called starved whose share of the assignments is below this part of an equal share."""


class ReportError(ValueError):
    """A report that cannot be made, with the way out."""


@dataclass(frozen=True)
class Run:
    """
    One run.

    Args:
        name (`str`): The folder's name, for legends and file names.
        path (`Path`): The folder.
        log (`list[dict]`): The Trainer's `log_history`.
        records (`list[dict]`): The routing log, by step (see `hf_locmoe.training.routing_log`).
        checkpoint (`Path`, *optional*): A folder with a config and weights.
    """

    name: str
    path: Path
    log: list[dict[str, Any]]
    records: list[dict[str, Any]]
    checkpoint: Path | None

    @property
    def training(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "train"]

    @property
    def latest(self) -> dict[str, Any] | None:
        """The last evaluation's routing, or the last of training where there was no evaluation."""
        evaluations = [record for record in self.records if record["kind"].startswith("eval")]
        return (evaluations or self.records or [None])[-1]

    @property
    def local_shares(self) -> list[tuple[int, float]]:
        """(step, share of the assignments that stayed on their node), the mean over layers; empty on one node."""
        shares = {
            entry["step"]: entry["routing/local_share"] for entry in self.log if "routing/local_share" in entry
        } or {
            record["step"]: record["overall"]["routing/local_share"]
            for record in self.training
            if record.get("overall", {}).get("routing/local_share") is not None
        }
        return sorted(shares.items())

    @property
    def step_parts(self) -> dict[str, float]:
        """
        Seconds of an optimizer step by what a rank did, the mean over ranks and over the log without its first event, which
        has the measurement of the links in it; empty on one process. They add up to the step.
        """
        entries = [entry for entry in self.log if "time/step_s" in entry]
        if not entries:
            return {}
        entries = entries[1:] or entries

        def mean(name: str) -> float:
            return sum(entry[f"time/{name}"] for entry in entries) / len(entries)

        overlap, idle = mean("overlap_s"), mean("idle_s")
        return {
            "computation": mean("computation_s") - overlap,
            "overlap": overlap,
            "communication": mean("exchange_s") - overlap - idle,
            "idle": idle,
        }

    @property
    def perplexities(self) -> list[tuple[int, float]]:
        """(step, exp(validation loss)), from the evaluation named `eval` or, with several data sets, each step's mean loss."""
        curve = {}
        for entry in self.log:
            losses = [value for name, value in entry.items() if name == "eval_loss"] or [
                value for name, value in entry.items() if re.fullmatch(r"eval_.+_loss", name)
            ]
            if losses and "eval_runtime" in entry and all(math.isfinite(loss) for loss in losses):
                curve[entry["step"]] = math.exp(min(sum(losses) / len(losses), 700.0))
        return sorted(curve.items())


def read_run(folder: str | os.PathLike[str]) -> Run:
    """
    Args:
        folder (`str` or `os.PathLike`): The `output_dir` of a Trainer's run.

    Returns:
        [`Run`].

    Raises:
        ReportError: There is no such folder, or nothing in it to report on.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ReportError(f"`RUN_DIR` ({folder}) is not a folder: give the `output_dir` of a training run.")
    states = [path / TRAINER_STATE_NAME, *(checkpoint / TRAINER_STATE_NAME for checkpoint in _checkpoints(path))]
    log = max((_read_log(state) for state in states if state.is_file()), key=len, default=[])
    records = [record for record in read_records(path) if record.get("layers")]
    if not log and not records:
        raise ReportError(
            f"`RUN_DIR` ({folder}) has neither a {TRAINER_STATE_NAME}, in itself or in a checkpoint, nor a"
            f" {ROUTING_LOG_NAME}: give the `output_dir` of a run of transformers' Trainer with hf_locmoe imported and"
            " without LOCMOE_TELEMETRY=0. A run that has only begun writes them at its first log event."
        )
    with_weights = [folder for folder in (path, *reversed(_checkpoints(path))) if _has_model(folder)]
    return Run(path.resolve().name, path, log, records, with_weights[0] if with_weights else None)


def _checkpoints(path: Path) -> list[Path]:
    """The run's checkpoint folders, by step."""
    found = [
        (int(match[1]), entry) for entry in path.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", entry.name))
    ]
    return [entry for _, entry in sorted(found)]


def _has_model(folder: Path) -> bool:
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    return (folder / CONFIG_NAME).is_file() and any((folder / name).is_file() for name in weights)


def _read_log(state: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(state.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f"{state} is not a Trainer's state ({error}): it may be cut off; remove it, and an older checkpoint's is read."
        ) from error


def num_starved(load: list[float]) -> int:
    """Experts of a layer whose share is below [`STARVED_SHARE`] of an equal one."""
    return sum(share < STARVED_SHARE / len(load) for share in load)


__all__ = ["STARVED_SHARE", "ReportError", "Run", "num_starved", "read_run"]
