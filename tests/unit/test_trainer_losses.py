# SPDX-License-Identifier: Apache-2.0
"""
The gradient of the router losses through the real Trainer: the same however a batch is cut into micro-batches.

Rows are identical where cuts are compared, so that every micro-batch has the statistics of the whole. The part of the
router losses is taken as the difference between a run with them and a run without.
"""

import gc
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_locmoe import LocMoeForSequenceClassification, LocMoeForTokenClassification
from hf_locmoe.distributed.router_scope import RouterScope
from hf_locmoe.training.checkpoint import LocMoeTrainer
from hf_locmoe.training.router_losses import labels_for_smoothing
from tests.tiny_models import gradients, random_ids, tiny_model
from tests.tolerances import assert_close


NEAR = torch.tensor([True, True, False, False])
NUM_ROWS = 8


@pytest.fixture(scope="module", autouse=True)
def _short_collections():
    """The Trainer collects garbage twice a run, half a second with all that these tests import; it is not theirs."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class KeepGradients(TrainerCallback):
    """The gradients that the first optimizer step sees, and the outputs of nothing else."""

    def __init__(self):
        self.gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {name: grad.double() for name, grad in gradients(model).items()}


def rows(padded):
    """One row, so often; with padding that labels ignore."""
    ids = random_ids(1, 12)[0]
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        ids[9:], mask[9:], labels[9:] = 0, 0, -100
    return [{"input_ids": ids, "attention_mask": mask, "labels": labels} for _ in range(NUM_ROWS)]


def train_one_step(
    tmp_path, dataset, accumulation, coefficient=0.5, model=None, model_class=None, make_trainer=Trainer, **arguments
):
    if model is None:
        settings = {} if model_class is None else {"model_class": model_class}
        model = tiny_model(
            gate_type="switch", router_aux_loss_coef=coefficient, locality_loss_coef=coefficient, **settings
        )
    model.base_model.router_scope = RouterScope(node_local_experts=NEAR)
    keep = KeepGradients()
    trainer = make_trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(dataset) // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            **arguments,
        ),
        train_dataset=dataset,
        callbacks=[keep],
    )
    trainer.train()
    return keep.gradients, trainer


def router_part(tmp_path, dataset, accumulation, **kwargs):
    """Per parameter, what the router losses add to the gradient."""
    with_losses, _ = train_one_step(tmp_path, dataset, accumulation, coefficient=0.5, **kwargs)
    without, _ = train_one_step(tmp_path, dataset, accumulation, coefficient=0.0, **kwargs)
    return torch.cat([(with_losses[name] - without[name]).flatten() for name in with_losses])


def ratio(actual, expected):
    assert expected.norm() > 0.05, "the router losses have no gradient to compare"
    return ((actual @ expected) / (expected @ expected)).item()


@pytest.fixture(params=[False, True], ids=["full", "padded"])
def dataset(request):
    return rows(request.param)


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_nothing(tmp_path, dataset, accumulation):
    expected = router_part(tmp_path, dataset, 1)
    actual = router_part(tmp_path, dataset, accumulation)
    assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_nor_does_num_items_in_batch(tmp_path, dataset, accumulation, monkeypatch):
    expected = router_part(tmp_path, dataset, 1)
    given = []
    forward = Trainer.compute_loss

    def without_it(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        given.append(num_items_in_batch)
        return forward(self, model, inputs, return_outputs=return_outputs, num_items_in_batch=None)

    # a Trainer that does not count the items divides each micro-batch's loss by the accumulation steps instead
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda self, batch_samples, device: None)
    monkeypatch.setattr(Trainer, "compute_loss", without_it)
    actual = router_part(tmp_path, dataset, accumulation)
    assert given
    assert set(given) == {None}
    assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
def test_nor_does_activation_checkpointing(tmp_path, dataset, kind):
    expected = router_part(tmp_path, dataset, 2)
    arguments = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": kind})
    actual = router_part(tmp_path, dataset, 2, **arguments)
    assert_close(actual, expected, torch.float32)


def test_the_whole_gradient_is_that_of_a_raw_loop(tmp_path):
    """Rows that differ, in micro-batches that differ in their number of targets."""
    ids = random_ids(4, 12)
    labels = ids.clone()
    labels[1, 3:] = -100
    labels[2, 8:] = -100
    dataset = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels)]
    settings = dict(gate_type="switch", router_aux_loss_coef=0.5, locality_loss_coef=0.5)
    actual, _ = train_one_step(
        tmp_path, dataset, 2, model=tiny_model(**settings), train_sampling_strategy="sequential"
    )

    model = tiny_model(**settings).train()
    model.model.router_scope = RouterScope(node_local_experts=NEAR)
    targets = (labels[:, 1:] != -100).sum()
    for micro_batch in (slice(0, 2), slice(2, 4)):
        logits = model(ids[micro_batch]).logits[:, :-1].flatten(0, 1)
        outputs = model(ids[micro_batch])
        wanted = labels[micro_batch, 1:].flatten()
        expected = cross_entropy(logits, wanted, reduction="sum") / targets
        share = (wanted != -100).sum() / targets
        router = 0.5 * outputs.router_aux_loss + 0.5 * outputs.locality_loss
        (expected + share * router).backward()
    for name, grad in gradients(model).items():
        assert_close(actual[name], grad.double(), torch.float32)


def test_raw_calls_with_and_without_num_items_in_batch():
    """Shares of the micro-batches of a step add up to one, also where labels were shifted beforehand."""
    ids = random_ids(4, 12)
    labels = ids.clone()
    labels[0, 5:] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    model = tiny_model(router_aux_loss_coef=0.5).train()
    parts = []
    total = (shifted != -100).sum()
    for labels_of_call in (dict(labels=labels), dict(labels=labels, shift_labels=shifted)):
        loss = model(ids, **labels_of_call).loss
        counted = model(ids, **labels_of_call, num_items_in_batch=total).loss
        assert_close(counted, loss)
        twice = model(ids, **labels_of_call, num_items_in_batch=2 * total).loss
        assert_close(twice, loss / 2)
        as_int = model(ids, **labels_of_call, num_items_in_batch=int(total)).loss
        assert_close(as_int, loss)
        parts.append(loss)
    assert_close(parts[1], parts[0])


class WithAHeadOfItsOwn(LocMoeTrainer):
    """As TRL's trainers: the decoder and the head apart, and a load-balancing loss of its own."""

    aux_loss_enabled = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        hidden = model.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        logits = model.lm_head(hidden[:, :-1]).flatten(0, 1)
        loss = cross_entropy(logits, inputs["labels"][:, 1:].flatten(), reduction="sum") / num_items_in_batch
        return loss + 100.0 * logits.square().mean() if self.aux_loss_enabled else loss


