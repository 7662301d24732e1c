# SPDX-License-Identifier: Apache-2.0
"""routing_stats.jsonl: lines that survive a kill, a resume and a second run."""

from __future__ import annotations

import json

import pytest

from hf_locmoe.training import routing_log
from hf_locmoe.training.routing_log import ROUTING_LOG_NAME, append_record, discard_records_after, read_records


def _record(step: int, kind: str = "train", value: float = 0.0) -> dict:
    return {"kind": kind, "step": step, "value": value}


def test_round_trip_in_order(tmp_path):
    for step in (10, 20, 5):
        append_record(tmp_path / "new" / "folder", _record(step))
    assert read_records(tmp_path / "new" / "folder") == [_record(5), _record(10), _record(20)]
    assert read_records(tmp_path) == []


def test_training_and_evaluation_of_one_step_are_two_events_and_the_last_of_each_counts(tmp_path):
    for record in (_record(1), _record(1, "eval"), _record(1, value=2.0)):
        append_record(tmp_path, record)
    assert read_records(tmp_path) == [_record(1, "eval"), _record(1, value=2.0)]


@pytest.mark.parametrize("torn", ['{"kind":"tr', "\x00\x00\x00", "[1]", '{"step":3}', "\udcff"])
def test_a_torn_line_costs_itself_only(tmp_path, torn):
    append_record(tmp_path, _record(1))
    path = tmp_path / ROUTING_LOG_NAME
    path.write_bytes(path.read_bytes() + torn.encode("utf-8", "surrogateescape"))
    append_record(tmp_path, _record(2))
    assert read_records(tmp_path) == [_record(1), _record(2)]
    assert json.loads(path.read_text(errors="replace").splitlines()[-1]) == _record(2)


def test_discarding_keeps_what_the_resumed_run_stands_on(tmp_path):
    for step in (1, 2, 3, 4):
        append_record(tmp_path, _record(step))
    discard_records_after(tmp_path, 2)
    assert read_records(tmp_path) == [_record(1), _record(2)]
    assert [path.name for path in tmp_path.iterdir()] == [ROUTING_LOG_NAME]
    discard_records_after(tmp_path / "absent", 2)


def test_a_failing_replacement_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    append_record(tmp_path, _record(1))

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(routing_log.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        discard_records_after(tmp_path, 0)
    assert read_records(tmp_path) == [_record(1)]
