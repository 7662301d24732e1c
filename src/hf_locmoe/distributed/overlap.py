# SPDX-License-Identifier: Apache-2.0
"""
Communication under the experts' computation: a layer's tokens cut into slices, and how many of them.

With two slices (`>` starts a transfer, `<` waits for it, both are autograd functions):

    forward    >D0 >D1 <D0 [experts 0] >C0 <D1 [experts 1] >C1 <C0 <C1
                    ......under......       ....under....
    backward   the mirror image: >C1' >C0' <C1' [experts 1'] >D1' <C0' [experts 0'] >D0' <D1' <D0'

Autograd runs the later-created of two ready nodes first, which gives the mirrored order on every rank alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .dispatch import DispatchPlan, FanOut, Peers, finish_combine, finish_dispatch, start_combine, start_dispatch
from .recomputation import Recomputation


_MAX_SLICES = 4
# What a prediction must promise before it is acted on: rates measured on busy machines swing, and an accelerator computes fewer
# rows at a lower rate.
_LEAST_GAIN = {"cpu": 0.03}
_LEAST_GAIN_ON_ACCELERATORS = 0.15
_LEAST_GAIN_OF_FAN_OUT = 0.15
_PROBES = 8
_PRODUCTS = 8
# A message to each peer, long enough to see a rate: 10 ms at 200 Mbit/s, and on accelerators' links some 50 us.
_PROBE_BYTES = {"cpu": 1 << 18}
_PROBE_BYTES_ON_ACCELERATORS = 1 << 24
# Of the square matrix product that finds the rate of computation.
_PROBE_SIDE = {"cpu": 512}
_PROBE_SIDE_ON_ACCELERATORS = 4096


def run_sliced(
    hidden_states: torch.Tensor,
    top_k_weights: torch.Tensor,
    plan: DispatchPlan,
    peers: Peers,
    experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor],
    wire_dtype: torch.dtype | None = None,
    recomputation: Recomputation | None = None,
    is_recomputed: bool = False,
    by_pair: bool = True,
) -> torch.Tensor:
    """
    Dispatch, experts and combine of one layer, slice by slice.

    Args:
        hidden_states (`torch.Tensor` of shape `(T, d)`): this rank's tokens.
        top_k_weights (`torch.Tensor` of shape `(T, k)`): their routing weights.
        plan (`DispatchPlan`): where they go, and in how many slices.
        peers (`Peers`): the expert-parallel group.
        experts (callable):
            `(tokens (R, d), local expert ids (R, s), weights (R, s), pairs) -> sums of weighted outputs (R, d)`, where `pairs`
            (`int`) is how many of the ids name an expert, with fixed shapes at most.
        wire_dtype (`torch.dtype`, *optional*): dtype under way.
        recomputation (`Recomputation`, *optional*): where the plan waits in backward, for activation checkpointing.
        is_recomputed (`bool`): whether a checkpoint runs this forward again. Then nothing returns before the last slice
            is computed: where nothing after the layer is needed, the checkpoint stops there and nothing returns at all.
        by_pair (`bool`): whether the experts get one row for each (token, local expert) pair, s = 1, or for each token, s = k.

    Returns:
        `torch.Tensor` of shape `(T, d)`.
    """
    num_slices = len(plan.slices)
    sizes = [part.tokens.stop - part.tokens.start for part in plan.slices]
    # `split`, not indexing: its backward puts the slices' gradients together in one piece.
    states, weights = hidden_states.split(sizes), top_k_weights.split(sizes)

    def send(index: int):
        return start_dispatch(states[index], weights[index], plan, index, peers, wire_dtype, recomputation)

    under_way, computed, returning = send(0), [], []
    for index in range(num_slices):
        current, under_way = under_way, send(index + 1) if index + 1 < num_slices else None
        tokens = finish_dispatch(current, by_pair)
        output = experts(tokens, current.expert_ids, current.weights, current.num_pairs)
        computed.append((output, current))
        if not is_recomputed or under_way is None:
            returning += [start_combine(*result) for result in computed]
            computed.clear()
    outputs = [finish_combine(metadata) for metadata in returning]
    return outputs[0] if num_slices == 1 else torch.cat(outputs)


@dataclass(frozen=True)
class CostModel:
    """
    What a group's links and devices do, the same numbers on every rank of it.

    Args:
        latency_s (`float`): seconds of an exchange without bytes.
        node_local_bytes_per_s (`float`): bytes a second that one rank exchanges inside its node.
        remote_bytes_per_s (`float`): bytes a second that one rank exchanges with other nodes.
        flops_per_s (`float`): floating-point operations a second of one rank.
        overlap (`float`, *optional*, defaults to 1.0):
            Share of a transfer that leaves the processor to the computation: nearly all on a slow link, little where the
            transfer is copies by the processor itself.
    """

    latency_s: float
    node_local_bytes_per_s: float
    remote_bytes_per_s: float
    flops_per_s: float
    overlap: float = 1.0

    @classmethod
    def measure(cls, peers: Peers, dtype: torch.dtype = torch.float32) -> CostModel:
        """
        Times a few exchanges and one matrix product, in `dtype` on an accelerator; collective over the group. The slowest
        rank counts.
        """
        same_node = peers.topology.same_node(peers.rank)
        device = peers.expert_to_rank.device
        num_bytes = _PROBE_BYTES.get(device.type, _PROBE_BYTES_ON_ACCELERATORS)
        side = _PROBE_SIDE.get(device.type, _PROBE_SIDE_ON_ACCELERATORS)
        # with random numbers of its own: the run's are the same with and without a measurement
        generator = torch.Generator(device).manual_seed(0)
        factors = torch.randn(side, side, device=device, generator=generator)
        factors = factors if device.type == "cpu" else factors.to(dtype)
        near = [num_bytes if is_near else 0 for is_near in same_node]
        far = [num_bytes - bytes_near for bytes_near in near]
        empty = _measure(_exchange(peers, [0] * peers.num_ranks), device)
        node_local = _measure(_exchange(peers, near), device)
        remote = _measure(_exchange(peers, far), device)
        products = _measure(lambda: [factors @ factors for _ in range(_PRODUCTS)], device)
        # of products what is usual, since ranks that share a processor keep up less than the best of it
        product_s = products.usual_s / _PRODUCTS
        busy = (remote if any(far) else node_local).busy
        slowest = torch.tensor(
            [empty.best_s, node_local.best_s, remote.best_s, product_s, busy], dtype=torch.float64, device=device
        )
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=peers.group)
        latency_s, node_local_s, remote_s, product_s, busy = slowest.tolist()
        # The largest node's sizes, so that all ranks get the same numbers on uneven nodes too.
        num_near, num_far = peers.ranks_per_node, peers.num_ranks - min(peers.topology.node_sizes)
        return cls(
            latency_s=latency_s,
            node_local_bytes_per_s=num_bytes * num_near / max(node_local_s - latency_s, 1e-6),
            remote_bytes_per_s=num_bytes * num_far / max(remote_s - latency_s, 1e-6) if num_far else float("inf"),
            flops_per_s=2 * side**3 / product_s,
            overlap=1 - busy if device.type == "cpu" else 1.0,
        )

    def choose_slices(self, num_tokens: int, row_bytes: int, num_top_k: int, row_flops: float, peers: Peers) -> int:
        """
        Slices that make a layer's forward and backward fastest; 1 where little is gained, on the CPU less than 3 %, on
        accelerators than 15 %.

        With `s` slices the transfers and the computation of all but one slice run side by side, and each slice costs
        two more exchanges in each direction, each of them its latency and about as much again on the host. A direction
        takes `transfer + compute - overlap * (1 - 1 / s) * min(transfer, compute) + 4 * s * latency`. The transfer is
        both ways of an exchange, taken as if routing were uniform; backward computes twice what forward does.

        Args:
            num_tokens (`int`): tokens of the rank that has most.
            row_bytes (`int`): bytes of one token under way.
            num_top_k (`int`): experts per token.
            row_flops (`float`): operations of one expert on one token.
        """
        remote, node_local = _copies_per_token(num_top_k, peers, "rank")
        transfer_s = (
            2 * num_tokens * row_bytes * (remote / self.remote_bytes_per_s + node_local / self.node_local_bytes_per_s)
        )
        compute_s = num_tokens * num_top_k * row_flops / self.flops_per_s

        def predicted_s(num_slices: int) -> float:
            hidden_s = min(transfer_s, compute_s) + min(transfer_s, 2 * compute_s)
            hidden_s *= self.overlap * (1 - 1 / num_slices)
            return 2 * transfer_s + 3 * compute_s - hidden_s + 8 * num_slices * self.latency_s

        best = min(range(1, _MAX_SLICES + 1), key=predicted_s)
        return best if predicted_s(best) < (1 - _least_gain(peers)) * predicted_s(1) else 1

    def choose_fan_out(self, num_top_k: int, peers: Peers) -> FanOut:
        """
        "node" where the copies that it keeps off the links between nodes are worth the hop inside the node that it
        adds, as if routing were uniform.
        """

        def seconds_a_byte(fan_out: FanOut) -> float:
            remote, node_local = _copies_per_token(num_top_k, peers, fan_out)
            return remote / self.remote_bytes_per_s + node_local / self.node_local_bytes_per_s

        return "node" if seconds_a_byte("node") < (1 - _LEAST_GAIN_OF_FAN_OUT) * seconds_a_byte("rank") else "rank"


def _least_gain(peers: Peers) -> float:
    return _LEAST_GAIN.get(peers.expert_to_rank.device.type, _LEAST_GAIN_ON_ACCELERATORS)


def _copies_per_token(num_top_k: int, peers: Peers, fan_out: FanOut) -> tuple[float, float]:
    """
    Expected rows one token puts on the links to other nodes and inside nodes, if routing were uniform: a set of `m`
    of P ranks is hit by at least one of k experts with probability 1 - (1 - m / P)^k.
    """
    num_ranks = peers.num_ranks
    hit_rank = 1 - (1 - 1 / num_ranks) ** num_top_k
    sizes = peers.topology.node_sizes
    own = max(sizes)  # not this rank's own node: the answer must be the same on all ranks
    remote_ranks = (num_ranks - own) * hit_rank
    if fan_out == "rank":
        return remote_ranks, (own - 1) * hit_rank
    others = list(sizes)
    others.remove(own)
    remote_nodes = sum(1 - (1 - size / num_ranks) ** num_top_k for size in others)
    # What arrives once is handed on; every row takes part in the hop inside, the rank's own among them.
    return remote_nodes, (own - 1) * hit_rank + remote_ranks


def _exchange(peers: Peers, sizes: list[int]) -> Callable[[], Any]:
    """An exchange of so many bytes with each rank, to be run again and again."""
    sent = torch.zeros(sum(sizes), dtype=torch.uint8, device=peers.expert_to_rank.device)
    received = torch.empty_like(sent)
    return lambda: dist.all_to_all_single(received, sent, sizes, sizes, group=peers.group)


class _Timing(NamedTuple):
    """The best of several, what others do on the machine can only make one slower; the median; and the processor's share."""

    best_s: float
    usual_s: float
    busy: float


def _measure(work: Callable[[], Any], device: torch.device) -> _Timing:
    """Times some work several times; the first is not counted."""
    seconds, computed_s = [], 0.0
    for probe in range(1 + _PROBES):
        _synchronize(device)
        begin, begin_computed = time.perf_counter(), time.process_time()
        work()
        _synchronize(device)
        if probe:
            seconds.append(time.perf_counter() - begin)
            computed_s += time.process_time() - begin_computed
    return _Timing(min(seconds), median(seconds), min(1.0, computed_s / sum(seconds)))


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
