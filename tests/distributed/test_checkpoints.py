# SPDX-License-Identifier: Apache-2.0
"""
Checkpoints of a Trainer over ranks: interrupted and resumed is uninterrupted, at the same layout bit for bit, at another
within the table's tolerance; a process that is killed at any moment leaves the last whole checkpoint.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, OlmoeConfig, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.distributed.expert_parallel import exchange_choices
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.checkpoint import LocMoeTrainer
from tests.harness import RankError, run_ranks
from tests.tiny_models import random_ids, tiny_config
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

ROWS = 24
BATCH = 4  # samples of a step, over all ranks and micro-batches
STATEFUL = dict(
    vocab_size=61, balance_bias_update_rate=0.02, gate_type="switch", attention_dropout=0.1, tie_word_embeddings=True
)


def dataset():
    return [{"input_ids": row, "labels": row} for row in random_ids(ROWS, 10)]


class Losses(TrainerCallback):
    def __init__(self, kill_at: int | None = None, rank: int | None = None):
        self.values: dict[int, tuple[float, float]] = {}
        self.kill_at, self.rank = kill_at, rank

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.values[state.global_step] = (logs["loss"], logs["grad_norm"])

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.kill_at and dist.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()
        for name, tensor in model.state_dict().items()
    }


def make_trainer(output_dir, layout="sharded", plugin=None, config=None, arguments=None, callbacks=(), wrap=None):
    """On however many ranks this is called, with the same samples in every step."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    in_background = os.environ.get("LOCMOE_ASYNC_SAVE") == "1"
    fixed = {"slices": "1", "async_save": in_background}  # "auto" depends on what is measured
    LocMoePlugin(layout=layout, **{**fixed, **(plugin or {})}).activate()
    set_seed(3)
    model = AutoModelForCausalLM.from_config(config or tiny_config(**STATEFUL))
    model = wrap(model) if wrap else model
    options = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=BATCH // world,
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        warmup_steps=2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
    )
    args = TrainingArguments(**{**options, **(arguments or {})})
    return LocMoeTrainer(model, args, train_dataset=dataset(), eval_dataset=dataset()[:4], callbacks=list(callbacks))


def train(output_dir, resume=None, losses=None, env=None, **settings):
    """Losses by step, and the weights at the end."""
    os.environ.update(env or {})
    losses = losses or Losses()
    trainer = make_trainer(output_dir, callbacks=[losses], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return losses.values, whole_weights(trainer.model)


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).glob("*checkpoint-*"))


