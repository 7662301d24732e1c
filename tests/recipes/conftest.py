# SPDX-License-Identifier: Apache-2.0
"""A little text in two domains, and a checkpoint trained on it by the recipe."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).resolve().parents[2] / "recipes"
sys.path.insert(0, str(RECIPES))  # as Python itself does for `python recipes/pretrain.py`

WORDS = {
    "sea": "wave tide harbour anchor sail gull salt current reef keel storm mast".split(),
    "wood": "oak moss root fern trail badger leaf bark acorn hollow stream fox".split(),
}
TINY_RUN = {
    "block_size": 16,
    "tokenizer_vocab_size": 300,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "max_position_embeddings": 64,
}


def documents(count: int, seed: int) -> list[dict[str, str]]:
    """Sentences of random words, alternating between the domains."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        domain = ("sea", "wood")[index % 2]
        words = [rng.choice(WORDS[domain]) for _ in range(40)]
        made.append(
            {
                "text": " ".join(words),
                "domain": domain,
                "prompt": " ".join(words[:3]),
                "completion": " " + " ".join(words[3:8]),
            }
        )
    return made


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """One row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(**settings: object) -> list[str]:
    """Settings as a command line."""
    line = []
    for name, value in settings.items():
        line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl and validation.jsonl."""
    folder = tmp_path_factory.mktemp("text")
    write_jsonl(folder / "train.jsonl", documents(60, seed=0))
    write_jsonl(folder / "validation.jsonl", documents(12, seed=1))
    return folder


@pytest.fixture(scope="session")
def pretrain_options(text_dir: Path) -> list[str]:
    """The command line of a tiny pretraining run, without its output folder."""
    files = {"train_file": text_dir / "train.jsonl", "validation_file": text_dir / "validation.jsonl"}
    return options(**files, **TINY_RUN, **{f"model.{name}": value for name, value in TINY_MODEL.items()})


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, pretrain_options: list[str]) -> tuple[Path, dict[str, float]]:
    """A checkpoint that pretrain.py made, and what it measured."""
    import pretrain

    folder = tmp_path_factory.mktemp("runs") / "checkpoint"
    return folder, pretrain.main([*pretrain_options, "--output_dir", str(folder)])


@pytest.fixture(scope="session")
def checkpoint(trained: tuple[Path, dict[str, float]]) -> Path:
    """The folder alone."""
    return trained[0]
