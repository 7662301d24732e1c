# SPDX-License-Identifier: Apache-2.0
"""What `from_pretrained` refuses and what it must go on taking; what `save_pretrained` passes on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM, LocMoeForSequenceClassification, LocMoeModel, pretrained_io
from hf_locmoe.pretrained_io import CheckpointError
from tests.tolerances import assert_close


_INPUT_IDS = torch.arange(14).view(2, 7)


def make_config(**overrides) -> LocMoeConfig:
    shape = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LocMoeConfig(**{**shape, "num_experts": 4, "pad_token_id": 0, **overrides})


@pytest.fixture
def model() -> LocMoeForCausalLM:
    return LocMoeForCausalLM(make_config()).eval()


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def sharded(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    return tmp_path / "sharded"


def as_hub_cache(checkpoint: Path, cache: Path, name: str) -> None:
    """Lays a folder out as the Hub's cache has it, so that `name` loads without a network."""
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(checkpoint, repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)


class Exploit:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


class TestPickles:
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
    def test_refused_by_name_and_not_run(self, checkpoint, name):
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / name).write_bytes(pickle.dumps(Exploit(checkpoint / "trace")))
        for auto_class in (LocMoeForCausalLM, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=rf"{name} is a pickle.*safetensors.torch.save_file"):
                auto_class.from_pretrained(checkpoint)
        assert not (checkpoint / "trace").exists()

    def test_the_way_out_of_the_message_works(self, model, checkpoint, monkeypatch):
        (checkpoint / "model.safetensors").unlink()
        torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
        with pytest.raises(ValueError) as raised:
            LocMoeForCausalLM.from_pretrained(checkpoint)
        command = str(raised.value).split("`")[1]
        monkeypatch.chdir(checkpoint)
        import safetensors.torch

        eval(command, {"safetensors": safetensors, "torch": torch})
        assert_close(LocMoeForCausalLM.from_pretrained(checkpoint)(_INPUT_IDS).logits, model(_INPUT_IDS).logits)

    def test_beside_safetensors_they_are_not_looked_at(self, checkpoint):
        for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
            (checkpoint / name).write_bytes(pickle.dumps(Exploit(checkpoint / "trace")))
        LocMoeForCausalLM.from_pretrained(checkpoint)
        assert not (checkpoint / "trace").exists()

    def test_a_trainers_state_is_not_blamed_for_missing_weights(self, checkpoint):
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "optimizer.pt").write_bytes(b"")
        with pytest.raises(OSError, match="no file named model.safetensors"):
            LocMoeForCausalLM.from_pretrained(checkpoint)

    def test_asked_for(self, checkpoint, model):
        with pytest.raises(ValueError, match=r"`use_safetensors` \(False\)"):
            LocMoeForCausalLM.from_pretrained(checkpoint, use_safetensors=False)
        with pytest.raises(ValueError, match=r"`safe_serialization` \(False\)"):
            model.save_pretrained(checkpoint, safe_serialization=False)
        model.save_pretrained(checkpoint, safe_serialization=True)

    def test_a_single_file(self, checkpoint, model):
        torch.save(model.state_dict(), checkpoint / "weights.bin")
        with pytest.raises(ValueError, match="weights.bin is a pickle"):
            LocMoeForCausalLM.from_pretrained(checkpoint / "weights.bin", config=model.config)

    def test_in_the_hubs_cache(self, checkpoint, model, tmp_path):
        (checkpoint / "model.safetensors").unlink()
        torch.save(model.state_dict(), checkpoint / "pytorch_model.bin")
        as_hub_cache(checkpoint, tmp_path / "cache", "someone/pickled")
        with pytest.raises(OSError, match=r"safetensors"):
            LocMoeForCausalLM.from_pretrained("someone/pickled", cache_dir=tmp_path / "cache")

    def test_an_adapter(self, checkpoint, tmp_path):
        adapter = tmp_path / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(checkpoint)}))
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Exploit(adapter / "trace")))
        with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
            LocMoeForCausalLM.from_pretrained(adapter)


