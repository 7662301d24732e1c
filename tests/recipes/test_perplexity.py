# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

import training_run
from tests.tiny_models import tiny_model
from tests.tolerances import assert_close

from .conftest import RECIPES


@pytest.fixture(scope="module")
def metric() -> evaluate.Metric:
    return evaluate.load(str(RECIPES / "metrics" / "perplexity"))


def test_by_hand(metric):
    """Two sequences with probabilities (1/2, 1/4) and (1/8): exp of the mean of three losses, not of two means."""
    losses = [math.log(2) + math.log(4), math.log(8)]
    result = metric.compute(predictions=losses, references=[2, 1])
    assert result["num_tokens"] == 3
    assert result["loss"] == pytest.approx(math.log(64) / 3)
    assert result["perplexity"] == pytest.approx(4.0)
    assert result["perplexity"] != pytest.approx(math.exp((math.log(8) / 2 + math.log(8)) / 2))


def test_batches_are_added_up(metric):
    metric.add_batch(predictions=[1.0, 2.0], references=[1, 4])
    metric.add(prediction=0.0, reference=0)  # a sequence without a predicted token
    metric.add_batch(predictions=[3.0], references=[1])
    result = metric.compute()
    assert result["perplexity"] == pytest.approx(math.exp(1.0))


def test_bits_per_byte(metric):
    result = metric.compute(predictions=[8 * math.log(2)], references=[3], num_bytes=4)
    assert result["bits_per_byte"] == pytest.approx(2.0)


def test_a_loss_too_large_for_a_float(metric):
    assert metric.compute(predictions=[1000.0], references=[1])["perplexity"] == math.inf


@pytest.mark.parametrize(
    "references, extra, message",
    [
        ([0], {}, "no predicted token"),
        ([-1], {}, r"`references` \(-1\)"),
        ([1], {"num_bytes": 0}, r"`num_bytes` \(0\)"),
    ],
)
def test_wrong_input(metric, references, extra, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=[1.0], references=references, **extra)


def test_the_trainer_computes_the_same(metric):
    rng = np.random.default_rng(0)
    sums, counts = rng.uniform(0, 50, 20), rng.integers(1, 30, 20)
    result = metric.compute(predictions=sums.tolist(), references=counts.tolist())
    logged = training_run.perplexity_from_losses(EvalPrediction(np.stack([sums, counts], axis=1), None))
    assert logged["perplexity"] == pytest.approx(result["perplexity"])
    assert logged["num_tokens"] == result["num_tokens"]


def test_losses_of_sequences_are_the_model_s(monkeypatch):
    monkeypatch.setattr(training_run, "POSITIONS_AT_ONCE", 5)  # several pieces, the last a short one
    model = tiny_model()
    ids = torch.randint(3, 61, (3, 18))
    labels = ids.clone()
    labels[0, :7] = -100
    labels[2, :] = -100
    outputs = model(input_ids=ids, labels=labels)
    losses = training_run.sequence_losses(outputs.logits, labels)
    assert losses[:, 1].tolist() == [11.0, 17.0, 0.0]
    assert_close(losses[:, 0].sum() / losses[:, 1].sum(), outputs.loss)
    other_outputs = (torch.tensor(3.0), outputs.logits, (torch.ones(54, 4),))  # as Qwen3-MoE returns them
    assert torch.equal(training_run.sequence_losses(other_outputs, labels), losses)
