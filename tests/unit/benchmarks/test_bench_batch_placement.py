# SPDX-License-Identifier: Apache-2.0
"""The cost of batch placement: the record is written, and a wrong assignment is refused before a time is printed."""

import json

import pytest

from benchmarks import bench_batch_placement


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench_batch_placement, "SIZES", {"small": (2, 4, 2, 64, 2, 2, 8, 16)})
    monkeypatch.setattr(bench_batch_placement.torch, "set_num_threads", lambda count: None)


def test_the_record_has_every_part(tmp_path, capsys):
    bench_batch_placement.main(["--hardware", "here", "--repeats", "2", "--output", str(tmp_path)])
    (path,) = tmp_path.glob("batch_placement_here_*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["counted"] == 8 * 16 * 2 * 2
    assert all(row[part]["count"] == 2 and row[part]["median"] > 0 for part in ("count_ms", "score_ms", "deal_ms"))
    assert "small" in capsys.readouterr().out


def test_an_assignment_that_is_not_the_best_is_refused(monkeypatch):
    monkeypatch.setattr(bench_batch_placement, "balanced_assignment", lambda scores, counts: scores.argmin(axis=1))
    with pytest.raises(AssertionError, match="not the best"):
        bench_batch_placement.measure("small", 1)
