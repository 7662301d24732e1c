# SPDX-License-Identifier: Apache-2.0
"""Attention: backends, rotary positions, sliding window, and transformers' own models with the same weights."""

import importlib.util

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    masking_utils,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


class TestBackends:
    def logits(self, implementation, **settings):
        model = tiny_model(head_dim=16, sliding_window=settings.pop("sliding_window", None))
        model.set_attn_implementation(implementation)
        return model(random_ids(2, 12), **settings).logits

    def test_positions_made_here_are_not_searched_for_packed_sequences(self, monkeypatch):
        """That search makes a GPU's host wait; a caller's positions still separate sequences."""
        found = []
        search = masking_utils.find_packed_sequence_indices
        monkeypatch.setattr(
            masking_utils, "find_packed_sequence_indices", lambda positions: found.append(1) or search(positions)
        )
        ids = random_ids(1, 12)
        model = tiny_model()
        whole = model(ids, use_cache=False).logits
        assert not found
        assert_close(model(ids, position_ids=torch.arange(12)[None], use_cache=False).logits, whole)
        packed = model(ids, position_ids=torch.cat([torch.arange(5), torch.arange(7)])[None], use_cache=False).logits
        assert len(found) == 2
        assert_close(packed[:, :5], whole[:, :5])
        assert_close(packed[:, 5:], model(ids[:, 5:]).logits)

    @pytest.mark.parametrize("implementation", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("sliding_window", [None, 4])
    @torch.no_grad()  # flex attention has no backward on a CPU
    def test_agrees_with_eager(self, implementation, sliding_window):
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[0, :4] = 0
        expected = self.logits("eager", attention_mask=mask, sliding_window=sliding_window)
        actual = self.logits(implementation, attention_mask=mask, sliding_window=sliding_window)
        assert_close(actual[0, 4:], expected[0, 4:])
        assert_close(actual[1], expected[1])

    @pytest.mark.gpu
    def test_flash_attention_agrees_with_eager(self):
        if importlib.util.find_spec("flash_attn") is None:
            pytest.skip("flash_attn is not installed")
        ids = random_ids(2, 12).cuda()
        results = []
        for implementation in ("eager", "flash_attention_2"):
            model = tiny_model(head_dim=32).to("cuda", torch.bfloat16)
            model.set_attn_implementation(implementation)
            results.append(model(ids).logits)
        assert_close(results[1], results[0])

    def test_gradients_agree(self):
        ids = random_ids()
        grads = []
        for implementation in ("eager", "sdpa"):
            model = tiny_model().train()
            model.set_attn_implementation(implementation)
            model(ids, labels=ids).loss.backward()
            grads.append([parameter.grad for parameter in model.parameters()])
        assert_close(grads[1], grads[0])

    def test_dropout_in_training_alone(self):
        ids = random_ids()
        model = tiny_model(attention_dropout=0.5, attn_implementation="eager")
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)


ROPES = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", rope_theta=500.0, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=500.0, factor=4.0),
    "yarn": dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32),
    "longrope": dict(
        rope_type="longrope",
        rope_theta=500.0,
        factor=4.0,
        short_factor=[1.0, 1.1, 1.2, 1.3],
        long_factor=[2.0, 3.0, 4.0, 5.0],
        original_max_position_embeddings=32,
    ),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
}


if "proportional" in ROPE_INIT_FUNCTIONS:
    ROPES["proportional"] = dict(rope_type="proportional", rope_theta=500.0, partial_rotary_factor=0.5)


def test_every_rope_of_this_transformers_is_here():
    assert set(ROPE_INIT_FUNCTIONS) <= set(ROPES)


def copy_weights(ours, theirs):
    """Llama's dense layers into ours; names agree but for the order of gate and up."""
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    own = [name for name in missing.missing_keys if "e_score_correction_bias" not in name]
    assert own == []
    assert missing.unexpected_keys == []


def shape_of(config):
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
        " max_position_embeddings initializer_range pad_token_id bos_token_id eos_token_id"
    )
    return {name: getattr(config, name) for name in names.split()}


def dense(**overrides):
    return tiny_model(mlp_only_layers=[0, 1], gated_mlp=True, hidden_act="silu", **overrides)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [12, 50])
def test_every_rope_is_llamas(rope, length):
    ours = dense(rope_parameters=ROPES[rope])
    theirs = LlamaForCausalLM(LlamaConfig(**shape_of(ours.config), rope_parameters=ROPES[rope])).eval()
    copy_weights(ours, theirs)
    ids = random_ids(1, length)
    assert_close(ours(ids).logits, theirs(ids).logits)


