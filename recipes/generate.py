# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint and continues prompts.

Usage:

    python recipes/generate.py --model_name_or_path runs/tiny_cpu --prompts "The with statement" "def "
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_locmoe  # noqa: F401  registers `model_type: locmoe`; nothing else of it is used here
from arguments import parse_recipe, run_as_script


@dataclass
class GenerationArguments:
    """What to continue, and how."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint folder or Hub name."})
    prompts: list[str] = field(metadata={"help": "Texts to continue."})
    max_new_tokens: int = field(default=48, metadata={"help": "Tokens to add to each."})
    temperature: float = field(default=0.7, metadata={"help": "Below 1 for safer words; 0 takes the likeliest one."})
    top_p: float = field(default=0.95, metadata={"help": "Share of the probability that words are drawn from."})
    seed: int = field(default=0, metadata={"help": "Seed of the drawing."})


def main(argv: list[str] | None = None) -> list[str]:
    """Runs the recipe; returns the prompts with their continuations."""
    (args,) = parse_recipe([GenerationArguments], argv, __doc__)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="auto").to(device)
    batch = tokenizer(args.prompts, return_tensors="pt", padding=True, return_token_type_ids=False).to(device)
    drawing = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p} if args.temperature else {}
    tokens = model.generate(**batch, max_new_tokens=args.max_new_tokens, **drawing)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for prompt, text in zip(args.prompts, texts, strict=True):
        print(f"--- {prompt!r}\n{text}\n")
    return texts


if __name__ == "__main__":
    run_as_script(main)
