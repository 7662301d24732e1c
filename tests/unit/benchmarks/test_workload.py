# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from benchmarks.workload import batches, optimizer_for, standard_library_text, token_stream


def test_the_text_is_pythons_own_and_a_missing_module_is_left_out():
    texts = standard_library_text(["argparse", "no_such_module", "no.such.package", "sys", "heapq"])
    assert len(texts) == 2
    assert "class ArgumentParser" in texts[0]
    assert "def heappush" in texts[1]


def test_the_tokenizer_is_the_same_every_time_and_loses_nothing():
    texts = standard_library_text(["heapq", "textwrap"])
    stream = token_stream(texts, vocab_size=300)
    assert torch.equal(stream, token_stream(texts, vocab_size=300))
    assert stream.dtype == torch.int64
    assert stream.max() < 300


def test_batches_take_every_sequence_at_most_once():
    stream = torch.arange(1000)
    drawn = batches(stream, batch_size=4, sequence_length=7, count=35, seed=1)
    assert drawn.shape == (35, 4, 7)
    assert drawn.flatten().unique().numel() == drawn.numel()
    assert torch.equal(drawn[..., 1:], drawn[..., :-1] + 1)
    assert not torch.equal(drawn, batches(stream, 4, 7, 35, seed=2))


def test_too_short_a_text_says_so():
    with pytest.raises(ValueError, match=r"`count` x `batch_size` \(144\) must be at most .*\(142\)"):
        batches(torch.arange(1000), batch_size=4, sequence_length=7, count=36, seed=0)


def test_plain_parameters_make_one_group():
    model = torch.nn.Linear(2, 2)
    assert [len(group["params"]) for group in optimizer_for(model, 0.1).param_groups] == [2]
