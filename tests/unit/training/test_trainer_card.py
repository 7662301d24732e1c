# SPDX-License-Identifier: Apache-2.0
"""The model card of a Trainer's run: measured values, pushes, other models and adapters."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers import trainer as trainer_module

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.model_card import CARD_NAME, OUR_MARK
from hf_locmoe.training.trainer_card import facts_of_run, let_trainer_write_our_card


def _model() -> LocMoeForCausalLM:
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2)
    return LocMoeForCausalLM(LocMoeConfig(**shape, num_experts=4, max_position_embeddings=32))


def _trainer(model, output_dir, **arguments) -> Trainer:
    rows = torch.randint(0, 32, (8, 8)).tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    arguments = {"max_steps": 2, "save_strategy": "no", "report_to": "none", **arguments}
    args = TrainingArguments(str(output_dir), use_cpu=True, disable_tqdm=True, logging_steps=1, **arguments)
    return Trainer(model, args, train_dataset=dataset, eval_dataset=dataset)


def _card(output_dir) -> ModelCard:
    return ModelCard.load(output_dir / CARD_NAME)


def test_a_run_leaves_a_card_with_its_measured_values(tmp_path):
    trainer = _trainer(_model(), tmp_path / "my-run")
    trainer.train()
    assert "## Evaluation" not in _card(tmp_path / "my-run").text
    metrics = trainer.evaluate()
    text = _card(tmp_path / "my-run").text
    assert "# my-run" in text
    assert f"| perplexity | {math.exp(metrics['eval_loss']):.4g} |" in text
    assert f"load | {metrics['eval_routing/load_cv']:.4g} |" in text
    assert "| optimizer steps | 2 |" in text
    assert "| hardware | CPU |" in text


def test_a_card_that_cannot_be_made_does_not_stop_the_run(tmp_path):
    (tmp_path / CARD_NAME).write_text(f"---\nlanguage: not a language\n---\n{OUR_MARK}\n-->\n")
    trainer = _trainer(_model(), tmp_path)
    trainer.train()
    assert "not a language" in (tmp_path / CARD_NAME).read_text()


def test_create_model_card_takes_what_the_caller_knows(tmp_path):
    trainer = _trainer(_model(), tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(
        language="en",
        license="apache-2.0",
        tags="tiny",
        model_name="named",
        finetuned_from="someone/base",
        dataset_tags="Salesforce/wikitext",
        dataset="WikiText",
    )
    metadata = _card(tmp_path).data.to_dict()
    assert metadata["language"] == ["en"]
    assert metadata["license"] == "apache-2.0"
    assert {"tiny", "locmoe"} <= set(metadata["tags"])
    assert metadata["base_model"] == "someone/base"
    assert metadata["datasets"] == ["Salesforce/wikitext"]
    (index,) = metadata["model-index"]
    assert index["name"] == "named"
    assert index["results"][0]["dataset"]["name"] == "WikiText"
    assert "# named" in _card(tmp_path).text


def test_a_trainers_push_carries_our_card(tmp_path, monkeypatch):
    uploaded = []

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            uploaded.append(ModelCard.load(f"{folder_path}/{CARD_NAME}"))

    monkeypatch.setattr(trainer_module, "hf_api", Hub)
    trainer = _trainer(_model(), tmp_path)
    trainer.hub_model_id = "someone/pushed"
    trainer.train()
    metrics = trainer.evaluate()
    trainer.push_to_hub()
    (card,) = uploaded
    assert OUR_MARK in card.text
    assert 'from_pretrained("someone/pushed")' in card.text
    assert f"{math.exp(metrics['eval_loss']):.4g}" in card.text


def test_a_persons_page_survives_the_trainer(tmp_path):
    (tmp_path / CARD_NAME).write_text("# Mine\n")
    trainer = _trainer(_model(), tmp_path)
    trainer.train()
    trainer.create_model_card()
    assert (tmp_path / CARD_NAME).read_text() == "# Mine\n"


def test_other_models_and_adapters_get_their_own_cards(tmp_path):
    shape = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    other = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=32))
    adapter = peft.get_peft_model(_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for name, model in (("other", other), ("adapter", adapter)):
        trainer = _trainer(model, tmp_path / name)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        assert OUR_MARK not in _card(tmp_path / name).text


def test_the_evaluation_is_that_of_the_final_weights(tmp_path):
    trainer = _trainer(
        _model(),
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the first is the best
        learning_rate=0.01,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.best_global_step == 1
    assert losses[0] != losses[-1]
    facts = facts_of_run(trainer.args, trainer.state, trainer.model)
    assert facts["metrics"]["loss"] == losses[0]
    after = trainer.evaluate()
    assert facts_of_run(trainer.args, trainer.state, trainer.model)["metrics"]["loss"] == after["eval_loss"]


def test_nothing_is_claimed_of_a_run_that_has_not_happened(tmp_path):
    trainer = _trainer(_model(), tmp_path)
    assert facts_of_run(trainer.args, trainer.state, trainer.model) == {"architecture": LocMoeForCausalLM}


def test_the_adapter_is_put_on_once_and_fails_where_upstream_changed(monkeypatch):
    wrapped = Trainer.create_model_card
    let_trainer_write_our_card()
    assert Trainer.create_model_card is wrapped
    monkeypatch.setattr(Trainer, "create_model_card", lambda self, text: None)
    with pytest.raises(RuntimeError, match="create_model_card"):
        let_trainer_write_our_card()


def test_what_was_counted_between_nodes_is_on_the_card(tmp_path):
    trainer = _trainer(_model(), tmp_path)
    trainer.state.global_step = 1
    trainer.state.log_history.append({"step": 1, "routing/local_share": 0.75, "comm/bytes_inter_node": 12345.0})
    times = {"time/step_s": 2.0, "time/exchange_s": 0.7, "time/overlap_s": 0.2}
    trainer.state.log_history[-1] |= times
    training = facts_of_run(trainer.args, trainer.state, trainer.model)["training"]
    assert training["node-local share of the assignments, last logged"] == "75.0%"
    assert training["counted traffic between nodes, last logged"] == "12,345 bytes a step"
    assert training["time of a step, last logged"] == "2 s, 25.0% of it waiting for the exchange of tokens"
