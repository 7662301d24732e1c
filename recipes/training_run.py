# SPDX-License-Identifier: Apache-2.0
"""What the training recipes share after their model and data are made: train, evaluate, save, report."""

import math
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)

from text_data import Documents, first_samples


# Token losses are summed over this many positions at a time: logits in float32 are the largest tensor of an evaluation.
POSITIONS_AT_ONCE = 4096


def sequence_losses(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each sequence, from its logits and nothing else: no router loss is in it.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`, or a tuple that holds it): Model output.
        labels (`torch.Tensor` of shape `(batch, length)`, int64): Token ids, -100 where none is to be predicted.

    Returns:
        `torch.Tensor` of shape `(batch, 2)`, float32: Sum over the predicted tokens, in nats, and their number.
    """
    if isinstance(logits, tuple):  # some MoE models give an auxiliary loss or router logits besides
        logits = next(part for part in logits if torch.is_tensor(part) and part.dim() == 3)
    targets = labels[:, 1:].contiguous()
    losses = torch.cat(
        [
            F.cross_entropy(some_logits.float().transpose(1, 2), some_targets, ignore_index=-100, reduction="none")
            for some_logits, some_targets in zip(
                logits[:, :-1].split(POSITIONS_AT_ONCE, dim=1), targets.split(POSITIONS_AT_ONCE, dim=1), strict=True
            )
        ],
        dim=1,
    )
    return torch.stack([losses.sum(dim=1), (targets != -100).sum(dim=1).float()], dim=1)


def perplexity_from_losses(prediction: EvalPrediction) -> dict[str, float]:
    """Token-weighted perplexity of the sequences that `sequence_losses` summed up."""
    nll, num_tokens = np.asarray(prediction.predictions, dtype=np.float64).sum(axis=0)
    loss = nll / num_tokens
    return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "num_tokens": int(num_tokens)}


def sample_blocks(blocks: Documents, count: int, seed: int) -> Dataset:
    """A fixed random sample of the training blocks, or the first of a stream, to measure training perplexity on."""
    if isinstance(blocks, IterableDataset):
        return Dataset.from_list(list(first_samples(blocks, count)))
    return first_samples(blocks.shuffle(seed=seed), count)


class LossOnTheBar(ProgressCallback):
    """The Trainer's progress bar with the loss beside it and one line an evaluation, in place of the whole log.

    The whole log is in `trainer_state.json` and goes to the trackers of `report_to`.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Called by the Trainer."""
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
        if "eval_perplexity" in logs:
            self.training_bar.write(
                f"step {state.global_step}: validation loss {math.log(logs['eval_perplexity']):.4f}, "
                f"perplexity {logs['eval_perplexity']:.2f}"
            )


def train_and_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Documents,
    validation: Documents | None,
    args: TrainingArguments,
    data_collator,
    train_sample_size: int = 256,
) -> dict[str, float]:
    """Trains a causal language model, evaluates it on both parts of the data, saves and reports.

    `output_dir` then holds the model, its tokenizer and card, `trainer_state.json` with the log, and `all_results.json`.

    Args:
        model (`PreTrainedModel`): The model; moved and wrapped by the Trainer.
        tokenizer (`PreTrainedTokenizerBase`): Saved beside it.
        train (`Dataset` or `IterableDataset`): Training samples.
        validation (`Dataset` or `IterableDataset`, *optional*): Validation samples.
        args (`TrainingArguments`): The run.
        data_collator (`Callable`): Samples to a batch.
        train_sample_size (`int`): Training samples on which the final training perplexity is measured.

    Returns:
        `dict[str, float]`: `train_perplexity` and, with validation data, `eval_perplexity`, beside the Trainer's own
        figures, of which `train_loss` is the mean over the run, router losses included.

    Raises:
        ValueError: If a stream comes without `max_steps`.
    """
    if isinstance(train, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            f"`max_steps` ({args.max_steps}) must be positive with `streaming`: a stream has no known length, so say "
            "after how many steps training ends."
        )
    if validation is None:
        args.eval_strategy = "no"
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=data_collator,
        compute_metrics=perplexity_from_losses,
        preprocess_logits_for_metrics=sequence_losses,
    )
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnTheBar)
    resume = args.resume_from_checkpoint
    if resume is not None and resume.lower() in ("last", "true"):
        resume = True  # the Trainer's word for the newest checkpoint of output_dir
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    trainer.save_model()
    sample = sample_blocks(train, train_sample_size, args.seed)
    metrics["train_perplexity"] = trainer.evaluate(sample, metric_key_prefix="train_sample")["train_sample_perplexity"]
    if validation is not None:
        metrics |= trainer.evaluate()
    trainer.save_metrics("all", metrics, combined=False)
    trainer.save_state()
    trainer.create_model_card()  # with what was measured
    if trainer.is_world_process_zero():
        print(f"\n{'':12}{'loss':>9}{'perplexity':>13}")
        for part, name in (("train", "training"), ("eval", "validation")):
            perplexity = metrics.get(f"{part}_perplexity")
            if perplexity is not None:
                print(f"{name:12}{math.log(perplexity):>9.4f}{perplexity:>13.2f}")
        print(f"model, tokenizer and log in {Path(args.output_dir)}")
    return metrics
