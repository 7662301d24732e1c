# SPDX-License-Identifier: Apache-2.0
"""Trains a small LocMoE on text that every Python installation has, and shows what it learned. About three minutes.

Everything here is done by the recipes, called as a user would call them on other data.

Usage:

    python recipes/demo.py
    python recipes/demo.py --output_dir somewhere --max_steps 1000
"""

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

import pretrain
import train_tokenizer
from arguments import parse_recipe, run_as_script
from corpus import build_corpus, write_corpus
from hf_locmoe import cli
from text_data import DataArguments, load_documents, pack, token_counts


RECIPES = Path(__file__).resolve().parent
MARKER = ".made_by_the_demo"  # a folder without it is nobody's to delete
PROMPTS = ['The "with" statement is used to', "    def __init__(self", "U+0394 Lu GREEK CAPITAL LETTER"]


@dataclass
class DemoArguments:
    """The demo's few settings; those of the model and its training are in the recipe's configuration."""

    output_dir: str = field(default="demo_output", metadata={"help": "Folder for everything; replaced if the demo's."})
    recipe_config: str = field(
        default=str(RECIPES / "configs" / "tiny_cpu.yaml"), metadata={"help": "Configuration given to pretrain.py."}
    )
    max_steps: int | None = field(default=None, metadata={"help": "Training steps in place of the configuration's."})
    max_chars_per_domain: int = field(default=800_000, metadata={"help": "Size of the corpus."})


class Stages:
    """Headings with the time since the start."""

    def __init__(self, count: int):
        self.count = count
        self.done = 0
        self.started = time.monotonic()

    def next(self, title: str) -> None:
        """Prints the heading of the next stage."""
        self.done += 1
        seconds = time.monotonic() - self.started
        print(f"\n[{self.done}/{self.count}] {title}  ({seconds:.0f} s since the start)", flush=True)


def fresh_folder(path: Path) -> None:
    """Makes an empty folder, in the place of an earlier demo's if there is one.

    Raises:
        ValueError: If the folder holds something that the demo did not make, or cannot be written.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"`output_dir` ({path}) is a file: name a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / MARKER).is_file():
            raise ValueError(
                f"`output_dir` ({path}) holds files that this demo did not make and will not delete: name another folder."
            )
        shutil.rmtree(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / MARKER).touch()
    except OSError as error:
        raise ValueError(
            f"`output_dir` ({path}) cannot be written ({error.strerror}): name a folder you may write to."
        ) from error


def unigram_perplexity(train: Iterable[dict], validation: Iterable[dict], vocab_size: int) -> tuple[float, float]:
    """Perplexity of the unigram model: each token drawn by its frequency in training, with one added to each count.

    Args:
        train (`Iterable[dict]`): Blocks with `input_ids`, to count and to measure training perplexity on.
        validation (`Iterable[dict]`): Blocks to measure on. Like the models, it is not asked for a block's first token.
        vocab_size (`int`): Number of token ids.

    Returns:
        `tuple[float, float]`: Training and validation perplexity.
    """
    counts = token_counts(train, vocab_size)
    losses = -np.log((counts + 1) / (counts.sum() + vocab_size))
    perplexities = []
    for blocks in (train, validation):
        predicted = token_counts(({"input_ids": block["input_ids"][1:]} for block in blocks), vocab_size)
        perplexities.append(math.exp(float(losses @ predicted) / predicted.sum()))
    return perplexities[0], perplexities[1]


def parameter_counts(checkpoint: Path) -> tuple[int, int]:
    """All parameters of a checkpoint, and those that one token passes through."""
    config = AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    in_experts = sum(weight.numel() for name, weight in model.named_parameters() if ".mlp.experts." in name)
    idle = in_experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
    return model.num_parameters(), model.num_parameters() - idle


def dense_overrides(config: PreTrainedConfig) -> list[str]:
    """Options that turn the recipe's model into a dense one whose layers are as wide as what a token passes through."""
    width = config.moe_intermediate_size * (config.num_experts_per_tok + config.num_shared_experts)
    layers = list(range(config.num_hidden_layers))
    return ["--model.mlp_only_layers", str(layers), "--model.intermediate_size", str(width)]


