# SPDX-License-Identifier: Apache-2.0
"""What the expert-parallel tests run on every rank: tiny models of transformers' own, one process against many."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.distributed import DistributedConfig

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_options


_SIZES = dict(
    vocab_size=61,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_config(family: str, num_experts: int = 4, num_experts_per_tok: int = 2):
    if family == "olmoe":
        config = OlmoeConfig(
            **_SIZES, intermediate_size=16, num_experts=num_experts, num_experts_per_tok=num_experts_per_tok
        )
    elif family == "mixtral":
        config = MixtralConfig(
            **_SIZES, intermediate_size=16, num_local_experts=num_experts, num_experts_per_tok=num_experts_per_tok
        )
    elif family == "locmoe":
        # Router losses are over all ranks' tokens; here every batch is one loss of its own.
        config = LocMoeConfig(
            **_SIZES,
            moe_intermediate_size=16,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            num_shared_experts=1,
            gate_type="switch",
            router_aux_loss_coef=0.0,
            locality_loss_coef=0.0,
        )
    else:
        config = Qwen3MoeConfig(
            **_SIZES,
            head_dim=8,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            norm_topk_prob=True,
        )
    config.initializer_range = 0.2  # so that gradients are far from rounding
    return config


@dataclass
class Variant:
    """One way to run the same training, on the ranks' `device`."""

    mesh: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "olmoe"
    num_experts: int = 4
    num_experts_per_tok: int = 2
    experts: str = "grouped_mm"
    implementation: str = "locmoe"
    checkpointing: bool | None = None  # use_reentrant
    accumulation: int = 1
    autocast: bool = False
    one_expert: bool = False
    tied: bool = False
    steps: int = 2
    lengths: tuple[int, ...] = (7,)  # sequence length by batch
    device: str = "cpu"


def batches(variant: Variant, num_batches: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    size = variant.lengths
    drawn = [torch.randint(3, 61, (2, size[i % len(size)]), generator=generator) for i in range(num_batches)]
    return [input_ids.to(variant.device) for input_ids in drawn]


def full_model(variant: Variant):
    torch.manual_seed(0)
    config = tiny_config(variant.family, variant.num_experts, variant.num_experts_per_tok)
    config.tie_word_embeddings = variant.tied
    model = AutoModelForCausalLM.from_config(config, experts_implementation=variant.experts)
    if variant.one_expert:  # every token's first choice is the last expert, and its second the one before
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.weight"):
                    parameter.zero_()
    return model.to(variant.device)


def sharded_model(variant: Variant, model, config_class=DistributedConfig, model_class=None):
    distributed_config = config_class(ep_implementation=variant.implementation, **variant.mesh)
    with expert_parallel_options(**variant.options):
        return (model_class or type(model)).from_pretrained(
            None,
            config=copy.deepcopy(model.config),
            state_dict={name: tensor.clone() for name, tensor in model.state_dict().items()},
            distributed_config=distributed_config,
            experts_implementation=variant.experts,
        )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, variant: Variant, own_batches, scale: float):
    """Losses, logits of the last batch, gradients of the first step, parameters after the last."""
    if variant.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": variant.checkpointing})
    model.train()
    # without foreach, the default on CUDA: with TP and no FSDP plain tensors stand beside DTensors, which it does not take
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, foreach=False)
    losses, gradients, logits = [], None, None
    for step in range(variant.steps):
        total = 0.0
        for input_ids in own_batches(step):
            context = torch.autocast(variant.device, torch.bfloat16) if variant.autocast else nullcontext()
            with context:
                output = model(input_ids=input_ids, labels=input_ids)
            (output.loss * scale).backward()
            total += float(output.loss.detach()) * scale
            logits = output.logits.detach()
        losses.append(total)
        if gradients is None:
            gradients = {
                name: whole(parameter.grad).clone() if parameter.grad is not None else None
                for name, parameter in model.named_parameters()
            }
        optimizer.step()
        optimizer.zero_grad()
    return losses, logits, gradients, {name: whole(p.detach()) for name, p in model.named_parameters()}


def compare(variant: Variant, tolerance: dict[str, float], **build) -> Any:
    """Trains the variant on this rank's batches and, in one process, on everybody's; returns the sharded model."""
    rank, world = dist.get_rank(), dist.get_world_size()
    num_shards = world // variant.mesh.get("tp_size", 1)
    shard = rank // variant.mesh.get("tp_size", 1)
    per_step = num_shards * variant.accumulation
    truth = full_model(variant)
    model = sharded_model(variant, truth, **build)
    expected = train(truth, variant, lambda step: batches(variant, per_step, step), 1 / per_step)
    got = train(
        model,
        variant,
        lambda step: batches(variant, per_step, step)[shard::num_shards],
        1 / variant.accumulation,
    )
    mean_losses = torch.tensor(got[0], device=variant.device)
    dist.all_reduce(mean_losses)
    torch.testing.assert_close((mean_losses / world).cpu(), torch.tensor(expected[0]), **tolerance)
    if shard == num_shards - 1:  # the truth's last batch is that of the last shard
        torch.testing.assert_close(whole(got[1]), expected[1], **tolerance)
    for kind in (2, 3):
        assert got[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            torch.testing.assert_close(
                got[kind][name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    return model
