# SPDX-License-Identifier: Apache-2.0
"""What the routers of a checkpoint see, against plain loops over pairs of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_locmoe.report import probe as probe_module
from hf_locmoe.report.probe import HISTOGRAM_BINS, probe_checkpoint
from hf_locmoe.report.run import ReportError
from tests.tolerances import assert_close
from tests.unit.report.run_folder import LAYERS, NUM_EXPERTS, tiny_model


def _save_tokenizer(folder) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{index}": index for index in range(1, 48)}}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def _text(tmp_path, num_words: int):
    path = tmp_path / "sample.txt"
    path.write_text(" ".join(f"w{1 + (7 * index) % 47}" for index in range(num_words)))
    return path


@pytest.mark.parametrize("gate_type", ["locmoe", "switch", "hash"])
def test_pairs_and_gate_cosines_against_loops(tmp_path, gate_type):
    model = tiny_model(gate_type=gate_type).eval()
    model.save_pretrained(tmp_path)
    _save_tokenizer(tmp_path)
    probe = probe_checkpoint(tmp_path, _text(tmp_path, 40))
    assert [layer.layer for layer in probe.layers] == list(LAYERS)
    assert "32 tokens" in probe.source  # one sequence of the greatest length, the rest of the text is not used
    seen = []
    hook = model.sparse_blocks[0].gate.register_forward_hook(lambda gate, args, out: seen.append((args[0], out[2])))
    with torch.no_grad():
        model(torch.tensor([[1 + (7 * index) % 47 for index in range(32)]]))
    hook.remove()
    states, experts = seen[0][0], seen[0][1][:, 0].tolist()
    pairs = {True: [], False: []}
    for i in range(32):
        for j in range(i):
            cosine = torch.cosine_similarity(states[i], states[j], dim=0).item()
            pairs[experts[i] == experts[j]].append(cosine)
    layer = probe.layers[0]
    assert_close(layer.same_mean, sum(pairs[True]) / len(pairs[True]))
    assert_close(layer.different_mean, sum(pairs[False]) / len(pairs[False]))
    assert layer.same.sum() == len(pairs[True])
    assert layer.different.sum() == len(pairs[False])
    assert layer.same.shape == (HISTOGRAM_BINS,)
    cosines = model.sparse_blocks[0].gate.cosines(states)
    assert_close(layer.chosen, torch.stack([cosines[i, expert] for i, expert in enumerate(experts)]))
    assert layer.others.numel() == 32 * (NUM_EXPERTS - 1)
    for expert in set(experts):
        members = [i for i in range(32) if experts[i] == expert]
        assert_close(layer.by_expert[expert], cosines[members].mean(dim=0))
    assert all(layer.by_expert[expert].isnan().all() for expert in set(range(NUM_EXPERTS)) - set(experts))


def test_without_text_the_model_samples_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "NUM_TOKENS", 64)
    tiny_model().save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    first, second = probe_checkpoint(tmp_path), probe_checkpoint(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert "64 tokens of text that the model sampled itself" in first.source
    torch.testing.assert_close(first.layers[0].chosen, second.layers[0].chosen, rtol=0, atol=0)
    assert all(math.isfinite(layer.different_mean) for layer in first.layers)


def test_tokens_are_kept_evenly(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_module, "NUM_KEPT", 8)
    tiny_model().save_pretrained(tmp_path)
    _save_tokenizer(tmp_path)
    layer = probe_checkpoint(tmp_path, _text(tmp_path, 32)).layers[0]
    assert layer.chosen.shape == (8,)
    assert layer.same.sum() + layer.different.sum() == 8 * 7 / 2


def test_other_models_have_no_routers_to_look_at(tmp_path):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    assert probe_checkpoint(tmp_path) is None


def test_text_that_cannot_be_used(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ReportError, match="cannot be read"):
        probe_checkpoint(tmp_path, tmp_path / "absent.txt")
    with pytest.raises(ReportError, match="has none"):
        probe_checkpoint(tmp_path, _text(tmp_path, 8))
    _save_tokenizer(tmp_path)
    with pytest.raises(ReportError, match="too short"):
        probe_checkpoint(tmp_path, _text(tmp_path, 1))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(ReportError, match="UTF-8"):
        probe_checkpoint(tmp_path, tmp_path / "binary")
