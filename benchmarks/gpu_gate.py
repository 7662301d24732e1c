# SPDX-License-Identifier: Apache-2.0
"""
Gates, from bfloat16 hidden states to experts, weights and router statistics, beside the time of reading the hidden states.

Shapes: T tokens, d = hidden_size, n = num_experts, k = num_experts_per_tok.
"""

from __future__ import annotations

from unittest import mock

import torch

from benchmarks.gpu_timing import copy_bandwidth, timed_graph_us
from benchmarks.record import Record
from hf_locmoe import LocMoeConfig
from hf_locmoe.moe import gate as gate_module
from hf_locmoe.moe import gate_kernels, routing
from hf_locmoe.moe.baseline_gates import SwitchGate
from hf_locmoe.moe.gate import LocMoeGate
from tests.tolerances import assert_close


# tokens, d, n, k
SHAPES = [
    (16384, 2560, 16, 1),
    (16384, 4096, 8, 2),
    (16384, 2048, 64, 8),
    (16384, 2048, 128, 8),
    (16384, 4096, 256, 8),
    (8192, 7168, 256, 8),
    (16384, 2560, 24, 1),
    (16384, 2000, 48, 1),
    (16384, 2560, 96, 1),
]
NOTES = [
    "The limit is one read of the hidden states, with backward two reads and one write. The kernels read them once each way; "
    "float32 logits, an eighth of those bytes at 2048/128, come on top, and with statistics partial sums. Blocks whose bounds are "
    "no multiples of 8 dimensions are read from the multiple before, 16 bytes a load.",
    "Forward it is one kernel, whose programs are single warps that take token after token, and with statistics a second one, "
    "which adds the partial sums of some 2000 warps. Variants: registers a thread, and warps that a launch has. Registers and "
    "warps go by the number of experts, since few experts leave registers free and more warps then wait for memory together, and "
    "the sums of many do not fit 128 registers: on an H100 with statistics 2000/48 takes 45.6 µs with 128 registers and 43.0 "
    "with 96, 2560/24 49.1 and 46.1, 2560/16 41.3 and 39.9, 4096/8 55.5 and 55.9; 4096/256 71.8 with 128 and 69.8 with 168, "
    "7168/256 87.8 and 74.5; at 64, 96 and 128 experts 128 is best. Half the warps at 128 registers is slower everywhere (2000/48 "
    "64.1, 7168/256 94.8).",
    "Did not help in earlier forms: a chunk of tokens a program of several warps (2048/128 with statistics 50 to 59 µs with 4 "
    "warps, 76 to 111 with 8: sums over tokens and, from 256 experts on, over experts went through shared memory). Larger tiles or more warps for pooling (2048/128: 27.7 to 29.3 "
    "µs). Sums over tokens in the routing kernel (2048/128: 40 µs without, 79 with them): Triton's sum over the rows of a "
    "tile goes through shared memory, by the instructions with a stride of 32 words, all lanes in one bank.",
    "A gate of mean affinities on uneven blocks had wrong gradients for some shapes until block bounds were kept from 16-bit "
    "arithmetic: ptxas 12.8 makes of `add.s16x2` of a value and an undefined one, by a constant, an addition of 0.",
]
# registers of a thread, warps of a launch
VARIANTS = [(128, 16 * 132), (168, 12 * 132), (96, 20 * 132)]
COPIES = 3  # inputs to rotate among, so that the cache holds none of them


