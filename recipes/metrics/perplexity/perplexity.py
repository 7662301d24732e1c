# SPDX-License-Identifier: Apache-2.0
"""Perplexity from token losses: an `evaluate` metric that needs neither network nor a model of its own.

Usage:

    metric = evaluate.load("recipes/metrics/perplexity")
    metric.add_batch(predictions=sums_of_losses, references=numbers_of_tokens)
    metric.compute()
"""

import math

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Perplexity of a language model, `exp(total negative log-likelihood / total number of predicted tokens)`. Every token
weighs the same, whichever sequence or batch it is in; the mean of the sequences' perplexities is another number.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of `float`): Sum of the negative log-likelihoods of each sequence's predicted tokens, in nats.
    references (list of `int`): Number of predicted tokens of each sequence. A sequence may have none.
    num_bytes (`int`, *optional*): UTF-8 bytes of the text predicted, to get bits per byte, which compare models with
        different tokenizers.

Returns:
    perplexity (`float`), loss (`float`, nats a token), num_tokens (`int`) and, with `num_bytes`, bits_per_byte (`float`).

Examples:
    >>> metric = evaluate.load("recipes/metrics/perplexity")
    >>> results = metric.compute(predictions=[4.0, 2.0], references=[2, 1])
    >>> round(results["loss"], 4), round(results["perplexity"], 4)
    (2.0, 7.3891)
"""

_CITATION = """
@article{jelinek1977perplexity,
  title={Perplexity -- a measure of the difficulty of speech recognition tasks},
  author={Jelinek, Fred and Mercer, Robert L. and Bahl, Lalit R. and Baker, James K.},
  journal={The Journal of the Acoustical Society of America},
  volume={62},
  number={S1},
  pages={S63},
  year={1977}
}
"""

LARGEST_LOSS = 700.0  # exp of more does not fit a float


class Perplexity(evaluate.Metric):
    """Token-weighted perplexity."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, num_bytes: int | None = None) -> dict[str, float]:
        losses = np.asarray(predictions, dtype=np.float64)
        counts = np.asarray(references, dtype=np.int64)
        if (counts < 0).any():
            raise ValueError(f"`references` ({counts.min()}) must be numbers of tokens, 0 or more.")
        num_tokens = int(counts.sum())
        if num_tokens == 0:
            raise ValueError("`references` (0 in all) count no predicted token: perplexity needs at least one.")
        total = float(losses.sum())
        loss = total / num_tokens
        results = {
            "perplexity": math.exp(loss) if loss < LARGEST_LOSS else math.inf,
            "loss": loss,
            "num_tokens": num_tokens,
        }
        if num_bytes is not None:
            if num_bytes <= 0:
                raise ValueError(f"`num_bytes` ({num_bytes}) must be positive: the size of the text predicted.")
            results["bits_per_byte"] = total / math.log(2) / num_bytes
        return results