def test_rope_scalings_differ_from_each_other():
    ids = random_ids(1, 50)
    results = [
        dense(rope_parameters=parameters)(ids).logits
        for parameters in ROPES.values()
        if parameters["rope_type"] != "dynamic"
    ]
    for i, first in enumerate(results):
        assert not any(torch.allclose(first, other, atol=1e-4) for other in results[i + 1 :])


@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_llama(attention_bias, tied):
    ours = dense(attention_bias=attention_bias, tie_word_embeddings=tied)
    config = LlamaConfig(**shape_of(ours.config), attention_bias=attention_bias, tie_word_embeddings=tied)
    theirs = LlamaForCausalLM(config).eval()
    copy_weights(ours, theirs)
    ids = random_ids()
    assert_close(ours(ids).logits, theirs(ids).logits)


def test_a_mistral_with_its_sliding_window():
    ours = dense(sliding_window=4)
    theirs = MistralForCausalLM(MistralConfig(**shape_of(ours.config), sliding_window=4)).eval()
    copy_weights(ours, theirs)
    ids = random_ids()
    assert_close(ours(ids).logits, theirs(ids).logits)
    assert not torch.allclose(ours(ids).logits, dense()(ids).logits)
    settings = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


def test_a_dense_qwen3_with_its_norm_over_heads():
    ours = dense(qk_norm="head")
    theirs = Qwen3ForCausalLM(Qwen3Config(**shape_of(ours.config), rms_norm_eps=1e-6)).eval()
    with torch.no_grad():
        for layer in theirs.model.layers:
            layer.self_attn.q_norm.weight.uniform_(0.5, 2)
            layer.self_attn.k_norm.weight.uniform_(0.5, 2)
    copy_weights(ours, theirs)
    ids = random_ids()
    assert_close(ours(ids).logits, theirs(ids).logits)


def randomize_norms(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2)


def moe(**overrides):
    block = dict(gated_mlp=True, hidden_act="silu", gate_type="switch", num_experts_per_tok=2)
    return tiny_model(**block, rope_parameters=ROPES["default"], **overrides)


MOE_FIELDS = dict(num_experts_per_tok=2, rms_norm_eps=1e-6, rope_parameters=ROPES["default"])


def compare_moe(ours, theirs):
    randomize_norms(theirs)
    copy_weights(ours, theirs.eval())
    ids = random_ids(2, 12)
    assert_close(ours(ids).logits, theirs(ids).logits)
    both = [model(ids, output_router_logits=True).router_logits for model in (ours, theirs)]
    for ours_logits, theirs_logits in zip(*both):
        assert_close(ours_logits.softmax(-1), theirs_logits.float().softmax(-1))


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_a_qwen3_moe(norm_topk_prob):
    ours = moe(qk_norm="head", norm_topk_prob=norm_topk_prob, mlp_only_layers=[0])
    config = Qwen3MoeConfig(
        **shape_of(ours.config),
        **MOE_FIELDS,
        moe_intermediate_size=24,
        num_experts=4,
        norm_topk_prob=norm_topk_prob,
        mlp_only_layers=[0],
    )
    compare_moe(ours, Qwen3MoeForCausalLM(config))


def test_a_mixtral():
    ours = moe(norm_topk_prob=True, moe_intermediate_size=48)
    config = MixtralConfig(**shape_of(ours.config), **MOE_FIELDS, num_local_experts=4, sliding_window=None)
    compare_moe(ours, MixtralForCausalLM(config))


@pytest.mark.parametrize("clip_qkv", [None, 0.1])
def test_an_olmoe(clip_qkv):
    ours = moe(qk_norm="full", moe_intermediate_size=48, clip_qkv=clip_qkv)
    shape = {name: value for name, value in shape_of(ours.config).items() if name != "head_dim"}
    config = OlmoeConfig(**shape, **MOE_FIELDS, num_experts=4, norm_topk_prob=False, clip_qkv=clip_qkv)
    compare_moe(ours, OlmoeForCausalLM(config))


def test_head_dim_of_its_own():
    model = tiny_model(head_dim=6, qk_norm="full", attention_bias=True)
    assert model.model.layers[0].self_attn.q_proj.out_features == 24
    assert model(random_ids()).logits.shape == (2, 12, 61)


def test_mixtrals_name_for_the_number_of_experts_is_known():
    assert tiny_config(num_local_experts=8).num_experts == 8
