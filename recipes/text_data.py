# SPDX-License-Identifier: Apache-2.0
"""Text for every recipe: local files or a dataset of the Hub in, blocks of token ids of one length out."""

import glob
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

FORMATS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
Documents = Dataset | IterableDataset


@dataclass
class DataArguments:
    """Where the text comes from and how it is cut."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Local .txt, .json, .jsonl, .parquet or .csv files; patterns allowed."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "The same, for validation."})
    dataset_name: str | None = field(default=None, metadata={"help": "In place of files: a dataset of the Hub."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_split: str = field(default="train", metadata={"help": "Its split for training."})
    validation_split: str = field(default="validation", metadata={"help": "Its split for validation, if it has one."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the training documents held out when there is no validation data."}
    )
    validation_documents: int = field(
        default=500, metadata={"help": "The same for a stream: this many documents from its head."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    domain_column: str | None = field(
        default=None,
        metadata={"help": "Column with each document's domain, for experts in groups (`num_expert_groups`)."},
    )
    domain_groups: dict | str | None = field(
        default=None,
        metadata={"help": "Expert group of each domain, as `{law: 0, code: 1}`; by alphabet when left out."},
    )
    block_size: int = field(default=1024, metadata={"help": "Tokens in a training sample."})
    streaming: bool = field(default=False, metadata={"help": "Read while training and keep nothing on disk."})
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "Documents of a stream that are shuffled among each other; 0 keeps its order."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most so many training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most so many validation blocks."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self):
        for name in ("train_file", "validation_file"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if (self.train_file is None) == (self.dataset_name is None):
            given = "both" if self.train_file else "neither"
            raise ValueError(
                f"Give either `train_file` or `dataset_name` ({given} given): one source of text is needed."
            )
        if self.block_size < 2:
            raise ValueError(
                f"`block_size` ({self.block_size}) must be 2 or more: a token to read and one to predict."
            )
        if not 0 <= self.validation_split_percentage < 100:
            raise ValueError(
                f"`validation_split_percentage` ({self.validation_split_percentage}) must be at least 0 and below 100."
            )


def local_files(patterns: list[str], name: str) -> tuple[str, list[str]]:
    """Format and paths of local files.

    Args:
        patterns (`list[str]`): Paths or glob patterns.
        name (`str`): The option they came from, for messages.

    Returns:
        `tuple[str, list[str]]`: The `datasets` loader that reads them, and the sorted paths.

    Raises:
        ValueError: If nothing matches, a file is empty, or the formats are unknown or mixed.
    """
    paths: list[str] = []
    for pattern in patterns:
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not matches:
            raise ValueError(f"`{name}` ({pattern}) matches no file: check the path.")
        paths += matches
    formats = set()
    for path in paths:
        suffixes = [suffix for suffix in Path(path).suffixes if suffix not in COMPRESSIONS]
        formats.add(FORMATS.get(suffixes[-1].lower()) if suffixes else None)
        if Path(path).stat().st_size == 0:
            raise ValueError(f"`{name}` ({path}) is empty: name a file with text.")
    if len(formats) != 1 or None in formats:
        raise ValueError(f"`{name}` ({', '.join(paths)}) must be files of one format among {', '.join(FORMATS)}.")
    return formats.pop(), paths


def load_documents(args: DataArguments, seed: int = 0) -> tuple[Documents, Documents | None]:
    """Loads training and validation documents.

    Where there is no validation data some of the training documents are held out: a random share of them, or the end of
    a plain text file, whose lines belong together, or the head of a stream.

    Args:
        args (`DataArguments`): What to load.
        seed (`int`): Choice of the documents held out.

    Returns:
        `tuple`: Training and validation documents; the latter `None` where nothing is held out.

    Raises:
        ValueError: If the source is missing, cannot be read, has no text or lacks a column.
    """
    parts = _load(args)
    train, validation = parts[args.train_split], parts.get(args.validation_split)
    for part, name in ((train, "train"), (validation, "validation")):
        if part is not None:
            _check_columns(part, args, name)
    if validation is None and args.streaming and args.validation_documents:
        rest = train.skip(args.validation_documents)
        if next(iter(rest), None) is None:
            raise ValueError(
                f"`validation_documents` ({args.validation_documents}) leaves no document to train on: lower it, or pass "
                "`--validation_file`."
            )
        return rest, train.take(args.validation_documents)
    if validation is None and not args.streaming and args.validation_split_percentage:
        if len(train) < 2:
            raise ValueError(
                "`train_file` holds a single document, so none can be held out for validation: pass "
                "`--validation_file`, or `--validation_split_percentage 0` to train without."
            )
        held_out = max(1, round(len(train) * args.validation_split_percentage / 100))
        split = train.train_test_split(test_size=held_out, shuffle=not is_line_wise(args), seed=seed)
        return split["train"], split["test"]
    return train, validation


def _load(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    if args.dataset_name is not None:
        parts = load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
        if args.train_split not in parts:
            raise ValueError(
                f"`train_split` ({args.train_split}) is not a split of {args.dataset_name}: choose among "
                f"{', '.join(parts)}."
            )
        return parts
    kind, train_paths = local_files(args.train_file, "train_file")
    data_files = {args.train_split: train_paths}
    if args.validation_file is not None:
        validation_kind, data_files[args.validation_split] = local_files(args.validation_file, "validation_file")
        if validation_kind != kind:
            raise ValueError(f"`validation_file` ({validation_kind}) must have the format of `train_file` ({kind}).")
    # lines of a text file keep their ends, so that joined again they are the text
    options = {"keep_linebreaks": True} if kind == "text" else {}
    try:
        return load_dataset(kind, data_files=data_files, streaming=args.streaming, **options)
    except DatasetGenerationError as error:
        raise ValueError(
            f"`train_file` or `validation_file` cannot be read as {kind} ({error.__cause__ or error}): check that "
            "every line holds the same fields."
        ) from error


def is_line_wise(args: DataArguments) -> bool:
    """Whether the documents are lines of plain text, which join without a mark between them."""
    return args.train_file is not None and local_files(args.train_file, "train_file")[0] == "text"


def _check_columns(documents: Documents, args: DataArguments, part: str) -> None:
    try:
        first = next(iter(documents))
    except StopIteration:
        raise ValueError(f"The {part} data holds no document: name a source with text.") from None
    for option in ("text_column", "domain_column"):
        column = getattr(args, option)
        if column is not None and column not in first:
            raise ValueError(
                f"`{option}` ({column}) is not a column of the {part} data: choose among {', '.join(first)}."
            )
    text = first[args.text_column]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"`text_column` ({args.text_column}) holds {type(text).__name__} in the {part} data: it must hold text."
        )


def domain_groups(documents: Documents, args: DataArguments) -> dict[Any, int] | None:
    """The expert group of each domain.

    Args:
        documents (`Dataset` or `IterableDataset`): Training documents.
        args (`DataArguments`): With `domain_column` and, for streams, `domain_groups`.

    Returns:
        `dict`, *optional*: Domain to group; `None` without a `domain_column`.

    Raises:
        ValueError: If the domains of a stream are not listed.
    """
    if args.domain_column is None:
        return None
    if args.domain_groups:
        return dict(args.domain_groups)
    if isinstance(documents, IterableDataset):
        raise ValueError(
            "`domain_groups` must list the domains of a stream, which cannot be known beforehand, as "
            "`domain_groups: {law: 0, code: 1}` in the YAML file."
        )
    return {domain: group for group, domain in enumerate(sorted(documents.unique(args.domain_column)))}


def pack(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    args: DataArguments,
    groups: dict[Any, int] | None = None,
    max_samples: int | None = None,
) -> Documents:
    """Tokenizes documents, joins them and cuts the result into blocks of `block_size` tokens.

    Documents are joined by the tokenizer's end-of-sequence token; lines of plain text are joined as they are. What is
    left of a batch of documents after its last full block is dropped.

    Args:
        documents (`Dataset` or `IterableDataset`): With the text column and, with `groups`, the domain column.
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer.
        args (`DataArguments`): Names of the columns and block size.
        groups (`dict`, *optional*): Expert group of each domain.
        max_samples (`int`, *optional*): Stop after so many blocks.

    Returns:
        `Dataset` or `IterableDataset`: With `input_ids` and `labels`, each of `block_size` tokens, and with `groups`
        also `domain_ids` of the same length: the group of the document each token comes from.

    Raises:
        ValueError: If the text does not fill one block, or a domain is not in `groups`.
    """
    line_wise = is_line_wise(args)
    options: dict[str, Any] = {
        "batched": True,
        "batch_size": 10_000 if line_wise else 1_000,
        "remove_columns": list(next(iter(documents))),
        "fn_kwargs": {
            "tokenizer": tokenizer,
            "block_size": args.block_size,
            "text_column": args.text_column,
            "end_of_document": None if line_wise else tokenizer.eos_token_id,
            "domain_column": args.domain_column if groups is not None else None,
            "groups": groups,
        },
    }
    if isinstance(documents, Dataset):
        options |= {"num_proc": args.preprocessing_num_workers, "desc": "tokenize"}
    blocks = first_samples(documents.map(_encode_and_cut, **options), max_samples)
    if next(iter(blocks), None) is None:
        raise ValueError(
            f"`block_size` ({args.block_size}) is more than the tokens that the text has: choose a smaller one, or add "
            "text."
        )
    return blocks


def first_samples(samples: Documents, count: int | None) -> Documents:
    """The first `count` samples, or all where there are fewer or `count` is `None`."""
    if count is None:
        return samples
    if isinstance(samples, IterableDataset):
        return samples.take(count)
    return samples.select(range(min(count, len(samples))))


def _encode_and_cut(
    batch: dict[str, list],
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    text_column: str,
    end_of_document: int | None,
    domain_column: str | None,
    groups: dict[Any, int] | None,
) -> dict[str, np.ndarray]:
    texts = [text or "" for text in batch[text_column]]
    tail = [] if end_of_document is None else [end_of_document]
    documents = [
        np.array(ids + tail, dtype=np.int64) if ids else np.zeros(0, dtype=np.int64)
        for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    ]
    columns = {"input_ids": np.concatenate(documents)}
    columns["labels"] = columns["input_ids"]
    if groups is not None:
        unknown = set(batch[domain_column]) - set(groups)
        if unknown:
            raise ValueError(
                f"`domain_groups` ({', '.join(map(str, groups))}) lacks the domain {sorted(map(str, unknown))[0]!r}: "
                "give it a group."
            )
        columns["domain_ids"] = np.repeat(
            [groups[domain] for domain in batch[domain_column]], [len(ids) for ids in documents]
        )
    full = len(columns["input_ids"]) // block_size * block_size
    return {name: tokens[:full].reshape(-1, block_size) for name, tokens in columns.items()}


def token_counts(blocks: Iterable[dict[str, Any]], vocab_size: int) -> np.ndarray:
    """How often each token occurs.

    Args:
        blocks (`Iterable[dict]`): Samples with `input_ids`.
        vocab_size (`int`): Number of token ids.

    Returns:
        `np.ndarray` of shape `(vocab_size,)`, int64.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for block in blocks:
        counts += np.bincount(block["input_ids"], minlength=vocab_size)
    return counts
