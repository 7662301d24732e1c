# SPDX-License-Identifier: Apache-2.0
"""Do rows that turn tokens away in training lose because evaluation turns none away?

    python -m benchmarks.locality_evaluation --trained runs/locality

A capacity tier is a matter of training: evaluation sends every token where its gate wants it, and deals no samples to nodes.
Here the kept checkpoints of `bench_locality` (one seed) are evaluated as they are and as they were trained, on the CPU:
the tier on, on batches as they come and on batches that are dealt to the nodes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.bench_locality import TRAINED, command_of
from benchmarks.locality_data import Sequences, load
from benchmarks.locality_jobs import unpack
from benchmarks.locality_measure import one_process
from benchmarks.locality_rows import REFERENCE, ROUTINGS, Setup, Topology, config_of
from benchmarks.locality_train import Nodes, RouteTap
from benchmarks.record import Load, Record


ROWS = ("none", "loss + batches", "loss 0.1 + batches", "loss + batches + experts + tiers", "all local")


def evaluate(run: dict, name: str, topology: Topology, part: Sequences) -> dict[str, dict[str, float]]:
    """Nats a token and node-local share: `as it is`, with its `tier` on, with its tier on and batches `dealt`."""
    setup, routing = Setup(**run["setup"]), ROUTINGS[name]
    config = config_of(setup, routing)
    config.gate_noise_std = 0.0  # nothing but the tier is another one in training
    model = one_process(config, run["state_dict"])
    tap = RouteTap(model)
    nodes = Nodes(setup, routing, topology, len(part.domains))
    nodes.node_of_expert = run["placement"]["node_of_expert"]
    nodes.table.load_state_dict(run["placement"]["table"])
    nodes.limit(model)
    as_read = Nodes(setup, dataclasses.replace(routing, places_batches=False), topology, len(part.domains))
    ways = {"as it is": (model.eval, as_read)}
    if routing.inter_node_capacity_factor is not None:
        ways |= {"tier": (model.train, as_read), "tier, dealt": (model.train, nodes)}
    found = {}
    for way, (mode, dealer) in ways.items():
        mode()
        losses, shares = [], []
        # whole batches only, the same for every way: a tier's ceiling follows from the size of a batch
        for rows in torch.arange(len(part.input_ids)).split(setup.sequences)[: len(part.input_ids) // setup.sequences]:
            input_ids, domain = part.input_ids[rows].long(), part.domain[rows].long()
            node, order = (dealt := dealer.deal(input_ids, domain)).sort(stable=True)
            assert len(dealt) == setup.sequences
            batch = input_ids[order]
            with torch.no_grad():
                logits = model(input_ids=batch).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item())
            routes = tap.routes()
            shares.append(nodes.local_share(routes, node.repeat_interleave(setup.sequence_length)).mean().item())
        found[way] = {"loss": fmean(losses), "share": fmean(shares)}
    return found


def record_of(rows: list[dict], command: str, load_: dict, trained: dict, config: dict) -> Record:
    return Record(
        theme="locality_evaluation",
        question="Do rows that turn tokens away in training lose because evaluation turns none away?",
        config=config,
        command=command,
        rows=rows,
        columns={
            "topology": "nodes x ranks",
            "row": "",
            "way": "evaluated",
            "loss": "validation loss",
            "difference": "to the same gate without locality",
            "share": "node-local share",
        },
        notes=[
            "`as it is`: no tier, batches as they come, which is evaluation. `tier`: with the capacity tier of the training. "
            "`tier, dealt`: and every batch's samples dealt to the nodes of their experts, as in training.",
            "The tier looks at a whole batch before it turns a token away, so its rows are a diagnosis and no perplexity.",
            "One seed; checkpoints travelled with experts in eight bits and the rest in bfloat16. Batches of "
            f"{config['sequences']} sequences, whole ones only, so that losses differ a little from those of the training.",
            *trained.get("notes", []),
        ],
        load=load_,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.locality_evaluation", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=Path(".cache/locality_tokens.xz"))
    parser.add_argument("--trained", type=Path, default=Path("runs/locality"))
    parser.add_argument("--topologies", nargs="+", default=["2x2", "4x1"])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=list(ROUTINGS))
    parser.add_argument("--hardware", default="cpu", help="part of the results' file name")
    parser.add_argument("--output", type=Path, help="directory of the results (default: benchmarks/results)")
    args = parser.parse_args(argv)
    runs, trained = unpack(args.trained), json.loads((args.trained / TRAINED).read_text())
    rows = []
    with Load() as busy:
        for topology in map(Topology.parse, args.topologies):
            by_row = {}
            for name in args.rows:
                run = runs[f"{topology} {name}"]
                part = load(args.data, run["setup"]["sequence_length"])["validation"]
                by_row[name] = evaluate(run, name, topology, part)
            for name, ways in by_row.items():
                reference = by_row.get(REFERENCE.get(ROUTINGS[name].gate, ""))
                for way, seen in ways.items():
                    row = {"topology": str(topology), "row": name, "way": way}
                    row |= {"loss": f"{seen['loss']:.3f}", "share": f"{seen['share']:.3f}"}
                    if reference is not None:
                        row["difference"] = f"{seen['loss'] - reference['as it is']['loss']:+.3f}"
                    rows.append(row | {"raw": seen})
    command = command_of(argv if argv is not None else sys.argv[1:], "benchmarks.locality_evaluation")
    record = record_of(rows, command, busy.result(), trained, run["setup"])
    print(record.table())
    print(record.write(args.hardware, **({"directory": args.output} if args.output else {})))
    return 0


if __name__ == "__main__":
    sys.exit(main())
