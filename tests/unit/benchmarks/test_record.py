# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.record import Load, Record, Spread, hardware, versions


def record(**changes) -> Record:
    rows = [
        {"name": "a", "seconds": Spread.of([1.0, 2.0, 4.0]), "hidden": 1},
        {"name": "b", "seconds": 12345.678},
    ]
    columns = {"name": "layout", "seconds": "s/step", "absent": "never set"}
    return Record("step", "How long?", {"seed": 0, "links": ["x", "y"]}, "make it", rows, columns, **changes)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_spread_is_numpys(count):
    values = np.random.default_rng(count).normal(size=count).tolist()
    spread = Spread.of(values)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose([spread.q1, spread.median, spread.q3], quartiles, rtol=1e-12)
    assert (spread.count, spread.lowest, spread.highest) == (count, min(values), max(values))


def test_spread_of_nothing():
    with pytest.raises(ValueError, match="at least one measurement"):
        Spread.of([])


def test_the_table_shows_the_columns_and_leaves_the_rest_to_the_json():
    assert record().table().splitlines() == [
        "| layout | s/step | never set |",
        "| --- | --- | --- |",
        "| a | 2 (1.5-3) |  |",
        "| b | 12346 |  |",
    ]


def test_both_files_are_written_and_say_where_the_figures_come_from(tmp_path):
    page = record(notes=["it rained"], load={"load_average_before": 0.5}, extra={"raw": [1, 2]}).write("box", tmp_path)
    text, data = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert page.name.startswith("step_box_2")
    for part in ("How long?", "* it rained", "`make it`", "seed 0, links x / y", "load average before 0.5", "torch "):
        assert part in text
    assert data["extra"] == {"raw": [1, 2]}
    assert data["rows"][0]["seconds"]["median"] == 2.0
    assert data["hardware"] == hardware()
    assert data["versions"] == versions()
    assert data["commit"]


def test_load_counts_what_others_do(monkeypatch):
    busy, own = iter([100.0, 130.0]), iter([10.0, 20.0])
    monkeypatch.setattr(Load, "_busy_s", staticmethod(lambda: next(busy)))
    monkeypatch.setattr(Load, "_own_s", staticmethod(lambda: next(own)))
    monkeypatch.setattr("benchmarks.record.time.monotonic", iter([0.0, 10.0]).__next__)
    monkeypatch.setattr("benchmarks.record.os.cpu_count", lambda: 4)
    with Load() as load:
        pass
    assert load.result()["cpu_share_of_others"] == 0.5
