# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pretrain
import training_run
from hf_locmoe import LocMoeConfig
from hf_locmoe.moe.baseline_gates import HashGate

from .conftest import RECIPES, TINY_MODEL, options


def test_end_to_end(trained):
    folder, metrics = trained
    assert {"config.json", "model.safetensors", "tokenizer.json", "trainer_state.json", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    for part in ("train", "eval"):
        assert 1 < metrics[f"{part}_perplexity"] < 2 * 300
    # no router loss in evaluation; blocks are of one length, so the mean over batches is the mean over tokens
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]), rel=1e-3)
    assert json.loads((folder / "all_results.json").read_text())["eval_perplexity"] == metrics["eval_perplexity"]
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, LocMoeConfig)
    assert {name: getattr(config, name) for name in TINY_MODEL} == TINY_MODEL
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config.vocab_size == len(tokenizer) == 300
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_it_learns(pretrain_options, trained, tmp_path):
    longer = pretrain.main([*pretrain_options, *options(output_dir=tmp_path, max_steps=40, learning_rate=1e-2)])
    assert longer["eval_perplexity"] < 0.5 * trained[1]["eval_perplexity"]


def test_the_same_run_twice(pretrain_options, checkpoint, tmp_path):
    pretrain.main([*pretrain_options, "--output_dir", str(tmp_path)])
    first, second = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_resumed_is_uninterrupted(pretrain_options, tmp_path):
    run = [*pretrain_options, "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "4"]
    pretrain.main([*run, "--output_dir", str(tmp_path / "whole")])
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    again = [*run, "--output_dir", str(tmp_path / "again"), "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")]
    pretrain.main(again)
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    # the newest checkpoint of the folder, by name
    (tmp_path / "again" / "checkpoint-2").mkdir(exist_ok=True)
    metrics = pretrain.main([*run, "--output_dir", str(tmp_path / "whole"), "--resume_from_checkpoint", "last"])
    assert metrics["train_runtime"] >= 0


def test_another_architecture_and_tokenizer(pretrain_options, checkpoint, tmp_path):
    run = [*pretrain_options, "--output_dir", str(tmp_path), "--tokenizer_name", str(checkpoint)]
    qwen = {
        "model.num_key_value_heads": 1,
        "model.model_type": "qwen3_moe",
        "model.moe_intermediate_size": 16,
        "model.num_experts_per_tok": 2,
    }
    pretrain.main([*run, *options(**qwen)])
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3_moe"
    assert (tmp_path / "tokenizer.json").read_text() == (checkpoint / "tokenizer.json").read_text()


def test_from_a_config_that_exists(pretrain_options, checkpoint, tmp_path):
    without_model = list(pretrain_options)
    while any(option.startswith("--model.") for option in without_model):
        index = next(i for i, option in enumerate(without_model) if option.startswith("--model."))
        del without_model[index : index + 2]
    start = ["--config_name", str(checkpoint), "--tokenizer_name", str(checkpoint), "--model.num_experts", "2"]
    pretrain.main([*without_model, *start, "--output_dir", str(tmp_path)])
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_experts == 2
    assert config.hidden_size == TINY_MODEL["hidden_size"]


