# SPDX-License-Identifier: Apache-2.0
"""Building, saving and loading: every way gives the same model."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hf_locmoe import LocMoeForCausalLM, LocMoeModel
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


STATEFUL = dict(
    gate_centering=True,
    gate_rotation=True,
    balance_bias_update_rate=0.01,
    capacity_mode="critical",
    critical_capacity_steps=1,
)
FLOAT32_STATE = (
    "e_score_correction_bias",
    "hidden_mean",
    "hidden_mean_updates",
    "rotation",
    "steps",
    "cos_angle",
    "min_factor",
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model whose router state is unlike an initial one, and its checkpoint."""
    model = tiny_model(**STATEFUL).train()
    ids = random_ids(4, 16)
    outputs = model(ids, labels=ids)
    model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
    path = tmp_path_factory.mktemp("checkpoint")
    model.eval().save_pretrained(path)
    return model, path


def assert_same(loaded, model):
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name
    ids = random_ids(vocab_size=model.config.vocab_size)
    assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    for block, other in zip(loaded.sparse_blocks, model.sparse_blocks, strict=True):
        assert block.capacity_rule.train().capacity(40) == other.capacity_rule.train().capacity(40)
        block.eval()
        other.eval()


class TestLoading:
    def test_auto_class(self, saved):
        model, path = saved
        loaded, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert type(loaded) is LocMoeForCausalLM
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same(loaded, model)

    def test_safetensors_only_under_runtime_names(self, saved):
        model, path = saved
        assert [file.name for file in path.glob("*.bin")] == []
        assert load_file(path / "model.safetensors").keys() == model.state_dict().keys()

    def test_low_memory(self, saved):
        model, path = saved
        assert_same(LocMoeForCausalLM.from_pretrained(path, low_cpu_mem_usage=True), model)

    def test_device_map(self, saved):
        model, path = saved
        assert_same(LocMoeForCausalLM.from_pretrained(path, device_map="cpu"), model)
        assert_same(LocMoeForCausalLM.from_pretrained(path, device_map="auto").cpu(), model)
        split = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        assert_same(LocMoeForCausalLM.from_pretrained(path, device_map={**split, "lm_head": "cpu"}), model)

    def test_offloaded_to_disk(self, saved, tmp_path):
        model, path = saved
        device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        loaded = LocMoeForCausalLM.from_pretrained(
            path, device_map={**device_map, **rest}, offload_folder=str(tmp_path)
        )
        ids = random_ids()
        assert_close(loaded.eval()(ids).logits, model(ids).logits)

    def test_shards(self, saved, tmp_path):
        model, _ = saved
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert_same(LocMoeForCausalLM.from_pretrained(tmp_path), model)

    @pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "auto"])
    def test_dtype_on_load_leaves_the_router_state_in_float32(self, saved, dtype):
        model, path = saved
        loaded = LocMoeForCausalLM.from_pretrained(path, dtype=dtype)
        wanted = {"bfloat16": torch.bfloat16, "auto": torch.float32}.get(dtype, dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {wanted}
        expected, found = model.state_dict(), set()
        for name, buffer in loaded.named_buffers():
            if name.endswith(FLOAT32_STATE):
                found.add(name.split(".")[-1])
                assert torch.equal(buffer, expected[name]), name
        assert found == set(FLOAT32_STATE)
        assert loaded(random_ids()).logits.isfinite().all()

    def test_a_half_precision_checkpoint_keeps_the_router_state(self, saved, tmp_path):
        model, path = saved
        LocMoeForCausalLM.from_pretrained(path, dtype=torch.bfloat16).save_pretrained(tmp_path)
        again = LocMoeForCausalLM.from_pretrained(tmp_path)
        for name, buffer in model.named_buffers():
            if name.endswith(FLOAT32_STATE):
                assert torch.equal(again.get_buffer(name), buffer), name

    def test_the_decoder_of_a_full_checkpoint(self, saved):
        model, path = saved
        decoder = AutoModel.from_pretrained(path)
        assert type(decoder) is LocMoeModel
        ids = random_ids()
        assert_close(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)

    def test_config_overrides_on_load(self, saved):
        _, path = saved
        loaded = LocMoeForCausalLM.from_pretrained(path, router_aux_loss_coef=0.5, capacity_mode="dropless")
        assert loaded.config.router_aux_loss_coef == 0.5
        assert loaded.sparse_blocks[0].capacity_rule.mode == "dropless"

    def test_another_number_of_experts_is_refused(self, saved):
        _, path = saved
        with pytest.raises((RuntimeError, ValueError), match="up_proj"):
            LocMoeForCausalLM.from_pretrained(path, num_experts=8)


class TestBuilding:
    def test_from_config(self):
        config = tiny_config(**STATEFUL)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        torch.manual_seed(0)
        assert_same(model, LocMoeForCausalLM(config))
        half = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert half(random_ids()).logits.isfinite().all()

    @pytest.mark.parametrize("settings", [STATEFUL, dict(gate_type="switch"), dict(gate_type="hash")])
    def test_meta_then_empty_then_loaded(self, settings):
        model = tiny_model(**settings)
        with torch.device("meta"):
            empty = LocMoeForCausalLM(tiny_config(**settings))
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        empty.to_empty(device="cpu")
        empty.load_state_dict(model.state_dict())
        empty.model.rotary_emb = model.model.rotary_emb  # not part of a checkpoint
        assert_same(empty, model)

    def test_initial_weights_have_the_configs_spread(self):
        model = tiny_model(initializer_range=0.03, hidden_size=128, moe_intermediate_size=128, gate_type="switch")
        for name, parameter in model.named_parameters():
            if "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter))
            elif parameter.numel() > 4000:
                assert abs(parameter.std().item() / 0.03 - 1) < 0.05, name
        assert not model.model.embed_tokens.weight[0].any()

    def test_initial_router_state(self):
        model = tiny_model(**STATEFUL)
        for name, buffer in model.named_buffers():
            if name.endswith("rotation"):
                assert_close(buffer @ buffer.T, torch.eye(4))
            elif name.endswith(FLOAT32_STATE):
                assert not buffer.any(), name

    def test_a_checkpoint_without_router_state_gets_an_initial_one(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path, gate_rotation=True, gate_centering=True)
        for block in loaded.sparse_blocks:
            assert_close(block.gate.rotation @ block.gate.rotation.T, torch.eye(4))
            assert not block.gate.hidden_mean.any()


class TestEmbeddings:
    def test_tied(self, tmp_path):
        model = tiny_model(tie_word_embeddings=True)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert_same(loaded, model)

    def test_untied(self):
        model = tiny_model()
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert model.get_output_embeddings() is model.lm_head
        assert model.get_input_embeddings() is model.model.embed_tokens

    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("new_size", [80, 40])
    def test_resize(self, tmp_path, tied, new_size):
        model, ids = tiny_model(tie_word_embeddings=tied), random_ids(vocab_size=40)
        with torch.no_grad():  # torch keeps a parameter's old shape as long as a graph knows it
            before = model(ids).logits
        model.resize_token_embeddings(new_size)
        kept = min(61, new_size)
        assert model.config.vocab_size == new_size
        assert_close(model(ids).logits[..., :kept], before[..., :kept])
        outputs = model.train()(ids, labels=ids)
        outputs.loss.backward()
        if new_size == 80:
            assert model(torch.full((1, 3), 79)).logits.isfinite().all()
        with pytest.raises(ValueError, match=f"must be from 0 to {new_size - 1}"):
            model(torch.tensor([[new_size]]))
        model.save_pretrained(tmp_path)
        assert_same(LocMoeForCausalLM.from_pretrained(tmp_path), model)

    def test_resize_to_a_multiple(self):
        model = tiny_model(gate_type="hash")
        model.resize_token_embeddings(61, pad_to_multiple_of=16)
        assert model.sparse_blocks[0].gate.expert_of_token.shape == (64, 1)
        assert model(torch.full((1, 2), 63)).logits.shape[-1] == 64


def test_config_round_trip(tmp_path):
    config = tiny_config(
        qk_norm="full", capacity_mode="factor", expert_capacity_factor=1.25, mlp_only_layers=[0], sliding_window=7
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    ignored = {"auto_map", "transformers_version", "_name_or_path"}
    first, second = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, loaded))
    assert first == second


