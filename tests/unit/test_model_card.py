# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that parses back and that the Hub accepts, known facts only, a person's page untouched."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from transformers.utils import hub

from hf_locmoe import (
    LocMoeConfig,
    LocMoeForCausalLM,
    LocMoeForSequenceClassification,
    LocMoeForTokenClassification,
    LocMoeModel,
    pretrained_io,
)
from hf_locmoe.model_card import CARD_NAME, TEMPLATE_PATH, build_model_card, is_generated, write_model_card


ROOT = Path(__file__).resolve().parents[2]
WIKITEXT = {"name": "WikiText", "type": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "split": "test"}


def _config(**overrides) -> LocMoeConfig:
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=3)
    return LocMoeConfig(**{**shape, "num_experts": 4, "mlp_only_layers": [0], **overrides})


def _metadata(card: ModelCard) -> dict:
    """As the Hub reads it: the YAML block, and JSON of it."""
    metadata = yaml.safe_load(REGEX_YAML_BLOCK.search(str(card)).group(2))
    json.dumps(metadata, allow_nan=False)
    return metadata


def test_a_card_of_nothing_but_a_config_claims_nothing_more():
    card = build_model_card(_config())
    metadata = _metadata(card)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["locmoe", "moe", "mixture-of-experts"],
    }
    for heading in ("## Evaluation", "## Routing", "## Training"):
        assert heading not in card.text
    for word in ("None", "nan", "unknown", "More Information Needed"):
        assert word not in card.text


def test_metadata_round_trip_with_everything_known():
    card = build_model_card(
        _config(),
        {"perplexity": 12.5, "accuracy": 0.5, "routing/load_cv": 0.25},
        ["Salesforce/wikitext", "code_search_net"],
        model_id="someone/locmoe-small",
        evaluation_data=WIKITEXT,
        language=["en", "code"],
        license="apache-2.0",
        base_model="someone/locmoe-base",
        tags=["tiny", "moe"],
        training={"steps": 100},
        hardware="2 x some device",
        date=datetime.date(2025, 3, 1),
    )
    metadata = _metadata(card)
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en", "code"]
    assert metadata["base_model"] == "someone/locmoe-base"
    assert metadata["datasets"] == ["Salesforce/wikitext", "code_search_net"]
    assert metadata["metrics"] == ["perplexity", "accuracy"]
    assert metadata["tags"] == ["locmoe", "moe", "mixture-of-experts", "tiny"]
    assert "model_name" not in metadata
    (index,) = metadata["model-index"]
    assert index["name"] == "locmoe-small"
    (result,) = index["results"]
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"] == WIKITEXT
    assert {entry["type"]: entry["value"] for entry in result["metrics"]} == {"perplexity": 12.5, "accuracy": 0.5}

    parsed = ModelCard(str(card))
    assert str(parsed) == str(card)
    assert parsed.data.to_dict() == card.data.to_dict()
    again = ModelCardData(**yaml.safe_load(parsed.data.to_yaml()))  # huggingface_hub's own validation
    assert [entry.metric_value for entry in again.eval_results] == [12.5, 0.5]
    for text in ("| steps | 100 |", "2 x some device", "2025-03-01", "| perplexity | 12.5 |", "load | 0.25 |"):
        assert text in card.text


def test_results_without_a_named_dataset_stay_in_the_text():
    card = build_model_card(_config(), {"perplexity": 12.5}, evaluation_data={"name": "my own files"})
    assert "model-index" not in _metadata(card)
    assert "| perplexity | 12.5 |" in card.text
    assert "my own files" in card.text


def test_values_that_are_no_measurements_are_left_out():
    card = build_model_card(
        _config(), {"loss": math.nan, "perplexity": math.inf, "accuracy": 0.5, "done": True}, evaluation_data=WIKITEXT
    )
    assert _metadata(card)["metrics"] == ["accuracy"]


