# SPDX-License-Identifier: Apache-2.0
"""Models with LoRA on a run's ranks, for the tests of adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig, set_seed

from tests.distributed.test_accelerator import LOCMOE, prepared
from tests.harness import run_ranks
from tests.tiny_models import TINY_SHAPE, tiny_config
from tests.tolerances import assert_close


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = ("attention", "experts", "both")


def base_config(family: str, num_experts: int = 4) -> Any:
    """Of a tiny model whose training one process and several have in common."""
    if family == "locmoe":
        return tiny_config(**LOCMOE, num_experts=num_experts)
    if family == "gated":
        return tiny_config(**LOCMOE, num_experts=num_experts, gated_mlp=True, hidden_act="silu")
    shape = {**TINY_SHAPE, "vocab_size": 64, "num_experts_per_tok": 2, "num_experts": num_experts}
    if family == "mixtral":
        return MixtralConfig(**shape, num_local_experts=num_experts)
    return OlmoeConfig(**shape) if family == "olmoe" else Qwen3MoeConfig(**shape, head_dim=8)


def expert_parameters(model: Any) -> list[str]:
    """As `target_parameters` wants them: `mlp.experts.down_proj` and what else the experts have."""
    return sorted({".".join(name.split(".")[-3:]) for name, _ in model.named_parameters() if ".mlp.experts." in name})


def lora_config(model: Any, target: str, **settings: Any) -> Any:
    import peft

    return peft.LoraConfig(
        target_modules=[] if target == "experts" else list(ATTENTION),
        target_parameters=None if target == "attention" else expert_parameters(model),
        **{"r": 2, "lora_alpha": 8, "init_lora_weights": False, **settings},
    )


def with_lora(model: Any, target: str = "both", **settings: Any) -> Any:
    """`model` with adapters that change what it computes from the start."""
    import peft

    set_seed(5)
    return peft.get_peft_model(model, lora_config(model, target, **settings))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def losses_of_training(accelerator, model, optimizer, loader) -> Iterator[float]:
    """Trains, and gives the loss of each micro-batch over all ranks once its step has been taken."""
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            mean = accelerator.gather(loss.detach()).mean().item()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        yield mean


def adapter_gradients(
    family="locmoe", target="both", checkpointing=None, num_experts=4, **settings
) -> dict[str, torch.Tensor]:
    """
    What the first optimizer step of two micro-batches would take: the gradient of every A and B. `checkpointing` is its
    `use_reentrant`, none if not given; the rest is for `prepared`.
    """
    config = base_config(family, num_experts)
    accelerator, model, _, loader = prepared(config=config, wrap=lambda base: with_lora(base, target), **settings)
    inner = accelerator.unwrap_model(model)
    inner.train()
    if checkpointing is not None:
        inner.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        if checkpointing:
            inner.enable_input_require_grads()
        assert inner.is_gradient_checkpointing
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            break
    return {name: whole(value.grad).cpu() for name, value in inner.named_parameters() if value.requires_grad}


def gradients_of_all(*runs: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    return [adapter_gradients(**run) for run in runs]


def compare_gradients(
    world: int, runs: list[dict[str, Any]], ranks_per_node: str = "2", device: str = "cpu", **common: Any
) -> None:
    """Of the same family, each on so many ranks and, without its layout, on one process."""
    runs = [{"cpu": device == "cpu", **run, **common} for run in runs]
    alone = {"cpu": device == "cpu", "family": runs[0].get("family", "locmoe"), **common}
    targets = sorted({run.get("target", "both") for run in runs})
    truths = run_ranks(gradients_of_all, 1, *({**alone, "target": target} for target in targets), device=device)[0]
    truth = dict(zip(targets, truths, strict=True))
    env = {"LOCMOE_RANKS_PER_NODE": ranks_per_node}
    for results in run_ranks(gradients_of_all, world, *runs, env=env, device=device, timeout_s=300):
        for run, gradients in zip(runs, results, strict=True):
            expected = truth[run.get("target", "both")]
            assert gradients.keys() == expected.keys()
            assert all(gradient.any() for gradient in expected.values())
            try:
                assert_close(gradients, expected)
            except AssertionError as error:
                raise AssertionError(f"{run}: {error}") from error
