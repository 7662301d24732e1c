# SPDX-License-Identifier: Apache-2.0
"""Generation: every strategy and cache against what full forwards would choose."""

import pytest
import torch
from transformers import DynamicCache, StaticCache, pipeline

from hf_locmoe.moe.routing import RouterStat
from tests.tiny_models import random_ids, tiny_model
from tests.tolerances import assert_close


NEW_TOKENS = 8


def greedy_by_full_forwards(model, ids, num_tokens=NEW_TOKENS, **kwargs):
    for _ in range(num_tokens):
        next_token = model(ids, use_cache=False, **kwargs).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_token], dim=1)
    return ids


def generate(model, ids, **kwargs):
    defaults = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
    return model.generate(ids, **{**defaults, **kwargs})


@pytest.fixture(params=["locmoe", "switch", "hash", "capacity"])
def model(request):
    if request.param == "capacity":
        return tiny_model(capacity_mode="factor", expert_capacity_factor=0.5)
    return tiny_model(gate_type=request.param, num_experts_per_tok=2)


def test_greedy(model):
    ids = random_ids(2, 6)
    assert torch.equal(generate(model, ids), greedy_by_full_forwards(model, ids))


# offloaded caches move layers between an accelerator and the host
OFFLOADED = [pytest.param(cache, marks=pytest.mark.gpu) for cache in ("offloaded", "offloaded_static")]


@pytest.mark.parametrize("cache", ["dynamic", "static", "none", *OFFLOADED])
def test_caches(model, cache):
    device = "cuda" if "offloaded" in cache else "cpu"
    model, ids = model.to(device), random_ids(2, 6).to(device)
    expected = greedy_by_full_forwards(model, ids)
    settings = dict(use_cache=False) if cache == "none" else dict(cache_implementation=cache)
    assert torch.equal(generate(model, ids, disable_compile=True, **settings), expected)


def test_a_static_cache_of_ones_own(model):
    ids = random_ids(2, 6)
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert torch.equal(
        generate(model, ids, past_key_values=cache, disable_compile=True), greedy_by_full_forwards(model, ids)
    )


def test_batched_with_padding_on_the_left(model):
    prompts = [random_ids(1, length, seed=length) for length in (3, 7, 5)]
    padded = torch.zeros(3, 7, dtype=torch.int64)
    mask = torch.zeros(3, 7, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, 7 - prompt.shape[1] :] = prompt
        mask[row, 7 - prompt.shape[1] :] = 1
    together = generate(model, padded, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row, 7:], generate(model, prompt)[0, prompt.shape[1] :])


def test_sampling_repeats_with_its_seed(model):
    ids = random_ids(2, 6)
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, ids, do_sample=True, top_k=0))
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_sampling_follows_the_models_probabilities():
    model = tiny_model()
    ids = random_ids(1, 6).expand(4000, 6)
    drawn = generate(model, ids, do_sample=True, top_k=0, max_new_tokens=1, min_new_tokens=1)[:, -1]
    frequency = drawn.bincount(minlength=61) / 4000
    probability = model(ids[:1]).logits[0, -1].softmax(-1)
    assert (frequency - probability).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_beam_search_finds_what_exhaustive_search_finds():
    model = tiny_model(vocab_size=7)
    ids = random_ids(1, 4, vocab_size=7)
    all_pairs = torch.cartesian_prod(torch.arange(7), torch.arange(7))
    candidates = torch.cat([ids.expand(49, 4), all_pairs], dim=1)
    log_probs = model(candidates).logits.log_softmax(-1)
    scores = sum(log_probs[:, 3 + i].gather(-1, all_pairs[:, i : i + 1]) for i in range(2)).flatten()
    best = generate(model, ids, num_beams=7, max_new_tokens=2, min_new_tokens=2)
    assert torch.equal(best[0], candidates[scores.argmax()])


def test_beams_in_a_batch_are_beams_alone(model):
    ids = random_ids(2, 6)
    together = generate(model, ids, num_beams=3)
    for row in range(2):
        assert torch.equal(together[row], generate(model, ids[row : row + 1], num_beams=3)[0])


def test_assisted_generation_changes_nothing_but_the_work(model):
    ids = random_ids(1, 6)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, assistant_model=tiny_model(seed=5)), expected)
    assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3), expected)


def test_continued_from_past_key_values(model):
    ids = random_ids(2, 6)
    expected = greedy_by_full_forwards(model, ids)
    cache = DynamicCache(config=model.config)
    half = generate(model, ids, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    rest = generate(model, half, past_key_values=cache, max_new_tokens=4, min_new_tokens=4)
    assert torch.equal(rest, expected)


def test_a_prompt_in_two_pieces(model):
    ids = random_ids(2, 10)
    whole = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:], past_key_values=first.past_key_values, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], dim=1), whole)


def test_statistics_of_a_step_count_that_step():
    model, ids = tiny_model(), random_ids(2, 6)
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    stats = model(ids[:, 5:], attention_mask=mask, past_key_values=cache, output_router_stats=True).router_stats
    assert stats[0, RouterStat.TOKENS].sum() == 2


def test_outputs_of_every_step():
    model, ids = tiny_model(attn_implementation="eager"), random_ids(1, 6)
    outputs = generate(
        model,
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert len(outputs.logits) == len(outputs.hidden_states) == len(outputs.attentions) == NEW_TOKENS
    whole = model(outputs.sequences).logits[:, 5:-1]
    assert_close(torch.stack(outputs.logits, dim=1), whole)


def test_from_embeddings():
    model, ids = tiny_model(), random_ids(2, 6)
    from_embeddings = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert torch.equal(from_embeddings, generate(model, ids, max_new_tokens=5, min_new_tokens=5)[:, 6:])


def test_a_model_in_training_mode_still_generates():
    model, ids = tiny_model(), random_ids(2, 6)
    expected = generate(model, ids)
    assert torch.equal(generate(model.train(), ids), expected)


def test_text_generation_pipeline(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", *[f"w{i}" for i in range(57)]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    model = tiny_model()
    model.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert type(generator.model).__name__ == "LocMoeForCausalLM"
    (result,) = generator("w3 w1 w4", max_new_tokens=5, do_sample=False)
    ids = fast("w3 w1 w4", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    continuation = fast.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert result["generated_text"].removeprefix("w3 w1 w4").strip() == continuation
    batched = generator(["w3 w1 w4", "w5 w9 w2 w6"], max_new_tokens=5, do_sample=False, batch_size=2)
    assert batched[0][0]["generated_text"] == result["generated_text"]