def exactly_equal(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def train_all(*runs):
    """Several trainings, one after the other on the same ranks; each is the keyword arguments of one."""
    return [train(**run) for run in runs]


NO_DROPOUT = tiny_config(**{**STATEFUL, "attention_dropout": 0.0, "locality_loss_coef": 0.0})
LONGER = dict(config=NO_DROPOUT, arguments=dict(max_steps=8))
TWO_NODES = dict(plugin=dict(ranks_per_node="1"))


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """Six steps on two ranks without a stop, and the same from the fourth on; without dropout at one layout and another."""
    whole, rest = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("rest")
    plain, other = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("other")
    results = run_ranks(
        train_all,
        2,
        dict(output_dir=whole),
        dict(output_dir=rest, resume=str(whole / "checkpoint-4")),
        dict(output_dir=plain, **LONGER),
        dict(output_dir=other, **LONGER, resume=str(plain / "checkpoint-4"), layout="spread", **TWO_NODES),
    )
    names = ("whole", "rest", "plain", "other")
    return {"folder": {"whole": whole, "plain": plain}, **dict(zip(names, results[0]))}


def test_same_layout_bit_for_bit(on_two_ranks):
    (losses, weights), (resumed, resumed_weights) = on_two_ranks["whole"], on_two_ranks["rest"]
    assert checkpoints(on_two_ranks["folder"]["whole"]) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert resumed == {step: losses[step] for step in (5, 6)}
    exactly_equal(resumed_weights, weights)


def train_over_nodes(output_dir, resume=None):
    """With samples dealt to nodes, and slices as the links were measured: what decides them is in the checkpoint."""
    losses = Losses()
    settings = dict(layout="spread", plugin=dict(ranks_per_node="1", slices="auto", backend="locmoe"))
    trainer = make_trainer(output_dir, callbacks=[losses], **settings)
    trainer.train(resume_from_checkpoint=resume)
    table = trainer.batch_placement().table.counts.clone()
    return losses.values, whole_weights(trainer.model), table, exchange_choices(trainer.model)


def test_over_nodes_bit_for_bit(tmp_path):
    whole = run_ranks(train_over_nodes, 2, tmp_path)[0]
    resumed = run_ranks(train_over_nodes, 2, tmp_path / "rest", str(tmp_path / "checkpoint-4"))[0]
    assert resumed[0] == {step: whole[0][step] for step in (5, 6)}
    exactly_equal(resumed[1], whole[1])
    assert torch.equal(resumed[2], whole[2]) and whole[2].any()
    # measured once: a second measurement would differ in the digits
    assert resumed[3] == whole[3] and whole[3][0]["cost"] is not None


def agrees(resumed, losses, weights=None):
    assert resumed[0] and resumed[0].keys() <= losses.keys()
    for step, values in resumed[0].items():
        assert_close(values, losses[step], torch.float32)


def test_another_layout(on_two_ranks):
    agrees(on_two_ranks["other"], on_two_ranks["plain"][0])


def test_one_process_goes_on_and_back_to_two(on_two_ranks, tmp_path):
    """Two ranks, then one process, then two ranks again: the trajectory of two."""
    folder, losses = on_two_ranks["folder"]["plain"], on_two_ranks["plain"][0]
    alone = dict(output_dir=tmp_path, resume=str(folder / "checkpoint-4"), **LONGER)
    agrees(run_ranks(train_all, 1, alone)[0][0], losses)
    again = dict(output_dir=tmp_path / "again", resume=str(tmp_path / "checkpoint-6"), **LONGER)
    agrees(run_ranks(train_all, 2, again)[0][0], losses)


def train_adapter(base, output_dir, resume=None):
    """LoRA of attention and experts: every parameter decays, so that a parameter group is empty."""
    from peft import LoraConfig, get_peft_model

    def adapted(_):
        model = AutoModelForCausalLM.from_pretrained(base)
        set_seed(5)
        experts = ["mlp.experts.up_proj", "mlp.experts.down_proj"]
        return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=experts, r=2))

    losses = Losses()
    trainer = make_trainer(output_dir, callbacks=[losses], wrap=adapted, **LONGER)
    trainer.train(resume_from_checkpoint=resume)
    weights = whole_weights(trainer.model)
    return losses.values, {name: tensor for name, tensor in weights.items() if "lora_" in name}


