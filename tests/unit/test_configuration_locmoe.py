# SPDX-License-Identifier: Apache-2.0
"""What a config accepts, derives, warns of and refuses."""

import dataclasses
import re

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from hf_locmoe import LocMoeConfig
from tests.tiny_models import tiny_config


def test_defaults_are_valid_and_derived():
    config = LocMoeConfig()
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.head_dim == config.hidden_size // config.num_attention_heads
    assert config.moe_intermediate_size == config.intermediate_size
    assert config.mlp_only_layers == []
    assert config.rope_parameters["rope_type"] == "default"
    assert config.sparse_layers == list(range(24))
    assert type(AutoConfig.for_model("locmoe")) is LocMoeConfig


@pytest.mark.parametrize(
    "mlp_only_layers, step, expected",
    [([], 1, [0, 1, 2, 3, 4, 5]), ([0, 1], 1, [2, 3, 4, 5]), ([], 2, [1, 3, 5]), ([1], 3, [2, 5]), ([2, 5], 3, [])],
)
def test_sparse_layers_are_qwen_moes(mlp_only_layers, step, expected):
    config = tiny_config(num_hidden_layers=6, mlp_only_layers=mlp_only_layers, decoder_sparse_step=step)
    assert config.sparse_layers == expected


def test_every_field_is_documented():
    documented = set(re.findall(r"^ {8}(\w+) \(", LocMoeConfig.__doc__, flags=re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(LocMoeConfig)} & set(LocMoeConfig.__annotations__)
    inherited = {"pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits"}
    assert documented == fields - inherited


# field, value, and what the message says besides; other fields that the case needs
WRONG = [
    ("vocab_size", 0, "at least 1", {}),
    ("num_experts", 0, "at least 1", {}),
    ("num_experts", -3, "at least 1", {}),
    ("num_experts_per_tok", 0, "at least 1", {}),
    ("num_experts_per_tok", 5, "`num_experts` (4)", {}),
    ("num_experts", 40, "`hidden_size` (32)", {}),
    ("num_attention_heads", 0, "at least 1", {}),
    ("num_attention_heads", 4, "`num_key_value_heads` (3)", dict(num_key_value_heads=3)),
    ("head_dim", 7, "must be even", {}),
    ("decoder_sparse_step", 0, "at least 1", {}),
    ("mlp_only_layers", [0, 7], "[7]", {}),
    ("num_experts", 4, "`num_expert_groups` (3)", dict(num_expert_groups=3)),
    ("topk_group", 3, "`num_expert_groups` (2)", dict(num_expert_groups=2)),
    ("num_experts_per_tok", 3, "`topk_group` (1)", dict(num_expert_groups=2)),
    ("num_shared_experts", -1, "not negative", {}),
    ("gate_noise_std", -0.5, "not negative", {}),
    ("gate_noise_std", float("inf"), "finite", {}),
    ("router_aux_loss_coef", -0.1, "set it to 0", {}),
    ("router_aux_loss_coef", float("nan"), "finite", {}),
    ("locality_loss_coef", -0.1, "set it to 0", {}),
    ("locality_remote_share", 0.0, "between 0 and 1", {}),
    ("locality_remote_share", 1.5, "between 0 and 1", {}),
    ("balance_bias_update_rate", -1.0, "not negative", {}),
    ("expert_capacity_factor", None, "1.25", dict(capacity_mode="factor")),
    ("expert_capacity_factor", -1.0, "1.25", dict(capacity_mode="factor")),
    ("expert_capacity_factor", float("inf"), "finite", dict(capacity_mode="factor")),
    ("critical_capacity_quantile", 1.0, "between 0 and 1", {}),
    ("critical_max_drop_rate", 0.0, "between 0 and 1", {}),
    ("critical_capacity_steps", 0, "at least 1", {}),
    ("initializer_range", 0.0, "positive", {}),
    ("rms_norm_eps", -1e-6, "positive", {}),
    ("attention_dropout", 1.5, "less than 1", {}),
    ("sliding_window", 0, "`None`", {}),
    ("clip_qkv", -1.0, "`None`", {}),
    ("pad_token_id", 61, "`vocab_size` (61)", {}),
    ("pad_token_id", -1, "from 0 to 60", {}),
    ("hidden_act", "no_such", "'gelu'", {}),
]


@pytest.mark.parametrize("field, value, rule, others", WRONG)
def test_relations_name_field_value_and_way_out(field, value, rule, others):
    with pytest.raises(ValueError) as caught:
        tiny_config(**{field: value, **others})
    message = str(caught.value)
    assert f"`{field}` ({value})" in message
    assert rule in message


# the strict dataclass checks types as a field is set, in its own words
WRONG_TYPES = [
    ("gate_type", "gap", "'locmoe', 'switch', 'hash'"),
    ("gate_affinity", "dot", "'cosine', 'mean'"),
    ("capacity_mode", "tight", "'dropless', 'factor', 'critical'"),
    ("capacity_overflow", "wrap", "'drop', 'next_best'"),
    ("router_loss_scope", "node", "'global', 'micro_batch'"),
    ("qk_norm", "layer", "'head', 'full'"),
    ("num_experts", "8", "int"),
    ("num_experts", 8.0, "int"),
    ("num_experts", True, "int"),
    ("gated_mlp", 1, "bool"),
    ("router_aux_loss_coef", "0.01", "float"),
    ("mlp_only_layers", ["a"], "int"),
    ("output_router_stats", "yes", "bool"),
]


@pytest.mark.parametrize("field, value, expected", WRONG_TYPES)
def test_types_name_field_value_and_what_is_expected(field, value, expected):
    with pytest.raises(StrictDataclassError) as caught:
        tiny_config(**{field: value})
    message = str(caught.value)
    assert field in message
    assert str(value) in message
    assert expected in message


def test_types_are_checked_on_assignment_and_by_json_too(tmp_path):
    config = tiny_config()
    with pytest.raises(StrictDataclassError, match="gate_type"):
        config.gate_type = "gap"
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"gate_type": "locmoe"', '"gate_type": "gap"'))
    with pytest.raises(StrictDataclassError, match="gate_type"):
        LocMoeConfig.from_pretrained(tmp_path)


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match=r"`rope_type` \(spiral\).*'yarn'"):
        tiny_config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})