class TestDamaged:
    @pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
    def test_truncated(self, checkpoint, kept):
        file = checkpoint / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
        for auto_class in (LocMoeForCausalLM, LocMoeModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
            with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*damaged.*again"):
                auto_class.from_pretrained(checkpoint)

    @pytest.mark.parametrize("data", [b"\x00" * 64, b"\xff" * 64, b"<!DOCTYPE html>" * 9, b"version https://git-lfs"])
    def test_not_safetensors_at_all(self, checkpoint, data):
        (checkpoint / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            LocMoeForCausalLM.from_pretrained(checkpoint)

    def test_one_shard(self, sharded):
        shards = sorted(sharded.glob("model-*.safetensors"))
        data = shards[1].read_bytes()
        shards[1].write_bytes(data[:-3])
        with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read"):
            LocMoeForCausalLM.from_pretrained(sharded)
        shards[1].unlink()
        with pytest.raises(ValueError, match=f"{shards[1].name} cannot be read .the file is missing"):
            LocMoeForCausalLM.from_pretrained(sharded)

    @pytest.mark.parametrize("text", ["", '{"weight_map": {', "[]", "{}", '{"weight_map": []}'])
    def test_the_index(self, sharded, text):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match="model.safetensors.index.json cannot be read"):
            LocMoeForCausalLM.from_pretrained(sharded)

    @pytest.mark.parametrize("text", ["", '{"model_type": "loc'])
    def test_the_configuration(self, checkpoint, text):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json cannot be read"):
            LocMoeForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(OSError, match="config.json' is not a valid JSON"):
            AutoModelForCausalLM.from_pretrained(checkpoint)

    def test_in_the_hubs_cache(self, checkpoint, tmp_path):
        data = (checkpoint / "model.safetensors").read_bytes()
        (checkpoint / "model.safetensors").write_bytes(data[:-3])
        as_hub_cache(checkpoint, tmp_path / "cache", "someone/damaged")
        with pytest.raises(ValueError, match=r"`someone/damaged` is damaged .*force_download=True"):
            LocMoeForCausalLM.from_pretrained("someone/damaged", cache_dir=tmp_path / "cache")


class TestForeign:
    def test_another_architecture(self, tmp_path, checkpoint):
        config = OlmoeConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=4,
        )
        OlmoeForCausalLM(config).save_pretrained(tmp_path / "olmoe")
        with pytest.raises(ValueError, match=r"`model_type` \('olmoe'\).*AutoModel"):
            LocMoeForCausalLM.from_pretrained(tmp_path / "olmoe")
        with pytest.raises(ValueError, match=r"`model_type` \('olmoe'\)"):
            LocMoeConfig.from_pretrained(tmp_path / "olmoe")
        with pytest.raises(ValueError, match=r"`config` \(model_type 'olmoe'\)"):
            LocMoeForCausalLM.from_pretrained(checkpoint, config=config)
        with pytest.raises(
            ValueError, match=r"lacks .*layers.0.mlp.experts.up_proj.*others.*experts.0.down_proj.weight"
        ):
            LocMoeForCausalLM.from_pretrained(tmp_path / "olmoe", config=make_config())

    def test_no_configuration(self, checkpoint):
        (checkpoint / "config.json").unlink()
        with pytest.raises(ValueError, match="has no `config.json`"):
            LocMoeForCausalLM.from_pretrained(checkpoint)
        with pytest.raises(ValueError, match="has no `config.json`"):
            LocMoeConfig.from_pretrained(checkpoint)
        LocMoeForCausalLM.from_pretrained(checkpoint, config=make_config())

    @pytest.mark.parametrize("split", [False, True])
    def test_missing_or_split_experts(self, checkpoint, split):
        weights = load_file(checkpoint / "model.safetensors")
        name = "model.layers.1.mlp.experts.up_proj"
        fused = weights.pop(name)
        if split:
            for expert, weight in enumerate(fused):
                weights[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"] = weight.clone()
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        for load in (LocMoeForCausalLM, LocMoeForSequenceClassification, AutoModelForCausalLM):
            with pytest.raises(CheckpointError, match="lacks model.layers.1.mlp.experts.up_proj") as raised:
                load.from_pretrained(checkpoint)
            assert ("experts.0.up_proj.weight" in str(raised.value)) == split
        with pytest.raises(ValueError, match="lacks layers.1.mlp.experts.up_proj"):
            LocMoeModel.from_pretrained(checkpoint)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, allow_missing_weights=True, output_loading_info=True
        )
        assert info["missing_keys"] == {name}
        assert loaded.model.layers[1].mlp.experts.up_proj.std() > 0

    @pytest.mark.parametrize("error", [ValueError, RuntimeError])
    def test_another_shape(self, checkpoint, error):
        with pytest.raises(
            error, match=r"experts.down_proj \(4, 16, 24\) there, \(8, 16, 24\) here.*ignore_mismatched"
        ):
            LocMoeForCausalLM.from_pretrained(checkpoint, num_experts=8)
        with pytest.raises(error, match=r"lm_head.weight \(48, 16\) there, \(50, 16\) here"):
            AutoModelForCausalLM.from_pretrained(checkpoint, vocab_size=50)
        loaded = LocMoeForCausalLM.from_pretrained(checkpoint, num_experts=8, ignore_mismatched_sizes=True)
        assert loaded.model.layers[0].mlp.experts.down_proj.shape[0] == 8

    def test_another_gate(self, checkpoint):
        with pytest.raises(ValueError, match="lacks model.layers.0.mlp.gate.weight"):
            LocMoeForCausalLM.from_pretrained(checkpoint, gate_type="switch")


