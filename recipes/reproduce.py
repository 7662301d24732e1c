# SPDX-License-Identifier: Apache-2.0
"""The paper's figures from runs that a laptop makes: Hash, Switch and LocMoE on two emulated nodes, a few minutes each.

Trains the same small model with each gate by `recipes/pretrain.py`, two ranks that stand for two nodes under
`hf_locmoe.launch`, and draws figures 6 and 8 to 13 with `locmoe report`. What they show here, and what the paper has, is in
docs/reproducing.md.

Usage:

    python recipes/reproduce.py
    python recipes/reproduce.py --output_dir somewhere --max_steps 2000
"""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import train_tokenizer
from arguments import parse_recipe, run_as_script
from corpus import build_corpus, write_corpus
from demo import Stages, fresh_folder
from hf_locmoe import cli


RECIPES = Path(__file__).resolve().parent
CONFIGS = RECIPES / "configs"

# name: its configuration, what the run adds to it. The first three are the paper's; the fourth has everything that keeps
# tokens on their node.
RUNS = {
    "hash": ("baseline_hash.yaml", {"LOCMOE_BATCH_PLACEMENT": "off"}),
    "switch": ("baseline_switch.yaml", {"LOCMOE_BATCH_PLACEMENT": "off", "LOCMOE_LOCALITY_LOSS_COEF": "0"}),
    "locmoe": ("paper.yaml", {"LOCMOE_BATCH_PLACEMENT": "off"}),
    "placed": (
        "tiny_cpu.yaml",
        {
            "LOCMOE_BATCH_PLACEMENT": "micro_batch",
            "LOCMOE_EXPERT_PLACEMENT_STEPS": "50",
            "LOCMOE_LOCALITY_LOSS_COEF": "0.03",
        },
    ),
}


@dataclass
class ReproduceArguments:
    """Sizes; everything else is in the configurations, the same for all runs but for the gate."""

    output_dir: str = field(default="runs/reproduce", metadata={"help": "Folder for everything; replaced if ours."})
    max_steps: int = field(default=600, metadata={"help": "Training steps of each run."})
    num_experts: int = field(default=16, metadata={"help": "Experts of every sparse layer, as in the paper."})
    ranks: int = field(default=2, metadata={"help": "Ranks, each standing for a node."})
    max_chars_per_domain: int = field(default=800_000, metadata={"help": "Size of the corpus."})
    options: str = field(
        default="", metadata={"help": "More options for every run, as pretrain.py takes them, in one string."}
    )


def train(config: Path, environment: dict[str, str], ranks: int, options: list[str]) -> None:
    """One run of `pretrain.py`, spread over ranks that each are a node of their own.

    Args:
        config (`Path`): Its configuration.
        environment (`dict[str, str]`): Fields of the plugin, as variables.
        ranks (`int`): Processes.
        options (`list[str]`): What the command line adds.

    Raises:
        ValueError: If it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "hf_locmoe.launch", str(RECIPES / "pretrain.py"), str(config), *options]
    variables = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "LOCMOE_RANKS_PER_NODE": "1",
        "LOCMOE_LAYOUT": "spread",
        **environment,
    }
    if subprocess.run(command, env=variables).returncode:
        raise ValueError(f"The run of {config.name} failed; the lines above say why.")


def main(argv: list[str] | None = None) -> Path:
    """Makes all runs and their report; returns the page."""
    (args,) = parse_recipe([ReproduceArguments], argv, __doc__)
    out = Path(args.output_dir)
    fresh_folder(out)
    stages = Stages(len(RUNS) + 2)

    stages.next("a corpus of unlike domains, identically mixed, and its tokenizer")
    corpus = build_corpus(args.max_chars_per_domain)
    train_file, validation_file = write_corpus(corpus, out / "corpus")
    recipe = yaml.safe_load((CONFIGS / "tiny_cpu.yaml").read_text(encoding="utf-8"))
    files = ["--train_file", str(train_file), "--validation_file", str(validation_file)]
    vocab = ["--vocab_size", str(recipe["tokenizer_vocab_size"])]
    tokenizer_dir = train_tokenizer.main([*files, *vocab, "--output_dir", str(out / "tokenizer")])

    batch_size = max(1, recipe["per_device_train_batch_size"] // args.ranks)
    for name, (config, environment) in RUNS.items():
        stages.next(f"{name}: {config} on {args.ranks} emulated nodes")
        options = [*files, "--tokenizer_name", str(tokenizer_dir), "--output_dir", str(out / name)]
        options += ["--max_steps", str(args.max_steps), "--model.num_experts", str(args.num_experts)]
        options += ["--per_device_train_batch_size", str(batch_size), "--eval_steps", str(max(1, args.max_steps // 8))]
        options += shlex.split(args.options)
        train(CONFIGS / config, environment, args.ranks, options)

    stages.next("the figures")
    sample = out / "corpus" / "sample.txt"
    sample.write_text("\n\n".join(document["text"] for document in corpus.validation[:20]), encoding="utf-8")
    report = out / "report"
    folders = [str(out / name) for name in ("locmoe", *(name for name in RUNS if name != "locmoe"))]
    if cli.main(["report", *folders, "--output", str(report), "--text", str(sample)]):
        raise ValueError("The report could not be drawn; the line above says why.")
    print(f"open {report / 'routing.html'}; docs/reproducing.md says what to look for")
    return report / "routing.html"


if __name__ == "__main__":
    run_as_script(main)
