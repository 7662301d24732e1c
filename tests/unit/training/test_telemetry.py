# SPDX-License-Identifier: Apache-2.0
"""Router statistics in the Trainer: sums against plain loops, every way a model is wrapped, and how to turn them off."""

from __future__ import annotations

import gc
import json
import math

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.routing_log import ROUTING_LOG_NAME, append_record, read_records
from hf_locmoe.training.telemetry import RouterStateCallback, RoutingStats, RoutingStatsCallback
from tests.harness import run_ranks
from tests.tolerances import assert_close


NUM_LAYERS, NUM_EXPERTS, VOCAB_SIZE = 2, 4, 64


def _model(**overrides) -> LocMoeForCausalLM:
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=32, num_attention_heads=2)
    shape.update(num_hidden_layers=NUM_LAYERS, num_experts=NUM_EXPERTS, max_position_embeddings=64)
    return LocMoeForCausalLM(LocMoeConfig(**{**shape, **overrides}))


def _dataset(num_samples: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, VOCAB_SIZE, (num_samples, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def _trainer(model, output_dir, train=None, evaluation=None, **arguments) -> Trainer:
    """Learning rate 0 unless told otherwise, so that a plain loop over the same rows is the truth."""
    arguments = {"learning_rate": 0.0, "max_steps": 4, "logging_steps": 2, "save_strategy": "no", **arguments}
    arguments = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "report_to": "none", **arguments}
    args = TrainingArguments(
        str(output_dir), use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", **arguments
    )
    return Trainer(model, args, train_dataset=train or _dataset(64), eval_dataset=evaluation)


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _plain_loop(model, rows, batch_size: int) -> tuple[torch.Tensor, float]:
    """The (L, S, n) sums over all rows, and the mean of the batches' load-balancing losses."""
    sums, losses = 0, []
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            output = model(**_stack(rows[start : start + batch_size]), output_router_stats=True)
            sums = sums + output.router_stats.double()
            losses.append(output.router_aux_loss.item())
    return sums, sum(losses) / len(losses)


def _reference(sums: torch.Tensor) -> dict[str, float]:
    """The overall metrics, written out once more."""
    loads, cvs, entropies, cosines = [], [], [], []
    for rows in sums.tolist():
        tokens = sum(rows[RouterStat.PROB_SUM])
        shares = [count / sum(rows[RouterStat.TOKENS]) for count in rows[RouterStat.TOKENS]]
        loads.append(max(shares) * len(shares))
        variance = sum((share - 1 / len(shares)) ** 2 for share in shares) / len(shares)
        cvs.append(math.sqrt(variance) * len(shares))
        entropies.append(sum(rows[RouterStat.ENTROPY_SUM]) / tokens / math.log(len(shares)))
        cosines.append(sum(rows[RouterStat.COS_SUM]) / tokens)
    means = {"load_cv": cvs, "entropy": entropies, "cosine": cosines}
    reference = {f"routing/{name}": sum(values) / len(values) for name, values in means.items()}
    return reference | {"routing/max_load": max(loads)}


def _logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def _num_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- RoutingStats -------------------------------------------------------------------------------------------------------


def test_summary_of_known_sums():
    stats = torch.zeros(1, len(RouterStat), 2)
    stats[0, RouterStat.PROB_SUM] = torch.tensor([5.0, 3.0])
    stats[0, RouterStat.TOKENS] = torch.tensor([6.0, 2.0])
    stats[0, RouterStat.DROPPED] = torch.tensor([2.0, 0.0])
    stats[0, RouterStat.REROUTED] = torch.tensor([0.0, 1.0])
    stats[0, RouterStat.ENTROPY_SUM] = torch.tensor([3.0, 1.0]) * math.log(2)
    stats[0, RouterStat.COS_SUM] = torch.tensor([0.6, 0.2])
    accumulated = RoutingStats()
    accumulated.update(stats, {"router_aux_loss": torch.tensor(1.5), "locality_loss": torch.tensor(0.25)})
    summary = accumulated.summary()
    assert (summary["tokens"], summary["forwards"]) == (8, 1)
    (layer,) = summary["layers"]
    assert_close(layer["load"], [0.75, 0.25])
    assert_close(layer["probability"], [0.625, 0.375])
    assert_close(layer["dropped"], [0.25, 0.0])
    expected = {"load_cv": 0.5, "drop_rate": 0.25, "reroute_rate": 0.125, "entropy": 0.5, "cosine": 0.1}
    expected["aux_loss"] = 2 * (0.75 * 0.625 + 0.25 * 0.375)
    for name, value in expected.items():
        assert_close(layer[name], value)
        assert_close(summary["overall"][f"routing/{name}"], value)
    assert_close(summary["overall"]["routing/max_load"], 1.5)
    assert summary["overall"]["router_aux_loss"] == 1.5
    assert summary["overall"]["locality_loss"] == 0.25


def test_everything_in_a_summary_is_a_plain_number():
    accumulated = RoutingStats()
    accumulated.update(torch.rand(3, len(RouterStat), 5))
    json.dumps(accumulated.summary(), allow_nan=False)


def test_forwards_add_up_and_counts_stay_exact():
    forward = torch.zeros(1, len(RouterStat), 2)
    forward[0, RouterStat.TOKENS] = torch.tensor([3.0, 1.0])
    forward[0, RouterStat.PROB_SUM] = 2.0
    large = forward * 2.0**24  # where float32 can no longer count by one
    accumulated = RoutingStats()
    for stats in (large, forward, forward):
        accumulated.update(stats)
    summary = accumulated.summary()
    assert (summary["tokens"], summary["forwards"]) == (4 * (2**24 + 2), 3)
    assert summary["layers"][0]["load"] == [0.75, 0.25]
    assert "router_aux_loss" not in summary["overall"]
    accumulated.reset()
    assert accumulated.summary()["forwards"] == 0


def test_no_token_at_all_and_nothing_added():
    accumulated = RoutingStats()
    assert not accumulated
    assert accumulated.summary()["layers"] == []
    accumulated.update(torch.zeros(2, len(RouterStat), 3))
    assert accumulated
    assert all(math.isfinite(value) for value in accumulated.summary()["overall"].values())


# --- in the Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_training_logs_cover_each_micro_batch_once(tmp_path, accumulation, checkpointing):
    model, rows = _model(), _dataset(64)
    arguments = {"gradient_accumulation_steps": accumulation}
    if checkpointing is not None:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": checkpointing}
    trainer = _trainer(model, tmp_path, rows, **arguments)
    trainer.train()
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [2, 4]
    for event, record in enumerate(records):
        num_rows = 2 * 2 * accumulation  # rows per micro-batch, steps per event
        sums, aux_loss = _plain_loop(model.train(), rows[event * num_rows : (event + 1) * num_rows], 2)
        assert record["forwards"] == 2 * accumulation
        assert record["tokens"] == num_rows * 12
        for name, value in _reference(sums).items():
            assert_close(_logged(trainer, name)[event], value)
        assert_close(_logged(trainer, "router_aux_loss")[event], aux_loss)
        load = sums[:, RouterStat.TOKENS] / sums[:, RouterStat.TOKENS].sum(dim=-1, keepdim=True)
        assert_close([layer["load"] for layer in record["layers"]], load.tolist())


def test_names_in_the_training_log(tmp_path):
    trainer = _trainer(_model(), tmp_path)
    trainer.train()
    routing = {name for name in trainer.state.log_history[0] if name.startswith("rout") or name == "locality_loss"}
    expected = {"router_aux_loss", "locality_loss", "routing/layer_0/load_cv", "routing/layer_1/load_cv"}
    assert routing == expected | {
        f"routing/{name}" for name in ("load_cv", "max_load", "drop_rate", "entropy", "cosine")
    }
    assert all(isinstance(trainer.state.log_history[0][name], float) for name in routing)


def test_names_follow_the_config(tmp_path):
    bounded = dict(capacity_mode="factor", expert_capacity_factor=1.0, capacity_overflow="next_best")
    trainer = _trainer(_model(**bounded), tmp_path)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["routing/capacity"] == 1.0
    assert log["routing/reroute_rate"] > 0
    assert log["routing/drop_rate"] == 0
    trainer = _trainer(_model(gate_type="hash"), tmp_path)
    trainer.train()
    log = trainer.state.log_history[0]
    assert not {"routing/cosine", "routing/capacity", "routing/reroute_rate"} & set(log)


def test_what_the_remote_tier_turned_back_is_logged(tmp_path):
    model = _model()
    model.limit_inter_node(torch.tensor([[True] * 2 + [False] * 2] * NUM_LAYERS), 0.0)
    trainer = _trainer(model, tmp_path)
    trainer.train()
    log = trainer.state.log_history[0]
    (record, *_) = read_records(tmp_path)
    remote = [sum(layer["load"][2:]) for layer in record["layers"]]
    assert log["routing/reroute_rate"] == pytest.approx(sum(remote) / NUM_LAYERS, abs=1e-5)
    assert log["routing/reroute_rate"] > 0.1


def test_evaluation_covers_all_of_the_set_and_nothing_else(tmp_path):
    model, rows = _model(), _dataset(7, seed=1)
    trainer = _trainer(model, tmp_path, evaluation=rows)
    model.eval()
    model(**_stack(_dataset(5, seed=2)))  # not the Trainer's
    model.generate(rows[0]["input_ids"].unsqueeze(0), max_new_tokens=3, do_sample=False, pad_token_id=0)
    for _ in range(2):  # before training and, on the same hooks, after it
        metrics = trainer.evaluate()
        sums, _ = _plain_loop(model.eval(), rows, 2)
        for name, value in _reference(sums).items():
            assert_close(metrics[f"eval_{name}"], value)
        assert [record["tokens"] for record in read_records(tmp_path) if record["kind"] == "eval"][-1] == 7 * 12
        assert _logged(trainer, "eval_routing/load_cv") == [metrics["eval_routing/load_cv"]]
        assert "eval_router_aux_loss" in metrics
        trainer.train()
    assert {record["kind"] for record in read_records(tmp_path)} == {"eval", "train"}


def test_evaluation_sets_by_name_and_prediction(tmp_path):
    model = _model()
    sets = {"news": _dataset(4, seed=1), "code": _dataset(6, seed=2)}
    trainer = _trainer(model, tmp_path, evaluation=sets)
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        sums, _ = _plain_loop(model.eval(), rows, 2)
        assert_close(metrics[f"eval_{name}_routing/load_cv"], _reference(sums)["routing/load_cv"])
    predicted = trainer.predict(sets["code"])
    assert_close(predicted.metrics["test_routing/load_cv"], metrics["eval_code_routing/load_cv"])
    assert {record["kind"] for record in read_records(tmp_path)} == {"eval_news", "eval_code", "test"}


def test_the_caller_of_an_evaluation_forward_sees_no_difference(tmp_path):
    model, batch = _model().eval(), _stack(_dataset(3))
    model.config.use_cache = False  # as the Trainer sets it
    before = model(**batch)
    trainer = _trainer(model, tmp_path)
    after = model(**batch)
    assert list(before.keys()) == list(after.keys())
    torch.testing.assert_close(before.logits, after.logits, rtol=0, atol=0)
    assert model(**batch, output_router_stats=True).router_stats is not None
    assert model(**batch, output_router_stats=False).router_stats is None
    model.config.output_router_stats = True
    assert model(**batch).router_stats is not None
    del trainer


def test_evaluation_computes_no_losses_over_ranks(tmp_path, monkeypatch):
    """They are a collective, and a forward in evaluation may well be that of one rank alone."""
    model = _model()
    trainer = _trainer(model, tmp_path, evaluation=_dataset(4))
    monkeypatch.setattr(LocMoeForCausalLM, "router_losses", lambda *_: pytest.fail("router losses in evaluation"))
    assert "eval_routing/load_cv" in trainer.evaluate()


def test_two_trainers_on_one_model_both_see_the_evaluation(tmp_path):
    model = _model()
    first = _trainer(model, tmp_path / "first", evaluation=_dataset(4))
    second = _trainer(model, tmp_path / "second", evaluation=_dataset(4))
    assert first.evaluate()["eval_routing/load_cv"] == second.evaluate()["eval_routing/load_cv"]


def test_peft(tmp_path):
    model, rows = _model(balance_bias_update_rate=0.01), _dataset(16)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    trainer = _trainer(wrapped, tmp_path, rows, _dataset(4), max_steps=2)
    trainer.train()
    sums, aux_loss = _plain_loop(_model().train(), rows[:2], 2)
    assert sums[:, RouterStat.TOKENS].sum() > 0
    assert read_records(tmp_path)[0]["tokens"] == 2 * 2 * 12
    assert math.isfinite(_logged(trainer, "router_aux_loss")[0])
    assert "eval_routing/load_cv" in trainer.evaluate()
    assert any(block.gate.e_score_correction_bias.any() for block in model.sparse_blocks)


@pytest.mark.slow
def test_compiled_without_a_graph_break(tmp_path):
    model, rows = _model(), _dataset(64)
    trainer = _trainer(model, tmp_path, rows, torch_compile=True, torch_compile_backend="aot_eager")
    trainer.train()
    sums, _ = _plain_loop(model.train(), rows[:4], 2)
    assert_close(_logged(trainer, "routing/load_cv")[0], _reference(sums)["routing/load_cv"])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    stats = compiled(_stack(rows[:2])["input_ids"]).router_stats
    torch.testing.assert_close(stats, model(_stack(rows[:2])["input_ids"]).router_stats)


def test_other_models_are_left_alone(tmp_path):
    shape = dict(vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_attention_heads=2)
    config = LlamaConfig(**shape, num_hidden_layers=1, max_position_embeddings=64)
    model = LlamaForCausalLM(config)
    trainer = _trainer(model, tmp_path, evaluation=_dataset(2))
    trainer.train()
    assert _num_hooks(model) == 0
    assert not any("rout" in name for entry in trainer.state.log_history for name in entry)
    assert not any("rout" in name for name in trainer.evaluate())
    assert not (tmp_path / ROUTING_LOG_NAME).exists()


def test_trackers_get_the_numbers(tmp_path):
    class Tracker(TrainerCallback):
        seen: list[dict] = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer = _trainer(_model(), tmp_path)
    trainer.add_callback(Tracker)
    trainer.train()
    assert "routing/load_cv" in Tracker.seen[0]


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = _trainer(_model(), tmp_path, evaluation=_dataset(2), report_to="tensorboard")
    trainer.train()
    trainer.evaluate()
    tags = set()
    for events in tmp_path.rglob("events.out.tfevents*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        tags |= set(accumulator.Tags()["scalars"])
    assert {"train/routing/load_cv", "train/router_aux_loss", "eval/routing/load_cv"} <= tags


# --- off ----------------------------------------------------------------------------------------------------------------


def test_off_by_removing_the_callback(tmp_path):
    model = _model(balance_bias_update_rate=0.01)
    trainer = _trainer(model, tmp_path, evaluation=_dataset(2))
    assert _num_hooks(model) > 0
    trainer.remove_callback(RoutingStatsCallback)
    gc.collect()
    assert _num_hooks(model) == 0
    trainer.train()
    _assert_off(trainer, model, tmp_path)


def test_off_by_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCMOE_TELEMETRY", "0")
    model = _model(balance_bias_update_rate=0.01)
    trainer = _trainer(model, tmp_path, evaluation=_dataset(2))
    assert _num_hooks(model) == 0
    trainer.train()
    _assert_off(trainer, model, tmp_path)


def _assert_off(trainer, model, output_dir):
    """No statistics, but the router's state moved."""
    assert not any("routing/" in name for entry in trainer.state.log_history for name in entry)
    assert not any("routing/" in name for name in trainer.evaluate())
    assert not (output_dir / ROUTING_LOG_NAME).exists()
    assert any(block.gate.e_score_correction_bias.any() for block in model.sparse_blocks)


def test_no_hooks_outlive_the_trainer(tmp_path):
    model = _model(balance_bias_update_rate=0.01)
    trainer = _trainer(model, tmp_path)
    trainer.train()
    del trainer
    gc.collect()
    assert _num_hooks(model) == 0


# --- router state -------------------------------------------------------------------------------------------------------


def test_router_state_moves_once_per_optimizer_step_with_the_sums_of_its_micro_batches(tmp_path, monkeypatch):
    model, rows, calls = _model(gate_centering=True), _dataset(16), []
    monkeypatch.setattr(type(model), "update_router_state", lambda self, **sums: calls.append(sums))
    trainer = _trainer(
        model,
        tmp_path,
        rows,
        _dataset(4),
        max_steps=2,
        gradient_accumulation_steps=4,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    assert len(calls) == 2
    for step, sums in enumerate(calls):
        expected, _ = _plain_loop(model.train(), rows[step * 8 : (step + 1) * 8], 2)
        torch.testing.assert_close(sums["router_stats"].double(), expected, rtol=1e-5, atol=1e-5)
        assert sums["router_hidden_sum"].shape == (NUM_LAYERS, model.config.hidden_size)


def test_models_without_router_state_are_not_hooked_for_it(tmp_path):
    model = _model()
    trainer = _trainer(model, tmp_path)
    trainer.remove_callback(RoutingStatsCallback)
    gc.collect()
    trainer.train()
    assert _num_hooks(model) == 0


def test_router_state_without_statistics_is_an_error(tmp_path):
    model = _model(balance_bias_update_rate=0.01, output_router_stats=False)
    with pytest.raises(ValueError, match=r"`output_router_stats` \(False\)"):
        _trainer(model, tmp_path).train()


def test_a_skipped_registration_is_noticed():
    """Both callbacks are on by themselves, the update before the logs."""
    from transformers.trainer import DEFAULT_CALLBACKS

    assert DEFAULT_CALLBACKS.index(RouterStateCallback) < DEFAULT_CALLBACKS.index(RoutingStatsCallback)
    assert DEFAULT_CALLBACKS.count(RoutingStatsCallback) == 1


# --- the file -----------------------------------------------------------------------------------------------------------


def test_resuming_replaces_what_it_computes_again(tmp_path):
    arguments = dict(save_strategy="steps", save_steps=2, max_steps=4, logging_steps=1)
    _trainer(_model(), tmp_path, **arguments).train()
    first = read_records(tmp_path)
    trainer = _trainer(_model(), tmp_path, **{**arguments, "max_steps": 6})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = (tmp_path / ROUTING_LOG_NAME).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert read_records(tmp_path)[:2] == first[:2]


def test_a_new_run_in_an_old_folder_starts_a_new_file(tmp_path):
    append_record(tmp_path, {"kind": "train", "step": 9})
    _trainer(_model(), tmp_path).train()
    assert [record["step"] for record in read_records(tmp_path)] == [2, 4]


def test_the_steps_after_the_last_log_are_in_the_file(tmp_path):
    trainer = _trainer(_model(), tmp_path, max_steps=3, logging_steps=2)
    trainer.train()
    assert [record["step"] for record in read_records(tmp_path)] == [2, 3]
    assert len(_logged(trainer, "routing/load_cv")) == 1


def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path):
    (tmp_path / ROUTING_LOG_NAME).mkdir()
    trainer = _trainer(_model(), tmp_path)
    trainer.train()
    assert len(_logged(trainer, "routing/load_cv")) == 2


# --- ranks --------------------------------------------------------------------------------------------------------------


def _train_on_ranks(output_dir):
    trainer = _trainer(_model(), output_dir, _dataset(64), _dataset(8, seed=1), max_steps=2)
    trainer.train()
    return trainer.state.log_history[0], trainer.evaluate()


@pytest.mark.multiprocess
def test_two_ranks_log_what_one_process_logs(tmp_path):
    (log, metrics), (other_log, other_metrics) = run_ranks(_train_on_ranks, 2, tmp_path / "ranks", init=False)
    reference = _trainer(
        _model(), tmp_path / "one", _dataset(64), _dataset(8, seed=1), max_steps=2, per_device_train_batch_size=4
    )
    reference.train()
    reference_metrics = reference.evaluate()
    for name in ("load_cv", "max_load", "entropy", "cosine"):
        assert log[f"routing/{name}"] == other_log[f"routing/{name}"]
        assert_close(log[f"routing/{name}"], _logged(reference, f"routing/{name}")[0])
        assert metrics[f"eval_routing/{name}"] == other_metrics[f"eval_routing/{name}"]
        assert_close(metrics[f"eval_routing/{name}"], reference_metrics[f"eval_routing/{name}"])
    assert [record["kind"] for record in read_records(tmp_path / "ranks")] == ["eval", "train"]
