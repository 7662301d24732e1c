# SPDX-License-Identifier: Apache-2.0
"""What does batch placement cost a rank's host in an optimizer step: counting routes, scoring samples, dealing them?

Without its exchanges between ranks, which `bench_locality` has in its steps. The assignment's total score must be that of
scipy's solver before a time is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from benchmarks.record import RESULTS, Load, Record, Spread
from hf_locmoe.training.affinity import AffinityTable
from hf_locmoe.training.batch_placement import SAMPLED_ASSIGNMENTS
from hf_locmoe.training.placement import balanced_assignment


# name: layers, experts, experts per token, vocabulary, nodes, ranks, samples of a step, tokens of a sample
SIZES = {
    "8 experts, top-1, 4 layers; 64 samples of 128 on 2 nodes of 2": (4, 8, 1, 1024, 2, 4, 64, 128),
    "64 experts, top-8, 16 layers; 256 samples of 4096 on 8 nodes of 8": (16, 64, 8, 50304, 8, 64, 256, 4096),
}


def clock(run: Callable[[], object], repeats: int) -> Spread:
    """Milliseconds, after one run that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return Spread.of(times)


def measure(name: str, repeats: int) -> dict[str, object]:
    """One row: the three parts of a step's work on synthetic routes."""
    num_layers, num_experts, top_k, vocab_size, num_nodes, num_ranks, num_samples, length = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    counted = min(num_samples * length, SAMPLED_ASSIGNMENTS // (num_layers * top_k))
    keys = torch.randint(vocab_size, (counted,), generator=generator)
    experts = torch.randint(num_experts, (counted, num_layers, top_k), generator=generator)
    node_of_token = torch.randint(num_nodes, (counted,), generator=generator)
    samples = torch.randint(vocab_size, (num_samples, length), generator=generator)
    own = samples[: num_samples // num_ranks]  # a rank scores what it read, and all ranks deal all samples
    nodes = torch.arange(num_experts) * num_nodes // num_experts
    on_node = torch.nn.functional.one_hot(nodes, num_nodes).bool().expand(num_layers, -1, -1)
    table = AffinityTable(num_layers, vocab_size, num_experts, num_nodes)
    table.update(keys, experts, node_of_token)
    scores = table.node_scores(samples, on_node).numpy()
    places = [num_samples // num_nodes] * num_nodes
    node = balanced_assignment(scores, places)
    slots = np.repeat(np.arange(num_nodes), places)
    rows, columns = linear_sum_assignment(scores[:, slots], maximize=True)
    best = scores[rows, slots[columns]].sum()
    if not np.isclose(scores[np.arange(num_samples), node].sum(), best, rtol=1e-5):
        raise AssertionError(f"{name}: the assignment's total score is not the best")
    return {
        "size": name,
        "counted": counted * num_layers * top_k,
        "count_ms": clock(lambda: table.update(keys, experts, node_of_token), repeats),
        "score_ms": clock(lambda: table.node_scores(own, on_node), repeats),
        "deal_ms": clock(lambda: balanced_assignment(scores, places), repeats),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_batch_placement", description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--hardware", required=True, help="the results' short name of this machine")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with Load() as load:
        rows = [measure(name, args.repeats) for name in SIZES]
    record = Record(
        theme="batch_placement",
        question="What does batch placement cost a rank's host in an optimizer step?",
        config={"repeats": args.repeats, "threads": 1},
        command=f"python -m benchmarks.bench_batch_placement --hardware {args.hardware}",
        rows=rows,
        columns={
            "size": "model and step",
            "counted": "assignments counted",
            "count_ms": "counting, ms (quartiles)",
            "score_ms": "scoring a rank's samples, ms",
            "deal_ms": "dealing all samples, ms",
        },
        notes=[
            "One thread. Random routes and tokens, the least favourable case for dealing. On a GPU this is the host's work "
            "while the device still computes the step before; the ranks' exchange of routes, scores and moved samples is "
            "not in it.",
        ],
        load=load.result(),
    )
    record.write(args.hardware, args.output)
    print(record.table())


if __name__ == "__main__":
    main()
