# SPDX-License-Identifier: Apache-2.0
"""Dispatch on a CUDA device: equal to the CPU, host syncs counted, fixed shapes captured in a graph. One rank, NCCL."""

from __future__ import annotations

import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from hf_locmoe.distributed.dispatch import Capacity, Peers, plan_dispatch
from hf_locmoe.distributed.expert_parallel import LocMoeEP, expert_parallel_options
from hf_locmoe.distributed.overlap import run_sliced
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.moe import experts as experts_module
from tests.distributed.expert_parallel_runs import tiny_config
from tests.tolerances import TOLERANCES, assert_close


pytestmark = pytest.mark.gpu

NUM_TOKENS, HIDDEN, NUM_EXPERTS, TOP_K = 64, 32, 4, 2


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_layer(group, device, num_slices, capacity=None, by_pair=True):
    peers = Peers(NodeTopology((0,)).with_experts(NUM_EXPERTS), 0, group, None, torch.device(device))
    factors = torch.linspace(0.5, 2.0, NUM_EXPERTS + 1, device=device)
    factors[-1] = 0  # of no expert

    def experts(tokens, expert_ids, weights, num_pairs):
        return (tokens.tanh() * (factors[expert_ids] * weights).sum(1, keepdim=True)).to(tokens.dtype)

    def layer(tokens, index, weights, wire_dtype=None):
        plan = plan_dispatch(index, peers, "rank", num_slices, capacity)
        return run_sliced(tokens, weights, plan, peers, experts, wire_dtype, by_pair=by_pair)

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


@pytest.mark.parametrize("by_pair", [True, False])
@pytest.mark.parametrize("capacity", [None, Capacity(NUM_TOKENS, 0), Capacity(NUM_TOKENS - 9, 0, NUM_TOKENS)])
@pytest.mark.parametrize("num_slices", [1, 3])
def test_cuda_equals_cpu(group, num_slices, capacity, by_pair):
    expected = run(make_layer(group, "cpu", num_slices, capacity), *make_inputs("cpu"))
    got = run(make_layer(group, "cuda:0", num_slices, capacity, by_pair), *make_inputs("cuda:0"))
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


@pytest.mark.parametrize("by_pair", [True, False])
@pytest.mark.parametrize("num_slices", [1, 2])
def test_one_host_sync_a_layer_and_none_with_fixed_shapes(group, num_slices, by_pair):
    inputs, capacity = make_inputs("cuda:0"), Capacity(NUM_TOKENS, 0, NUM_TOKENS)
    assert len(count_syncs(make_layer(group, "cuda:0", num_slices, None, by_pair), inputs)) == 1
    assert count_syncs(make_layer(group, "cuda:0", num_slices, capacity, by_pair), inputs) == []


def check_capture(layer, inputs, dtype=torch.float32):
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
        torch.testing.assert_close(mine, truth, **TOLERANCES[dtype])


@pytest.mark.parametrize("by_pair", [True, False])
def test_fixed_shapes_are_captured_in_a_graph(group, by_pair):
    layer = make_layer(group, "cuda:0", 2, Capacity(NUM_TOKENS, 0, NUM_TOKENS), by_pair)
    check_capture(layer, make_inputs("cuda:0"))


# ---- transformers' experts on our kernels ---------------------------------------------------------------------------

FIXED = dict(slices=2, capacity_factor=1.0, max_tokens_per_rank=NUM_TOKENS)


def make_expert_layer(implementation, options, dtype):
    """As many experts as the plain layer, of 16 by 16, and whether they were given rows with their choices."""
    config = tiny_config("olmoe", NUM_EXPERTS)
    config._experts_implementation = implementation
    experts = OlmoeExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    experts = experts.to("cuda:0", dtype)
    experts._is_expert_parallel = True
    mesh = dist.init_device_mesh("cuda", (1, 1), mesh_dim_names=("ep", "tp"))
    with expert_parallel_options(**options):
        return LocMoeEP(experts, mesh["ep"], mesh["tp"])


def make_expert_inputs(dtype=torch.bfloat16):
    tokens, index, weights = make_inputs("cuda:0")
    return tokens[:, :16].detach().to(dtype).requires_grad_(), index, weights.detach().to(dtype).requires_grad_()


@pytest.mark.parametrize("options", [dict(slices=1), dict(slices=3), FIXED], ids=["one", "sliced", "fixed"])
def test_experts_that_take_choices_equal_the_loop(group, options):
    inputs = make_expert_inputs()
    exact = [inputs[0].double(), inputs[1], inputs[2].double()]
    exact = [tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor for tensor in exact]
    layer = make_expert_layer("capacity_bmm", options, torch.bfloat16)
    reference = make_expert_layer("eager", options, torch.bfloat16)
    reference.experts.double()
    truth = run(reference, *exact)
    with mock.patch.object(experts_module, "_fused_forward", wraps=experts_module._fused_forward) as fused:
        got = run(layer, *inputs)
    assert fused.call_count == options["slices"]
    assert all(call.args[2].shape[1] == TOP_K for call in fused.call_args_list)
    for mine, expected in zip(got, truth):
        scale = expected.abs().max()
        assert_close(mine.double() / scale, expected / scale, torch.bfloat16)


def test_experts_that_take_choices_wait_for_nothing_and_are_captured(group):
    inputs = make_expert_inputs()
    assert len(count_syncs(make_expert_layer("capacity_bmm", dict(slices=1), torch.bfloat16), inputs)) == 1
    fixed = make_expert_layer("capacity_bmm", FIXED, torch.bfloat16)
    assert count_syncs(fixed, inputs) == []
    check_capture(fixed, inputs, torch.bfloat16)


@pytest.mark.slow
def test_experts_that_take_choices_compile_to_one_graph(group):
    layer, inputs = make_expert_layer("capacity_bmm", FIXED, torch.bfloat16), make_expert_inputs()
    compiled = torch.compile(lambda *arguments: layer(*arguments), fullgraph=True, backend="aot_eager")
    for mine, expected in zip(run(compiled, *inputs), run(layer, *inputs)):
        scale = expected.abs().max()
        assert_close(mine / scale, expected / scale, torch.bfloat16)
