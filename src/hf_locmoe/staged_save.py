# SPDX-License-Identifier: Apache-2.0
"""
Saving that never damages an earlier checkpoint: everything is written aside first, then moved in.

The order of the moves makes one rename the moment at which the folder turns from the earlier checkpoint to the new one:

  1. the new files are written to `_saving-HOST-PID-*` inside the target folder and flushed to the disk;
  2. `config.json` is replaced by the new one, whose `transformers_weights` leads to the weights of step 1: the moment;
  3. the weights appear under their usual names as hard links, weights of another layout are removed;
  4. `config.json` is replaced by the new one as it stays, and the folder of step 1 is removed.

A process killed at any point leaves a folder that loads as the earlier checkpoint or as the new one, never as a mixture;
the next save finishes what it left. Where there is no earlier checkpoint the files are moved in one by one,
`config.json` last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


_STAGING_PREFIX = "_saving-"  # the underscore keeps Trainer from pushing the folder to the Hub
_POINTER_PREFIX, _LINK_PREFIX = "pointer.", "link."
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@contextmanager
def staged_save(save_directory: str | os.PathLike, needed_bytes: int = 0) -> Iterator[str]:
    """
    Context whose value is an empty folder to save into; what is in it at the end is moved into `save_directory`.

    Args:
        save_directory (`str` or `os.PathLike`): The target, made if it is not there.
        needed_bytes (`int`, *optional*, defaults to 0): About how much will be written, for the check beforehand and
            for the message of an error.

    Raises:
        OSError: The target cannot be written to or has no room. What was there before is as it was, and the temporary
            folder is gone.
    """
    target = Path(save_directory)
    if target.name.startswith(_STAGING_PREFIX):  # a model saves its configuration: one folder aside is enough
        yield str(target)
        return
    was_there, staging = target.exists(), None
    try:
        target.mkdir(parents=True, exist_ok=True)
        _reclaim_abandoned(target)
        staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING_PREFIX}{socket.gethostname()}-{os.getpid()}-", dir=target))
        if shutil.disk_usage(target).free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield str(staging)
        _flush_to_disk(staging)
        names = os.listdir(staging)
        replaces = CONFIG_NAME in names and (target / CONFIG_NAME).is_file() and _point_to(staging, target, names)
        _settle(staging, target, place=_link_over if replaces else os.replace)
    except (OSError, SafetensorError) as error:
        raise _with_path(error, target, staging, needed_bytes) from error
    finally:
        if staging is not None and not _is_in_use(staging):
            shutil.rmtree(staging, ignore_errors=True)
        if not was_there and target.is_dir() and not any(target.iterdir()):
            target.rmdir()


def _settle(staging: Path, target: Path, place: Callable[[Path, Path], None]) -> None:
    """Brings the staged files under their usual names. May be repeated after it was cut off."""
    names = sorted(name for name in os.listdir(staging) if not name.startswith((_POINTER_PREFIX, _LINK_PREFIX)))
    weights = sorted((name for name in names if _weights_stem(name)), key=lambda name: name.endswith(".json"))
    for name in weights:  # an index after its shards
        place(staging / name, target / name)
    stems = {_weights_stem(name) for name in weights}
    for name in sorted(os.listdir(target)):
        if _weights_stem(name) in stems and name not in weights:  # the same model in another number of files
            os.unlink(target / name)
    for name in [name for name in names if name not in weights and name != CONFIG_NAME] + [CONFIG_NAME]:
        if name in names:
            os.replace(staging / name, target / name)


def _reclaim_abandoned(target: Path) -> None:
    """Finishes or removes what killed processes left."""
    for folder in target.glob(f"{_STAGING_PREFIX}*-*-*"):
        host, pid, _ = folder.name.removeprefix(_STAGING_PREFIX).rsplit("-", 2)
        on_this_host = host == socket.gethostname()
        if on_this_host and _is_running(int(pid)):
            continue
        if _is_in_use(folder):
            _settle(folder, target, place=_link_over)
            shutil.rmtree(folder)
        elif on_this_host:
            shutil.rmtree(folder)


def _point_to(staging: Path, target: Path, names: list[str]) -> bool:
    """Makes the target's `config.json` the staged one, leading to the staged weights; False where there are none."""
    entry = next((name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME) if name in names), None)
    if entry is None:  # an adapter, a variant or a configuration alone
        return False
    if entry == SAFE_WEIGHTS_INDEX_NAME:  # the shards of an index are looked up from the target
        index = json.loads((staging / entry).read_text(encoding="utf-8"))
        index["weight_map"] = {name: f"{staging.name}/{file}" for name, file in index["weight_map"].items()}
        entry = _POINTER_PREFIX + entry
        (staging / entry).write_text(json.dumps(index), encoding="utf-8")
    config = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
    config["transformers_weights"] = f"{staging.name}/{entry}"
    pointer = staging / (_POINTER_PREFIX + CONFIG_NAME)
    pointer.write_text(json.dumps(config), encoding="utf-8")
    os.replace(pointer, target / CONFIG_NAME)
    return True


def _link_over(source: Path, destination: Path) -> None:
    """`destination` becomes `source`, which stays: a hard link, a copy where the file system has none."""
    beside = source.with_name(_LINK_PREFIX + source.name)
    beside.unlink(missing_ok=True)  # of a process that was killed here
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    os.replace(beside, destination)


def _weights_stem(name: str) -> str | None:
    """`model` for the single file, every shard and the index of `model`; `model.fp16` for those of its variant."""
    stem, extension, rest = name.partition(".safetensors")
    if rest.startswith(".index"):  # the variant of an index comes last: model.safetensors.index.fp16.json
        stem += rest.removeprefix(".index").removesuffix(".json")
    return _SHARD.sub("", stem) if extension else None


def _flush_to_disk(staging: Path) -> None:
    """Some file systems report that they are full only here."""
    for file in staging.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_in_use(staging: Path) -> bool:
    config = staging.parent / CONFIG_NAME
    return config.is_file() and staging.name in config.read_text(encoding="utf-8", errors="replace")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _with_path(error: Exception, target: Path, staging: Path | None, needed_bytes: int) -> OSError:
    """The error with the folder, the needed bytes and the state it leaves, as an `OSError` of the same number."""
    number = getattr(error, "errno", None)
    if number is None:  # safetensors: "... IoError(Os { code: 28, kind: StorageFull, ..."
        code = re.search(r"code: (\d+)", str(error))
        number = int(code.group(1)) if code else errno.EIO
    if staging is not None and _is_in_use(staging):
        state = (
            f"The new checkpoint is whole and loads from there, with its weights in {staging}: save again to tidy up."
        )
    else:
        free = ""
        existing = next(folder for folder in (target, *target.absolute().parents) if folder.exists())
        if needed_bytes:
            free = f" About {needed_bytes:,} bytes are needed, {shutil.disk_usage(existing).free:,} are free."
        state = f"{free} What was there before is as it was. Make room or choose another folder, and save again."
    return OSError(number, f"Saving to `save_directory` ({target}) failed: {os.strerror(number)} ({error}).{state}")
