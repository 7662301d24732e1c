# SPDX-License-Identifier: Apache-2.0
"""One rank of a training run, for `test_training.py`: `torchrun -m tests.cluster.train RUN.json`.

Also the one-process truth: `train(run)` without torch.distributed. Prints a line per step, which sets faults off.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import OlmoeConfig, PreTrainedConfig

from benchmarks import workload
from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import job_topology
from hf_locmoe.distributed.layouts import layout_config
from hf_locmoe_backend import register


SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 8,
    "use_cache": False,
}


@dataclass(frozen=True)
class Run:
    """What to train, and, where there are several ranks, in which layout."""

    architecture: str = "locmoe"
    num_experts_per_tok: int = 2
    world_size: int = 4
    steps: int = 4
    sequences_per_rank: int = 2
    accumulation: int = 1
    timeout_s: float = 120.0
    layout: str = "spread"
    backend: str = "gloo"
    output: str = ""

    def config(self) -> PreTrainedConfig:
        sizes = {**SIZES, "num_experts_per_tok": self.num_experts_per_tok}
        if self.architecture == "olmoe":
            return OlmoeConfig(**sizes, pad_token_id=None, eos_token_id=None)
        return LocMoeConfig(**sizes)

    def batches(self) -> torch.Tensor:
        """(steps, accumulation, world_size, sequences_per_rank, 32): token ids."""
        stream = workload.token_stream(
            workload.standard_library_text(["textwrap", "heapq", "ast"]), SIZES["vocab_size"]
        )
        shape = (self.accumulation, self.world_size, self.sequences_per_rank)
        return workload.batches(stream, math.prod(shape), 32, self.steps, seed=0).view(self.steps, *shape, 32)


def train(run: Run) -> dict[str, Any]:
    """Losses (mean over the ranks), gradient norms and the parameters afterwards; on rank 0, elsewhere no parameters."""
    alone = not dist.is_initialized()
    layout = None if alone else layout_config(run.layout, job_topology(), SIZES["num_experts"])
    model = workload.build(run.config(), seed=0, distributed=layout)
    # not Adam: it turns the rounding of a vanishing gradient into a whole step
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, foreach=False)
    losses, norms = [], []
    for step, micro_batches in enumerate(run.batches()):
        total = torch.zeros(())
        for parts in micro_batches:
            # one process: the parts together are one batch, so that router losses see the tokens of all ranks
            tokens = parts.flatten(0, 1) if alone else parts[dist.get_rank()]
            loss = model(input_ids=tokens, labels=tokens).loss / run.accumulation
            loss.backward()
            total += loss.detach()
        norms.append(gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        if not alone:
            dist.all_reduce(total)
            total /= run.world_size
        losses.append(total.item())
        print(f"step {step} loss {total.item():.6f}", flush=True)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    parameters = dict(model.state_dict()) if alone else get_model_state_dict(model, options=options)
    return {"losses": losses, "norms": norms, "parameters": parameters}


def gradient_norm(model: torch.nn.Module) -> float:
    """Over all parameters; a sharded gradient is gathered, so that the meshes' differences do not matter."""
    squares = torch.zeros(())
    for parameter in model.parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            squares += gradient.square().sum()
    return squares.sqrt().item()


def main() -> None:
    run = Run(**json.loads(Path(sys.argv[1]).read_text()))
    torch.set_num_threads(1)
    register()  # `import torch` does it where the package is installed, not where it only is on the path
    dist.init_process_group(run.backend, timeout=timedelta(seconds=run.timeout_s))
    trained = train(run)
    if dist.get_rank() == 0:
        torch.save(trained, run.output)
    dist.barrier()
    dist.destroy_process_group()


def write(run: Run, path: Path) -> Path:
    path.write_text(json.dumps(asdict(run)))
    return path


if __name__ == "__main__":
    main()