def measure(num_tokens: int, d: int, n: int, k: int, bandwidth: float, quick: bool) -> dict:
    torch.manual_seed(0)
    config = LocMoeConfig(hidden_size=d, num_attention_heads=8, num_experts=n, num_experts_per_tok=k)
    with torch.device("cuda"):
        pooled, dense = LocMoeGate(config, 0).train(), SwitchGate(config, 0).train()
        torch.nn.init.normal_(dense.weight, std=0.02)
    pooled.e_score_correction_bias = torch.zeros(n, device="cuda")
    dense.e_score_correction_bias = torch.zeros(n, device="cuda")
    inputs = [torch.randn(num_tokens, d, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]

    # the gradients that experts and losses would send back
    directions = [torch.randn(num_tokens, k, device="cuda"), torch.randn(len(routing.RouterStat), n, device="cuda")]

    def route(gate, x):
        logits, weights, index, *summed = gate(x, output_router_stats=True)
        return weights, routing.router_statistics(gate, x, logits, index, None, None, None, None, *summed)

    def train(gate, x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(route(gate, x), [x, *gate.parameters()], directions)[0]

    def plain(run):
        with (
            mock.patch.object(routing, "route_sums", None),
            mock.patch.object(routing, "top_k_of_router", None),
            mock.patch.object(gate_module, "pool_affinity", None),
        ):
            return run()

    with torch.no_grad():
        fast, slow = route(pooled, inputs[0]), plain(lambda: route(pooled, inputs[0]))
    same = (pooled(inputs[0])[2] == plain(lambda: pooled(inputs[0]))[2]).float().mean()
    if same < 0.999:  # sums in another order turn a near tie now and then
        raise AssertionError(
            f"{d}, {n}: the kernel and plain torch choose the same expert for {same:.2%} of the tokens"
        )
    assert_close(fast[1][0] / num_tokens, slow[1][0] / num_tokens)

    def graphed(run):
        return timed_graph_us([lambda x=x: run(x) for x in inputs])

    @torch.no_grad()
    def forward(gate, x):
        route(gate, x)

    forward_limit = num_tokens * d * 2 / bandwidth * 1e6
    row = {
        "shape": f"{d}, {n} experts, top-{k}",
        "tokens": num_tokens,
        "limit_us": forward_limit,
        "pooling": graphed(torch.no_grad()(lambda x: gate_module.pool_affinity(x, n, True))),
        "gate": graphed(lambda x: forward(pooled, x)),
        "gate_only": graphed(torch.no_grad()(lambda x: pooled(x))),
        "train": graphed(lambda x: train(pooled, x)),
        "train_limit_us": 3 * forward_limit,
        "variants_us": {},
    }
    for registers, warps in VARIANTS:
        with mock.patch.object(gate_kernels, "_LAUNCHES", ((n, registers, warps),)):
            gate_kernels._forward_layout.cache_clear()
            row["variants_us"][f"{registers}, {warps}"] = graphed(lambda x: forward(pooled, x)).median
    gate_kernels._forward_layout.cache_clear()
    if not quick:
        row["dense"] = graphed(lambda x: forward(dense, x))
        row["train_dense"] = graphed(lambda x: train(dense, x))
        row["plain"] = plain(lambda: graphed(lambda x: forward(pooled, x))) if d % n == 0 else ""
    row["pooling_of_limit"] = row["pooling"].median / forward_limit
    row["gate_only_of_limit"] = row["gate_only"].median / forward_limit
    row["gate_of_limit"] = row["gate"].median / forward_limit
    row["train_of_limit"] = row["train"].median / (3 * forward_limit)
    return row


def bench_gate(quick: bool = False) -> Record:
    """All shapes; `quick` leaves out the other gates."""
    bandwidth = copy_bandwidth()
    rows = []
    for shape in SHAPES:
        rows.append(measure(*shape, bandwidth, quick))
        print(rows[-1], flush=True)
    return Record(
        theme="gate",
        question="How long does the gate take, beside the time of reading the hidden states?",
        config={"dtype": "bfloat16", "bandwidth_tb_s": bandwidth / 1e12, "inputs_rotated": COPIES},
        command=f"python -m benchmarks.bench_gpu --parts gate{' --quick' if quick else ''}",
        rows=rows,
        columns={
            "shape": "hidden size, experts",
            "tokens": "tokens",
            "limit_us": "memory limit, µs",
            "pooling": "pooling kernel, µs",
            "pooling_of_limit": "by the limit",
            "gate_only": "gate (experts and weights), µs",
            "gate_only_of_limit": "by the limit",
            "gate": "gate and statistics, µs",
            "gate_of_limit": "by the limit",
            "plain": "the same in plain torch, µs",
            "dense": "learned dense gate and statistics, µs",
            "train": "with backward, µs",
            "train_of_limit": "by its limit",
            "train_dense": "dense with backward, µs",
        },
        notes=NOTES,
    )


__all__ = ["bench_gate"]
