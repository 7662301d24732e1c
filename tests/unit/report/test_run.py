# SPDX-License-Identifier: Apache-2.0
"""Reading a run's folder: what is found, and what is said when it is not."""

from __future__ import annotations

import json
import math

import pytest

from hf_locmoe.report.run import ReportError, num_starved, read_run
from hf_locmoe.training.routing_log import ROUTING_LOG_NAME
from tests.unit.report.run_folder import make_run, tiny_model


def test_log_routing_and_perplexity(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.name == "run"
    assert [record["step"] for record in run.training] == [10, 20, 30]
    assert run.latest["kind"] == "eval"
    assert run.latest["step"] == 30
    assert run.perplexities == [(10, math.exp(3.0)), (20, math.exp(2.5)), (30, math.exp(2.0))]
    assert run.checkpoint is None


def test_several_evaluation_sets_make_one_curve_of_their_mean_loss(tmp_path):
    folder = make_run(tmp_path / "run")
    entries = [
        {"step": 5, "eval_a_loss": 1.0, "eval_a_runtime": 1.0, "eval_runtime": 1.0, "eval_b_loss": 2.0},
        {"step": 6, "eval_loss": math.nan, "eval_runtime": 1.0},
    ]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    assert read_run(folder).perplexities == [(5, math.exp(1.5))]


def test_the_longest_log_and_the_newest_checkpoint_are_taken(tmp_path):
    folder = make_run(tmp_path / "run", state=False)
    for step in (9, 10, 100):
        tiny_model().save_pretrained(folder / f"checkpoint-{step}")
        log = [{"loss": 1.0, "step": index} for index in range(step)]
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    run = read_run(folder)
    assert len(run.log) == 100
    assert run.checkpoint == folder / "checkpoint-100"
    tiny_model().save_pretrained(folder)
    assert read_run(folder).checkpoint == folder


def test_unfinished_lines_and_events_written_twice(tmp_path):
    folder = make_run(tmp_path / "run")
    log = folder / ROUTING_LOG_NAME
    log.write_text(log.read_text() + log.read_text().splitlines()[0] + '\n{"kind":"train","step":40,"lay')
    assert [record["step"] for record in read_run(folder).training] == [10, 20, 30]


@pytest.mark.parametrize("content", ["", "{", '{"log": []}', "[]"])
def test_a_broken_state_is_named(tmp_path, content):
    folder = make_run(tmp_path / "run")
    (folder / "trainer_state.json").write_text(content)
    with pytest.raises(ReportError, match=r"trainer_state\.json is not a Trainer's state"):
        read_run(folder)


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(ReportError, match="is not a folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(ReportError, match=r"neither a trainer_state\.json.*nor a routing_stats\.jsonl"):
        read_run(tmp_path)


def test_starved_experts():
    assert num_starved([0.5, 0.476, 0.024, 0.0]) == 2
    assert num_starved([0.25] * 4) == 0