class TestALossThatIsNotTheModels:
    """The router's part is what it is where the model computes the loss."""

    KINDS = {
        "label smoothing": dict(make_trainer=LocMoeTrainer, label_smoothing_factor=0.1),
        "a loss function": dict(
            make_trainer=partial(
                LocMoeTrainer,
                compute_loss_func=lambda outputs, labels, num_items_in_batch: (
                    cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
                    / num_items_in_batch
                ),
            )
        ),
        "a head of its own": dict(make_trainer=WithAHeadOfItsOwn),
        "the model's": dict(make_trainer=LocMoeTrainer),
    }

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("accumulation", [1, 4])
    def test_the_router_trains_as_ever(self, tmp_path, dataset, kind, accumulation):
        expected = router_part(tmp_path, dataset, 1)
        actual = router_part(tmp_path, dataset, accumulation, **self.KINDS[kind])
        assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)

    def test_two_forwards_for_a_loss_are_left_alone(self, tmp_path, dataset):
        class Twice(WithAHeadOfItsOwn):
            def compute_loss(self, *args, **kwargs):
                return super().compute_loss(*args, **kwargs) + super().compute_loss(*args, **kwargs)

        part = router_part(tmp_path, dataset, 1, make_trainer=Twice)
        assert part.norm() < 1e-5

    @pytest.mark.parametrize("make_trainer", [Trainer, LocMoeTrainer])
    def test_smoothed_labels_are_those_of_the_next_token(self, tmp_path, dataset, make_trainer):
        settings = dict(coefficient=0.0, make_trainer=make_trainer, label_smoothing_factor=0.1)
        actual, _ = train_one_step(tmp_path, dataset, 2, **settings)
        model = tiny_model(gate_type="switch", router_aux_loss_coef=0.0, locality_loss_coef=0.0).train()
        row = dataset[0]
        logits = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits
        cross_entropy(logits[0, :-1], row["labels"][1:], label_smoothing=0.1).backward()
        for name, grad in gradients(model).items():
            assert_close(actual[name], grad.double(), torch.float32)

    @pytest.mark.parametrize(
        "name, shifted", [("LocMoeForCausalLM", False), ("FSDPLocMoeForCausalLM", True), ("Other", False)]
    )
    def test_a_sharded_class_is_known_by_its_other_name(self, name, shifted):
        inputs = {"labels": torch.tensor([[5, 6, 7]]), "input_ids": None}
        given = labels_for_smoothing(type(name, (), {})(), inputs)["labels"]
        assert given.tolist() == ([[6, 7, -100]] if shifted else [[5, 6, 7]])


class TestClassification:
    CLASSES = {
        "sequence": LocMoeForSequenceClassification,
        "token": LocMoeForTokenClassification,
    }

    def rows(self, kind):
        ids = random_ids(1, 12)[0]
        labels = torch.tensor(1) if kind == "sequence" else ids % 2
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels} for _ in range(NUM_ROWS)]

    @pytest.mark.parametrize("kind", CLASSES)
    @pytest.mark.parametrize("accumulation", [2, 8])
    def test_accumulation_changes_nothing(self, tmp_path, kind, accumulation):
        dataset, model_class = self.rows(kind), self.CLASSES[kind]
        expected = router_part(tmp_path, dataset, 1, model_class=model_class)
        actual = router_part(tmp_path, dataset, accumulation, model_class=model_class)
        assert ratio(actual, expected) == pytest.approx(1.0, abs=5e-4)


def test_the_losses_are_logged_by_name(tmp_path):
    _, trainer = train_one_step(tmp_path, rows(False), 2)
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["router_aux_loss"] > 0
    assert entry["locality_loss"] > 0


def test_router_state_moves_once_per_optimizer_step(tmp_path):
    model = tiny_model(balance_bias_update_rate=0.01, gate_centering=True)
    train_one_step(tmp_path, rows(False), 4, model=model)
    for block in model.sparse_blocks:
        bias = block.gate.e_score_correction_bias
        assert 0 < bias.abs().max() <= 0.02
        assert block.gate.hidden_mean_updates == 1


def test_evaluation_reports_the_cross_entropy(tmp_path):
    dataset = rows(False)
    _, trainer = train_one_step(tmp_path, dataset, 1, per_device_eval_batch_size=4)
    metrics = trainer.evaluate(dataset)
    ids = dataset[0]["input_ids"][None]
    logits = trainer.model.eval()(ids).logits
    expected = cross_entropy(logits[0, :-1], ids[0, 1:])
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)
