# SPDX-License-Identifier: Apache-2.0
"""The Switch gate against its formula, and the hash gate's balance, order and growth."""

import pytest
import torch

from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.moe.baseline_gates import HashGate, SwitchGate
from tests.tiny_models import random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


def make_hash_gate(layer_idx=0, **overrides):
    gate = HashGate(tiny_config(gate_type="hash", **overrides), layer_idx)
    gate.reset_buffers(lambda buffer, value: buffer.copy_(value))
    return gate


class TestSwitch:
    def make(self, **overrides):
        gate = SwitchGate(tiny_config(gate_type="switch", **overrides), 0)
        torch.nn.init.normal_(gate.weight)
        return gate.eval()

    def test_formula(self):
        gate = self.make(num_experts_per_tok=2, gate_relu=True)  # the ReLU is the LocMoE gate's, not this one's
        x = torch.randn(30, 32)
        logits, weights, index = gate(x)
        assert_close(logits, x @ gate.weight.T)
        expected = (x @ gate.weight.T).softmax(-1).topk(2)
        assert_close(weights, expected.values)
        assert torch.equal(index, expected.indices)

    def test_router_arithmetic_is_float32_in_a_bfloat16_model(self):
        gate, x = self.make().bfloat16(), torch.randn(30, 32).bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = gate(x)[0]
        assert logits.dtype == torch.float32
        assert_close(logits, x.float() @ gate.weight.float().T)

    def test_it_learns(self):
        gate = self.make()
        gate(torch.randn(30, 32))[1].sum().backward()
        assert gate.weight.grad.abs().sum() > 0

    def test_cosines(self):
        gate, x = self.make(), torch.randn(30, 32)
        expected = torch.nn.functional.cosine_similarity(x[:, None], gate.weight[None], dim=-1)
        assert_close(gate.cosines(x), expected)


class TestHash:
    def test_it_is_balanced_over_token_ids(self):
        gate = make_hash_gate(num_experts=7, vocab_size=1000)
        counts = gate.expert_of_token.flatten().bincount(minlength=7)
        assert counts.max() - counts.min() <= 1

    def test_neighbouring_token_ids_are_spread(self):
        gate = make_hash_gate(num_experts=4, vocab_size=1000)
        experts = gate.expert_of_token.flatten()
        assert not torch.equal(experts, torch.arange(1000) % 4)
        assert experts[:40].bincount(minlength=4).min() > 3

    def test_a_token_id_keeps_its_expert_in_every_layer_and_process(self):
        assert torch.equal(make_hash_gate(0).expert_of_token, make_hash_gate(5).expert_of_token)

    def test_routing_follows_the_table(self):
        gate = make_hash_gate(num_experts_per_tok=2)
        ids = torch.randint(0, 61, (50,))
        logits, weights, index = gate(torch.randn(50, 32), ids)
        assert torch.equal(index, gate.expert_of_token[ids])
        assert all(a != b for a, b in index.tolist())
        assert torch.equal(weights, torch.full((50, 2), 0.5))
        assert_close(logits.softmax(-1).gather(-1, index), weights)
        assert (logits.dtype, weights.dtype, index.dtype) == (torch.float32, torch.float32, torch.int64)

    def test_balance_by_frequency(self):
        gate = make_hash_gate(vocab_size=500)
        counts = (10_000 / torch.arange(1, 501).float() ** 0.8).round()
        load = torch.zeros(4).scatter_add_(0, gate.expert_of_token.flatten(), counts)
        assert load.max() / load.mean() > 1.02
        gate.balance_by_frequency(counts)
        load = torch.zeros(4).scatter_add_(0, gate.expert_of_token.flatten(), counts)
        assert load.max() / load.mean() < 1.001

    def test_unseen_token_ids_are_spread_too(self):
        gate = make_hash_gate(vocab_size=402)
        gate.balance_by_frequency(torch.cat([torch.tensor([50.0, 49.0, 48.0, 47.0]), torch.zeros(398)]))
        counts = gate.expert_of_token[4:].flatten().bincount(minlength=4)
        assert counts.max() - counts.min() <= 1

    def test_counts_of_another_vocabulary_are_refused(self):
        with pytest.raises(ValueError, match=r"`token_counts` has shape \(5,\).*`vocab_size` \(61\)"):
            make_hash_gate().balance_by_frequency(torch.zeros(5))

    @pytest.mark.parametrize("k", [1, 3])
    def test_random_routed_experts_hash_inside_the_domains_group(self, k):
        gate = make_hash_gate(num_experts=12, num_expert_groups=3, num_experts_per_tok=k)
        ids, domain_ids = torch.arange(60), torch.arange(60) % 3
        logits, weights, index = gate(torch.randn(60, 32), ids, domain_ids)
        assert torch.equal(index // 4, domain_ids[:, None].expand(60, k))
        assert all(len(set(row)) == k for row in index.tolist())
        for domain in range(3):
            counts = index[domain_ids == domain].flatten().bincount(minlength=12)
            assert (counts[4 * domain : 4 * domain + 4] > 0).all()

    def test_embeddings_instead_of_token_ids_are_refused(self):
        model = tiny_model(gate_type="hash")
        with pytest.raises(ValueError, match=r"`gate_type` \('hash'\).*`input_ids`.*`gate_type='locmoe'`"):
            model(inputs_embeds=torch.randn(1, 4, 32))


@pytest.mark.parametrize("new_size", [80, 40])
def test_resized_embeddings_resize_the_hash(tmp_path, new_size):
    model = tiny_model(gate_type="hash", num_experts_per_tok=2)
    before = model.sparse_blocks[0].gate.expert_of_token.clone()
    model.resize_token_embeddings(new_size)
    kept = min(61, new_size)
    for block in model.sparse_blocks:
        table = block.gate.expert_of_token
        assert table.shape == (new_size, 2)
        assert torch.equal(table[:kept], before[:kept])
        assert table[kept:].flatten().bincount(minlength=4).float().std() < 1 if new_size > 61 else True
    ids = random_ids(vocab_size=new_size)
    expected = model(ids).logits
    assert expected.shape[-1] == new_size
    model.save_pretrained(tmp_path)
    assert_close(LocMoeForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_a_hash_balanced_by_frequency_survives_a_checkpoint(tmp_path):
    model = tiny_model(gate_type="hash")
    counts = torch.rand(61)
    for block in model.sparse_blocks:
        block.gate.balance_by_frequency(counts)
    model.save_pretrained(tmp_path)
    loaded = LocMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for block, other in zip(model.sparse_blocks, loaded.sparse_blocks, strict=True):
        assert torch.equal(block.gate.expert_of_token, other.gate.expert_of_token)
