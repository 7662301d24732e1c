# SPDX-License-Identifier: Apache-2.0
"""Trains a causal language model from scratch: an ordinary `transformers.Trainer` script.

Usage:

    python recipes/pretrain.py recipes/configs/tiny_cpu.yaml
    python recipes/pretrain.py --config my.yaml --max_steps 1000 --model.num_experts 16
"""

import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_locmoe  # noqa: F401  registers `model_type: locmoe`; nothing else of it is used here
from arguments import parse_recipe, prepare_output_dir, run_as_script
from text_data import DataArguments, Documents, domain_groups, load_documents, pack, token_counts
from train_tokenizer import train_tokenizer
from training_run import train_and_report


logger = logging.getLogger(__name__)


@dataclass
class ModelArguments:
    """What to train."""

    model: dict | str | None = field(
        default=None,
        metadata={"help": "Fields of the model's config as a mapping; single ones as `--model.num_experts 16`."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "A config.json, its folder or a Hub name to start from; `model` changes it."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer folder or Hub name; one is trained on the text when left out."}
    )
    tokenizer_vocab_size: int = field(default=2048, metadata={"help": "Tokens of a tokenizer that is trained."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Of weights and optimizer state; `bf16: true` computes in bfloat16 anyway."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    hash_balance_samples: int = field(
        default=10_000, metadata={"help": "With `gate_type: hash`: training blocks counted to balance its table."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a model already in `output_dir`."})

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` ({self.dtype}) must be float32, bfloat16 or float16.")


def load_or_train_tokenizer(
    args: ModelArguments, data_args: DataArguments, documents: Documents, show_progress: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer that `tokenizer_name` names, or a new one trained on the documents."""
    if args.tokenizer_name is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        if tokenizer.eos_token_id is None:
            raise ValueError(
                f"`tokenizer_name` ({args.tokenizer_name}) has no end-of-sequence token to put between documents: set "
                "`eos_token` in its tokenizer_config.json."
            )
        return tokenizer
    # of a stream the beginning has to do
    texts: Iterator[str] = (document[data_args.text_column] or "" for document in islice(documents, 100_000))
    return train_tokenizer(texts, args.tokenizer_vocab_size, show_progress=show_progress)


def build_config(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, block_size: int) -> PreTrainedConfig:
    """The model's config: `config_name`, changed by `model`, with the tokenizer's size and special tokens.

    Raises:
        ValueError: If neither is given, `model` has an unknown `model_type` or field, or the vocabulary or the
            positions are too few.
    """
    fields: dict[str, Any] = dict(args.model or {})
    if not fields and args.config_name is None:
        raise ValueError("Give `model` (fields of the config) or `config_name`: there is nothing to train without.")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        fields.setdefault(name, getattr(tokenizer, name))
    fields.setdefault("vocab_size", len(tokenizer))
    if args.config_name is not None:
        config = AutoConfig.from_pretrained(args.config_name, **fields)
    else:
        model_type = fields.pop("model_type", "locmoe")
        if model_type not in transformers.CONFIG_MAPPING:
            raise ValueError(
                f"`model.model_type` ({model_type}) is not known to transformers: leave it out for locmoe."
            )
        check_field_names(fields, model_type)
        config = AutoConfig.for_model(model_type, **fields)
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"`model.vocab_size` ({config.vocab_size}) must hold the tokenizer's {len(tokenizer)} tokens: leave it out "
            "or raise it."
        )
    if config.max_position_embeddings < block_size:
        raise ValueError(
            f"`block_size` ({block_size}) must not exceed `model.max_position_embeddings` "
            f"({config.max_position_embeddings}): lower the one or raise the other."
        )
    return config


def check_field_names(fields: dict[str, Any], model_type: str) -> None:
    """Raises `ValueError` for a misspelt field, which transformers would keep as an attribute that nobody reads."""
    default = AutoConfig.for_model(model_type)
    known = set(default.to_dict())
    for name in fields:
        if hasattr(default, name) or hasattr(default, f"_{name}"):  # `experts_implementation`, kept under `_`
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        if close:
            raise ValueError(
                f"`model.{name}` is not a field of the config of {model_type}: did you mean `{close[0]}`?"
            )
        logger.warning("`model.%s` is not among the declared fields of the config of %s.", name, model_type)


def balance_hash_gates(model: PreTrainedModel, blocks: Documents, num_blocks: int) -> None:
    """Gives hash gates, which know tokens by their id alone, tables that spread the training text evenly."""
    gates = [module for module in model.modules() if hasattr(module, "balance_by_frequency")]
    if gates:
        counts = torch.from_numpy(token_counts(islice(blocks, num_blocks), model.config.vocab_size))
        for gate in gates:
            gate.balance_by_frequency(counts)


def check_domains(config: PreTrainedConfig, groups: dict[Any, int] | None) -> None:
    """Raises `ValueError` unless the experts have a group for every domain."""
    num_groups = getattr(config, "num_expert_groups", 1)
    if groups is not None and not set(groups.values()) <= set(range(num_groups)):
        raise ValueError(
            f"`domain_column` has domains in the groups {sorted(set(groups.values()))}, but "
            f"`model.num_expert_groups` is {num_groups}: raise it to {max(groups.values()) + 1}, or put several "
            "domains into one group with `domain_groups`."
        )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the recipe.

    Args:
        argv (`list[str]`, *optional*): Command line without the program's name.

    Returns:
        `dict[str, float]`: What was measured, see `train_and_report`.
    """
    model_args, data_args, training_args = parse_recipe(
        [ModelArguments, DataArguments, TrainingArguments], argv, __doc__
    )
    prepare_output_dir(training_args, model_args.overwrite_output_dir)
    set_seed(training_args.seed)

    train_documents, validation_documents = load_documents(data_args, training_args.seed)
    if data_args.streaming and data_args.shuffle_buffer_size:
        train_documents = train_documents.shuffle(training_args.seed, buffer_size=data_args.shuffle_buffer_size)
    with training_args.main_process_first(desc="tokenizer and blocks"):  # the others find the results in the cache
        tokenizer = load_or_train_tokenizer(
            model_args, data_args, train_documents, show_progress=not training_args.disable_tqdm
        )
        config = build_config(model_args, tokenizer, data_args.block_size)
        groups = domain_groups(train_documents, data_args)
        check_domains(config, groups)
        train = pack(train_documents, tokenizer, data_args, groups, data_args.max_train_samples)
        validation = None
        if validation_documents is not None:
            validation = pack(validation_documents, tokenizer, data_args, groups, data_args.max_eval_samples)

    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, model_args.dtype), attn_implementation=model_args.attn_implementation
    )
    balance_hash_gates(model, train, model_args.hash_balance_samples)
    if training_args.process_index == 0:
        size = f"{len(train):,} blocks" if hasattr(train, "__len__") else "a stream of blocks"
        print(
            f"{type(model).__name__} with {model.num_parameters():,} parameters, {size} of {data_args.block_size} tokens"
        )
        tokenizer.save_pretrained(Path(training_args.output_dir))
    return train_and_report(model, tokenizer, train, validation, training_args, default_data_collator)


if __name__ == "__main__":
    run_as_script(main)
