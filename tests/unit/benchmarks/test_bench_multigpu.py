# SPDX-License-Identifier: Apache-2.0
"""The benchmark for several GPUs, on the CPU: its parts run, agree, and one that fails costs only itself."""

import json

import pytest

from benchmarks import bench_multigpu
from benchmarks.bench_multigpu import PARTS, Part


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("part", ["step", "step-quick", "step-2", "overlap", "nodes"])
def test_a_part_runs_and_all_ways_agree(part, tmp_path):
    bench_multigpu.main(["--parts", part, "--device", "cpu", "--hardware", "cpu", "--output", str(tmp_path)])
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert records and all(record["rows"] for record in records)
    for row in (row for record in records for row in record["rows"]):
        assert row.get("equal", "yes") == "yes", row
        assert row.get("loss_difference", 0.0) < 0.03 and row.get("difference", 0.0) < 0.03, row
        assert "WRONG" not in str(row.get("tokens_s")), row


def test_a_part_that_fails_costs_only_itself(monkeypatch, tmp_path, capsys):
    class Written:
        question, notes, rows = "", [], []

        def table(self):
            return "a table"

        def write(self, hardware, output):
            (output / f"{hardware}.md").write_text("kept")

    def fails(device, world_size, timeout_s):
        raise RuntimeError("no peer")

    monkeypatch.setitem(PARTS, "step", Part(fails, 4, 1.0))
    monkeypatch.setitem(PARTS, "nodes", Part(lambda *_: [Written()], 4, 1.0))
    with pytest.raises(SystemExit, match="failed: step"):
        bench_multigpu.main(["--parts", "step", "nodes", "--device", "cpu", "--output", str(tmp_path)])
    assert (tmp_path / "4xh100.md").read_text() == "kept"
    assert "no peer" in capsys.readouterr().err


def test_gpus_that_are_missing_are_counted(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit):
        bench_multigpu.main(["--parts", "nodes"])
    assert "need 4 CUDA devices, and torch finds 1" in capsys.readouterr().err