@pytest.mark.slow
def test_an_adapter_goes_on_with_another_number_of_ranks(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    base = tmp_path / "base"
    LocMoeForCausalLM(NO_DROPOUT).save_pretrained(base)
    two = run_ranks(train_adapter, 2, base, tmp_path / "two")[0]
    one = run_ranks(train_adapter, 1, base, tmp_path / "one", str(tmp_path / "two/checkpoint-4"))[0]
    agrees(one, two[0])
    again = run_ranks(train_adapter, 2, base, tmp_path / "again", str(tmp_path / "one/checkpoint-6"))[0]
    agrees(again, two[0])
    assert_close(again[1], two[1])


@pytest.mark.slow
def test_four_ranks_and_two(tmp_path):
    """Experts on 4 ranks, on 2 with copies that are shards (strided), spread over nodes; then on half as many ranks."""
    runs = [dict(output_dir=tmp_path / "ep4", **LONGER)]
    start = str(tmp_path / "ep4" / "checkpoint-4")
    for name, layout, plugin in [
        ("ep2", "sharded", dict(ep_size=2)),
        ("replicated", "replicated", dict(ranks_per_node="2")),
        ("spread", "spread", dict(ranks_per_node="2")),
    ]:
        runs.append(dict(output_dir=tmp_path / name, resume=start, layout=layout, plugin=plugin, **LONGER))
        later = str(tmp_path / name / "checkpoint-6")
        runs.append(dict(output_dir=tmp_path / f"{name}-back", resume=later, **LONGER))
    first, *others = run_ranks(train_all, 4, *runs, timeout_s=240)[0]
    for other in others:
        agrees(other, first[0])
    halved = [
        dict(output_dir=tmp_path / f"half-{name}", resume=str(tmp_path / name / "checkpoint-6"), **LONGER)
        for name in ("ep2", "spread")
    ]
    for other in run_ranks(train_all, 2, *halved)[0]:
        agrees(other, first[0])


# ---- killed ---------------------------------------------------------------------------------------------------------


def train_and_die(output_dir, resume, at, rank, **settings):
    """Killed by SIGKILL, on one rank: in step `at` (a number), or where `at` names a function of the checkpoint module."""
    from hf_locmoe.training import checkpoint, checkpoint_folder

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    if isinstance(at, int):
        return train(output_dir, resume, losses=Losses(at, rank), **settings)
    if dist.get_rank() == rank:
        if at == "rmtree":
            remove = checkpoint_folder.shutil.rmtree

            def die_half_way(folder, *args, **kwargs):
                die() if "_deleting-" in str(folder) and Path(folder).exists() else remove(folder, *args, **kwargs)

            checkpoint_folder.shutil.rmtree = die_half_way
        else:
            setattr(checkpoint.dcp if at in ("save", "async_save") else checkpoint, at, die)
    return train(output_dir, resume, **settings)


def killed(folder, resume, at, rank, **settings):
    with pytest.raises(RankError):
        run_ranks(train_and_die_with, 2, folder, resume, at, rank, settings, may_die=[rank], timeout_s=60)


def train_and_die_with(output_dir, resume, at, rank, settings):
    return train_and_die(output_dir, resume, at, rank, **settings)


def test_killed_in_a_step_and_in_a_save(on_two_ranks, tmp_path):
    losses, weights = on_two_ranks["whole"]
    killed(tmp_path, None, at=4, rank=1)  # the fifth step
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    killed(tmp_path, True, at="publish", rank=0)  # all is written, under another name
    assert checkpoints(tmp_path) == ["_saving-checkpoint-6", "checkpoint-2", "checkpoint-4"]
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed, resumed_weights = run_ranks(train, 2, tmp_path, "True")[0]  # as a command line gives it
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert resumed == {step: losses[step] for step in (5, 6)}
    exactly_equal(resumed_weights, weights)


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["0", "1"])
@pytest.mark.parametrize("at, rank", [("gathered_weights", 0), ("gathered_weights", 1), ("save", 0), ("save", 1)])
def test_killed_before_a_checkpoint_is_whole(on_two_ranks, tmp_path, at, rank, asynchronous):
    at = "async_save" if at == "save" and asynchronous == "1" else at
    start = str(on_two_ranks["folder"]["whole"] / "checkpoint-2")
    killed(tmp_path, start, at=at, rank=rank, env={"LOCMOE_ASYNC_SAVE": asynchronous})
    assert get_last_checkpoint(tmp_path) is None
    assert checkpoints(tmp_path) == ["_saving-checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", ["0", "1"])
def test_killed_when_a_checkpoint_is_whole(on_two_ranks, tmp_path, asynchronous):
    """After the second appeared, and before the first is removed."""
    env, arguments = {"LOCMOE_ASYNC_SAVE": asynchronous}, dict(save_total_limit=1)
    killed(tmp_path, None, at="rmtree", rank=0, env=env, arguments=arguments)
    assert checkpoints(tmp_path) == ["_deleting-checkpoint-2", "checkpoint-4"]
    resumed, resumed_weights = run_ranks(train, 2, tmp_path, True)[0]
    exactly_equal(resumed_weights, on_two_ranks["whole"][1])


# ---- Trainer's arguments --------------------------------------------------------------------------------------------


