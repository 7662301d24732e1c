# SPDX-License-Identifier: Apache-2.0
"""The plugin's fields: where they come from, what they yield, and what is said of wrong ones."""

import json

import pytest
import torch

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.distributed.layouts import ModelSize, SpreadConfig, layout_config
from hf_locmoe.distributed.parallel_run import check_tied_vocabulary, current_parallel_run
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.training.accelerate_plugin import LocMoePlugin


def tiny_config(**fields) -> LocMoeConfig:
    return LocMoeConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_experts": 4,
            **fields,
        }
    )


def test_environment_and_yaml_say_the_same(tmp_path):
    env = {
        "LOCMOE_LAYOUT": "spread",
        "LOCMOE_EP_SIZE": "4",
        "LOCMOE_RANKS_PER_NODE": "2,2",
        "LOCMOE_SLICES": "2",
        "LOCMOE_TIMEOUT_S": "30.5",
        "LOCMOE_TELEMETRY": "0",
        "LOCMOE_LOCALITY_LOSS_COEF": "0.05",
        "LOCMOE_WIRE_DTYPE": "",
    }
    from_env = LocMoePlugin.from_environment(env)
    file = tmp_path / "plugin.yaml"
    file.write_text(
        "layout: spread\nep_size: 4\nranks_per_node: 2,2\nslices: 2\ntimeout_s: 30.5\ntelemetry: false\n"
        "locality_loss_coef: 0.05\n"
    )
    assert LocMoePlugin.from_yaml(file) == from_env
    assert (from_env.ep_size, from_env.timeout_s, from_env.telemetry) == (4, 30.5, False)
    assert from_env.expert_parallel_options().slices == 2
    assert LocMoePlugin.from_environment(from_env.to_environment()) == from_env


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"LOCMOE_LAYOUT": "flat"}, ["`layout`", "flat", "spread"]),
        ({"LOCMOE_EP_SIZE": "two"}, ["`LOCMOE_EP_SIZE`", "two", "a number"]),
        ({"LOCMOE_EP_SIZE": "0"}, ["`ep_size`", "0", "positive"]),
        ({"LOCMOE_TELEMETRY": "perhaps"}, ["`LOCMOE_TELEMETRY`", "perhaps", "1 or 0"]),
        ({"LOCMOE_WIRE_DTYPE": "int8"}, ["`wire_dtype`", "int8", "bfloat16"]),
    ],
)
def test_wrong_values_are_named_with_the_way_out(env, words):
    with pytest.raises(ValueError) as error:
        LocMoePlugin.from_environment(env)
    assert all(word in str(error.value) for word in words)


def test_a_yaml_file_with_an_unknown_field_lists_the_known_ones(tmp_path):
    file = tmp_path / "plugin.yaml"
    file.write_text("nodes: 2\n")
    with pytest.raises(ValueError, match=r"unknown fields \['nodes'\].*ranks_per_node"):
        LocMoePlugin.from_yaml(file)


def test_overrides_hold_for_the_run_and_are_not_saved(tmp_path, monkeypatch):
    for name in ("LOCMOE_TIMEOUT_S", "LOCMOE_TELEMETRY", "LOCMOE_ASYNC_SAVE"):
        monkeypatch.setenv(name, "")
    tiny = tiny_config(router_aux_loss_coef=0.01)
    LocMoeForCausalLM(tiny).save_pretrained(tmp_path / "before")
    plugin = LocMoePlugin(router_aux_loss_coef=0.5, capacity_mode="factor", expert_capacity_factor=1.5)
    plugin.activate()
    assert current_parallel_run() is not None
    model = LocMoeForCausalLM.from_pretrained(tmp_path / "before")
    assert model.config.router_aux_loss_coef == 0.5
    assert model.train().sparse_blocks[0].capacity_rule.capacity(64) == 24
    model.save_pretrained(tmp_path / "after")
    saved = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("before", "after")]
    assert saved[0] == saved[1]


def test_a_script_changes_fields_of_the_configuration_as_it_loads(tmp_path):
    LocMoeForCausalLM(tiny_config()).save_pretrained(tmp_path / "models" / "tiny")
    LocMoePlugin(router_aux_loss_coef=0.5).activate()
    given = dict(capacity_mode="critical", subfolder="tiny", experts_implementation="eager", revision="main")
    model, info = LocMoeForCausalLM.from_pretrained(
        tmp_path / "models", dtype=torch.bfloat16, output_loading_info=True, attn_implementation="eager", **given
    )
    assert model.config.capacity_mode == "critical" and model.config.router_aux_loss_coef == 0.5
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    assert model.dtype == torch.bfloat16 and not info["unexpected_keys"]
    with pytest.raises(TypeError, match="no_such_field"):
        LocMoeForCausalLM.from_pretrained(tmp_path / "models" / "tiny", no_such_field=1)


def test_an_override_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="expert_capacity_factor"):
        LocMoePlugin(capacity_mode="factor").override(tiny_config())


def test_tied_embeddings_in_unequal_shards_are_refused_under_tensor_parallelism():
    config = layout_config("spread", NodeTopology.from_ranks_per_node(4, 8), 8, tp_size=2)
    check_tied_vocabulary(tiny_config(vocab_size=63), config)
    check_tied_vocabulary(tiny_config(vocab_size=64, tie_word_embeddings=True), config)
    with pytest.raises(ValueError, match=r"`vocab_size` \(63\).*\(4\).*`tp_size` \(2\): resize the embeddings to 64"):
        check_tied_vocabulary(tiny_config(vocab_size=63, tie_word_embeddings=True), config)
    without = layout_config("spread", NodeTopology.from_ranks_per_node(4, 8), 8)
    check_tied_vocabulary(tiny_config(vocab_size=63, tie_word_embeddings=True), without)


def test_yields_the_configs_of_transformers_and_accelerate(monkeypatch):
    monkeypatch.setattr("hf_locmoe.training.accelerate_plugin.ParallelRun.distributed_config", _spread_of_two_nodes)
    size = ModelSize.of(LocMoeForCausalLM(tiny_config()))
    config = LocMoePlugin(layout="spread").distributed_config(size)
    assert isinstance(config, SpreadConfig)
    parallelism = LocMoePlugin().parallelism_config(config)
    assert (parallelism.dp_replicate_size, parallelism.dp_shard_size, parallelism.tp_size) == (2, 2, 1)


def _spread_of_two_nodes(run, size):
    return layout_config(run.layout, NodeTopology.from_ranks_per_node(2, 4), size.num_experts)