@pytest.mark.parametrize(
    "model_class, auto_class, pipeline_tag",
    [
        (LocMoeForCausalLM, "AutoModelForCausalLM", "text-generation"),
        (LocMoeForSequenceClassification, "AutoModelForSequenceClassification", "text-classification"),
        (LocMoeForTokenClassification, "AutoModelForTokenClassification", "token-classification"),
        (LocMoeModel, "AutoModel", "feature-extraction"),
    ],
)
def test_task_and_parameter_counts_are_the_models(model_class, auto_class, pipeline_tag):
    config = _config(num_experts_per_tok=2)
    card = build_model_card(config, architecture=model_class.__name__)
    assert _metadata(card)["pipeline_tag"] == pipeline_tag
    assert f"{auto_class}.from_pretrained" in card.text
    model = model_class(config)
    expert = 2 * config.hidden_size * config.moe_intermediate_size
    total = model.num_parameters()
    assert f"| parameters | {total:,} |" in card.text
    assert f"| parameters used for a token | {total - 2 * 2 * expert:,} |" in card.text  # two layers, two idle experts


def test_a_class_made_from_ours_is_told_as_ours():
    class Mine(LocMoeForTokenClassification):
        pass

    assert _metadata(build_model_card(_config(), architecture=Mine))["pipeline_tag"] == "token-classification"


@pytest.mark.parametrize(
    "overrides, text",
    [
        ({"gate_type": "switch"}, "learned dense gate (Switch)"),
        ({"gate_affinity": "mean", "gate_relu": True}, "mean of the expert's group, ReLU"),
        ({"capacity_mode": "factor", "expert_capacity_factor": 1.25}, "factor 1.25, overflow: drop"),
        ({"capacity_mode": "critical", "capacity_overflow": "next_best"}, "Theorem 1, overflow: next best"),
        ({"balance_bias_update_rate": 0.02}, "step 0.02"),
        ({"num_shared_experts": 2}, "| shared experts | 2 |"),
        ({"gated_mlp": True, "hidden_act": "silu"}, "silu, gated"),
    ],
)
def test_the_architecture_is_told_from_the_config(overrides, text):
    assert text in build_model_card(_config(**overrides)).text


@pytest.mark.parametrize(
    "facts, field",
    [
        ({"language": "English"}, "`language` ('English')"),
        ({"datasets": "my data"}, "`datasets` ('my data')"),
        ({"base_model": "/home/me/model"}, "`base_model` ('/home/me/model')"),
        ({"tags": ["good", " "]}, "`tags` (' ')"),
        ({"architecture": "BertModel"}, "`architecture` ('BertModel')"),
    ],
)
def test_what_the_hub_would_refuse_is_refused_here(facts, field):
    with pytest.raises(ValueError) as error:
        build_model_card(_config(), **facts)
    assert field in str(error.value)


def test_a_value_cannot_break_the_table():
    assert "| data set | a \\| b c |" in build_model_card(_config(), training={"data set": "a | b\nc"}).text


# --- files --------------------------------------------------------------------------------------------------------------


def test_written_again_with_what_is_known_by_then(tmp_path):
    directory = tmp_path / "some-model"
    path = write_model_card(directory, _config())
    assert path == directory / CARD_NAME
    assert "# some-model" in path.read_text()
    assert write_model_card(directory, _config(), metrics={"perplexity": 9.0}) == path
    assert "| perplexity | 9 |" in path.read_text()
    assert [file.name for file in directory.iterdir()] == [CARD_NAME]