def best_of_three(folder):
    """The weights after training, which are the best checkpoint's, and those of that checkpoint."""
    arguments = dict(
        save_total_limit=1,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="loss",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=1,
    )
    trainer = make_trainer(folder, arguments=arguments, config=NO_DROPOUT)
    trainer.train()
    trainer.save_model()
    whole = whole_weights(trainer.model)
    scores = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    return whole, trainer.state.best_model_checkpoint, scores


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_best_is_kept_and_loaded_and_one_process_reads_it(tmp_path, asynchronous):
    env = {"LOCMOE_ASYNC_SAVE": str(int(asynchronous))}
    weights, best, scores = run_ranks(best_of_three, 2, tmp_path, env=env)[0]
    assert best == str(tmp_path / f"checkpoint-{min(scores, key=scores.get)}")
    assert checkpoints(tmp_path) == [Path(best).name]
    for folder in (best, tmp_path):
        model = LocMoeForCausalLM.from_pretrained(folder)
        exactly_equal(dict(model.state_dict()), weights)
        assert [path.name for path in Path(folder).glob("*.safetensors")] == ["model.safetensors"]
        assert "distributed_config" not in json.loads(Path(folder, "config.json").read_text())


def test_written_in_the_background(on_two_ranks, tmp_path):
    losses, weights = on_two_ranks["whole"]
    run = dict(output_dir=tmp_path, env={"LOCMOE_ASYNC_SAVE": "1"})
    again = dict(output_dir=tmp_path / "again", resume=str(tmp_path / "checkpoint-4"))
    (first, first_weights), (resumed, resumed_weights) = run_ranks(train_all, 2, run, again)[0]
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert first == losses
    exactly_equal(first_weights, weights)
    assert resumed == {step: losses[step] for step in (5, 6)}
    exactly_equal(resumed_weights, weights)


# ---- other models ---------------------------------------------------------------------------------------------------


def olmoe(folder):
    """transformers' own: its files hold every expert by itself."""
    config = OlmoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    from hf_locmoe.distributed.parallel_run import spread_every_model

    spread_every_model()
    whole = train(folder, config=config)
    return whole, train(folder / "rest", str(folder / "checkpoint-4"), config=config)


def test_experts_that_are_stored_one_by_one(tmp_path):
    (losses, weights), (resumed, resumed_weights) = run_ranks(olmoe, 2, tmp_path)[0]
    assert resumed == {step: losses[step] for step in (5, 6)}
    exactly_equal(resumed_weights, weights)


# ---- errors ---------------------------------------------------------------------------------------------------------


def refusals(folder):
    """What each of these resumes says, on this rank."""
    messages = []
    for resume in (str(folder / "absent"), True, str(folder / "stock"), str(folder / "empty"), str(folder / "cut")):
        trainer = make_trainer(folder / "new")
        with pytest.raises(ValueError) as error:
            trainer.train(resume_from_checkpoint=resume)
        messages.append(str(error.value))
    return messages


def test_what_cannot_be_resumed_is_named_on_every_rank(on_two_ranks, tmp_path):
    import shutil

    for name, state in (("stock", ["optimizer.pt"]), ("empty", [])):
        (tmp_path / name).mkdir()
        for file in ["trainer_state.json", *state]:
            (tmp_path / name / file).write_text("{}")
    shutil.copytree(on_two_ranks["folder"]["whole"] / "checkpoint-2", tmp_path / "cut")
    pieces = sorted((tmp_path / "cut" / "distributed_optimizer").glob("*.distcp"))
    pieces[-1].write_bytes(pieces[-1].read_bytes()[:-1])
    absent, none, stock, empty, cut = zip(*run_ranks(refusals, 2, tmp_path))
    assert all("absent) cannot be resumed: it is no folder" in message for message in absent)
    assert all("finds no checkpoint in `output_dir`" in message for message in none)
    assert all("saved by transformers' Trainer, for one process" in message for message in stock)
    assert all("it has no optimizer state. Pass `--save_only_model`" in message for message in empty)
    assert all("bytes where" in message and ".distcp" in message for message in cut)