def test_hash_tables_are_balanced_by_the_training_tokens(pretrain_options, tmp_path):
    pretrain.main([*pretrain_options, "--output_dir", str(tmp_path), "--model.gate_type", "hash"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    gates = [module for module in model.modules() if isinstance(module, HashGate)]
    assert len(gates) == 2
    untouched = HashGate(model.config)
    untouched.reset_buffers(lambda old, new: old.copy_(new))
    for gate in gates:
        assert not torch.equal(gate.expert_of_token, untouched.expert_of_token)


def test_balance_is_by_counts():
    config = LocMoeConfig(**{**TINY_MODEL, "vocab_size": 6, "num_experts": 2, "gate_type": "hash"})
    model = AutoModelForCausalLM.from_config(config)
    pretrain.balance_hash_gates(model, [{"input_ids": [0] * 6 + [1] * 3 + [2] * 2 + [3]}], 10)
    for gate in (module for module in model.modules() if isinstance(module, HashGate)):
        load = torch.zeros(2).index_add_(0, gate.expert_of_token[:4, 0], torch.tensor([6.0, 3.0, 2.0, 1.0]))
        assert load.tolist() == [6.0, 6.0]


def test_domains_reach_their_groups(pretrain_options, tmp_path, monkeypatch):
    """Two-level routing: tokens of a domain go to the experts of its group only, in training and in evaluation."""
    seen = []
    forward = HashGate.forward

    def recorded(self, hidden_states, input_ids=None, domain_ids=None, *args):
        outputs = forward(self, hidden_states, input_ids, domain_ids, *args)
        seen.append((domain_ids, outputs[2]))
        return outputs

    monkeypatch.setattr(HashGate, "forward", recorded)
    grouped = {"model.gate_type": "hash", "model.num_expert_groups": 2, "domain_column": "domain"}
    pretrain.main([*pretrain_options, *options(output_dir=tmp_path, **grouped)])
    assert seen
    for domain_ids, index in seen:
        assert torch.equal(index[:, 0] // 2, domain_ids)


def test_streaming_trains_on_the_same_blocks(pretrain_options, tmp_path, monkeypatch):
    """In the order of the file, a stream gives the run that the file gives."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n))  # the sampler's order: the file's
    for streaming in ("false", "true"):
        pretrain.main(
            [*pretrain_options, *options(output_dir=tmp_path / streaming, streaming=streaming, shuffle_buffer_size=0)]
        )
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("false", "true"))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_no_validation(pretrain_options, tmp_path, text_dir):
    run = list(pretrain_options)
    index = run.index("--validation_file")
    del run[index : index + 2]
    metrics = pretrain.main(
        [*run, *options(output_dir=tmp_path, validation_split_percentage=0, eval_strategy="steps")]
    )
    assert "eval_perplexity" not in metrics
    assert metrics["train_perplexity"] > 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model.num_expert": 4}, r"`model.num_expert` .* did you mean `num_experts`"),
        ({"model.model_type": "nothing"}, r"`model.model_type` \(nothing\)"),
        ({"model.vocab_size": 10}, r"`model.vocab_size` \(10\) must hold the tokenizer's 300 tokens"),
        ({"block_size": 65}, r"`block_size` \(65\) must not exceed `model.max_position_embeddings` \(64\)"),
        ({"model.num_experts": 64}, r"`num_experts` \(64\)"),  # of the config's own, passed on
        ({"domain_column": "domain"}, r"`model.num_expert_groups` is 1: raise it to 2"),
        ({"streaming": "true", "max_steps": -1}, r"`max_steps` \(-1\) must be positive"),
        ({"train_file": "missing.jsonl"}, r"`train_file` \(missing.jsonl\)"),
        ({"text_column": "body"}, r"`text_column` \(body\)"),
        ({"tokenizer_vocab_size": 10}, r"`vocab_size` \(10\)"),
        ({"dtype": "int8"}, r"`dtype` \(int8\)"),
    ],
)
def test_mistakes(pretrain_options, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        pretrain.main([*pretrain_options, *options(output_dir=tmp_path / "run", **settings)])
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_nothing_to_train(text_dir, tmp_path):
    with pytest.raises(ValueError, match="Give `model` .* or `config_name`"):
        pretrain.main(
            options(
                train_file=text_dir / "train.jsonl", output_dir=tmp_path, tokenizer_vocab_size=300, report_to="none"
            )
        )


def test_a_finished_run_is_not_replaced_unasked(pretrain_options, checkpoint):
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="already holds a model"):
        pretrain.main([*pretrain_options, "--output_dir", str(checkpoint)])
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_as_a_script(tmp_path):
    """One line on a mistake, no traceback; the exit status says that it failed."""
    done = subprocess.run(
        [sys.executable, RECIPES / "pretrain.py", "--train_file", "no.txt", "--output_dir", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: `train_file` (no.txt) matches no file")
    assert "Traceback" not in done.stderr


def test_the_bar_shows_loss_and_perplexity(pretrain_options, tmp_path, capsys):
    run = [*pretrain_options, *options(output_dir=tmp_path, disable_tqdm="false", eval_strategy="steps", eval_steps=2)]
    pretrain.main(run)
    shown = capsys.readouterr()
    assert "step 2: validation loss" in shown.out + shown.err
    assert "loss=" in shown.err
    assert "grad_norm" not in shown.out + shown.err
    assert "validation" in shown.out
    assert training_run.LossOnTheBar.__doc__
