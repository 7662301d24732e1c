# SPDX-License-Identifier: Apache-2.0
"""A training loop of one's own with Accelerate: on one process, or with the model spread over the ranks of several nodes.

Usage:

    python recipes/accelerate_loop.py --model_name_or_path runs/tiny_cpu --train_file my.txt --output_dir runs/loop
    torchrun --nproc-per-node 8 recipes/accelerate_loop.py --plugin recipes/configs/plugin_several_nodes.yaml ...

The same loss on any number of ranks, for the same `ranks x batch_size x accumulation_steps`. The state is saved every
`--save_steps`, and a later call goes on from the newest one, also on another number of ranks. Three lines have to do with
LocMoE, and are marked.
"""

import argparse
import re
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_scheduler, set_seed

from arguments import run_as_script
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.accelerator import LocMoeAccelerator


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True, help="text, read as one stream of tokens")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--plugin", help="YAML file with fields of LocMoePlugin; LOCMOE_* variables if left out")
    parser.add_argument("--block_size", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--batch_size", type=int, default=4, help="samples of a rank in a micro-batch")
    parser.add_argument("--accumulation_steps", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--save_steps", type=int, default=50)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def read_samples(file: str, tokenizer, block_size: int, samples_per_step: int) -> list[dict[str, torch.Tensor]]:
    """Blocks of `block_size` tokens, of as many as make whole steps; what is left at the end is dropped."""
    ids = torch.tensor(tokenizer(Path(file).read_text(encoding="utf-8"))["input_ids"])
    blocks = ids[: len(ids) // block_size * block_size].view(-1, block_size)
    whole_steps = len(blocks) // samples_per_step * samples_per_step
    if whole_steps == 0:
        raise ValueError(
            f"`train_file` ({file}) has {len(ids)} tokens and a step takes {samples_per_step * block_size}: give more text, or "
            "set `batch_size`, `accumulation_steps` or `block_size` lower."
        )
    return [{"input_ids": block, "labels": block} for block in blocks[:whole_steps]]


def newest_state(output_dir: str) -> tuple[Path | None, int]:
    """The folder of the newest state that was written to its end, and its step."""
    found = [
        (int(match[1]), folder)
        for folder in Path(output_dir).glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", folder.name)) and (folder / "complete").is_file()
    ]
    step, folder = max(found, default=(0, None))
    return folder, step


def main(argv: list[str] | None = None) -> list[float]:
    """Trains; returns the loss of every step, the mean over the ranks."""
    args = parse(argv)
    plugin = LocMoePlugin.from_yaml(args.plugin) if args.plugin else LocMoePlugin.from_environment()  # LocMoE
    plugin.activate()  # LocMoE: before the accelerator and the model
    accelerator = LocMoeAccelerator(  # LocMoE
        gradient_accumulation_steps=args.accumulation_steps, mixed_precision=args.mixed_precision
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    samples_per_step = args.batch_size * args.accumulation_steps * accelerator.num_processes
    samples = read_samples(args.train_file, tokenizer, args.block_size, samples_per_step)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    # Accelerate steps a scheduler once for every rank, because every rank reads a batch
    scheduler = get_scheduler("constant_with_warmup", optimizer, args.warmup_steps * accelerator.num_processes)
    # in a fixed order, so that any number of ranks reads the same samples in a step
    loader = DataLoader(samples, args.batch_size, collate_fn=default_data_collator)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)

    folder, step = newest_state(args.output_dir)
    if folder is not None:
        accelerator.load_state(folder)
        accelerator.print(f"going on from {folder}")
    losses: list[float] = []
    model.train()
    read = step * args.accumulation_steps % len(loader)
    while step < args.max_steps:
        total = torch.zeros((), device=accelerator.device)
        for batch in accelerator.skip_first_batches(loader, read):
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            total += loss.detach() / args.accumulation_steps
            if not accelerator.sync_gradients:
                continue
            step += 1
            losses.append(accelerator.reduce(total, "mean").item())
            accelerator.print(f"step {step}  loss {losses[-1]:.6f}")
            total.zero_()
            if step % args.save_steps == 0:
                target = Path(args.output_dir, f"step_{step}")
                accelerator.save_state(target)
                if accelerator.is_main_process:
                    (target / "complete").touch()
            if step == args.max_steps:
                break
        read = 0

    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    plugin.deactivate()
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    run_as_script(main)
