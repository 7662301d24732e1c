# SPDX-License-Identifier: Apache-2.0
"""Expert parallelism over NCCL on several GPUs equals one process on a GPU; resuming with fewer; what the host waits for."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hf_locmoe.distributed.layouts import SpreadConfig, with_spread_layout
from hf_locmoe.moe import experts as experts_module
from tests.distributed.expert_parallel_runs import Variant, compare, full_model
from tests.distributed.test_checkpoints import LONGER, agrees, train_all
from tests.distributed.test_expert_parallel import PLAIN, SLICED, one_layer
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


pytestmark = [pytest.mark.gpu, pytest.mark.multiprocess]

ON_GPUS = dict(device="cuda", timeout_s=150)
TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2", "LOCMOE_TIMEOUT_S": "60"}
EP4 = dict(fsdp_size=4, ep_size=4)
WITH_TP = dict(fsdp_size=2, tp_size=2, ep_size=4)
SPREAD = dict(dp_replicate_size=2, fsdp_size=2, ep_size=4)


def compare_all(variants):
    """Each against one process on this rank's GPU: losses, logits, gradients, parameters."""
    for variant in variants:
        build = {}
        if variant.mesh.get("dp_replicate_size", 1) > 1:
            build = dict(config_class=SpreadConfig, model_class=with_spread_layout(type(full_model(variant))))
        try:
            compare(variant, TOLERANCES[torch.float32], **build)
        except AssertionError as error:
            raise AssertionError(f"{variant}: {error}") from error
    return len(variants)


def on_gpu(mesh, options, **settings):
    return Variant(mesh, options, device="cuda", **settings)


@pytest.mark.multigpu(4)
@pytest.mark.parametrize("plan", ["flat", "two_level", "auto"])
def test_every_family_over_four_gpus_equals_one_process(plan):
    """The exchange through the backend "locmoe", on two emulated nodes."""
    sliced, plain = dict(SLICED, backend="locmoe"), dict(PLAIN, backend="locmoe")
    variants = [
        on_gpu(EP4, sliced, family="olmoe", checkpointing=False, accumulation=2, lengths=(7, 3)),
        on_gpu(EP4, plain, family="mixtral", experts="eager"),
        on_gpu(EP4, dict(backend="locmoe"), family="qwen3", num_experts=8, num_experts_per_tok=3),
        on_gpu(EP4, sliced, one_expert=True, experts="eager", checkpointing=True),
        on_gpu(WITH_TP, sliced, family="mixtral"),
    ]
    env = TWO_NODES | {"LOCMOE_PLAN": plan}
    assert run_ranks(compare_all, 4, variants, env=env, **ON_GPUS) == [len(variants)] * 4


@pytest.mark.multigpu(4)
def test_other_layouts_over_four_gpus_equal_one_process():
    """Over the mesh's own groups."""
    variants = [
        on_gpu(EP4, SLICED, family="locmoe"),
        on_gpu(dict(fsdp_size=4, ep_size=2), SLICED, experts="eager", one_expert=True),
        on_gpu(SPREAD, SLICED, checkpointing=False, accumulation=2),
        on_gpu(dict(SPREAD, ep_size=2), PLAIN, family="qwen3"),
        on_gpu(EP4, dict(slices=2, capacity_factor=8.0, max_tokens_per_rank=14), experts="eager"),
    ]
    assert run_ranks(compare_all, 4, variants, env=TWO_NODES, **ON_GPUS) == [len(variants)] * 4


@pytest.mark.multigpu(2)
def test_two_gpus_equal_one_process():
    mesh = dict(fsdp_size=2, ep_size=2)
    variants = [
        on_gpu(mesh, dict(SLICED, backend="locmoe")),
        on_gpu(mesh, PLAIN, one_expert=True, experts="eager", num_experts_per_tok=1),
        on_gpu(dict(fsdp_size=1, tp_size=2, ep_size=2), SLICED, family="mixtral", checkpointing=False),
    ]
    env = TWO_NODES | {"LOCMOE_RANKS_PER_NODE": "1"}
    assert run_ranks(compare_all, 2, variants, env=env, **ON_GPUS) == [len(variants)] * 2


def _compare_on_kernels(variants):
    """In bfloat16, with our experts implementation, which takes the rows with all of their choices."""
    tolerance = {name: 2 * value for name, value in TOLERANCES[torch.bfloat16].items()}
    with patch.object(experts_module, "_fused_forward", wraps=experts_module._fused_forward) as fused:
        for variant in variants:
            compare(variant, tolerance)
    return {call.args[2].shape[1] for call in fused.call_args_list}