def test_what_was_set_on_the_hub_stays(tmp_path):
    path = write_model_card(tmp_path, _config(), license="mit", tags=["fast"])
    card = ModelCard.load(path)
    card.data.license, card.data.language = "apache-2.0", "en"
    card.save(path)
    write_model_card(tmp_path, _config(), metrics={"perplexity": 9.0}, tags="small")
    metadata = _metadata(ModelCard.load(path))
    assert metadata["license"] == "apache-2.0"
    assert metadata["language"] == ["en"]
    assert {"fast", "small", "locmoe"} <= set(metadata["tags"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# My model\nIt is good.\n",
        "---\nlicense: mit\n---\n# My model\n",
        "---\nlicense: [broken\n---\n# My model\n",
    ],
)
def test_a_persons_page_is_left_alone(tmp_path, text):
    (tmp_path / CARD_NAME).write_text(text)
    assert write_model_card(tmp_path, _config()) is None
    assert (tmp_path / CARD_NAME).read_text() == text


def test_removing_the_line_makes_the_card_a_persons(tmp_path):
    path = write_model_card(tmp_path, _config())
    lines = path.read_text().split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("<!-- Written by hf_locmoe"))
    path.write_text("\n".join(lines[:start] + lines[start + 2 :]))
    assert write_model_card(tmp_path, _config()) is None


def _card_of_a_push(monkeypatch, tags=None) -> ModelCard:
    """What transformers puts into a repository without a card."""

    def no_card(*args, **kwargs):
        raise EntryNotFoundError("no README.md")

    with monkeypatch.context() as patch:
        patch.setattr(hub.ModelCard, "load", no_card)
        return hub.create_and_tag_model_card("someone/model", tags)


def test_the_untouched_card_of_a_push_is_replaced_and_a_filled_in_one_is_not(monkeypatch):
    card = _card_of_a_push(monkeypatch, ["custom"])
    assert is_generated(str(card))
    assert not is_generated(str(card).replace("[More Information Needed]", "People like me", 1))


def test_an_unwritable_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        write_model_card(tmp_path / "file", _config())


def test_the_template_in_model_cards_is_the_one_in_use():
    assert (ROOT / "model_cards" / "TEMPLATE.md").read_text() == TEMPLATE_PATH.read_text()


# --- push ---------------------------------------------------------------------------------------------------------------


class _Hub:
    """The part of `HfApi` that a push touches."""

    def __init__(self):
        self.readme: str | None = None

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def create_branch(self, **kwargs):
        pass

    def create_commit(self, operations, **kwargs):
        for operation in operations:
            if operation.path_in_repo == CARD_NAME:
                self.readme = Path(operation.path_or_fileobj).read_text()


@pytest.mark.parametrize("on_the_hub", [None, "---\nlicense: mit\n---\n# By hand\n"])
def test_push_to_hub_of_a_model(monkeypatch, on_the_hub):
    api = _Hub()
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    card = _card_of_a_push(monkeypatch) if on_the_hub is None else ModelCard(on_the_hub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    LocMoeForCausalLM(_config()).push_to_hub("someone/pushed")
    if on_the_hub is None:
        assert 'from_pretrained("someone/pushed")' in api.readme
        assert _metadata(ModelCard(api.readme))["pipeline_tag"] == "text-generation"
    else:
        assert "# By hand" in api.readme


@pytest.mark.parametrize("in_the_folder", [None, "# By hand\n"])
def test_save_pretrained_with_a_push(monkeypatch, tmp_path, in_the_folder):
    card, uploaded = _card_of_a_push(monkeypatch), []
    monkeypatch.setattr(pretrained_io, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(pretrained_io, "create_repo", _Hub().create_repo)
    monkeypatch.setattr(
        pretrained_io,
        "upload_folder",
        lambda folder_path, **_: uploaded.append((Path(folder_path) / CARD_NAME).read_text()),
    )
    if in_the_folder is not None:
        (tmp_path / CARD_NAME).write_text(in_the_folder)
    LocMoeForCausalLM(_config()).save_pretrained(tmp_path, push_to_hub=True, repo_id="someone/pushed")
    (readme,) = uploaded
    if in_the_folder is None:
        assert 'from_pretrained("someone/pushed")' in readme
    else:
        assert readme == in_the_folder
