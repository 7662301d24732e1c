# SPDX-License-Identifier: Apache-2.0
"""
The model card of a checkpoint: metadata that the Hub accepts and a page, from the configuration and from measured values.

A fact that is not known is left out. The text is `model_card_template.md`; a README.md that a person wrote, or made their
own by removing the line that says who wrote it, is never touched.
"""

from __future__ import annotations

import datetime
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from .configuration_locmoe import LocMoeConfig
from .modeling_locmoe import (
    LocMoeForCausalLM,
    LocMoeForSequenceClassification,
    LocMoeForTokenClassification,
    LocMoeModel,
)


CARD_NAME = "README.md"
TEMPLATE_PATH = Path(__file__).with_name("model_card_template.md")
OUR_MARK = "<!-- Written by hf_locmoe from the configuration and from what was measured."
# A Trainer's card asks, as ours does, to remove the comment from a card that was completed.
TRAINER_MARK = (
    "<!-- This model card has been generated automatically according to the information the Trainer had access to."
)
# What `push_to_hub` puts into huggingface_hub's template: nobody's words as long as nothing else was filled in.
PUSHED_DESCRIPTION = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been"
    " automatically generated."
)

# model class -> Auto class, pipeline tag, what it is called in a sentence
_TASKS: dict[type[nn.Module], tuple[str, str, str]] = {
    LocMoeForCausalLM: ("AutoModelForCausalLM", "text-generation", "causal language model"),
    LocMoeForSequenceClassification: ("AutoModelForSequenceClassification", "text-classification", "text classifier"),
    LocMoeForTokenClassification: ("AutoModelForTokenClassification", "token-classification", "token classifier"),
    LocMoeModel: ("AutoModel", "feature-extraction", "decoder without a head"),
}
_GATES = {
    "locmoe": "grouped average pooling, no parameters",
    "switch": "learned dense gate (Switch)",
    "hash": "balanced hash of the token id",
}
_ROUTING_NAMES = {
    "routing/load_cv": "coefficient of variation of the experts' load",
    "routing/max_load": "load of the most loaded expert, as a multiple of the mean",
    "routing/drop_rate": "share of assignments dropped",
    "routing/reroute_rate": "share of assignments rerouted",
    "routing/entropy": "entropy of a token's distribution, in units of log(number of experts)",
    "routing/cosine": "cosine of a token with its expert's gate weight",
    "routing/capacity": "capacity factor in force",
    "router_aux_loss": "load-balancing loss",
}
_KEPT_METADATA = ("license", "language", "base_model", "datasets")
_METADATA = re.compile(r"\A\s*---\n.*?\n---[ \t]*(\n|\Z)", re.DOTALL)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_SUMMARY = (
    "A LocMoE {task}: a decoder whose feed-forward network is, in {num_moe_layers} of its {num_hidden_layers} layers, a"
    " mixture of {num_experts} experts, {num_experts_per_tok} of them for each token, trained with `hf_locmoe`."
)


