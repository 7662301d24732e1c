# SPDX-License-Identifier: Apache-2.0
"""How long does one MoE layer take under expert parallelism, forward and backward, and how many bytes cross nodes?

`python -m benchmarks.bench_dispatch` builds the emulated cluster and runs the same layer on the same tokens with
transformers' flat `all_to_all` and with ours, in the same processes, taking turns; who goes first rotates. Before a
speed is printed, outputs and gradients of every variant must equal upstream's.

A share of the assignments is routed to the token's own node (`--local_share`), the rest uniformly to the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cluster import Cluster, Counters, Link, run_on_nodes
from benchmarks.record import Load, Record, Spread


UNSHAPED = "unshaped"
UPSTREAM = "all_to_all"
RTOL = 1e-4  # of the largest entry, float32; with a bfloat16 wire 100 times that


@dataclass(frozen=True)
class Setup:
    nodes: int = 2
    ranks_per_node: int = 2
    hidden_size: int = 256
    intermediate_size: int = 512
    num_experts: int = 8
    num_experts_per_tok: int = 2
    tokens_per_rank: int = 1024
    local_share: float = 0.5
    seed: int = 0
    warmup: int = 3
    repeats: int = 15

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Variant:
    name: str
    options: dict[str, Any] = field(default_factory=dict)  # of `ExpertParallelOptions`; upstream's where empty

    @property
    def rtol(self) -> float:
        return RTOL * (100 if self.options.get("wire_dtype") == "bfloat16" else 1)


VARIANTS = [
    Variant(UPSTREAM),
    Variant("rank, 1 slice", {"fan_out": "rank", "slices": 1}),
    Variant("node, 1 slice", {"fan_out": "node", "slices": 1}),
    Variant("node, 2 slices", {"fan_out": "node", "slices": 2}),
    Variant("auto", {"fan_out": "auto", "slices": "auto"}),
    Variant("auto, bfloat16 wire", {"fan_out": "auto", "slices": "auto", "wire_dtype": "bfloat16"}),
]


def make_layer(setup: Setup, variant: Variant, mesh, tp_mesh):
    """One rank's experts behind an expert-parallel implementation."""
    from transformers import OlmoeConfig
    from transformers.distributed.expert_parallel import AllToAllEP
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    from hf_locmoe.distributed.expert_parallel import LocMoeEP, expert_parallel_options

    config = OlmoeConfig(
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_experts=setup.num_experts,
        num_experts_per_tok=setup.num_experts_per_tok,
    )
    config._experts_implementation = "grouped_mm"
    experts = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(setup.seed)
    local = setup.num_experts // setup.world_size
    own = slice(dist.get_rank() * local, (dist.get_rank() + 1) * local)
    for name, parameter in list(experts.named_parameters()):
        whole = torch.randn(parameter.shape, generator=generator) * setup.hidden_size**-0.5
        setattr(experts, name, torch.nn.Parameter(whole[own].clone()))
    experts.num_experts, experts._is_expert_parallel = local, True
    if variant.name == UPSTREAM:
        return experts, AllToAllEP(experts, mesh, tp_mesh)
    with expert_parallel_options(**variant.options):
        return experts, LocMoeEP(experts, mesh, tp_mesh)


