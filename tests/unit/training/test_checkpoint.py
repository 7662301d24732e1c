# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on one process: whole or not there, read back exactly, and refused by name where they cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.training import checkpoint_folder
from hf_locmoe.training.checkpoint import LocMoeTrainer
from hf_locmoe.training.checkpoint_folder import damage_of, last_checkpoint, open_staging, prune, publish, tidy
from hf_locmoe.training.checkpoint_state import load_scheduler_state, load_weights
from tests.tiny_models import random_ids, tiny_model


ROUTER_STATE = dict(
    gate_centering=True, balance_bias_update_rate=0.02, capacity_mode="critical", attention_dropout=0.1
)


class Losses(TrainerCallback):
    def __init__(self):
        self.values = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values[state.global_step] = (logs["loss"], logs["grad_norm"])


def make_trainer(output_dir, model=None, trainer_class=LocMoeTrainer, **arguments):
    set_seed(0)
    model = tiny_model(**ROUTER_STATE) if model is None else model
    options = dict(max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=2, learning_rate=1e-2)
    options |= dict(report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(16, 10)]
    args = TrainingArguments(str(output_dir), **{**options, **arguments})
    return trainer_class(model, args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[Losses()])


def train(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    losses = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Losses))
    return losses.values, {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def exactly_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *train(make_trainer(folder))


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_resumed_is_uninterrupted(finished, tmp_path, monkeypatch, asynchronous):
    """With dropout, and with every kind of router state."""
    _, losses, weights = finished
    monkeypatch.setenv("LOCMOE_ASYNC_SAVE", asynchronous)
    train(make_trainer(tmp_path))
    resumed, resumed_weights = train(make_trainer(tmp_path / "rest"), str(tmp_path / "checkpoint-2"))
    assert resumed == {step: losses[step] for step in (3, 4)}
    exactly_equal(resumed_weights, weights)


def test_the_last_whole_checkpoint_is_taken(finished, tmp_path):
    folder, losses, _ = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    (tmp_path / "_saving-checkpoint-6").mkdir()
    assert train(make_trainer(tmp_path), True)[0] == {step: losses[step] for step in (3, 4)}
    assert damage_of(tmp_path / "checkpoint-4") is None
    assert not list(tmp_path.glob("_*"))


def test_experts_stored_one_by_one(tmp_path):
    """transformers' Trainer leaves them as they are when it resumes."""
    config = OlmoeConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )

    def model():
        set_seed(1)
        return OlmoeForCausalLM(config)

    losses, weights = train(make_trainer(tmp_path, model()))
    resumed, resumed_weights = train(make_trainer(tmp_path / "rest", model()), str(tmp_path / "checkpoint-2"))
    assert resumed == {step: losses[step] for step in (3, 4)}
    exactly_equal(resumed_weights, weights)


def test_an_empty_parameter_group(tmp_path):
    def trainer(folder):
        trainer = make_trainer(folder)
        everything = list(trainer.model.parameters())
        groups = [{"params": [], "weight_decay": 0.1}, {"params": everything, "lr": 0.02}]
        trainer.optimizer = torch.optim.AdamW(groups, lr=0.01)
        return trainer

    losses, weights = train(trainer(tmp_path))
    resumed, resumed_weights = train(trainer(tmp_path / "rest"), str(tmp_path / "checkpoint-2"))
    assert resumed == {step: losses[step] for step in (3, 4)}
    exactly_equal(resumed_weights, weights)


