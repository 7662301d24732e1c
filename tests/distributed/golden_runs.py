# SPDX-License-Identifier: Apache-2.0
"""
The golden class: every way to spread one training over ranks, and the one trajectory that all of them have to take.

A step's batch is four times the same eight rows, in another order each time. So a step is the same mathematics whether it is
taken at once or in four micro-batches, router losses included, which are no sums over micro-batches; and still no two
micro-batches of a rank are alike. Which rows a node computes depends on the number of nodes only, because the locality loss
is a node's.

The one-process truth knows nothing of layouts, groups or exchanges. `tests/golden/one_process.json` holds what it was when
somebody last looked at it; where it is meant to move, `python -m tests.distributed.golden_runs --record` writes it again.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.moe.losses import locality_loss
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.accelerate_plugin import LocMoePlugin


STEPS = 20
ROWS, COPIES, LENGTH = 8, 4, 8  # of one micro-batch over all ranks, micro-batches in a batch, tokens
LEARNING_RATE = 0.02
# of the data: with this one no token of any truth stands so near to two experts that rounding could decide
SEED = 3200
RECORDED = Path(__file__).parents[1] / "golden" / "one_process.json"


@dataclass(frozen=True)
class Member:
    """
    One way to take the golden steps.

    Args:
        ranks, nodes (`int`): nodes of equal size.
        layout (`str`): one of `LAYOUTS`.
        tp_size, ep_size: as the plugin's.
        plan (`str`): how the backend "locmoe" does an all-to-all, or `"none"`: the device's own backend.
        slices, fan_out: as the plugin's.
        accumulation (`int`): micro-batches of a step, 1, 2 or 4; of 4, the loss counts the step's targets as Trainer does.
        checkpointing (`bool`): whether activations are computed again in the backward.
        locality (`bool`): with the locality loss, whose value depends on the number of nodes.
    """

    ranks: int = 1
    nodes: int = 1
    layout: str = "sharded"
    tp_size: int = 1
    ep_size: int | None = None
    plan: str = "flat"
    slices: int | str = 1
    fan_out: str = "rank"
    accumulation: int = 1
    checkpointing: bool = False
    locality: bool = False

    @property
    def num_shards(self) -> int:
        return self.ranks // self.tp_size

    @property
    def truth(self) -> Member:
        """The one process that this member has to agree with."""
        return Member(nodes=self.nodes, locality=True) if self.locality else Member()

    def plugin(self) -> LocMoePlugin:
        return LocMoePlugin(
            layout=self.layout,
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            ranks_per_node=str(self.ranks // self.nodes),
            slices=str(self.slices),
            fan_out=self.fan_out,
            backend="none" if self.plan == "none" else "locmoe",
        )


def config(member: Member) -> LocMoeConfig:
    """A model small enough for hundreds of runs, whose router losses and balance bias weigh."""
    return LocMoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_shared_experts=1,
        num_experts=8,
        num_experts_per_tok=2,
        initializer_range=0.2,  # so that gradients are far from rounding
        router_aux_loss_coef=0.5,
        locality_loss_coef=0.5 if member.locality else 0.0,
        balance_bias_update_rate=0.01,
    )


def micro_batches(member: Member, step: int, shard: int | None, node: int | None = None) -> list[torch.Tensor]:
    """
    Token ids of a step's micro-batches, each `(rows, LENGTH)`: of one shard's ranks, of one node's, or of all.
    """
    generator = torch.Generator().manual_seed(SEED + step)
    ids = torch.randint(0, 64, (ROWS, LENGTH), generator=generator)
    on_node = ids.chunk(member.nodes)
    copies = []
    for copy in range(COPIES):
        rows = [part.roll(copy, 0) for part in on_node]
        if node is not None:
            copies.append(rows[node])
        elif shard is not None:
            copies.append(torch.cat(rows).chunk(member.num_shards)[shard])
        else:
            copies.append(torch.cat(rows))
    together = COPIES // member.accumulation
    return [torch.cat(copies[start : start + together]) for start in range(0, COPIES, together)]


def build(member: Member, device: torch.device):
    """From the seed; spread over the ranks where there are several."""
    torch.manual_seed(0)
    if member.ranks == 1:
        model = AutoModelForCausalLM.from_config(config(member)).to(device)
    else:
        os.environ["LOCMOE_PLAN"] = "" if member.plan == "none" else member.plan
        plugin = member.plugin()
        plugin.activate()
        try:
            model = AutoModelForCausalLM.from_config(config(member))
        finally:
            plugin.deactivate()
    if member.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def backward(model, member: Member, step: int, device: torch.device) -> tuple[float, torch.Tensor, torch.Tensor]:
    """One step's gradients; the loss (mean over ranks), the router losses, and the router statistics of all ranks."""
    alone = member.ranks == 1
    shard = None if alone else dist.get_rank() // member.tp_size
    total, router, stats = torch.zeros((), device=device), torch.zeros(2, device=device), 0
    counts = {}
    if (
        member.accumulation == COPIES
    ):  # as Trainer: the step's targets are counted, and the average over ranks is undone
        counts["num_items_in_batch"] = torch.tensor(COPIES * ROWS * (LENGTH - 1), device=device)
    for index, ids in enumerate(micro_batches(member, step, shard)):
        ids = ids.to(device)
        output = model(input_ids=ids, labels=ids, **counts)
        loss = output.loss * member.num_shards if counts else output.loss / member.accumulation
        locality = output.locality_loss if member.locality else torch.zeros((), device=device)
        if alone and member.locality:
            locality = locality_of_nodes(model, member, step, index, device)
            loss = loss + model.config.locality_loss_coef * locality / member.accumulation
        loss.backward()
        total += loss.detach()
        router += torch.stack([output.router_aux_loss, locality]).detach() / member.accumulation
        stats = stats + output.router_stats
    if not alone:
        for tensor in (total, router, stats):
            dist.all_reduce(tensor)
        total, router = total / member.ranks, router / member.ranks
    return total.item(), router.tolist(), stats


