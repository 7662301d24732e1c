# SPDX-License-Identifier: Apache-2.0
"""Trains a checkpoint further, on text or on pairs of prompt and completion: an ordinary `transformers.Trainer` script.

Usage:

    python recipes/finetune.py --model_name_or_path runs/tiny_cpu --train_file my.txt --output_dir runs/mine
    python recipes/finetune.py recipes/configs/finetune.yaml --prompt_column question --completion_column answer
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import hf_locmoe  # noqa: F401  registers `model_type: locmoe`; nothing else of it is used here
from arguments import parse_recipe, prepare_output_dir, run_as_script
from text_data import DataArguments, Documents, domain_groups, first_samples, load_documents, pack
from training_run import train_and_report


IGNORED = -100  # label of a token that is not to be predicted


@dataclass
class FinetuneArguments:
    """What to train further, and on which columns."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub name."})
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with prompts; only the completions are learned."}
    )
    completion_column: str | None = field(default=None, metadata={"help": "Column with their completions."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace a model already in `output_dir`."})

    def __post_init__(self):
        if (self.prompt_column is None) != (self.completion_column is None):
            missing = "prompt_column" if self.prompt_column is None else "completion_column"
            raise ValueError(f"`{missing}` is missing: prompts and completions need a column each.")


def encode_pairs(
    documents: Documents, tokenizer: PreTrainedTokenizerBase, args: FinetuneArguments, data_args: DataArguments
) -> Documents:
    """Tokenizes prompts and completions; the prompts' labels are ignored by the loss.

    Args:
        documents (`Dataset` or `IterableDataset`): With the two columns.
        tokenizer (`PreTrainedTokenizerBase`): Its end-of-sequence token closes each completion.
        args (`FinetuneArguments`): Names of the columns.
        data_args (`DataArguments`): `block_size` is the length at which a pair is cut.

    Returns:
        `Dataset` or `IterableDataset`: With `input_ids` and `labels` of equal length, pair by pair.

    Raises:
        ValueError: If the column of the completions is missing, or every prompt alone fills `block_size`.
    """
    columns = list(next(iter(documents)))
    if args.completion_column not in columns:
        raise ValueError(
            f"`completion_column` ({args.completion_column}) is not a column of the data: choose among "
            f"{', '.join(columns)}."
        )

    def encode(pair: dict) -> dict[str, list[int]]:
        prompt = tokenizer(pair[args.prompt_column] or "", add_special_tokens=False)["input_ids"]
        completion = tokenizer(pair[args.completion_column] or "", add_special_tokens=False)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
        return {
            "input_ids": (prompt + completion)[: data_args.block_size],
            "labels": ([IGNORED] * len(prompt) + completion)[: data_args.block_size],
        }

    pairs = documents.map(encode, remove_columns=columns).filter(
        lambda pair: any(label != IGNORED for label in pair["labels"][1:])
    )
    if next(iter(pairs), None) is None:
        raise ValueError(
            f"`block_size` ({data_args.block_size}) leaves no completion of any pair: raise it above the length of the "
            "prompts."
        )
    return pairs


def prepare_data(
    args: FinetuneArguments, data_args: DataArguments, training_args: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, Documents, Documents | None, Callable]:
    """The checkpoint's tokenizer, training and validation samples made with it, and the collator they need.

    Raises:
        ValueError: If the data or its columns are wrong, see `load_documents` and `pack`.
    """
    in_pairs = args.prompt_column is not None
    if in_pairs:
        data_args.text_column = args.prompt_column
    train_documents, validation_documents = load_documents(data_args, training_args.seed)
    if data_args.streaming and data_args.shuffle_buffer_size:
        train_documents = train_documents.shuffle(training_args.seed, buffer_size=data_args.shuffle_buffer_size)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with training_args.main_process_first(desc="tokenize"):  # the others find the results in the cache
        groups = domain_groups(train_documents, data_args)

        def prepare(documents: Documents | None, max_samples: int | None) -> Documents | None:
            if documents is None:
                return None
            if in_pairs:
                return first_samples(encode_pairs(documents, tokenizer, args, data_args), max_samples)
            return pack(documents, tokenizer, data_args, groups, max_samples)

        train = prepare(train_documents, data_args.max_train_samples)
        validation = prepare(validation_documents, data_args.max_eval_samples)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED) if in_pairs else default_data_collator
    return tokenizer, train, validation, collator


def load_model(args: FinetuneArguments) -> PreTrainedModel:
    """The checkpoint to train further."""
    return AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path, dtype=args.dtype, attn_implementation=args.attn_implementation
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the recipe.

    Args:
        argv (`list[str]`, *optional*): Command line without the program's name.

    Returns:
        `dict[str, float]`: What was measured, see `train_and_report`.
    """
    args, data_args, training_args = parse_recipe([FinetuneArguments, DataArguments, TrainingArguments], argv, __doc__)
    prepare_output_dir(training_args, args.overwrite_output_dir)
    set_seed(training_args.seed)
    tokenizer, train, validation, collator = prepare_data(args, data_args, training_args)
    return train_and_report(load_model(args), tokenizer, train, validation, training_args, collator)


if __name__ == "__main__":
    run_as_script(main)
