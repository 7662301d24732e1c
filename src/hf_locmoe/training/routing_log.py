# SPDX-License-Identifier: Apache-2.0
"""
`routing_stats.jsonl`: the routing of a run in full, every layer and every expert, one line per log event.

The Trainer's own log keeps a few numbers per event; this file keeps what figures are drawn from. A line is written with
one append, so that a killed run leaves at most its last line unfinished, which readers skip.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


ROUTING_LOG_NAME = "routing_stats.jsonl"


def append_record(output_dir: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """
    Adds one line to the run's routing log.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder; made if missing.
        record (`dict`): Anything JSON can hold. Readers expect `kind` ("train", "eval", ...) and `step`.

    Raises:
        OSError: The folder or the file cannot be written, or the disk is full.
    """
    path = Path(output_dir, ROUTING_LOG_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record, separators=(",", ":")) + "\n"
    with open(path, "a+b") as file:
        if file.tell():  # the line before may have been cut off by a kill
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def read_records(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    The run's records in order of (step, kind), the last written where an event occurs twice; unfinished lines are skipped.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.

    Returns:
        `list[dict]`: Empty where the run has no routing log.
    """
    path = Path(output_dir, ROUTING_LOG_NAME)
    if not path.is_file():
        return []
    records: dict[tuple[int, str], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            records[int(record["step"]), str(record["kind"])] = record
        except (ValueError, TypeError, KeyError):
            continue
    return [records[key] for key in sorted(records)]


def discard_records_after(output_dir: str | os.PathLike[str], step: int) -> None:
    """
    Drops the records of steps that a resumed run will compute again, and those of an earlier run that began at zero.

    Args:
        output_dir (`str` or `os.PathLike`): The run's folder.
        step (`int`): The last optimizer step to keep.

    Raises:
        OSError: The file cannot be replaced. It is then left as it was.
    """
    path = Path(output_dir, ROUTING_LOG_NAME)
    if not path.is_file():
        return
    kept = [json.dumps(record, separators=(",", ":")) for record in read_records(output_dir) if record["step"] <= step]
    replacement = path.with_suffix(".jsonl.tmp")
    replacement.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(replacement, path)


__all__ = ["ROUTING_LOG_NAME", "append_record", "discard_records_after", "read_records"]