def build_model_card(
    config: LocMoeConfig,
    metrics: Mapping[str, float] | None = None,
    datasets: str | Sequence[str] | None = None,
    *,
    architecture: str | type[nn.Module] | None = None,
    model_id: str | None = None,
    evaluation_data: Mapping[str, str] | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    base_model: str | None = None,
    tags: str | Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    hardware: str | None = None,
    date: datetime.date | None = None,
) -> ModelCard:
    """
    A card for one checkpoint.

    Args:
        config ([`LocMoeConfig`]): The checkpoint's.
        metrics (`Mapping[str, float]`, *optional*): Measured values by name ("perplexity", "accuracy", ...); those that
            telemetry names `routing/...` get a table of their own. Values that are not finite are left out.
        datasets (`str` or `Sequence[str]`, *optional*): Hub names of the data the model was trained on.
        architecture (`str` or `type`, *optional*): The model class, one of ours or made from one, or its name;
            `config.architectures` if not given, else the causal language model.
        model_id (`str`, *optional*): Hub name or folder of the checkpoint.
        evaluation_data (`Mapping[str, str]`, *optional*): What the metrics were measured on: `name`, and `type` (Hub
            name), `config`, `split` where known. With `name` and `type` the metrics become the card's `model-index`.
        language (`str` or `Sequence[str]`, *optional*): ISO 639 codes, "code" or "multilingual".
        license (`str`, *optional*): A license identifier of the Hub, "apache-2.0" for example.
        base_model (`str`, *optional*): Hub name of the model this one was made from.
        tags (`str` or `Sequence[str]`, *optional*): Added to ours.
        training (`Mapping[str, Any]`, *optional*): Facts of the run, in words of your own, as a table.
        hardware (`str`, *optional*): What it was trained on.
        date (`datetime.date`, *optional*): When.

    Returns:
        `huggingface_hub.ModelCard`.

    Raises:
        ValueError: A dataset, model, language or tag that the Hub would refuse.
    """
    model_class = _model_class(config, architecture)
    auto_class, pipeline_tag, task = _TASKS[model_class]
    numbers = {name: float(value) for name, value in (metrics or {}).items() if _is_finite_number(value)}
    measured = {name: value for name, value in numbers.items() if name not in _ROUTING_NAMES}
    data = {key: value for key, value in (evaluation_data or {}).items() if value}
    title = Path(model_id).name if model_id else "LocMoE"
    card_data = ModelCardData(
        language=_checked_languages(language),
        license=license,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[*dict.fromkeys(["locmoe", "moe", "mixture-of-experts", *_checked_tags(tags)])],
        base_model=_checked_repo("base_model", base_model),
        datasets=[_checked_repo("datasets", name) for name in _listed(datasets)] or None,
        metrics=list(measured) or None,
        **_model_index(title, pipeline_tag, measured, data),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE_PATH),
        title=title,
        model_id=model_id or "path/to/checkpoint",
        auto_class=auto_class,
        summary=_SUMMARY.format(
            task=task,
            num_moe_layers=len(config.sparse_layers),
            num_hidden_layers=config.num_hidden_layers,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
        ),
        architecture=_architecture_table(config, model_class),
        evaluation={name.replace("_", " "): _shown(value) for name, value in measured.items()},
        evaluation_data=_described(data),
        routing={text: _shown(numbers[name]) for name, text in _ROUTING_NAMES.items() if name in numbers},
        training=_training_table(training, datasets, hardware, date),
    )


def write_model_card(save_directory: str | os.PathLike[str], config: LocMoeConfig, **facts: Any) -> Path | None:
    """
    Writes the card of [`build_model_card`] into a checkpoint's folder. License, language, base model and datasets of an
    earlier card that a program wrote, and its tags, stay unless given anew: the Hub's pages let people set them.

    Args:
        save_directory (`str` or `os.PathLike`): The folder; made if missing.
        config ([`LocMoeConfig`]): The checkpoint's.
        facts: As for [`build_model_card`]; `model_id` is the folder's name if not given.

    Returns:
        `pathlib.Path`: The file; None where a person's README.md was left alone.

    Raises:
        OSError: The folder cannot be written to. An earlier card is then as it was.
        ValueError: See [`build_model_card`].
    """
    path = Path(save_directory, CARD_NAME)
    facts = {name: value for name, value in facts.items() if value is not None}
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if not is_generated(text):
            return None
        earlier = ModelCard(text, ignore_metadata_errors=True).data
        facts = {name: earlier[name] for name in _KEPT_METADATA if earlier.get(name)} | facts
        facts["tags"] = [*_listed(earlier.get("tags")), *_listed(facts.get("tags"))]
    facts.setdefault("model_id", Path(save_directory).resolve().name)
    card = build_model_card(config, **facts)
    unfinished = path.with_name(f"_{CARD_NAME}.tmp")
    card.save(unfinished)
    os.replace(unfinished, path)
    return path


def is_generated(text: str) -> bool:
    """Whether a README.md is a program's: it says so, or is the Hub's template with nothing filled in."""
    flowing = " ".join(text.split())
    if OUR_MARK in flowing or TRAINER_MARK in flowing:
        return True
    untouched = ModelCard.from_template(
        ModelCardData(library_name="transformers"), model_description=PUSHED_DESCRIPTION
    )
    return _METADATA.sub("", text).split() == untouched.text.split()


def _model_class(config: LocMoeConfig, architecture: str | type[nn.Module] | None) -> type[nn.Module]:
    by_name = {model_class.__name__: model_class for model_class in _TASKS}
    if isinstance(architecture, type):
        names = [base.__name__ for base in architecture.__mro__]
    else:
        names = [architecture or (config.architectures or [LocMoeForCausalLM.__name__])[0]]
    known = [by_name[name] for name in names if name in by_name]
    if not known:
        raise ValueError(f"`architecture` ({names[0]!r}) must be one of {', '.join(by_name)}, or made from one.")
    return known[0]