class TestStillTaken:
    def test_heads_may_be_missing(self, checkpoint, model, tmp_path):
        classifier = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
        assert classifier(_INPUT_IDS).logits.shape == (2, 3)
        base = AutoModel.from_pretrained(checkpoint).eval()
        assert_close(base(_INPUT_IDS).last_hidden_state, model.model(_INPUT_IDS).last_hidden_state)
        base.save_pretrained(tmp_path / "base")
        again, info = LocMoeForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert info["missing_keys"] == {"lm_head.weight"}
        assert_close(again.model(_INPUT_IDS).last_hidden_state, model.model(_INPUT_IDS).last_hidden_state)

    def test_router_buffers_start_from_their_defaults(self, checkpoint):
        loaded = LocMoeForCausalLM.from_pretrained(checkpoint, gate_centering=True)
        assert torch.equal(loaded.model.layers[0].mlp.gate.hidden_mean, torch.zeros(16))

    def test_tied_head(self, tmp_path):
        model = LocMoeForCausalLM(make_config(tie_word_embeddings=True)).eval()
        model.save_pretrained(tmp_path)
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
        assert_close(LocMoeForCausalLM.from_pretrained(tmp_path)(_INPUT_IDS).logits, model(_INPUT_IDS).logits)

    def test_weights_from_the_caller(self, model):
        loaded = LocMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
        assert_close(loaded(_INPUT_IDS).logits, model(_INPUT_IDS).logits)
        fresh, info = LocMoeForCausalLM.from_pretrained(
            None, config=model.config, state_dict={}, output_loading_info=True
        )
        assert len(info["missing_keys"]) > 10
        assert all(parameter.isfinite().all() for parameter in fresh.parameters())
        wrong = {**model.state_dict(), "lm_head.weight": torch.zeros(3, 16)}
        with pytest.raises(CheckpointError, match="lm_head.weight"):
            LocMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=wrong)

    @pytest.mark.parametrize("folder", ["checkpoint", "sharded"])
    def test_device_map_dtype_and_offload(self, folder, model, tmp_path, request):
        source = request.getfixturevalue(folder)
        on_disk = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
        on_disk.update({"lm_head": "cpu", "model.layers.1": "disk"})
        for options in (
            {"device_map": "cpu"},
            {"device_map": "auto"},
            {"low_cpu_mem_usage": True},
            {"device_map": on_disk, "offload_folder": tmp_path / "offload"},
            {"disable_mmap": True},
        ):
            loaded = AutoModelForCausalLM.from_pretrained(source, **options)
            assert_close(loaded(_INPUT_IDS).logits, model(_INPUT_IDS).logits)
        assert AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_subfolder_and_names_of_the_hub(self, checkpoint, model, tmp_path):
        shutil.copytree(checkpoint, tmp_path / "outer" / "inner")
        loaded = LocMoeForCausalLM.from_pretrained(tmp_path / "outer", subfolder="inner")
        assert_close(loaded(_INPUT_IDS).logits, model(_INPUT_IDS).logits)
        as_hub_cache(checkpoint, tmp_path / "cache", "someone/good")
        loaded = AutoModelForCausalLM.from_pretrained("someone/good", cache_dir=tmp_path / "cache")
        assert_close(loaded(_INPUT_IDS).logits, model(_INPUT_IDS).logits)

    def test_resized_embeddings(self, model, tmp_path):
        model.resize_token_embeddings(60)
        model.save_pretrained(tmp_path)
        assert LocMoeForCausalLM.from_pretrained(tmp_path).lm_head.weight.shape == (60, 16)

    def test_meta_device(self, checkpoint):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
        assert model.lm_head.weight.is_meta

    def test_adapters(self, checkpoint, model, tmp_path):
        model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="default")
        expected = model(_INPUT_IDS).logits
        model.save_pretrained(tmp_path / "adapter")
        assert sorted(os.listdir(tmp_path / "adapter")) == [
            "adapter_config.json",
            "adapter_model.safetensors",
            "generation_config.json",
        ]
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(checkpoint)
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(_INPUT_IDS).logits, expected)
        base = LocMoeForCausalLM.from_pretrained(checkpoint)
        base.load_adapter(str(tmp_path / "adapter"))
        assert_close(base(_INPUT_IDS).logits, expected)


