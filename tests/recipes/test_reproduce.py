# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import reproduce
from benchmarks import bench_reproduce
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from tests.unit.report.run_folder import TIMES, make_run


FIGURES = {
    *(f"fig{number:02}_{name}_{run}.png" for number, name in ((6, "capacity_against_angle"), (8, "token_similarity"),
      (12, "tokens_per_expert")) for run in reproduce.RUNS),
    *(f"fig09_gate_similarity_{run}.png" for run in reproduce.RUNS if run != "hash"),
    "fig10_step_time.png",
    "fig11_step_time_shares.png",
    "fig13_validation_perplexity.png",
    "local_share.png",
    "routing.html",
}  # fmt: skip
# A small step with everything in it.
SMALL = "--block_size 16 --logging_steps 1 --max_eval_samples 8 --max_train_samples 64 --disable_tqdm true"
SMALL += " --model.hidden_size 64 --model.num_hidden_layers 3 --model.intermediate_size 64"


def test_every_run_gets_its_gate_and_its_plugin_and_the_same_else(tmp_path, monkeypatch):
    """What would be trained and drawn, without doing it."""
    trained, drawn = [], []
    monkeypatch.setattr(reproduce, "train", lambda *given: trained.append(given))
    monkeypatch.setattr(reproduce.cli, "main", lambda argv: drawn.extend(argv))
    out = tmp_path / "out"
    page = reproduce.main(["--output_dir", str(out), "--max_steps", "80", "--max_chars_per_domain", "20000"])
    assert page == out / "report" / "routing.html"
    assert drawn[:5] == ["report", *(str(out / name) for name in ("locmoe", "hash", "switch", "placed"))]
    assert len(Path(drawn[-1]).read_text(encoding="utf-8")) > 1000
    gates = []
    for config, environment, ranks, options in trained:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        gates.append(settings["model"].get("gate_type", "locmoe"))
        assert ranks == 2
        assert options[options.index("--eval_steps") + 1] == "10"
        assert set(environment) <= {f"LOCMOE_{field.name.upper()}" for field in fields(LocMoePlugin)}
    assert gates == ["hash", "switch", "locmoe", "locmoe"]
    only = [[option for option in options if str(out) not in option] for *_, options in trained]
    assert all(options == only[0] for options in only)
    placements = [LocMoePlugin.from_environment(environment).batch_placement for _, environment, *_ in trained]
    assert placements == ["off", "off", "off", "micro_batch"]


def test_a_run_that_fails_ends_it(monkeypatch):
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *args, **kwargs: type("Done", (), {"returncode": 3}))
    with pytest.raises(ValueError, match="paper.yaml failed"):
        reproduce.train(Path("paper.yaml"), {}, 2, [])


def test_the_numbers_of_a_run(tmp_path):
    folder = make_run(tmp_path / "run", times=TIMES)
    state = json.loads((folder / "trainer_state.json").read_text())
    for index, entry in enumerate(entry for entry in state["log_history"] if "loss" in entry):
        entry |= {"routing/local_share": 0.5 + 0.1 * index, "comm/bytes_inter_node": 1e6 * index}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    run = bench_reproduce.read_run(folder)
    row = bench_reproduce.row_of(run, None)
    assert row["perplexities"] == pytest.approx([20.0855, 12.1825, 7.38906], rel=1e-4)
    assert row["starved"] == [2, 0, 8]  # one expert without a token in each of two layers, in the first event
    assert row["local_share"] == pytest.approx(0.7)
    assert row["megabytes"] == pytest.approx(2.0)
    assert row["step_s"] == pytest.approx(8.0)
    assert sum(row["shares"]) == pytest.approx(100)
    assert set(row) <= set(bench_reproduce.COLUMNS)


@pytest.mark.slow
def test_the_whole_of_it(tmp_path):
    page = reproduce.main(
        [
            "--output_dir",
            str(tmp_path / "out"),
            "--max_steps",
            "8",
            "--max_chars_per_domain",
            "20000",
            "--options",
            SMALL,
        ]
    )
    assert {path.name for path in page.parent.iterdir()} == FIGURES
    bench_reproduce.main(["--output_dir", str(tmp_path / "out"), "--reuse"])