def _architecture_table(config: LocMoeConfig, model_class: type[nn.Module]) -> dict[str, str]:
    total, active = _count_parameters(config, model_class)
    rows = {
        "parameters": f"{total:,}",
        "parameters used for a token": f"{active:,}",
        "hidden size": config.hidden_size,
        "layers": f"{config.num_hidden_layers}, of which mixtures of experts: {len(config.sparse_layers)}",
        "experts": f"{config.num_experts} of width {config.moe_intermediate_size}, {config.num_experts_per_tok} a token",
        "shared experts": config.num_shared_experts or None,
        "activation": f"{config.hidden_act}{', gated' if config.gated_mlp else ''}",
        "gate": _GATES[config.gate_type],
        "gate logits": _gate_logits(config),
        "expert groups": config.num_expert_groups if config.num_expert_groups > 1 else None,
        "balance bias": f"step {config.balance_bias_update_rate:g}" if config.balance_bias_update_rate else None,
        "load-balancing loss": f"coefficient {config.router_aux_loss_coef:g}",
        "locality loss": f"coefficient {config.locality_loss_coef:g} (zero on one node)",
        "capacity in training": _capacity(config),
        "attention heads": f"{config.num_attention_heads}, key-value heads: {config.num_key_value_heads}",
        "longest sequence": f"{config.max_position_embeddings:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens",
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _gate_logits(config: LocMoeConfig) -> str | None:
    if config.gate_type != "locmoe":
        return None
    kind = (
        "cosine of the token and the gate weight" if config.gate_affinity == "cosine" else "mean of the expert's group"
    )
    extras = {"ReLU": config.gate_relu, "centred": config.gate_centering, "rotated": config.gate_rotation}
    return ", ".join([kind, *(name for name, used in extras.items() if used)])


def _capacity(config: LocMoeConfig) -> str:
    if config.capacity_mode == "dropless":
        return "unbounded"
    bound = (
        f"factor {config.expert_capacity_factor:g}" if config.capacity_mode == "factor" else "lower bound of Theorem 1"
    )
    return f"{bound}, overflow: {config.capacity_overflow.replace('_', ' ')}"


def _count_parameters(config: LocMoeConfig, model_class: type[nn.Module]) -> tuple[int, int]:
    """All parameters, and those that one token passes through: an expert counts k times in n."""
    with torch.device("meta"):
        model = model_class(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    return total, total - routed * (config.num_experts - config.num_experts_per_tok) // config.num_experts


def _model_index(
    title: str, pipeline_tag: str, measured: Mapping[str, float], data: Mapping[str, str]
) -> dict[str, Any]:
    """The Hub wants a dataset's type and name with every result; without them a result stays in the text."""
    if not measured or not {"name", "type"} <= data.keys():
        return {}
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=data["type"],
            dataset_name=data["name"],
            dataset_config=data.get("config"),
            dataset_split=data.get("split"),
            metric_type=name,
            metric_value=value,
        )
        for name, value in measured.items()
    ]
    return {"model_name": title, "eval_results": results}


def _training_table(
    training: Mapping[str, Any] | None,
    datasets: str | Sequence[str] | None,
    hardware: str | None,
    date: datetime.date | None,
) -> dict[str, str]:
    rows = {"data": ", ".join(_listed(datasets)) or None, **(training or {})}
    rows |= {"hardware": hardware, "date": date.isoformat() if date is not None else None}
    return {name: _shown(value) for name, value in rows.items() if value is not None}


def _described(data: Mapping[str, str]) -> str:
    """`name (config, split)`, as far as known."""
    details = ", ".join(data[key] for key in ("config", "split") if key in data)
    name = data.get("name", "")
    return f"{name} ({details})" if name and details else name


def _shown(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())  # one cell of a table


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _checked_languages(language: str | Sequence[str] | None) -> list[str] | None:
    for code in _listed(language):
        if not _LANGUAGE.fullmatch(code):
            raise ValueError(
                f"`language` ({code!r}) must be an ISO 639 code of two or three lower-case letters, 'code' or"
                " 'multilingual': 'en' for English."
            )
    return _listed(language) or None


def _checked_tags(tags: str | Sequence[str] | None) -> list[str]:
    for tag in _listed(tags):
        if not isinstance(tag, str) or not tag.strip():
            raise ValueError(f"`tags` ({tag!r}) must be words: leave empty ones out.")
    return _listed(tags)


def _checked_repo(name: str, value: str | None) -> str | None:
    if value is not None and not is_hub_name(value):
        raise ValueError(
            f"`{name}` ({value!r}) must be a name on the Hub, `owner/name` in letters, digits, '-', '_' and '.': leave it"
            " out where the data or the model is not there."
        )
    return value


def is_hub_name(value: str | None) -> bool:
    """Whether the Hub could have a repository of this name."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


__all__ = ["CARD_NAME", "build_model_card", "is_generated", "is_hub_name", "write_model_card"]
