# SPDX-License-Identifier: Apache-2.0
"""Experts that move between ranks: the function, the training and the checkpoints stay what they were."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, OlmoeConfig, TrainerCallback, TrainingArguments, set_seed

from hf_locmoe.distributed.expert_move import canonical_experts, move_experts, placements_of, reason_not_to_move
from hf_locmoe.distributed.expert_parallel import expert_parallel_layers
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.checkpoint import LocMoeTrainer
from hf_locmoe.training.checkpoint_state import gathered_weights
from tests.harness import run_ranks
from tests.tiny_models import random_ids, tiny_config
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

STEPS = 6


def config(family):
    if family == "locmoe":
        return tiny_config(num_experts=8, vocab_size=64, router_aux_loss_coef=0.01, locality_loss_coef=0.0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.2}
    return OlmoeConfig(**sizes, eos_token_id=1, output_router_logits=False)


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def optimizer_tensors(model, optimizer):
    return [
        whole(value)
        for parameter in model.parameters()
        for _, value in sorted(optimizer.state[parameter].items())
        if isinstance(value, torch.Tensor)
    ]


def random_placements(model, draw):
    """Another one for every layer, the same on all ranks."""
    return [
        tuple(layer.peers.topology.expert_to_rank[expert] for expert in torch.randperm(8, generator=draw).tolist())
        for layer in expert_parallel_layers(model)
    ]


def train(family, layout, moves, folder=None):
    """One process trains on all samples, a rank on its share. With `moves` the experts are somewhere else in every step."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    if world > 1:
        LocMoePlugin(layout=layout, backend="none", slices="1").activate()
        spread_every_model()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(family)).train()
    # With a large eps: Adam divides by the gradient's size, and of one near zero that makes a step of its rounding.
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    draw = torch.Generator().manual_seed(5)
    losses, exact, num_moved = [], True, 0
    for step in range(STEPS):
        ids = random_ids(8, 10, 64, seed=step)
        mine = ids.chunk(world)[rank]
        loss = model(input_ids=mine, labels=mine, num_items_in_batch=ids[:, 1:].numel()).loss * world
        loss.backward()
        losses.append(loss.item() / world)
        optimizer.step()
        optimizer.zero_grad()
        if moves:
            with canonical_experts(model, optimizer):
                before = gathered_weights(model, True), optimizer_tensors(model, optimizer)
            num_moved += move_experts(model, random_placements(model, draw), optimizer)
            after_move = placements_of(model)
            with canonical_experts(model, optimizer):
                after = gathered_weights(model, True), optimizer_tensors(model, optimizer)
            assert placements_of(model) == after_move
            exact &= all(torch.equal(before[0][name], value) for name, value in after[0].items())
            exact &= all(torch.equal(old, new) for old, new in zip(before[1], after[1], strict=True))
    if moves:
        model.save_pretrained(folder)
        assert placements_of(model) == after_move
    weights = gathered_weights(model, True) if world > 1 else dict(model.state_dict())
    return {"losses": losses, "weights": weights, "exact": exact, "moved": num_moved}


@pytest.mark.parametrize(
    "family, layout, world_size",
    [("locmoe", "spread", 2), ("locmoe", "sharded", 4), ("olmoe", "spread", 4)],
)
def test_the_training_is_that_of_one_process_wherever_the_experts_are(family, layout, world_size, tmp_path):
    truth = train(family, layout, moves=False)
    ranks = run_ranks(
        train,
        world_size,
        family,
        layout,
        True,
        str(tmp_path),
        env={"LOCMOE_RANKS_PER_NODE": str(world_size // 2)},
    )
    assert_close(torch.tensor([result["losses"] for result in ranks]).sum(0), torch.tensor(truth["losses"]))
    for result in ranks:
        assert result["exact"]
        assert result["moved"] > STEPS
    for name, weight in truth["weights"].items():
        assert_close(ranks[0]["weights"][name], weight)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)  # what one process reads
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight, ranks[0]["weights"][name])


