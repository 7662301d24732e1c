# SPDX-License-Identifier: Apache-2.0
"""
A training step asks the device for nothing: run on meta tensors, which have no values to read back, with all refused that
copies values of the host's to the device. On a device `tests/gpu/test_fast_paths.py` holds the kernels to it.
"""

import contextlib
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from hf_locmoe.distributed.router_scope import RouterScope
from hf_locmoe.moe.overflow import RemoteTier
from hf_locmoe.training.telemetry import RoutingStats
from tests.tiny_models import tiny_model


class NoCopies(TorchFunctionMode):
    """Refuses what copies a Python list or a tensor from the host to the device, or back; CUDA waits for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.Tensor.new_tensor, torch.as_tensor) and not torch.is_tensor(args[-1]):
            raise AssertionError(f"{func.__name__} of {args[-1]} copies it to the device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                raise AssertionError(f"the list in the index {args[1]} is copied to the device")
        result = func(*args, **kwargs)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.copy_) and len(args) > 0:
            source = args[1] if func is torch.Tensor.copy_ else args[0]
            if source.device != result.device:
                raise AssertionError(f"a tensor is copied from {source.device} to {result.device}")
        return result


def meta_model(**fields):
    torch.manual_seed(0)
    return tiny_model(**fields).to("meta", torch.bfloat16).train()


def step(model, stats=None, **kwargs):
    ids = torch.empty(2, 12, dtype=torch.int64, device="meta")
    # autocast knows no meta device
    no_autocast = dict(autocast=lambda **kwargs: contextlib.nullcontext(), is_autocast_enabled=lambda device: False)
    with mock.patch.multiple(torch, **no_autocast), NoCopies():
        outputs = model(ids, labels=ids, use_cache=False, **kwargs)
        outputs.loss.backward()
        model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
        if stats is not None:
            losses = {"router_aux_loss": outputs.router_aux_loss, "locality_loss": outputs.locality_loss}
            stats.update(outputs.router_stats, losses)
    return outputs


@pytest.mark.parametrize(
    "copies",
    [
        lambda x: x[:, [0, 1]],
        lambda x: x * torch.tensor([1.0, 2.0], device="meta"),
        lambda x: x.new_tensor(0.5),
        lambda x: x + torch.zeros(2).to("meta"),
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_what_would_wait_is_refused(copies):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), NoCopies():
        copies(torch.empty(2, 2, device="meta"))


CAPACITY = dict(capacity_mode="factor", expert_capacity_factor=0.8)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        dict(num_experts_per_tok=2, norm_topk_prob=True, gate_noise_std=0.1, gate_relu=False),
        dict(num_experts_per_tok=2, gated_mlp=True, hidden_act="silu", num_shared_experts=1, **CAPACITY),
        dict(capacity_overflow="next_best", **CAPACITY),
        dict(num_experts=5, gate_centering=True, balance_bias_update_rate=0.001),
        dict(num_experts=5, gate_affinity="mean", gate_centering=True),
        dict(gate_rotation=True, gate_centering=True),
        dict(num_expert_groups=2, topk_group=1),
        dict(gate_type="switch", num_experts_per_tok=2),
        dict(gate_type="hash", num_experts_per_tok=2),
    ],
    ids=str,
)
def test_a_training_step_never_waits(fields):
    stats = RoutingStats()
    model = meta_model(**fields)
    model.set_experts_implementation("capacity_bmm" if "capacity_mode" in fields else "grouped_mm")
    for _ in range(2):
        step(model, stats)


def test_nor_with_a_mask_for_statistics_and_a_sum_for_loss():
    step(meta_model(), num_items_in_batch=11, domain_ids=None)


@pytest.mark.parametrize("capacity", [{}, CAPACITY])
def test_nor_where_experts_are_on_several_nodes(capacity):
    model = meta_model(**capacity)
    model.set_experts_implementation("capacity_bmm" if capacity else "grouped_mm")
    near = torch.zeros(2, 4, dtype=torch.bool)
    near[:, :2] = True
    for experts, block in zip(near, model.sparse_blocks):
        block.remote_tier = RemoteTier(experts, 0.5)
        block.remote_tier.node_local_experts = experts.to("meta")
    scope = RouterScope(num_nodes=2, node_local_experts=near.to("meta"), locality_scale=torch.ones(2, device="meta"))
    model.model.router_scope = scope
    outputs = step(model)
    assert outputs.locality_loss.device.type == "meta"
    # placed on the host, it would be copied in each step
    model.model.router_scope = replace(scope, node_local_experts=near)
    with pytest.raises(AssertionError, match="copied from cpu"):
        step(model)