class TestSave:
    def test_state_dict(self, model, tmp_path):
        doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=dict(doubled))
        assert_close(load_file(tmp_path / "model.safetensors")["lm_head.weight"], doubled["lm_head.weight"])

    def test_not_the_main_process(self, model, tmp_path):
        model.save_pretrained(tmp_path / "target", is_main_process=False)
        assert os.listdir(tmp_path / "target") == []

    def test_names_of_folders(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("relative", "with/slash/", Path("a") / "path", str(tmp_path / "absolute")):
            model.save_pretrained(name)
            LocMoeForCausalLM.from_pretrained(name)

    def test_distributed_checkpoint_is_left_to_transformers(self, model, tmp_path):
        with pytest.raises(ValueError, match="distributed_checkpoint=True.*requires an FSDP- or TP-sharded model"):
            model.save_pretrained(tmp_path, distributed_checkpoint=True)

    @pytest.fixture
    def hub(self, monkeypatch) -> list[tuple[str, dict]]:
        calls = []

        def create(repo_id, **options):
            calls.append(("create", {"repo_id": repo_id, **options}))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload(**options):
            files = {file.name for file in Path(options["folder_path"]).iterdir()}
            assert set(options["allow_patterns"]) <= files
            calls.append(("upload", options))

        class Card:
            def save(self, path):
                Path(path).write_text("card")

        monkeypatch.setattr(pretrained_io, "create_repo", create)
        monkeypatch.setattr(pretrained_io, "upload_folder", upload)
        monkeypatch.setattr(pretrained_io, "create_and_tag_model_card", lambda *args, **kwargs: Card())
        return calls

    def test_push_to_hub(self, model, tmp_path, hub):
        (tmp_path / "private.txt").write_text("stays here")
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="name", token="t", private=True, create_pr=True)
        (created, creation), (uploaded, upload) = hub
        assert (created, uploaded) == ("create", "upload")
        assert creation == {"repo_id": "name", "exist_ok": True, "token": "t", "private": True}
        assert upload["repo_id"] == "me/name"
        assert {"config.json", "model.safetensors", "modeling_locmoe.py", "README.md"} <= set(upload["allow_patterns"])
        assert "private.txt" not in upload["allow_patterns"]
        assert upload["create_pr"] is True and upload["token"] == "t" and upload["commit_message"]
        assert (tmp_path / "README.md").read_text() == "card"

    def test_push_to_hub_takes_the_folders_name_and_its_card(self, model, tmp_path, hub):
        target = tmp_path / "my-model"
        target.mkdir()
        (target / "README.md").write_text("mine")
        model.save_pretrained(target, push_to_hub=True, commit_message="better")
        assert hub[0][1]["repo_id"] == "my-model"
        assert hub[1][1]["commit_message"] == "better"
        assert (target / "README.md").read_text() == "mine"

    def test_a_failing_upload_keeps_the_saved_files(self, model, tmp_path, hub, monkeypatch):
        def fail(**options):
            raise ConnectionError

        monkeypatch.setattr(pretrained_io, "upload_folder", fail)
        with pytest.raises(ConnectionError):
            model.save_pretrained(tmp_path, push_to_hub=True)
        assert_close(LocMoeForCausalLM.from_pretrained(tmp_path)(_INPUT_IDS).logits, model(_INPUT_IDS).logits)

    def test_a_configuration_pushes_its_code(self, tmp_path, monkeypatch):
        pushed = []
        monkeypatch.setattr(
            LocMoeConfig, "push_to_hub", lambda self, repo_id, **options: pushed.append((repo_id, options))
        )
        make_config().save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
        assert pushed == [("name", {"private": True})]
        assert (tmp_path / "name" / "modeling_locmoe.py").exists()