def perplexity_table(rows: list[tuple[str, float, float, str]]) -> str:
    """The models with their training and validation perplexity."""
    lines = [f"{'perplexity':34}{'training':>10}{'validation':>12}   parameters (used for a token)"]
    lines += [f"{name:34}{train:>10.1f}{validation:>12.1f}   {note}" for name, train, validation, note in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[tuple[str, float, float, str]]:
    """Runs the demo; returns the rows of its table of perplexities."""
    (args,) = parse_recipe([DemoArguments], argv, __doc__)
    out = Path(args.output_dir)
    fresh_folder(out)
    stages = Stages(7)

    stages.next("a corpus of unlike domains, from this Python installation")
    corpus = build_corpus(args.max_chars_per_domain)
    train_file, validation_file = write_corpus(corpus, out / "corpus")
    print(corpus.sizes())

    stages.next("a byte-level BPE tokenizer, trained on it")
    recipe = yaml.safe_load(Path(args.recipe_config).read_text(encoding="utf-8"))
    files = ["--train_file", str(train_file), "--validation_file", str(validation_file)]
    tokenizer_dir = train_tokenizer.main(
        [*files, "--vocab_size", str(recipe["tokenizer_vocab_size"]), "--output_dir", str(out / "tokenizer")]
    )

    options = [args.recipe_config, *files, "--tokenizer_name", str(tokenizer_dir)]
    if args.max_steps is not None:
        options += ["--max_steps", str(args.max_steps)]
    stages.next("a LocMoE, trained from scratch by recipes/pretrain.py")
    locmoe = pretrain.main([*options, "--output_dir", str(out / "locmoe")])

    stages.next("the references: a dense model of equal active size, and the unigram model of the same tokens")
    config = AutoConfig.from_pretrained(out / "locmoe")
    dense = pretrain.main([*options, "--output_dir", str(out / "dense"), *dense_overrides(config)])
    data = DataArguments(
        train_file=[str(train_file)], validation_file=[str(validation_file)], block_size=recipe["block_size"]
    )
    tokenizer = pretrain.AutoTokenizer.from_pretrained(tokenizer_dir)
    blocks = [pack(documents, tokenizer, data) for documents in load_documents(data)]
    unigram = unigram_perplexity(*blocks, config.vocab_size)

    stages.next("loaded again in a fresh process, generating text")
    subprocess.run(
        [sys.executable, RECIPES / "generate.py", "--model_name_or_path", out / "locmoe", "--prompts", *PROMPTS],
        check=True,
    )

    stages.next("the run as figures and as a page")
    sample = out / "corpus" / "sample.txt"
    sample.write_text("\n\n".join(document["text"] for document in corpus.validation[:20]), encoding="utf-8")
    if cli.main(["report", str(out / "locmoe"), "--output", str(out / "locmoe" / "report"), "--text", str(sample)]):
        raise ValueError("The report could not be drawn; the line above says why.")

    stages.next("what came out")
    rows = [("unigram of the same tokens", *unigram, f"{config.vocab_size:,}")]
    for name, metrics, folder in (
        ("dense, equal active size", dense, out / "dense"),
        (f"LocMoE, {config.num_experts} experts, top-{config.num_experts_per_tok}", locmoe, out / "locmoe"),
    ):
        total, active = parameter_counts(folder)
        rows.append((name, metrics["train_perplexity"], metrics["eval_perplexity"], f"{total:,} ({active:,})"))
    print(perplexity_table(rows))
    print("one setting for all, chosen for the LocMoE on this text: see recipes/README.md")
    table = [{"model": row[0], "train_perplexity": row[1], "validation_perplexity": row[2]} for row in rows]
    (out / "perplexities.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    print(where_things_are(out))
    return rows


def where_things_are(out: Path) -> str:
    """The last lines: what was made, and what to run next."""
    python = Path(sys.executable)  # the one that has the packages, as it can be typed here
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    made = {
        "the model and its card": f"{out / 'locmoe'}, {out / 'locmoe' / 'README.md'}",
        "how it routes, figures": f"{out / 'locmoe' / 'report' / 'routing.html'}, *.png",
        "the dense reference": out / "dense",
        "the text": out / "corpus",
    }
    following = {
        "generate": f'{python} recipes/generate.py --model_name_or_path {out / "locmoe"} --prompts "class "',
        "on your own text": f"{python} recipes/pretrain.py recipes/configs/tiny_cpu.yaml --train_file my.txt "
        "--validation_file my_validation.txt",
        "adapt it with LoRA": f"{python} recipes/finetune_lora.py --model_name_or_path {out / 'locmoe'} "
        "--train_file my.txt --output_dir runs/lora --block_size 128",
        "more": "recipes/README.md",
    }
    lines = ["", "made"]
    lines += [f"  {name:24}{value}" for name, value in made.items()]
    lines += ["next"]
    lines += [f"  {name:24}{value}" for name, value in following.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_as_script(main)
