# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from benchmarks import bench_telemetry
from benchmarks.bench_telemetry import VARIANTS, measure, notes, parse, rows
from hf_locmoe import LocMoeConfig
from hf_locmoe.training.telemetry import RoutingStats


ARGS = parse(["--device", "cpu", "--warmup", "2", "--logging_steps", "3"])


def _config() -> LocMoeConfig:
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    return LocMoeConfig(**shape, num_experts=4, balance_bias_update_rate=0.01)


def _data() -> torch.Tensor:
    return torch.randint(0, 32, (7, 2, 8))


def test_every_variant_takes_every_step_after_the_warm_up():
    seconds = measure(_config(), _data(), ARGS)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(VARIANTS, 5)


def test_a_wrong_log_stops_the_benchmark(monkeypatch):
    summary = RoutingStats.summary

    def wrong(self):
        result = summary(self)
        for layer in result["layers"]:
            layer["load"] = layer["load"][::-1]
        return result

    monkeypatch.setattr(RoutingStats, "summary", wrong)
    with pytest.raises(AssertionError):
        measure(_config(), _data(), ARGS)


def test_ratios_are_of_steps_on_the_same_batch():
    seconds = {"bare": [1.0, 2.0, 4.0], "training": [2.0, 4.0, 8.0], "telemetry": [3.0, 6.0, 12.0]}
    by_variant = {row["variant"]: row for row in rows(seconds)}
    assert by_variant["telemetry"]["ratio"].median == by_variant["telemetry"]["ratio"].lowest == 1.5
    assert by_variant["telemetry"]["added_ms"] == 2000.0
    assert not any("enclose 1" in note for note in notes(rows(seconds), "cpu", 10))
    seconds["telemetry"] = [2.0, 3.0, 9.0]
    assert any("enclose 1" in note for note in notes(rows(seconds), "cpu", 10))


def test_the_command_leaves_out_where_results_went():
    assert bench_telemetry._command(["--steps", "3", "--output", "somewhere"]).endswith("bench_telemetry --steps 3")
