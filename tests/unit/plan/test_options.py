# SPDX-License-Identifier: Apache-2.0
"""From the command line to a plan: configs of several architectures, machines by hand and measured, errors."""

from __future__ import annotations

import json
import math

import pytest
from transformers import AutoConfig, LlamaConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig

from hf_locmoe import LocMoeConfig, cli
from hf_locmoe.distributed.calibration import Calibration
from hf_locmoe.distributed.step_traffic import Workload
from hf_locmoe.plan import options
from hf_locmoe.plan.options import make_machine, read_model


SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
)
HAND = {"bandwidth_inter": "8gbit", "bandwidth_intra": "2GB", "latency_inter": None, "latency_intra": None}
MACHINE = ["--bandwidth-inter", "100gbit", "--bandwidth-intra", "100GB", "--flops", "100T"]


def configs():
    return {
        "locmoe": LocMoeConfig(**SIZES, num_experts=16, moe_intermediate_size=24),
        "olmoe": OlmoeConfig(**SIZES, num_experts=16, num_experts_per_tok=2),
        "mixtral": MixtralConfig(**SIZES, num_local_experts=16, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(
            **SIZES, head_dim=16, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=24
        ),
    }


@pytest.fixture
def folder(tmp_path):
    configs()["locmoe"].save_pretrained(tmp_path)
    return str(tmp_path)


def planned(folder, capsys, *arguments, nodes=4):
    argv = ["plan", "--config", folder, "--nodes", str(nodes), "--devices-per-node", "8", *arguments]
    status = cli.main(argv)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", list(configs()))
def test_any_moe_of_transformers(model_type, tmp_path):
    configs()[model_type].save_pretrained(tmp_path)
    config, size = read_model(str(tmp_path / "config.json"))
    assert config.model_type == model_type
    matrices, intermediate = {"locmoe": (2, 24), "qwen3_moe": (3, 24)}.get(model_type, (3, 48))
    assert size.expert_parameters == 2 * 16 * matrices * 32 * intermediate
    assert size.num_experts_per_tok == config.num_experts_per_tok
    assert size.embedding_parameters in (64 * 32, 0)  # none where tied
    assert size.kept_parameters == 64 * 32


def test_a_model_with_image_input(tmp_path):
    AutoConfig.for_model(
        "llama4", text_config=dict(**SIZES, intermediate_size_mlp=48, num_local_experts=4)
    ).save_pretrained(tmp_path)
    assert read_model(str(tmp_path))[1].num_experts == 4


def test_a_model_without_experts_and_a_missing_file(tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be of a model with experts.*llama has none"):
        read_model(str(tmp_path))
    with pytest.raises(ValueError, match="`config` .* no such file"):
        read_model(str(tmp_path / "absent"))


# ---- machines -------------------------------------------------------------------------------------------------------


def test_what_is_given_goes_before_what_is_measured(folder):
    size = read_model(folder)[1]
    measured = Calibration(4e12, inter_bytes_per_s=1.0, intra_bytes_per_s=3e9, latency_s=7e-5)
    machine = make_machine(size, Workload(1), HAND | {"bandwidth_intra": None}, utilization=0.5, measured=measured)
    assert machine.inter_bytes_per_s == 1e9
    assert machine.intra_bytes_per_s == 3e9
    assert machine.flops_per_s == 2e12
    assert machine.inter_latency_s == machine.intra_latency_s == 7e-5
    assert math.isinf(machine.memory_bytes)


def test_operations_from_the_seconds_of_a_step(folder):
    size = read_model(folder)[1]
    machine = make_machine(size, Workload(100, accumulation_steps=2), HAND, compute_seconds="500ms", memory="1GB")
    active = size.dense_parameters - size.embedding_parameters + size.expert_parameters / 16
    assert machine.flops_per_s == pytest.approx(6 * 200 * active / 0.5)
    assert machine.memory_bytes == 1e9


def test_what_is_missing_is_named(folder):
    with pytest.raises(ValueError, match="`bandwidth_inter`, `flops`|`flops`, `bandwidth_inter`"):
        make_machine(read_model(folder)[1], Workload(1), HAND | {"bandwidth_inter": None})


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_table_names_layouts_routings_break_evens_and_a_choice(folder, capsys):
    printed = planned(folder, capsys, *MACHINE)
    for text in ("sharded", "replicated", "spread", "hash", "switch", "locmoe-balanced", "Break-even by local share"):
        assert text in printed
    assert printed.splitlines()[-1].startswith('Recommended: "')
    assert "Warning" not in printed


@pytest.mark.parametrize("nodes", [1, 8, 2048])
def test_json_from_one_node_to_two_thousand(folder, capsys, nodes):
    plan = json.loads(planned(folder, capsys, *MACHINE, "--json", nodes=nodes))
    layouts = {step["groups"]["layout"] for step in plan["steps"]}
    assert {"sharded"} <= layouts
    assert (plan["break_even"] == []) == (nodes == 1)
    assert plan["recommended"]["layout"] in layouts - {"one copy"}
    assert ("one copy" in layouts) == (nodes == 2048)
    assert len(plan["warnings"]) == (nodes == 2048)


def test_more_nodes_than_experts_warn(folder, capsys):
    printed = planned(folder, capsys, *MACHINE, nodes=32)
    assert "Warning: `num_experts` (16) is below the number of nodes (32)" in printed
    assert "16 nodes hold none" in printed


def test_options_reach_the_prediction(folder, capsys):
    def step(*arguments):
        plan = json.loads(planned(folder, capsys, *MACHINE, "--json", *arguments))
        return next(s for s in plan["steps"] if (s["groups"]["layout"], s["routing"]["name"]) == ("spread", "locmoe"))

    plain = step()
    assert step("--local-share", "0.9")["cost"]["tokens"]["bytes_inter_node"] == pytest.approx(
        plain["cost"]["tokens"]["bytes_inter_node"] / 3
    )
    assert step("--dtype", "bfloat16")["cost"]["bytes_memory"] == plain["cost"]["bytes_memory"] / 2
    assert step("--wire-dtype", "bfloat16")["cost"]["parameters"] == plain["cost"]["parameters"]
    assert step("--gloo")["cost"]["parameters"]["bytes_intra_node"] > plain["cost"]["parameters"]["bytes_intra_node"]
    assert step("--load-cv", "locmoe=0")["busiest_rank"] == 1 < plain["busiest_rank"]
    assert step("--checkpointing", "--load-cv", "locmoe=0")["compute_s"] == pytest.approx(
        step("--load-cv", "locmoe=0")["compute_s"] * 8 / 6
    )
    assert step("--overlap", "0.5")["hidden_s"] > plain["hidden_s"] == 0


def test_a_measurement_takes_the_place_of_options(folder, capsys, monkeypatch):
    measured = Calibration(1e12, 1e9, 1e10, 1e-5, is_gloo=True)
    monkeypatch.setattr(options, "calibrate", lambda dtype: measured)
    plan = json.loads(planned(folder, capsys, "--calibrate", "--json"))
    assert plan["machine"]["flops_per_s"] == 1e12 * options.DEFAULT_UTILIZATION
    assert plan["machine"]["inter_bytes_per_s"] == 1e9
    assert plan["work"]["reduce_scatter_passes"] == 2
    monkeypatch.setattr(options, "calibrate", lambda dtype: Calibration(1e12, is_first_rank=False))
    assert planned(folder, capsys, "--calibrate") == ""


@pytest.mark.parametrize(
    "arguments, field",
    [
        (["--nodes", "0"], "nodes"),
        (["--tokens-per-rank", "0"], "tokens_per_rank"),
        (["--local-share", "1.5"], "local_share"),
        (["--bandwidth-inter", "fast"], "bandwidth_inter"),
        (["--load-cv", "hash"], "load_cv"),
        (["--load-cv", "other=0.1"], "load_cv"),
        (["--load-cv", "hash=-1"], "load_cv"),
        (["--config", "absent"], "config"),
    ],
)
def test_errors_are_one_line_that_names_the_field(arguments, field, folder, capsys):
    argv = ["plan", "--config", folder, "--nodes", "2", "--devices-per-node", "2", *MACHINE, *arguments]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"locmoe plan: `{field}`")
    assert error.count("\n") == 1
