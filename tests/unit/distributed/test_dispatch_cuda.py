# SPDX-License-Identifier: Apache-2.0
"""Dispatch on a CUDA device: equal to the CPU, host syncs counted, fixed shapes captured in a graph. One rank, NCCL."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist

from hf_locmoe.distributed.dispatch import Capacity, Peers, plan_dispatch
from hf_locmoe.distributed.overlap import run_sliced
from hf_locmoe.distributed.topology import NodeTopology
from tests.tolerances import TOLERANCES


pytestmark = pytest.mark.gpu

NUM_TOKENS, HIDDEN, NUM_EXPERTS, TOP_K = 64, 32, 4, 2


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_layer(group, device, num_slices, capacity=None):
    peers = Peers(NodeTopology((0,)).with_experts(NUM_EXPERTS), 0, group, None, torch.device(device))
    factors = torch.linspace(0.5, 2.0, NUM_EXPERTS + 1, device=device)

    def experts(tokens, expert_ids, weights):
        return (tokens.tanh() * factors[expert_ids] * weights).to(tokens.dtype)

    def layer(tokens, index, weights, wire_dtype=None):
        plan = plan_dispatch(index, peers, "rank", num_slices, capacity)
        return run_sliced(tokens, weights, plan, peers, experts, wire_dtype)

    return layer


def make_inputs(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(NUM_TOKENS, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
    weights = torch.rand(NUM_TOKENS, TOP_K, generator=generator).to(device).requires_grad_()
    index = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K].to(device)
    return tokens, index, weights


def run(layer, tokens, index, weights):
    output = layer(tokens, index, weights)
    return [output, *torch.autograd.grad(output.float().square().sum(), (tokens, weights))]


@pytest.mark.parametrize("capacity", [None, Capacity(NUM_TOKENS, 0)])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_cuda_equals_cpu(group, num_slices, capacity):
    expected = run(make_layer(group, "cpu", num_slices, capacity), *make_inputs("cpu"))
    got = run(make_layer(group, "cuda:0", num_slices, capacity), *make_inputs("cuda:0"))
    for mine, truth in zip(got, expected):
        torch.testing.assert_close(mine.cpu(), truth, **TOLERANCES[torch.float32])


def test_repeats_bit_for_bit(group):
    layer, inputs = make_layer(group, "cuda:0", 2), make_inputs("cuda:0", torch.bfloat16)
    first = run(layer, *inputs)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(layer, *inputs)))


def count_syncs(layer, inputs):
    run(layer, *inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(layer, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]


@pytest.mark.parametrize("num_slices", [1, 2])
def test_one_host_sync_a_layer_and_none_with_fixed_shapes(group, num_slices):
    inputs = make_inputs("cuda:0")
    assert len(count_syncs(make_layer(group, "cuda:0", num_slices), inputs)) == 1
    assert count_syncs(make_layer(group, "cuda:0", num_slices, Capacity(NUM_TOKENS, 0)), inputs) == []


def test_fixed_shapes_are_captured_in_a_graph(group):
    layer, inputs = make_layer(group, "cuda:0", 2, Capacity(NUM_TOKENS, 0)), make_inputs("cuda:0")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(layer, *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(layer, *inputs)
    # Other tokens on other ways through the same graph.
    tokens, index, _ = inputs
    with torch.no_grad():
        tokens.copy_(tokens.flip(0))
        index.copy_((index + 1) % NUM_EXPERTS)
    graph.replay()
    for mine, truth in zip(captured, run(layer, *inputs)):
        torch.testing.assert_close(mine, truth, **TOLERANCES[torch.float32])
