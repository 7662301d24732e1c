# SPDX-License-Identifier: Apache-2.0
"""Samples dealt to nodes under Trainer: whatever the data is, the training is that of the run in which they stay."""

from __future__ import annotations

import inspect

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed

from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.checkpoint import LocMoeTrainer
from tests.harness import run_ranks
from tests.tiny_models import tiny_config
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

VOCAB, LENGTH = 64, 10
ONE_EACH = {"LOCMOE_RANKS_PER_NODE": "1"}


def rows(count: int, packed: bool = False, with_domain: bool = False) -> Dataset:
    """Each of one domain, which is the parity of its token ids, in no order."""
    draw = torch.Generator().manual_seed(0)
    domains = torch.randint(0, 2, (count,), generator=draw).tolist()
    ids = [(torch.randint(1, VOCAB // 2, (LENGTH,), generator=draw) * 2 - domain).tolist() for domain in domains]
    columns = {"input_ids": ids, "labels": ids}
    if packed:  # two documents in a row, and the second begins anew
        columns["position_ids"] = [[*range(4), *range(LENGTH - 4)]] * count
    if with_domain:
        columns["domain"] = domains
    return Dataset.from_dict(columns)


class Log(TrainerCallback):
    def __init__(self):
        self.values: dict[int, list[float]] = {}
        self.shares: list[float] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values[state.global_step] = [logs["loss"], logs["grad_norm"]]
            self.shares.append(logs["routing/local_share"])


def train(folder, data, placement, plugin=None, resume=None, **arguments):
    """What a run gives, and what the placement did in it."""
    LocMoePlugin(layout="spread", backend="none", slices="1", batch_placement=placement, **(plugin or {})).activate()
    set_seed(3)
    config = tiny_config(vocab_size=VOCAB, gate_type="hash", router_aux_loss_coef=0.0, locality_loss_coef=0.0)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.arange(VOCAB)
    for block in model.sparse_blocks:  # a domain to each node
        block.gate.expert_of_token.copy_((ids % 2 * 2 + ids // 2 % 2).unsqueeze(-1))
    log = Log()
    options = dict(per_device_train_batch_size=2, logging_steps=1, eval_strategy="steps", eval_steps=2, save_steps=100)
    # Adam divides by the gradient's size, and of one near zero that makes a step of its rounding
    options |= dict(learning_rate=1e-2, adam_epsilon=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, seed=7)
    args = TrainingArguments(str(folder), **{**options, **arguments})
    trainer = LocMoeTrainer(model, args, train_dataset=data, eval_dataset=rows(6), callbacks=[log])
    seen = {"calls": 0, "moved": 0, "fields": set()}
    placed = trainer.batch_placement()
    if placed is not None:
        place = placed.place

        def watched(batches):
            before = [batch["input_ids"].clone() for batch in batches]
            after = place(batches)
            seen["calls"] += 1
            seen["moved"] += sum(
                int((old != new["input_ids"]).any(1).sum()) for old, new in zip(before, after, strict=True)
            )
            return after

        placed.place = watched
    forward = trainer.model.forward

    def called(*positional, **named):
        seen["fields"] |= set(named)
        return forward(*positional, **named)

    called.__signature__ = inspect.signature(forward)
    trainer.model.forward = called
    trainer.train(resume_from_checkpoint=resume)
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"log": log.values, "shares": log.shares, "evaluations": evaluations, "placed": placed is not None, **seen}


def with_and_without(folder, data, settings):
    """The same run with samples that stay and with samples that are dealt."""
    return [train(f"{folder}/{placement}", data, placement, **settings) for placement in ("off", "micro_batch")]


def check(pairs, num_steps):
    for stays, dealt in pairs:
        assert not stays["placed"] and dealt["moved"] > 0
        assert dealt["calls"] == num_steps  # and none for an evaluation
        assert list(dealt["log"]) == list(stays["log"]) == [*range(1, num_steps + 1)]
        for name in ("log", "evaluations"):
            of_both = [
                torch.tensor(list(run[name].values()) if name == "log" else run[name]) for run in (dealt, stays)
            ]
            assert_close(*of_both)
        assert sum(dealt["shares"]) > sum(stays["shares"])


def test_accumulation_epochs_and_an_uneven_last_step(tmp_path):
    """22 rows: two whole steps of 8 an epoch, and one with what is left."""
    settings = dict(gradient_accumulation_steps=2, num_train_epochs=2)
    check(run_ranks(with_and_without, 2, tmp_path, rows(22), settings, env=ONE_EACH), 6)


def streamed(folder):
    return with_and_without(folder, rows(40, packed=True).to_iterable_dataset(), dict(max_steps=6))


def test_a_stream_of_packed_rows(tmp_path):
    check(run_ranks(streamed, 2, tmp_path, env=ONE_EACH), 6)


def test_a_domain_column_tells_the_placement_and_not_the_model(tmp_path):
    settings = dict(max_steps=10, plugin=dict(domain_column="domain"))
    pairs = run_ranks(with_and_without, 2, tmp_path, rows(40, with_domain=True), settings, env=ONE_EACH)
    check(pairs, 10)
    for _, dealt in pairs:
        assert "domain" not in dealt["fields"]
        # two of one domain stay together only where a batch of four has three or four of it
        assert min(dealt["shares"][2:]) >= 0.5 and 1.0 in dealt["shares"]


def resumed(folder, data):
    whole = train(folder, data, "micro_batch", num_train_epochs=1, save_steps=2)
    again = train(folder, data, "micro_batch", num_train_epochs=1, resume=f"{folder}/checkpoint-2")
    return whole, again


def test_resumed_in_the_middle_of_an_epoch(tmp_path):
    for whole, again in run_ranks(resumed, 2, tmp_path, rows(24), env=ONE_EACH):
        assert list(again["log"]) == [3, 4, 5, 6]
        assert_close(torch.tensor(list(again["log"].values())), torch.tensor(list(whole["log"].values())[2:]))
        # with what it knew: the first batch is dealt by it, all but its newest step
        assert again["shares"][0] > 0.7 and again["calls"] == 4


def on_one_node(folder):
    LocMoePlugin(layout="spread", backend="none").activate()
    model = AutoModelForCausalLM.from_config(tiny_config())
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True)
    return LocMoeTrainer(model, args, train_dataset=rows(8)).batch_placement()


def test_on_one_node_there_is_nothing_to_place(tmp_path):
    assert run_ranks(on_one_node, 2, tmp_path, env={"LOCMOE_RANKS_PER_NODE": "2"}) == [None, None]