def make_routing(setup: Setup, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, experts and weights of this rank in one step; different experts for one token."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(setup.seed + 1000 * step + rank)
    tokens = torch.randn(setup.tokens_per_rank, setup.hidden_size, generator=generator)
    node_of_expert = torch.arange(setup.num_experts) * setup.nodes // setup.num_experts
    is_local = node_of_expert == rank // setup.ranks_per_node
    chance = torch.where(
        is_local, setup.local_share / is_local.sum(), (1 - setup.local_share) / (~is_local).sum().clamp(min=1)
    )
    index = torch.multinomial(chance.expand(setup.tokens_per_rank, -1), setup.num_experts_per_tok, generator=generator)
    weights = torch.rand(index.shape, generator=generator)
    return tokens, index, weights


def run(setup: Setup, layer, routing):
    tokens, index, weights = (tensor.clone() for tensor in routing)
    tokens.requires_grad_()
    weights.requires_grad_()
    output = layer(tokens, index, weights)
    output.square().sum().backward()
    return output.detach(), tokens.grad, weights.grad


def worker(setup: Setup, output: Path) -> None:
    """One rank: all variants, taking turns. Rank 0 writes what was measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mesh = dist.init_device_mesh("cpu", (setup.world_size, 1), mesh_dim_names=("ep", "tp"))
    layers = {variant.name: make_layer(setup, variant, mesh["ep"], mesh["tp"]) for variant in VARIANTS}
    difference = compare(setup, layers)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    sent: dict[str, list[int]] = {name: [] for name in layers}
    for step in range(setup.warmup + setup.repeats):
        routing = make_routing(setup, step)
        first = step % len(VARIANTS)
        for variant in VARIANTS[first:] + VARIANTS[:first]:
            experts, layer = layers[variant.name]
            dist.barrier()
            before, started = Counters.read(), time.perf_counter()
            run(setup, layer, routing)
            elapsed = time.perf_counter() - started
            dist.barrier()
            sent[variant.name].append((Counters.read() - before).tx_bytes)
            seconds[variant.name].append(elapsed)
            experts.zero_grad()
    chosen = {name: _chosen(layer) for name, (_, layer) in layers.items()}
    everyone: list[Any] = [None] * setup.world_size
    dist.all_gather_object(everyone, {"seconds": seconds, "sent": sent, "difference": difference})
    if dist.get_rank() == 0:
        measured = {
            name: {
                "seconds": [max(step) for step in zip(*(rank["seconds"][name] for rank in everyone), strict=True)],
                "sent": [
                    max(step)
                    for step in zip(*(rank["sent"][name] for rank in everyone[:: setup.ranks_per_node]), strict=True)
                ],
                "difference": max(rank["difference"][name] for rank in everyone),
                "chosen": chosen[name],
            }
            for name in layers
        }
        output.write_text(json.dumps(measured))
    dist.barrier()
    dist.destroy_process_group()


def compare(setup: Setup, layers: dict[str, Any]) -> dict[str, float]:
    """Largest difference of outputs and gradients to upstream's, over the largest entry."""
    results = {}
    routing = make_routing(setup, 0)
    for name, (experts, layer) in layers.items():
        results[name] = [*run(setup, layer, routing), *(parameter.grad for parameter in experts.parameters())]
        experts.zero_grad()
    return {
        name: max(
            float((mine - truth).abs().max() / truth.abs().max().clamp(min=1e-9))
            for mine, truth in zip(result, results[UPSTREAM], strict=True)
        )
        for name, result in results.items()
    }


def _chosen(layer) -> str:
    """What "auto" came to."""
    if not hasattr(layer, "choices"):
        return ""
    fan_out, num_slices = layer.choices
    return f"{fan_out}, {num_slices} slice" + ("s" if num_slices != 1 else "")


def measure(setup: Setup, links: list[Link]) -> dict[str, dict]:
    """Per link what the ranks measured; the cluster is built once and its links reshaped."""
    measured = {}
    with tempfile.TemporaryDirectory() as scratch, Cluster(setup.nodes, links[0]) as cluster:
        for link in links:
            cluster.shape(link)
            output = Path(scratch, "measured.json")
            command = [sys.executable, *"-m torch.distributed.run -m benchmarks.bench_dispatch --worker".split()]
            command += [str(output), "--setup", json.dumps(asdict(setup))]
            result = run_on_nodes(cluster, command, setup.ranks_per_node, timeout_s=900)
            if result.status:
                raise RuntimeError(f"the run at {link} failed with status {result.status}:\n{result.text()}")
            measured[str(link)] = json.loads(output.read_text())
    return measured


def table(setup: Setup, links: list[Link], measured: dict[str, dict]) -> list[dict]:
    """One row per variant; one whose numbers differ from upstream's gets no speed."""
    rows = []
    for variant in VARIANTS:
        of_links = {str(link): measured[str(link)][variant.name] for link in links}
        row: dict[str, Any] = {"variant": variant.name}
        row["difference"] = max(one["difference"] for one in of_links.values())
        row["correct"] = row["difference"] <= variant.rtol
        if row["correct"]:
            row["sent"] = statistics.median(of_links[str(links[0])]["sent"][setup.warmup :]) / 1e6
            for link, one in of_links.items():
                base = measured[link][UPSTREAM]["seconds"][setup.warmup :]
                own = one["seconds"][setup.warmup :]
                row[f"ms {link}"] = Spread.of([1e3 * value for value in own])
                row[f"ratio {link}"] = Spread.of([a / b for a, b in zip(own, base, strict=True)])
                row[f"chosen {link}"] = one["chosen"]
        rows.append(row)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_dispatch", description=__doc__.splitlines()[0])
    parser.add_argument("--links", nargs="+", default=[UNSHAPED, "1gbit", "200mbit"])
    for option in fields(Setup):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    parser.add_argument("--hardware", default=f"emulated-{os.cpu_count()}core", help="part of the results' file name")
    parser.add_argument("--dry", action="store_true", help="print, write nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--setup", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.worker:
        worker(Setup(**json.loads(args.setup)), args.worker)
        return 0
    setup = Setup(**{option.name: getattr(args, option.name) for option in fields(Setup)})
    links = [Link(None if rate == UNSHAPED else rate) for rate in args.links]
    with Load() as load:
        measured = measure(setup, links)
    columns = {"variant": "", "sent": "MB a node sends"}
    for link in links:
        columns |= {f"ms {link}": f"ms {link} (quartiles)", f"ratio {link}": "to all_to_all (quartiles)"}
        columns |= {f"chosen {link}": "came to"}
    columns["difference"] = "largest difference"
    rows = table(setup, links, measured)
    record = Record(
        theme=f"dispatch_top{setup.num_experts_per_tok}",
        question=__doc__.splitlines()[0],
        config={**asdict(setup), "links": [str(link) for link in links]},
        command=" ".join(["python -m benchmarks.bench_dispatch", *(argv if argv is not None else sys.argv[1:])]),
        rows=[{key: f"{value:.1e}" if key == "difference" else value for key, value in row.items()} for row in rows],
        columns=columns,
        notes=[
            "One layer's experts with exchange, forward and backward, no optimizer. Seconds are the slowest rank's.",
            "Emulated nodes on one machine: all ranks share its cores, so computation slows transfers and the other way "
            "round. Compare within a column. Rows that came to the same choice run the same code: their difference is "
            "the noise of the run.",
        ],
        load=load.result(),
        extra={"raw": measured},
    )
    print(record.table())
    if not args.dry:
        print(record.write(args.hardware))
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