@pytest.mark.parametrize("has_kernels", [False, True])
def test_experts_implementation_is_chosen_where_the_model_is_made_and_not_saved(tmp_path, monkeypatch, has_kernels):
    monkeypatch.setattr("hf_locmoe.modeling_locmoe.kernels_serve_here", lambda: has_kernels)
    default = "capacity_bmm" if has_kernels else "grouped_mm"
    another = "grouped_mm" if has_kernels else "capacity_bmm"
    chosen = {"experts_implementation": another}
    model = LocMoeForCausalLM(tiny_config(**chosen))
    model.save_pretrained(tmp_path)
    models = [
        model,
        AutoModelForCausalLM.from_config(tiny_config(), **chosen),
        AutoModelForCausalLM.from_config(tiny_config(**chosen)),
        AutoModelForCausalLM.from_pretrained(tmp_path, **chosen),
    ]
    for each in models:
        assert each.sparse_blocks[0].experts.config._experts_implementation == another
    for each in (AutoModelForCausalLM.from_pretrained(tmp_path), LocMoeForCausalLM(tiny_config())):
        assert each.sparse_blocks[0].experts.config._experts_implementation == default


def test_nothing_of_the_run_is_in_config_json(saved):
    _, path = saved
    fields = json.loads((path / "config.json").read_text())
    for word in ("node", "rank", "world", "distributed", "path"):
        assert not any(word in name for name in fields if name != "_name_or_path"), word
