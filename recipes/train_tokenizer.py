# SPDX-License-Identifier: Apache-2.0
"""Trains a byte-level BPE tokenizer on text files.

Usage:

    python recipes/train_tokenizer.py --train_file runs/corpus/train.jsonl --vocab_size 2048 --output_dir tokenizer
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from arguments import parse_recipe, run_as_script
from text_data import DataArguments, load_documents


END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 256 + 2  # all bytes and the two special tokens


@dataclass
class TokenizerArguments:
    """Settings of a new tokenizer."""

    vocab_size: int = field(default=2048, metadata={"help": "Number of tokens, special ones included."})
    output_dir: str = field(default="tokenizer", metadata={"help": "Folder to save to."})


def train_tokenizer(texts: Iterator[str], vocab_size: int, show_progress: bool = True) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer. It can encode any text: every byte is a token.

    Args:
        texts (`Iterator[str]`): Training text.
        vocab_size (`int`): Number of tokens wanted; fewer come out when the text has too few pairs to merge.
        show_progress (`bool`): Whether to show progress bars.

    Returns:
        `PreTrainedTokenizerFast`: With `<|endoftext|>` as beginning and end and `<|padding|>` as padding.

    Raises:
        ValueError: If `vocab_size` has no room for all bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"`vocab_size` ({vocab_size}) must be at least {SMALLEST_VOCABULARY}, the 256 bytes and two special tokens."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, PADDING],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",  # what generation in batches needs
        clean_up_tokenization_spaces=False,
    )


def main(argv: list[str] | None = None) -> Path:
    """Command line: trains a tokenizer on the training text and saves it."""
    data_args, tokenizer_args = parse_recipe([DataArguments, TokenizerArguments], argv, __doc__)
    documents, _ = load_documents(data_args)
    texts = (document[data_args.text_column] or "" for document in documents)
    tokenizer = train_tokenizer(texts, tokenizer_args.vocab_size)
    tokenizer.save_pretrained(tokenizer_args.output_dir)
    print(f"tokenizer of {len(tokenizer):,} tokens in {tokenizer_args.output_dir}")
    return Path(tokenizer_args.output_dir)


if __name__ == "__main__":
    run_as_script(main)
