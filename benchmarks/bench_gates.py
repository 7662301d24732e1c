# SPDX-License-Identifier: Apache-2.0
"""
Which gate is best? Every gate variant in the same small model, on the same text, tokens, steps and seeds.

    python -m benchmarks.bench_gates --hardware 4core --steps 600 --seeds 0 1

Text: the sources of the standard library and the language reference, a byte-level BPE trained on them; the validation
part is whole files. Reported per variant: validation loss in nats and perplexity, the experts' load CV (mean over layers),
and the share of tokens that a capacity of 1.0, 1.1 and 1.25 equal shares would drop.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import statistics
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM

import hf_locmoe
from benchmarks.record import Load, Record
from hf_locmoe.moe.routing import RouterStat


COSINE = {"gate_affinity": "cosine", "gate_relu": False}
MEAN = {"gate_affinity": "mean", "gate_relu": False}
BIAS = {"balance_bias_update_rate": 0.02}
VARIANTS = {
    "dense FFN of equal active size": {"dense": True},
    "hash": {"gate_type": "hash"},
    "switch": {"gate_type": "switch"},
    "switch, balance bias": {"gate_type": "switch", **BIAS},
    "locmoe: paper (mean, ReLU, noise)": {"gate_affinity": "mean", "gate_relu": True, "gate_noise_std": 0.01},
    "locmoe: mean": MEAN,
    "locmoe: cosine, ReLU": {**COSINE, "gate_relu": True},
    "locmoe: cosine": COSINE,
    "locmoe: cosine, balance bias": {**COSINE, **BIAS},
    "locmoe: cosine, ReLU, balance bias": {**COSINE, "gate_relu": True, **BIAS},
    "locmoe: cosine, centring": {**COSINE, "gate_centering": True},
    "locmoe: cosine, rotation": {**COSINE, "gate_rotation": True},
    "locmoe: cosine, rotation, balance bias": {**COSINE, "gate_rotation": True, **BIAS},
}


def standard_library_text() -> dict[str, str]:
    """Every source file of the standard library by its name below it, and the language reference."""
    root = Path(os.__file__).parent
    texts = {"reference": "\n\n".join(pydoc_data.topics.topics.values())}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" not in name and path.stat().st_size < 400_000:
            texts[name] = path.read_text(encoding="utf-8", errors="ignore")
    return texts


def tokens(vocab_size: int, cache: Path) -> dict[str, torch.Tensor]:
    """Token ids of the training and the validation files (one in sixteen, chosen by a checksum of its name)."""
    if cache.exists():
        return torch.load(cache)
    texts = standard_library_text()
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts.values(), vocab_size=vocab_size, show_progress=False)
    parts: dict[str, list[int]] = {"train": [], "validation": []}
    for name, text in texts.items():
        part = "validation" if zlib.crc32(name.encode()) % 16 == 0 and name != "reference" else "train"
        parts[part].extend(tokenizer.encode(text).ids)
    data = {part: torch.tensor(ids, dtype=torch.int32) for part, ids in parts.items()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(data, cache)
    return data


def make_model(variant: dict, args) -> torch.nn.Module:
    fields = dict(variant)
    dense = fields.pop("dense", False)
    config = hf_locmoe.LocMoeConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.expert_size,
        moe_intermediate_size=args.expert_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden_size // 64,
        num_experts=args.experts,
        mlp_only_layers=list(range(args.layers)) if dense else [],
        max_position_embeddings=args.block_size,
        tie_word_embeddings=True,
        **fields,
    )
    return AutoModelForCausalLM.from_config(config, experts_implementation=args.experts_implementation)


def batch(data: torch.Tensor, starts: torch.Tensor, block_size: int, device: str) -> torch.Tensor:
    return torch.stack([data[s : s + block_size] for s in starts.tolist()]).long().to(device)


def train_one(name: str, seed: int, args) -> dict:
    """Train one variant and measure it on the validation text."""
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = tokens(args.vocab_size, Path(args.cache))
    torch.manual_seed(seed)
    model = make_model(VARIANTS[name], args).to(device)
    if VARIANTS[name].get("gate_type") == "hash":
        counts = torch.bincount(data["train"].long(), minlength=args.vocab_size)
        for block in model.sparse_blocks:
            block.gate.balance_by_frequency(counts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = max(1, args.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, s / args.steps)))),
    )
    order = torch.Generator().manual_seed(1000 + seed)
    model.train()
    curve = []
    for step in range(args.steps):
        starts = torch.randint(len(data["train"]) - args.block_size, (args.batch_size,), generator=order)
        ids = batch(data["train"], starts, args.block_size, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(ids, labels=ids)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if outputs.router_stats is not None:
            model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
        if (step + 1) % max(1, args.steps // 5) == 0 and step + 1 < args.steps:
            curve.append((step + 1, evaluate(model, data["validation"], args, device, limit=15)["loss"]))
    return {"variant": name, "seed": seed, "curve": curve, **evaluate(model, data["validation"], args, device)}


@torch.no_grad()
def evaluate(model, data: torch.Tensor, args, device: str, limit: int | None = None) -> dict:
    model.eval()
    starts = torch.arange(0, len(data) - args.block_size, args.block_size)
    if limit is not None:
        starts = starts[:: max(1, len(starts) // (limit * args.batch_size))]
    total, count, loads, drops = 0.0, 0, [], {1.0: [], 1.1: [], 1.25: []}
    for chunk in starts.split(args.batch_size):
        ids = batch(data, chunk, args.block_size, device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            outputs = model(ids, labels=ids, output_router_stats=True)
        total += outputs.loss.item() * len(chunk)
        count += len(chunk)
        if outputs.router_stats is not None and len(chunk) == args.batch_size:
            load = outputs.router_stats[:, RouterStat.TOKENS]
            loads.append(load)
            for factor, found in drops.items():
                over = (load - math.ceil(factor * ids.numel() / load.shape[-1])).clamp_min(0)
                found.append((over.sum() / load.sum()).item())
    model.train()
    result = {"loss": total / count}
    if loads:
        load = torch.stack(loads).sum(dim=0)
        result["load_cv"] = (load.std(dim=-1, correction=0) / load.mean(dim=-1)).mean().item()
        result.update({f"drop_{factor}": statistics.mean(found) for factor, found in drops.items()})
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", required=True, help="short name for the results file, e.g. 4core or h100")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--expert-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--experts-implementation", default="grouped_mm")
    parser.add_argument("--workers", type=int, default=2, help="variants trained at the same time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--cache", default=".bench/gate_tokens.pt", help="where the token ids are kept")
    parser.add_argument("--output", default=None, help="folder of the results files")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    sizes = {part: len(ids) for part, ids in tokens(args.vocab_size, Path(args.cache)).items()}
    print(f"tokens: {sizes}", flush=True)
    results = []
    pool = ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"))
    with Load() as load, pool:
        jobs = [pool.submit(train_one, name, seed, args) for seed in args.seeds for name in args.variants]
        for job in as_completed(jobs):
            results.append(job.result())
            print(json.dumps(results[-1]), flush=True)
    rows = []
    for name in args.variants:
        found = [r for r in results if r["variant"] == name]
        means = {k: statistics.mean(r[k] for r in found) for k in found[0] if k not in ("variant", "seed", "curve")}
        losses = ", ".join(f"{r['loss']:.3f}" for r in sorted(found, key=lambda r: r["seed"]))
        shown = {k: f"{v:.3f}" if k in ("loss", "load_cv") else f"{100 * v:.1f} %" for k, v in means.items()}
        rows.append({"variant": name, "losses": losses, "perplexity": f"{math.exp(means['loss']):.2f}", **shown})
    record = Record(
        theme="gates",
        question="Which gate gives the lowest validation loss, and how even is its load?",
        config={k: v for k, v in vars(args).items() if k not in ("cache", "output", "variants")} | {"tokens": sizes},
        command="python -m benchmarks.bench_gates " + " ".join(sys.argv[1:]),
        rows=rows,
        columns={
            "variant": "gate",
            "loss": "validation loss (nats)",
            "losses": "by seed",
            "perplexity": "perplexity",
            "load_cv": "load CV",
            "drop_1.0": "drops at capacity 1.0",
            "drop_1.1": "at 1.1",
            "drop_1.25": "at 1.25",
        },
        load=load.result(),
        extra={"runs": results},
    )
    print(record.table())
    where = {} if args.output is None else {"directory": Path(args.output)}
    print(record.write(args.hardware, **where))


if __name__ == "__main__":
    main()