def replicated():
    """An expert with a copy on each node has no one place."""
    LocMoePlugin(layout="replicated", backend="none").activate()
    model = AutoModelForCausalLM.from_config(config("locmoe"))
    return reason_not_to_move(model)


def test_what_cannot_move_is_named():
    for reason in run_ranks(replicated, 4, env={"LOCMOE_RANKS_PER_NODE": "2"}):
        assert "an expert has several copies: 2 ranks of 4" in reason
    assert "no experts that this package" in reason_not_to_move(torch.nn.Linear(1, 1))


# ---- with Trainer ---------------------------------------------------------------------------------------------------

BATCH = 4


def samples():
    """Read in order, rank 0 gets odd token ids and rank 1 even ones."""
    rows = []
    for index in range(24):
        ids = random_ids(1, 10, 32, seed=index)[0] * 2 % 64
        rows.append(ids + 1 if index // 2 % 2 == 0 else ids)
    return [{"input_ids": row, "labels": row} for row in rows]


class Shares(TrainerCallback):
    def __init__(self):
        self.values: dict[int, tuple[float, float]] = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values[state.global_step] = (logs["loss"], logs.get("routing/local_share", 1.0))


def trained(folder, resume=None, evaluate=False):
    """A hash gate that sends even token ids to the first half of the experts, odd ones to the second: all to the other node."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    LocMoePlugin(
        layout="spread", backend="none", slices="1", batch_placement="off", expert_placement_steps=2
    ).activate()
    set_seed(3)
    model = AutoModelForCausalLM.from_config(
        tiny_config(num_experts=8, vocab_size=64, gate_type="hash", router_aux_loss_coef=0.0, locality_loss_coef=0.0)
    )
    ids = torch.arange(64)
    for block in model.sparse_blocks:
        block.gate.expert_of_token.copy_((ids % 2 * 4 + ids // 2 % 4).unsqueeze(-1))
    shares = Shares()
    options = dict(per_device_train_batch_size=BATCH // world, train_sampling_strategy="sequential", max_steps=STEPS)
    options |= dict(save_steps=3, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True)
    args = TrainingArguments(str(folder), **options)
    trainer = LocMoeTrainer(model, args, train_dataset=samples(), eval_dataset=samples()[:4], callbacks=[shares])
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "final"))
    return shares.values, loss, placements_of(model)


def test_through_trainer_saved_resumed_and_on_one_process(tmp_path):
    truth, eval_loss, _ = trained(tmp_path / "one")
    env = {"LOCMOE_RANKS_PER_NODE": "1"}
    for values, loss, placements in run_ranks(trained, 2, tmp_path / "two", env=env):
        assert [round(share, 6) for _, share in values.values()] == [0.0] * 2 + [1.0] * 4
        assert placements == [(1, 1, 1, 1, 0, 0, 0, 0)] * 2
        assert_close(
            torch.tensor([entry[0] for entry in values.values()]), torch.tensor([v[0] for v in truth.values()])
        )
        assert_close(torch.tensor(loss), torch.tensor(eval_loss))
    for name in ("checkpoint-3", "checkpoint-6", "final"):
        expected, actual = (load_file(tmp_path / run / name / "model.safetensors") for run in ("one", "two"))
        for key, weight in expected.items():
            assert_close(actual[key], weight)
    # resumed from the third step: where the experts were, with their optimizer state, bit for bit
    resumed = run_ranks(trained, 2, tmp_path / "two", str(tmp_path / "two" / "checkpoint-3"), env=env)
    assert [round(share, 6) for _, share in resumed[0][0].values()] == [1.0] * 3
    again = load_file(tmp_path / "two" / "final" / "model.safetensors")
    for key, weight in actual.items():
        assert torch.equal(again[key], weight)
    # and on one process
    continued, _, _ = trained(tmp_path / "two", str(tmp_path / "two" / "checkpoint-3"))
    assert_close(
        torch.tensor([continued[step][0] for step in (4, 5, 6)]), torch.tensor([truth[step][0] for step in (4, 5, 6)])
    )
    state = json.loads((tmp_path / "two" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
