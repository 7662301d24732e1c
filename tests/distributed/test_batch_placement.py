# SPDX-License-Identifier: Apache-2.0
"""Samples dealt to the nodes of their experts: the training is the same, the traffic is not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, OlmoeConfig

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.batch_placement import batch_placement_for
from tests.harness import run_ranks
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

VOCAB, LENGTH, STEPS = 64, 12, 5


def config(family: str = "locmoe"):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_experts": 4, "initializer_range": 0.2, "pad_token_id": 0}
    if family == "olmoe":
        return OlmoeConfig(**sizes, num_experts_per_tok=2, eos_token_id=1, output_router_logits=False)
    # dealt among the micro-batches of a step, the load-balancing loss, which is a micro-batch's, is another one
    aux_loss_coef = 0.0 if family == "locmoe-no-aux" else 0.01
    losses = {"locality_loss_coef": 0.0, "router_aux_loss_coef": aux_loss_coef}
    return LocMoeConfig(**sizes, gate_type="hash", moe_intermediate_size=24, **losses)


def global_batches(num_samples: int, ragged: bool = False) -> list[dict[str, torch.Tensor]]:
    """As many samples of each of two domains by the parity of their token ids, which a hash gate of two nodes tells apart by a table made for it."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(STEPS):
        domain = (torch.randperm(num_samples, generator=draw) % 2).unsqueeze(1)
        ids = torch.randint(1, VOCAB // 2, (num_samples, LENGTH), generator=draw) * 2 - domain
        labels, mask = ids.clone(), torch.ones_like(ids)
        if ragged:
            short = torch.randint(0, 2, (num_samples,), generator=draw).bool()
            ids[short, LENGTH // 2 :], labels[short, LENGTH // 2 :], mask[short, LENGTH // 2 :] = 0, -100, 0
        batches.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return batches


def split_by_parity(model) -> None:
    """Even token ids to the experts of the first node, odd ones to those of the second."""
    for block in model.sparse_blocks:
        ids = torch.arange(VOCAB)
        block.gate.expert_of_token.copy_(((ids % 2) * 2 + ids // 2 % 2).unsqueeze(-1))


def train(batches, family, counts, accumulation, scope) -> dict:
    """On one process the whole batches; on a rank its samples, read in order, so many as `counts` says."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world_size > 1:
        LocMoePlugin(layout="spread", batch_placement=scope, backend="none", slices="1").activate()
        spread_every_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).train()
    if family != "olmoe":
        split_by_parity(model)
    placement = batch_placement_for(model) if world_size > 1 else None
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()], lr=1e-2)
    losses, norms, shares, read, computed = [], [], [], [], []
    for batch in batches:
        micro = [dict(zip(batch, values)) for values in zip(*(value.chunk(accumulation) for value in batch.values()))]
        num_items = sum((part["labels"][:, 1:] != -100).sum() for part in micro)
        if world_size > 1:
            micro = [{name: value.split(counts)[rank] for name, value in part.items()} for part in micro]
            read += [row for part in micro for row in part["input_ids"].tolist()]
            if placement is not None:
                micro = placement.place(micro)
            computed += [row for part in micro for row in part["input_ids"].tolist()]
        total = 0.0
        for part in micro:
            loss = model(**part, num_items_in_batch=num_items).loss * world_size
            loss.backward()
            total += loss.item() / world_size
            if layers := expert_parallel_layers(model):
                node = rank * 2 // world_size
                near = [torch.tensor(layer.node_of_expert)[layer.newest_routes] == node for layer in layers]
                shares.append(torch.stack(near).float().mean().item())
        norms.append(
            float(
                torch.nn.utils.get_total_norm(
                    [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
                )
            )
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    seen = None if placement is None else placement.table.counts.sum(dim=(1, 2)).tolist()
    weights = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in model.state_dict().items()}
    return {
        "losses": losses,
        "norms": norms,
        "shares": shares,
        "read": read,
        "computed": computed,
        "weights": weights,
        "seen": seen,
    }


def check(world_size, family="locmoe", accumulation=1, scope="micro_batch", counts=None, ragged=False, env=None):
    counts = counts or [8] * world_size
    batches = global_batches(sum(counts) * accumulation, ragged)
    truth = train(batches, family, counts, accumulation, scope)
    ranks = run_ranks(
        train,
        world_size,
        batches,
        family,
        counts,
        accumulation,
        scope,
        env={"LOCMOE_RANKS_PER_NODE": str(world_size // 2), **(env or {})},
    )
    losses = torch.tensor([result["losses"] for result in ranks]).sum(0)
    assert_close(losses, torch.tensor(truth["losses"]))
    for result in ranks:
        assert_close(torch.tensor(result["norms"]), torch.tensor(truth["norms"]))
        for name, weight in truth["weights"].items():
            assert_close(result["weights"][name], weight)
    read, computed = ([row for result in ranks for row in result[key]] for key in ("read", "computed"))
    assert sorted(computed) == sorted(read)
    assert [len(result["computed"]) for result in ranks] == [len(result["read"]) for result in ranks]
    return ranks


@pytest.mark.parametrize("scope, accumulation", [("micro_batch", 1), ("micro_batch", 2), ("step", 2)])
def test_the_training_is_that_of_one_process(scope, accumulation):
    family = "locmoe-no-aux" if scope == "step" else "locmoe"
    ranks = check(2, family, scope=scope, accumulation=accumulation)
    moved = sum(result["computed"] != result["read"] for result in ranks)
    assert moved == 2
    first, last = (sum(result["shares"][index] for result in ranks) / 2 for index in (0, -1))
    assert first < 0.65
    assert last > (0.85 if scope == "micro_batch" and accumulation > 1 else 0.95)


def test_four_ranks_padding_uneven_numbers_and_top_2():
    check(4, family="olmoe", counts=[5, 3, 4, 4], ragged=True)


def test_the_statistics_decay_once_a_step_whatever_the_number_of_ranks():
    """Of every step but the newest, which is not told yet, all tokens of all ranks with one weight."""
    expected = sum(16 * LENGTH * 0.98**age for age in range(STEPS - 1))
    for result in check(2, counts=[8, 8]):
        assert_close(torch.tensor(result["seen"]), torch.full((2,), expected))