WITHOUT_EFFECT = [
    ("gate_centering", True, dict(gate_type="switch")),
    ("gate_rotation", True, dict(gate_type="hash")),
    ("gate_relu", True, dict(gate_type="switch")),
    ("gate_noise_std", 0.1, dict(gate_type="hash")),
    ("balance_bias_update_rate", 0.1, dict(gate_type="hash")),
    ("norm_topk_prob", True, dict(gate_type="hash")),
    ("expert_capacity_factor", 1.0, {}),
    ("expert_capacity_factor", 1.5, dict(capacity_mode="critical")),
    ("capacity_overflow", "next_best", {}),
    ("capacity_at_eval", True, {}),
]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr("hf_locmoe.configuration_locmoe.logger.warning_once", said.append)
    return said


@pytest.mark.parametrize("field, value, others", WITHOUT_EFFECT)
def test_a_setting_without_effect_warns(field, value, others, warnings):
    tiny_config(**{field: value, **others})
    assert len(set(warnings)) == 1  # validation runs twice, the logger says it once
    assert f"`{field}` ({value}) has no effect" in warnings[0]


def test_a_plain_config_is_silent(warnings):
    tiny_config()
    LocMoeConfig.paper()
    tiny_config(gate_centering=True, balance_bias_update_rate=0.1, capacity_mode="factor", expert_capacity_factor=1.0)
    assert warnings == []


@given(
    num_experts=st.integers(1, 12),
    groups=st.integers(1, 12),
    topk_group=st.integers(1, 12),
    k=st.integers(1, 12),
)
def test_a_config_is_refused_exactly_where_no_token_could_be_routed(num_experts, groups, topk_group, k):
    routable = num_experts % groups == 0 and topk_group <= groups and k <= num_experts // groups * topk_group
    fields = dict(num_experts=num_experts, num_expert_groups=groups, topk_group=topk_group, num_experts_per_tok=k)
    if routable:
        assert tiny_config(**fields).num_experts_per_tok == k
    else:
        with pytest.raises(ValueError, match="must be|more than"):
            tiny_config(**fields)
