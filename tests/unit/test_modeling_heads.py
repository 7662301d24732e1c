# SPDX-License-Identifier: Apache-2.0
"""The classification heads: results, losses, router losses, loading."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hf_locmoe import LocMoeForCausalLM, LocMoeForSequenceClassification, LocMoeForTokenClassification
from hf_locmoe.distributed.router_scope import RouterScope
from hf_locmoe.moe.routing import RouterStat
from tests.tiny_models import gradients, random_ids, tiny_model
from tests.tolerances import assert_close


KINDS = {"sequence": LocMoeForSequenceClassification, "token": LocMoeForTokenClassification}


def build(kind, **settings):
    return tiny_model(model_class=KINDS[kind], num_labels=3, **settings)


def labels_for(kind, ids):
    return ids.sum(-1) % 3 if kind == "sequence" else ids % 3


@pytest.mark.parametrize("kind", KINDS)
class TestBoth:
    def test_evaluation(self, kind):
        model, ids = build(kind), random_ids()
        outputs = model(ids, labels=labels_for(kind, ids))
        assert outputs.logits.shape == ((2, 3) if kind == "sequence" else (2, 12, 3))
        logits, labels = outputs.logits.view(-1, 3), labels_for(kind, ids).view(-1)
        assert_close(outputs.loss, torch.nn.functional.cross_entropy(logits, labels))
        assert "router_stats" not in outputs

    def test_training_adds_the_router_losses(self, kind):
        model, ids = build(kind, router_aux_loss_coef=0.5, locality_loss_coef=0.25).train(), random_ids()
        model.model.router_scope = RouterScope(node_local_experts=torch.tensor([True, False, False, False]))
        labels = labels_for(kind, ids)
        outputs = model(ids, labels=labels)
        task = torch.nn.functional.cross_entropy(outputs.logits.view(-1, 3), labels.view(-1))
        assert outputs.locality_loss > 0
        assert_close(outputs.loss, task + 0.5 * outputs.router_aux_loss + 0.25 * outputs.locality_loss)
        assert outputs.router_stats.shape == (2, len(RouterStat), 4)
        assert not outputs.router_stats.requires_grad

    def test_the_router_losses_have_a_gradient(self, kind):
        ids = random_ids()
        grads = []
        for coefficient in (0.0, 1.0):
            model = build(kind, gate_type="switch", router_aux_loss_coef=coefficient).train()
            model(ids, labels=labels_for(kind, ids)).loss.backward()
            grads.append(gradients(model)["model.layers.0.mlp.gate.weight"])
        assert not torch.allclose(grads[0], grads[1])

    def test_as_a_tuple(self, kind):
        model, ids = build(kind), random_ids()
        labels = labels_for(kind, ids)
        expected = model(ids, labels=labels)
        loss, logits, *_ = model(ids, labels=labels, return_dict=False)
        assert_close([loss, logits], [expected.loss, expected.logits])
        losses = []
        for return_dict in (True, False):
            torch.manual_seed(1)  # of the head's dropout
            losses.append(model.train()(ids, labels=labels, return_dict=return_dict)[0])
        assert_close(losses[1], losses[0])

    def test_hidden_states_and_router_logits(self, kind):
        outputs = build(kind)(random_ids(), output_hidden_states=True, output_router_logits=True)
        assert len(outputs.hidden_states) == 3

    def test_checkpointing(self, kind):
        ids, results = random_ids(), []
        for checkpointing in (False, True):
            model = build(kind).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            outputs = model(ids, labels=labels_for(kind, ids))
            outputs.loss.backward()
            results.append([outputs.loss.detach(), outputs.router_stats, gradients(model)])
        assert_close(results[1], results[0])

    def test_on_top_of_a_language_model(self, kind, tmp_path):
        language_model = tiny_model()
        language_model.save_pretrained(tmp_path)
        auto_class = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}[kind]
        model, info = auto_class.from_pretrained(tmp_path, num_labels=3, output_loading_info=True)
        assert type(model) is KINDS[kind]
        assert set(info["missing_keys"]) == {"score.weight"} | ({"score.bias"} if kind == "token" else set())
        ids = random_ids()
        assert_close(model.model(ids).last_hidden_state, language_model.model(ids).last_hidden_state)
        model.save_pretrained(tmp_path / "again")
        assert_close(auto_class.from_pretrained(tmp_path / "again")(ids).logits, model.eval()(ids).logits)

    def test_a_failing_forward_leaves_no_hook(self, kind):
        model = build(kind)
        with pytest.raises(ValueError, match="input_ids"):
            model(torch.tensor([[99, 3]]))
        assert not model.model._forward_hooks

    def test_it_learns(self, kind):
        model, ids = build(kind, initializer_range=0.05).train(), random_ids(6, 8)
        labels = labels_for(kind, ids)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(40):
            outputs = model(ids, labels=labels)
            outputs.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        predicted = model.eval()(ids).logits.argmax(-1)
        assert (predicted == labels).float().mean() > 0.95


def test_the_last_token_that_is_no_padding_decides():
    model, ids = build("sequence"), random_ids(2, 9)
    padded = torch.cat([ids, torch.zeros(2, 3, dtype=torch.int64)], dim=1)
    mask = (padded != 0).long()
    assert_close(model(padded, attention_mask=mask).logits, model(ids).logits)


def test_hash_gates_work_under_a_head():
    model, ids = build("token", gate_type="hash").train(), random_ids()
    assert model(ids, labels=ids % 3).loss.isfinite()


def test_domains_reach_the_router_through_a_head():
    model = build("sequence", num_experts=6, num_expert_groups=3)
    ids = random_ids()
    stats = model(ids, domain_ids=torch.tensor([1, 1]), output_router_stats=True)["router_stats"]
    assert stats[:, RouterStat.TOKENS].nonzero()[:, 1].unique().tolist() in ([2], [3], [2, 3])


def test_language_models_are_told_to_take_the_item_count():
    """Trainer asks this attribute: heads whose loss is a mean over the batch have to say no."""
    assert not LocMoeForSequenceClassification.accepts_loss_kwargs
    assert not LocMoeForTokenClassification.accepts_loss_kwargs
    assert getattr(LocMoeForCausalLM, "accepts_loss_kwargs", True)