def locality_of_nodes(model, member: Member, step: int, index: int, device: torch.device) -> torch.Tensor:
    """What the nodes' locality losses come to, on average, in one process: each node's rows by themselves."""
    seen = []
    hook = model.model.register_forward_hook(lambda module, inputs, output: seen.append(output.router_stats))
    experts = model.config.num_experts
    losses = []
    for node in range(member.nodes):
        ids = micro_batches(member, step, None, node)[index].to(device)
        model(input_ids=ids)
        prob_sum, tokens = seen.pop()[:, RouterStat.PROB_SUM], torch.full((2,), float(ids.numel()), device=device)
        near = torch.arange(experts, device=device) * member.nodes // experts == node
        losses.append(locality_loss(prob_sum, tokens, near, model.config.locality_remote_share).mean())
    hook.remove()
    return torch.stack(losses).mean()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None}


def gradient_norm(model) -> float:
    """Over all parameters. Dense layers and experts have meshes of their own: one norm each."""
    by_mesh: dict[Any, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is not None:
            by_mesh.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [whole(torch.nn.utils.get_total_norm(gradients)) for gradients in by_mesh.values()]
    return torch.stack(norms).norm().item()


def router_gradient(model, member: Member, device: torch.device) -> torch.Tensor:
    """What the router losses add to the gradient of the first step."""
    parts = []
    coefficients = {name: getattr(model.config, name) for name in ("router_aux_loss_coef", "locality_loss_coef")}
    for scale in (1.0, 0.0):
        for name, value in coefficients.items():
            setattr(model.config, name, value * scale)
        backward(model, member, 0, device)
        parts.append(torch.cat([gradient.double().flatten() for gradient in gradients(model).values()]))
        model.zero_grad()
    for name, value in coefficients.items():
        setattr(model.config, name, value)
    return parts[0] - parts[1]


def train(member: Member, device: str | torch.device = "cpu", steps: int = STEPS) -> dict[str, Any]:
    """
    Takes the golden steps, on every rank of the default group or, with `member.ranks == 1`, in this process.

    Returns:
        `dict`: `losses`, `norms` of the gradients, `router_losses` (load balance, locality), each by step; the
        `router_gradient` of the first step; `parameters` and buffers after the last, whole, on the CPU; `choices`: fan-out
        and slices of every layer.
    """
    device = torch.device(device)
    model = build(member, device)
    of_router = router_gradient(model, member, device)
    # Not Adam: it turns the rounding of a vanishing gradient into a whole step. Without foreach, the default on CUDA: with TP
    # and no FSDP norms are plain tensors beside DTensors, and one kernel takes no mixture (Trainer groups them by mesh).
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, foreach=False)
    losses, norms, router_losses = [], [], []
    for step in range(steps):
        loss, router, stats = backward(model, member, step, device)
        losses.append(loss)
        router_losses.append(router)
        norms.append(gradient_norm(model))
        optimizer.step()
        optimizer.zero_grad()
        model.update_router_state(stats)
    return {
        "losses": losses,
        "norms": norms,
        "router_losses": router_losses,
        "router_gradient": of_router,
        "parameters": {name: whole(tensor) for name, tensor in model.state_dict().items()},
        "choices": [layer.choices for layer in expert_parallel_layers(model)],
    }


def train_all(members: list[Member], device_type: str = "cpu") -> list[dict[str, Any]]:
    """For `run_ranks`: one member after the other on the same ranks. What rank 0 returns holds the parameters."""
    device = torch.device(device_type)
    if device_type != "cpu":
        device = torch.device(device_type, int(os.environ["LOCAL_RANK"]))
        torch.accelerator.set_device_index(device.index)
    results = [train(member, device) for member in members]
    return results if dist.get_rank() == 0 else []


# ---- what is recorded -----------------------------------------------------------------------------------------------

TRUTHS = {
    "one node": Member(),
    "two nodes, with the locality loss": Member(nodes=2, locality=True),
    "four nodes, with the locality loss": Member(nodes=4, locality=True),
}


def record_of(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that is kept in a file: series, and every parameter's norm."""
    norms = {name: tensor.double().norm().item() for name, tensor in result["parameters"].items()}
    return {key: result[key] for key in ("losses", "norms", "router_losses")} | {"parameter_norms": norms}


def main() -> None:
    if sys.argv[1:] != ["--record"]:
        sys.exit("usage: python -m tests.distributed.golden_runs --record")
    torch.set_num_threads(1)
    RECORDED.parent.mkdir(exist_ok=True)
    records = {name: record_of(train(member)) for name, member in TRUTHS.items()}
    RECORDED.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
