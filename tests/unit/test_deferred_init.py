# SPDX-License-Identifier: Apache-2.0
"""Recorded initialisation gives the values, and leaves the generators, as if nothing had been recorded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, ViTConfig

from hf_locmoe.distributed.deferred_init import InitializationRecorder
from tests.tiny_models import tiny_config


def recorded(build, smallest=1):
    """What `build` gives, its state dict with the recorded values in it, and how many were recorded."""
    recorder = InitializationRecorder(smallest)
    with recorder.recording():
        model = build()
    tensors = {name: recorder.recorded(tensor) for name, tensor in model.state_dict().items()}
    values = {
        name: model.state_dict()[name] if tensor is None else tensor[...]
        for name, tensor in reversed(tensors.items())  # in whatever order
    }
    return values, sum(tensor is not None for tensor in tensors.values()), recorder


def assert_as_if_not_recorded(build, smallest=1):
    torch.manual_seed(3)
    expected = build().state_dict()
    drawn_next = torch.rand(5)
    torch.manual_seed(3)
    values, count, recorder = recorded(build, smallest)
    assert torch.equal(torch.rand(5), drawn_next)
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor), name
        assert values[name].dtype == tensor.dtype
        assert values[name].stride() == tensor.stride()
    return count, recorder


class Odd(nn.Module):
    """Initialisations as constructors write them."""

    def __init__(self):
        super().__init__()
        self.truncated = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(40, 30), std=0.5, a=-1, b=1)
        )  # draws until it fits
        self.orthogonal = nn.Parameter(nn.init.orthogonal_(torch.empty(12, 20)))
        self.sparse = nn.Parameter(nn.init.sparse_(torch.empty(20, 6), 0.5))
        own = torch.Generator().manual_seed(5)
        self.own = nn.Parameter(torch.randn(6, 7, generator=own) + torch.rand(6, 7, generator=own))
        step = torch.full((9,), 2.0)
        self.scaled = nn.Parameter(torch.ones(9) * step)
        step.zero_()  # what was read of it has been read
        self.ramp = nn.Parameter(torch.empty(8).copy_(torch.arange(8)))
        self.embedding = nn.Embedding(10, 4, padding_idx=3)
        self.tied = self.embedding.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
        self.like = nn.Parameter(torch.randn_like(self.scaled).double())
        self.columns = nn.Parameter(torch.rand(6, 4).T)
        with torch.no_grad():
            self.columns[1:3] = 0.5
            self.columns.data[:, ::2] += torch.ones(6)[::2]
        self.register_buffer("table", torch.randperm(11) % 4)
        self.copied = nn.Parameter(
            torch.empty_like(self.like, device=self.like.device).copy_(self.like).to("cpu", torch.float16)
        )
        self.beside = nn.Parameter(torch.arange(4, device=self.scaled.device, dtype=torch.float32))


@pytest.mark.parametrize("smallest", [1, 10, 100, 1 << 16])
def test_whatever_a_constructor_does(smallest):
    count, _ = assert_as_if_not_recorded(Odd, smallest)
    assert count == {1: 14, 10: 9, 100: 3, 1 << 16: 0}[smallest]


@pytest.mark.parametrize(
    "build",
    [
        lambda: AutoModelForCausalLM.from_config(tiny_config()),
        lambda: AutoModelForCausalLM.from_config(tiny_config(gate_type="hash", tie_word_embeddings=True)),
        lambda: AutoModelForCausalLM.from_config(
            tiny_config(gate_rotation=True, gate_centering=True, dtype="bfloat16")
        ),
        lambda: AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
            )
        ),
        lambda: AutoModel.from_config(
            ViTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32)
        ),
    ],
    ids=["locmoe", "hash", "rotated", "llama", "vit"],
)
def test_models(build):
    count, _ = assert_as_if_not_recorded(build)
    assert count > 10


def test_draws_that_were_overwritten_are_not_repeated():
    """A linear layer's constructor draws, and its model draws again."""
    torch.manual_seed(0)
    _, _, recorder = recorded(lambda: AutoModelForCausalLM.from_config(tiny_config()))
    assert max(len(storage.operations) for storage in recorder._storages.values()) <= 4


def test_a_part_is_all_that_is_kept():
    recorder = InitializationRecorder(1)
    torch.manual_seed(0)
    with recorder.recording():
        weight = torch.empty(64, 32).normal_()
    tensor = recorder.recorded(weight)
    assert weight.is_meta
    assert tensor.get_shape() == [64, 32]
    torch.manual_seed(0)
    expected = torch.randn(64, 32)
    part = tensor[8:16, :4]
    assert torch.equal(part, expected[8:16, :4])
    assert part.untyped_storage().nbytes() == 8 * 4 * 4
    assert torch.equal(tensor[0:0], expected[0:0])
    assert recorder.recorded(expected) is None


def test_the_default_dtype_is_that_of_the_time():
    torch.set_default_dtype(torch.float64)
    try:
        recorder = InitializationRecorder(1)
        torch.manual_seed(0)
        with recorder.recording():
            weight = torch.rand(7)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    assert torch.equal(recorder.recorded(weight)[...], torch.rand(7, dtype=torch.float64))


@pytest.mark.parametrize(
    "look",
    [
        lambda weight: weight.tolist(),
        lambda weight: weight[weight > 0],
        lambda weight: torch.zeros(3, dtype=torch.float64).copy_(weight[0]),
        lambda weight: torch.bernoulli(weight),
        lambda weight: torch.zeros(8).sum() if weight.numpy().any() else None,
        lambda weight: weight + weight.new_tensor([1.0, 2.0, 3.0]),
    ],
    ids=["list", "mask", "buffer", "chances", "numpy", "new tensor"],
)
def test_what_needs_values_raises(look):
    recorder = InitializationRecorder(4)
    with pytest.raises((RuntimeError, TypeError)), recorder.recording():
        look(torch.empty(3, 3).uniform_() if look else None)


def test_the_fingerprint_is_of_what_is_drawn():
    def fingerprint(seed, std=1.0, factor=1.0):
        recorder = InitializationRecorder(1)
        torch.manual_seed(seed)
        with recorder.recording():
            nn.init.normal_(torch.empty(5), std=std).mul_(torch.tensor([factor] * 5))
        return recorder.fingerprint

    assert fingerprint(0) == fingerprint(0)
    assert len({fingerprint(0), fingerprint(1), fingerprint(0, std=2.0), fingerprint(0, factor=1.0001)}) == 4