def test_the_router_state_of_an_adapter(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")

    def model():
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
        return peft.get_peft_model(tiny_model(**ROUTER_STATE), config)

    losses, weights = train(make_trainer(tmp_path, model()))
    resumed, resumed_weights = train(make_trainer(tmp_path / "rest", model()), str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert resumed == {step: losses[step] for step in (3, 4)}
    exactly_equal(resumed_weights, weights)


def test_what_transformers_trainer_saved_is_resumed(tmp_path):
    losses, weights = train(make_trainer(tmp_path, trainer_class=Trainer))
    resumed, resumed_weights = train(make_trainer(tmp_path / "rest"), str(tmp_path / "checkpoint-2"))
    assert resumed == {step: losses[step] for step in (3, 4)}
    exactly_equal(resumed_weights, weights)


@pytest.mark.parametrize("in_arguments", [True, False])
def test_transformers_trainer_does_not_go_on_without_the_optimizer(finished, tmp_path, in_arguments):
    checkpoint = str(finished[0] / "checkpoint-2")
    if in_arguments:
        with pytest.raises(
            ValueError, match="`resume_from_checkpoint` .* run the script with `python -m hf_locmoe.launch`"
        ):
            make_trainer(tmp_path, trainer_class=Trainer, resume_from_checkpoint=checkpoint)
        make_trainer(tmp_path, resume_from_checkpoint=checkpoint)  # ours takes it
    else:
        with pytest.raises(FileNotFoundError, match="optimizer.pt"):
            make_trainer(tmp_path, trainer_class=Trainer).train(resume_from_checkpoint=checkpoint)


def test_the_schedule_with_another_number_of_groups():
    def scheduled(num_groups):
        parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(num_groups)]
        optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.5)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    optimizer, scheduler = scheduled(3)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    other_optimizer, other = scheduled(2)
    for group in other_optimizer.param_groups:  # the optimizer's state is loaded first
        group["lr"] = optimizer.param_groups[0]["lr"]
    load_scheduler_state(other, scheduler.state_dict(), other_optimizer)
    assert other.get_last_lr() == scheduler.get_last_lr()[:2]
    other_optimizer.step(), optimizer.step(), other.step(), scheduler.step()
    assert other.get_last_lr() == scheduler.get_last_lr()[:2]
    state = {**scheduler.state_dict(), "lr_lambdas": [1, 2, 3]}
    with pytest.raises(ValueError, match="`lr_lambdas` .* each of 3 parameter groups, and here are 2"):
        load_scheduler_state(other, state, other_optimizer)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_other_parameters_are_named(finished, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.lm_head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="optimizer state of other parameters .* with lm_head.weight"):
        trainer.train(resume_from_checkpoint=str(finished[0] / "checkpoint-2"))


@pytest.mark.parametrize(
    "overrides, message", [(dict(num_hidden_layers=3), "lacks weights"), (dict(vocab_size=64), "of shape")]
)
def test_another_model_is_named(finished, overrides, message):
    with pytest.raises(ValueError, match=message):
        load_weights(tiny_model(**ROUTER_STATE, **overrides), finished[0] / "checkpoint-2")


def test_weights_alone_resume_only_when_asked(finished, tmp_path):
    train(make_trainer(tmp_path, save_only_model=True))
    assert not (tmp_path / "checkpoint-2" / "distributed_optimizer").exists()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="it has no optimizer state. Pass `--save_only_model`"):
        make_trainer(tmp_path / "rest").train(resume_from_checkpoint=checkpoint)
    make_trainer(tmp_path / "rest", save_only_model=True).train(resume_from_checkpoint=checkpoint)


# ---- folders --------------------------------------------------------------------------------------------------------


def written(folder, step, content="new"):
    staging = open_staging(folder, f"checkpoint-{step}")
    (staging / "model.safetensors").write_text(content)
    return publish(staging, {"format": 1})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survived", range(3))
def test_a_publication_that_is_cut_off(tmp_path, monkeypatch, survived):
    """After every rename: the earlier checkpoint of that name or the new one, never a part of either."""
    written(tmp_path, 2, "earlier")
    rename, left = Path.rename, [survived]

    def cut(self, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", cut)
        if survived < 2:
            with pytest.raises(Killed):
                written(tmp_path, 2)
        else:
            written(tmp_path, 2)
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    expected = "earlier" if survived < 2 else "new"
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_text() == expected
    assert get_last_checkpoint(tmp_path) == last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_removal_that_is_cut_off(tmp_path, monkeypatch):
    for step in (2, 4, 6):
        written(tmp_path, step)

    def cut(folder, ignore_errors=False):
        if Path(folder).exists():
            (Path(folder) / "model.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_folder.shutil, "rmtree", cut)
        with pytest.raises(Killed):
            prune(tmp_path, 1, None)
    assert {path.name for path in tmp_path.iterdir()} == {"_deleting-checkpoint-2", "checkpoint-4", "checkpoint-6"}
    tidy(tmp_path)
    prune(tmp_path, 1, str(tmp_path / "checkpoint-4"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-6"}


def test_damage_is_named(tmp_path):
    checkpoint = written(tmp_path, 2)
    assert damage_of(checkpoint) is None
    (checkpoint / "model.safetensors").write_text("longer than it was")
    assert damage_of(checkpoint) == "model.safetensors has 18 bytes where 3 were written"
    (checkpoint / "model.safetensors").unlink()
    assert damage_of(checkpoint) == "model.safetensors is missing"
    (checkpoint / "locmoe_checkpoint.json").write_text("{")
    assert "locmoe_checkpoint.json cannot be read" in damage_of(checkpoint)
    assert last_checkpoint(tmp_path) is None


def test_a_failed_save_says_why_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    save = LocMoeForCausalLM.save_pretrained

    def full(self, folder, **kwargs):
        if "checkpoint-4" in str(folder):
            raise OSError(28, "No space left on device")
        save(self, folder, **kwargs)

    monkeypatch.setattr(LocMoeForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert damage_of(tmp_path / "checkpoint-2") is None
