# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_perplexity
import finetune
import finetune_lora
import generate
from tests.tolerances import assert_close

from .conftest import TINY_RUN, documents, options, write_jsonl


RUN = {name: value for name, value in TINY_RUN.items() if name != "tokenizer_vocab_size"}


def command(checkpoint, text_dir, output_dir, **others) -> list[str]:
    files = {"train_file": text_dir / "train.jsonl", "validation_file": text_dir / "validation.jsonl"}
    return options(**{"model_name_or_path": checkpoint, "output_dir": output_dir, **files, **RUN, **others})


def test_on_text(checkpoint, trained, text_dir, tmp_path):
    metrics = finetune.main(command(checkpoint, text_dir, tmp_path, max_steps=20, learning_rate=1e-2))
    assert metrics["eval_perplexity"] < trained[1]["eval_perplexity"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_on_pairs_learns_completions_alone(checkpoint, text_dir, tmp_path):
    pairs = {"prompt_column": "prompt", "completion_column": "completion", "block_size": 48}
    metrics = finetune.main(command(checkpoint, text_dir, tmp_path, **pairs))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = documents(12, seed=1)
    wanted = 0
    for row in rows:
        prompt, completion = (len(tokenizer(row[name])["input_ids"]) for name in ("prompt", "completion"))
        wanted += max(0, min(prompt + completion + 1, 48) - prompt)
    assert metrics["eval_num_tokens"] == wanted


def test_labels_of_a_pair(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"q": "wave tide", "a": " reef"}, {"q": "moss " * 90, "a": "x"}])
    args = finetune.FinetuneArguments(model_name_or_path="", prompt_column="q", completion_column="a")
    data_args = finetune.DataArguments(train_file=[str(path)], block_size=64, validation_split_percentage=0)
    data_args.text_column = "q"
    pairs = finetune.encode_pairs(finetune.load_documents(data_args)[0], tokenizer, args, data_args)
    assert len(pairs) == 1  # the long prompt leaves nothing to learn
    prompt, completion = (tokenizer(text)["input_ids"] for text in ("wave tide", " reef"))
    assert pairs[0]["input_ids"] == [*prompt, *completion, tokenizer.eos_token_id]
    assert pairs[0]["labels"] == [-100] * len(prompt) + [*completion, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_column": "prompt"}, "`completion_column` is missing"),
        ({"completion_column": "completion"}, "`prompt_column` is missing"),
        ({"prompt_column": "ask", "completion_column": "completion"}, r"`text_column` \(ask\)"),
        ({"prompt_column": "prompt", "completion_column": "answer"}, r"`completion_column` \(answer\)"),
        ({"prompt_column": "text", "completion_column": "completion"}, r"`block_size` \(16\) leaves no completion"),
    ],
)
def test_mistakes(checkpoint, text_dir, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        finetune.main(command(checkpoint, text_dir, tmp_path, **settings))


def test_lora_on_attention_and_experts(checkpoint, text_dir, tmp_path):
    folders = {name: tmp_path / name for name in ("adapter", "merged")}
    run = command(checkpoint, text_dir, folders["adapter"], max_steps=10, learning_rate=1e-2)
    finetune_lora.main([*run, "--merged_output_dir", str(folders["merged"])])
    adapter = json.loads((folders["adapter"] / "adapter_config.json").read_text())
    assert set(adapter["target_parameters"]) == {"experts.up_proj", "experts.down_proj"}
    assert not (folders["adapter"] / "model.safetensors").exists()

    ids = torch.randint(3, 300, (2, 12))
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = base(input_ids=ids).logits
    with_adapter = PeftModel.from_pretrained(base, folders["adapter"]).eval()(input_ids=ids).logits
    merged_model = AutoModelForCausalLM.from_pretrained(folders["merged"])
    assert_close(merged_model(input_ids=ids).logits, with_adapter)
    assert (with_adapter - before).abs().max() > 1e-3
    old, new = (load_file(folder / "model.safetensors") for folder in (checkpoint, folders["merged"]))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any("self_attn.q_proj" in name for name in changed)
    assert any("experts.up_proj" in name for name in changed)
    assert any("experts.down_proj" in name for name in changed)
    assert not any("embed_tokens" in name or "norm" in name for name in changed)
    AutoTokenizer.from_pretrained(folders["merged"])


def test_lora_on_attention_alone(checkpoint, text_dir, tmp_path):
    settings = {"lora_experts": "false", "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "v_proj"]}
    finetune_lora.main(command(checkpoint, text_dir, tmp_path, **settings))
    adapter = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {"q_proj", "v_proj"}
    assert not adapter["target_parameters"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"lora_r": 0}, r"`lora_r` \(0\)"),
        ({"lora_dropout": 0.1}, r"`lora_dropout` \(0.1\) must be 0 with `lora_experts`"),
    ],
)
def test_lora_mistakes(checkpoint, text_dir, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        finetune_lora.main(command(checkpoint, text_dir, tmp_path, **settings))


def test_a_spread_model_is_not_merged(checkpoint, text_dir, tmp_path, monkeypatch):
    def spread_model(args):
        model = finetune.load_model(args)
        model._is_distributed_loading_by_transformers = True
        return model

    monkeypatch.setattr(finetune_lora, "load_model", spread_model)
    with pytest.raises(ValueError, match=r"`merged_output_dir` \(.*\) needs the whole model on one process"):
        finetune_lora.main(command(checkpoint, text_dir, tmp_path, merged_output_dir=tmp_path / "merged"))


def test_lora_on_experts_needs_experts():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"`lora_experts` \(True\) needs a model with experts"):
        finetune_lora.add_adapters(model, finetune_lora.LoraArguments())


def test_the_perplexity_of_a_checkpoint_is_that_of_its_run(checkpoint, trained, text_dir, tmp_path, capsys):
    run = {"model_name_or_path": checkpoint, "eval_file": text_dir / "validation.jsonl", "block_size": 16}
    result = evaluate_perplexity.main(options(**run, batch_size=3, output_file=tmp_path / "result.json"))
    metrics = trained[1]
    assert_close(result["perplexity"], metrics["eval_perplexity"])
    assert result["num_tokens"] == metrics["eval_num_tokens"]
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert f"perplexity {math.exp(result['loss']):.2f}" in capsys.readouterr().out
    streamed = evaluate_perplexity.main(options(**run, streaming="true", max_eval_samples=5))
    assert streamed["num_tokens"] == 5 * 15


def test_evaluation_of_nothing(checkpoint):
    with pytest.raises(ValueError, match=r"`eval_file` \(missing.jsonl\) matches no file"):
        evaluate_perplexity.main(options(model_name_or_path=checkpoint, eval_file="missing.jsonl"))
    with pytest.raises(ValueError, match="Give either `eval_file` or `dataset_name`"):
        evaluate_perplexity.main(options(model_name_or_path=checkpoint))


def test_generation(checkpoint, capsys):
    prompts = ["wave tide", "a much longer prompt than the other one"]
    run = options(model_name_or_path=checkpoint, prompts=prompts, max_new_tokens=5)
    texts = generate.main(run)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    assert generate.main(run) == texts
    together = generate.main([*run, "--temperature", "0"])
    alone = [
        generate.main(options(model_name_or_path=checkpoint, prompts=[prompt], max_new_tokens=5, temperature=0))[0]
        for prompt in prompts
    ]
    assert together == alone
    assert "--- 'wave tide'" in capsys.readouterr().out
