# SPDX-License-Identifier: Apache-2.0
"""
Folders of checkpoints that are whole or not there.

A checkpoint is written into `_saving-checkpoint-N` beside the others, sealed with a list of its files, and renamed to
`checkpoint-N`: the one moment at which it comes to be. One that goes is renamed to `_deleting-checkpoint-N` before its
files are removed. A process that is killed leaves whole checkpoints and folders with a leading underscore, which no
`get_last_checkpoint` looks at, the Hub is not sent, and the next training run in the folder removes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ..pretrained_io import CheckpointError


logger = logging.get_logger(__name__)

SEAL = "locmoe_checkpoint.json"
# transformers' Trainer looks for folders named after the optimizer: it fails at this one instead of passing over it
STATE_FOLDER = "distributed_optimizer"
GUARD_OFF = (
    "_state_is_resumed"  # an attribute of the training arguments while a Trainer is made that resumes the state
)
_SAVING, _DELETING, _REPLACED = "_saving-", "_deleting-", "_replaced-"
_SEALED_SUFFIXES = (".safetensors", ".distcp", ".metadata")  # what nobody edits by hand


def is_first_rank() -> bool:
    """Whether this is the process that writes: the first one, or the only one."""
    return not _is_distributed() or dist.get_rank() == 0


def raise_together(error: Exception | None) -> None:
    """
    Raises on every rank if any rank has an error: its own, or the one of the first rank that has one. All ranks call it.

    Raises:
        CheckpointError: Another rank failed; the message is that rank's.
    """
    if _is_distributed():
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        if error is None:
            for rank, message in enumerate(messages):
                if message is not None:
                    raise CheckpointError(f"rank {rank} failed with {message}")
    if error is not None:
        raise error


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


# ---- one checkpoint -------------------------------------------------------------------------------------------------


def open_staging(run_dir: str | os.PathLike, name: str) -> Path:
    """
    The empty folder in which the checkpoint `name` is written. All ranks call it.

    Raises:
        CheckpointError, OSError: On every rank, where a rank cannot write to `run_dir` or does not see what rank 0 does.
    """
    staging = Path(run_dir, _SAVING + name)
    error: Exception | None = None
    if is_first_rank():
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as os_error:
            error = os_error
    raise_together(error)
    if not staging.is_dir():
        error = CheckpointError(
            f"`output_dir` ({run_dir}) is not the folder that rank 0 sees: checkpoints of a model that is spread over "
            "ranks need one folder on a file system that all nodes share. Set `output_dir` to such a folder."
        )
    raise_together(error)
    return staging


def publish(staging: Path, facts: dict[str, Any]) -> Path:
    """Seals what was written in `staging` and gives it its name, in the place of an earlier checkpoint of that name."""
    files = sorted(file for file in staging.rglob("*") if file.is_file())
    sizes = {str(file.relative_to(staging)): file.stat().st_size for file in files if _is_sealed(file)}
    seal = staging / SEAL
    seal.write_text(json.dumps({**facts, "files": sizes}, indent=2) + "\n", encoding="utf-8")
    for path in (*files, seal, staging):
        _flush(path)
    final = staging.with_name(staging.name.removeprefix(_SAVING))
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    staging.rename(final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _is_sealed(file: Path) -> bool:
    return file.name.endswith(_SEALED_SUFFIXES)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(checkpoint: str | os.PathLike) -> None:
    """Removes a checkpoint; one that is half removed bears another name."""
    folder = Path(checkpoint)
    doomed = folder.with_name(_DELETING + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def read_seal(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    """What [`publish`] wrote: the facts and the `files`; None for a checkpoint of another Trainer."""
    seal = Path(checkpoint, SEAL)
    if not seal.is_file():
        return None
    return json.loads(seal.read_text(encoding="utf-8"))


def damage_of(checkpoint: str | os.PathLike) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where nothing is."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "it is no folder"
    try:
        files = (read_seal(folder) or {"files": {}})["files"]
    except ValueError as error:
        return f"{SEAL} cannot be read ({error})"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes where {size} were written"
    return None


# ---- all checkpoints of a run ---------------------------------------------------------------------------------------


def tidy(run_dir: str | os.PathLike) -> None:
    """Removes what killed processes left, and puts back what they were about to replace. Called by one process."""
    folder = Path(run_dir)
    if not folder.is_dir():
        return
    for leftover in folder.glob(f"{_REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        final = leftover.with_name(leftover.name.removeprefix(_REPLACED))
        if final.exists():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.rename(final)
    for prefix in (_SAVING, _DELETING):
        for leftover in folder.glob(f"{prefix}{PREFIX_CHECKPOINT_DIR}-*"):
            logger.warning(f"Removing {leftover}, which a killed run left.")
            shutil.rmtree(leftover, ignore_errors=True)


def last_checkpoint(run_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint with the highest step; names the ones that are damaged."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    folder = Path(run_dir)
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        damage = damage_of(path)
        if damage is None:
            return str(path)
        logger.warning(f"{path} is passed over: {damage}.")
    return None


def prune(run_dir: str | os.PathLike, limit: int | None, best: str | None) -> None:
    """Keeps `limit` checkpoints: the best one, and the most recent ones. At least the most recent is kept."""
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(str(run_dir), use_mtime=True, best_model_checkpoint=best)
    for checkpoint in checkpoints[:-limit]:
        if best is None or Path(checkpoint) != Path(best):
            discard(checkpoint)


def keep_only(run_dir: str | os.PathLike, best: str) -> None:
    """Removes every checkpoint but the best."""
    for checkpoint in sort_checkpoints(str(run_dir)):
        if Path(checkpoint) != Path(best):
            discard(checkpoint)


# ---- transformers' own Trainer --------------------------------------------------------------------------------------


class ResumeGuardCallback(TrainerCallback):
    """
    Refuses `resume_from_checkpoint` in transformers' own Trainer where it would go on without the optimizer's state.

    On by itself in every [`~transformers.Trainer`]; it reads the argument of `TrainingArguments`, which is what a command
    line sets.
    """

    def on_init_end(self, args, state, control, **kwargs):
        checkpoint = args.resume_from_checkpoint
        if checkpoint is None or hasattr(args, GUARD_OFF) or args.save_only_model:
            return
        if str(checkpoint).lower() == "true":
            checkpoint = last_checkpoint(args.output_dir)
        if checkpoint is not None and Path(checkpoint, STATE_FOLDER).is_dir():
            raise CheckpointError(
                f"`resume_from_checkpoint` ({checkpoint}) holds optimizer state that transformers' Trainer does not read: "
                "run the script with `python -m hf_locmoe.launch`, also on one process, or use "
                "`hf_locmoe.training.checkpoint.LocMoeTrainer`."
            )


@contextmanager
def without_upstream_refusal(args: Any) -> Iterator[None]:
    """
    Works around the end of `Trainer.__init__` (transformers/trainer.py), which refuses to save the optimizer of a model
    that was sharded at load time unless `save_only_model` is set: "Resuming is not supported for models sharded ...".
    """
    if args is None:
        yield
        return
    given = args.save_only_model
    args.save_only_model = given or not (args.deepspeed or args.fsdp)
    setattr(args, GUARD_OFF, True)
    try:
        yield
    finally:
        args.save_only_model = given
        delattr(args, GUARD_OFF)


__all__ = [
    "STATE_FOLDER",
    "ResumeGuardCallback",
    "damage_of",
    "discard",
    "is_first_rank",
    "keep_only",
    "last_checkpoint",
    "open_staging",
    "prune",
    "publish",
    "raise_together",
    "read_seal",
    "tidy",
    "without_upstream_refusal",
]