@pytest.mark.multigpu(2)
def test_experts_on_our_kernels_equal_one_process():
    mesh, on_kernels = dict(fsdp_size=2, ep_size=2), dict(experts="capacity_bmm", autocast=True, steps=1)
    fixed = dict(slices=1, capacity_factor=4.0, max_tokens_per_rank=14)
    variants = [
        on_gpu(mesh, PLAIN, **on_kernels),
        on_gpu(mesh, SLICED, **on_kernels, family="locmoe", checkpointing=False),
        on_gpu(mesh, fixed, **on_kernels, family="mixtral"),
    ]
    env = TWO_NODES | {"LOCMOE_RANKS_PER_NODE": "1"}
    assert run_ranks(_compare_on_kernels, 2, variants, env=env, **ON_GPUS) == [{2}] * 2


# ---- what the host waits for ----------------------------------------------------------------------------------------


def _count_syncs(run):
    """Calls of `run` that made the host wait for the device, as torch itself notices them."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _syncs_of_a_layer():
    """Forward and backward of one layer, by way of exchanging: (host syncs, exchanges)."""
    capacity = dict(slices=2, capacity_factor=4.0, max_tokens_per_rank=7)
    ways = {"fixed": capacity, "rank": PLAIN, "node": SLICED, "locmoe": dict(SLICED, backend="locmoe")}
    found = {}
    for name, options in ways.items():
        layer, run = one_layer(options, "cuda", "batched_mm")
        for _ in range(2):  # the communicators and kernels of the first time
            run(layer)
        torch.cuda.synchronize()
        with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as exchanges:
            found[name] = (_count_syncs(lambda: run(layer)), exchanges.call_count)
    return found


@pytest.mark.multigpu(4)
def test_the_host_waits_once_a_layer_and_never_with_fixed_shapes():
    env = TWO_NODES | {"LOCMOE_PLAN": "flat"}
    for found in run_ranks(_syncs_of_a_layer, 4, env=env, **ON_GPUS):
        # two slices, there and back, twice; and the sizes; a hop inside the node doubles it
        assert found == {"fixed": (0, 8), "rank": (1, 5), "node": (1, 17), "locmoe": (1, 17)}


def _capture():
    """Forward and backward of a layer with fixed shapes in one CUDA graph, replayed on other tokens."""
    layer, run = one_layer(dict(slices=2, capacity_factor=4.0, max_tokens_per_rank=7), "cuda", "batched_mm")
    tokens = torch.randn(7, 16, device="cuda").requires_grad_()
    weights = torch.rand(7, 2, device="cuda")
    index = torch.rand(7, 4, device="cuda").argsort(1)[:, :2].contiguous()

    def step():
        output = layer(tokens, index, weights)
        (gradient,) = torch.autograd.grad(output.square().sum(), tokens)
        return output.detach(), gradient

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        generator = torch.Generator("cuda").manual_seed(10 * seed + dist.get_rank())
        with torch.no_grad():
            tokens.copy_(torch.randn(7, 16, device="cuda", generator=generator))
            index.copy_(torch.rand(7, 4, device="cuda", generator=generator).argsort(1)[:, :2])
        graph.replay()
        got = [tensor.clone() for tensor in captured]
        torch.testing.assert_close(got, list(step()), **TOLERANCES[torch.float32])
    torch.cuda.synchronize()
    return True


@pytest.mark.multigpu(4)
def test_fixed_shapes_capture_in_a_cuda_graph():
    assert run_ranks(_capture, 4, env=TWO_NODES, **ON_GPUS) == [True] * 4


# ---- resume ---------------------------------------------------------------------------------------------------------


def on_gpus(output_dir, **settings):
    return dict(output_dir=output_dir, **LONGER | {"arguments": LONGER["arguments"] | {"use_cpu": False}}, **settings)


@pytest.mark.multigpu(4)
def test_four_gpus_then_two_then_one(tmp_path):
    """Each goes on from the checkpoint of the one before; all take the trajectory of four."""
    four = on_gpus(tmp_path / "4")
    other = on_gpus(tmp_path / "4-spread", resume=str(tmp_path / "4/checkpoint-4"), layout="spread")
    other["plugin"] = dict(ranks_per_node="2")
    first, spread = run_ranks(train_all, 4, four, other, **ON_GPUS)[0]
    agrees(spread, first[0])
    two = on_gpus(tmp_path / "2", resume=str(tmp_path / "4/checkpoint-4"))
    agrees(run_ranks(train_all, 2, two, **ON_GPUS)[0][0], first[0])
    one = on_gpus(tmp_path / "1", resume=str(tmp_path / "2/checkpoint-6"))
    agrees(run_ranks(train_all, 1, one, **ON_GPUS)[0][0], first[0])
