# SPDX-License-Identifier: Apache-2.0
"""LoRA on attention and on experts: trained, merged, saved and loaded."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_locmoe import LocMoeForCausalLM
from hf_locmoe.distributed.adapters import fit_adapters_to_spread_models
from hf_locmoe.moe.routing import RouterStat
from tests.tiny_models import random_ids, tiny_model
from tests.tolerances import assert_close


peft = pytest.importorskip("peft", reason="LoRA needs the extra [peft]")

TARGETS = {
    "attention": dict(target_modules=["q_proj", "v_proj"]),
    "experts": dict(target_modules=[], target_parameters=["mlp.experts.up_proj", "mlp.experts.down_proj"]),
    "gated experts": dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "both": dict(
        target_modules=["q_proj", "o_proj"], target_parameters=["mlp.experts.up_proj", "mlp.experts.down_proj"]
    ),
}


def base_model(target):
    if target == "gated experts":
        return tiny_model(gated_mlp=True, hidden_act="silu")
    return tiny_model()


def with_lora(target, model=None):
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **TARGETS[target])
    return peft.get_peft_model(model if model is not None else base_model(target), config)


def train(model, steps=3):
    ids = random_ids(4, 10)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("target", TARGETS)
class TestLora:
    def test_it_starts_as_the_base_model(self, target):
        ids = random_ids()
        assert_close(with_lora(target)(ids).logits, base_model(target)(ids).logits)

    def test_it_trains_its_own_parameters_alone(self, target):
        model = with_lora(target)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        losses = train(model, steps=8)
        assert losses[-1] < losses[0]
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all("lora_" in name for name in changed)
        if target != "attention":
            assert any("experts" in name for name in changed)

    def test_merged_equals_unmerged(self, target):
        model, ids = with_lora(target), random_ids()
        train(model)
        expected = model(ids).logits
        assert not torch.allclose(expected, base_model(target)(ids).logits, atol=1e-3)
        merged = model.merge_and_unload()
        assert type(merged) is LocMoeForCausalLM
        assert_close(merged(ids).logits, expected)

    def test_saved_and_loaded(self, target, tmp_path):
        model, ids = with_lora(target), random_ids()
        train(model)
        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(base_model(target), tmp_path / "adapter").eval()
        assert_close(loaded(ids).logits, model(ids).logits)
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert_close(LocMoeForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, model(ids).logits)

    def test_switched_off(self, target):
        model, ids = with_lora(target), random_ids()
        train(model)
        with model.disable_adapter():
            assert_close(model(ids).logits, base_model(target)(ids).logits)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_under_activation_checkpointing(self, target, use_reentrant):
        ids, grads = random_ids(), []
        for checkpointing in (False, True):
            torch.manual_seed(7)
            model = with_lora(target).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert_close(grads[1], grads[0])

    def test_generation(self, target):
        model, ids = with_lora(target), random_ids()
        train(model)
        settings = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
        generated = model.generate(input_ids=ids, **settings)
        assert torch.equal(generated, model.merge_and_unload().generate(ids, **settings))


def test_what_is_replaced_in_peft_for_spread_models_is_there():
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTuner

    fit_adapters_to_spread_models()
    fit_adapters_to_spread_models()  # once is enough
    for owner, name in (
        (LoraLayer, "_get_in_out_features"),
        (ParamWrapper, "_activate_lora"),
        (peft.PeftModel, "save_pretrained"),
        (BaseTuner, "_check_merge_allowed"),
    ):
        replaced = owner.__dict__[name]
        assert replaced._knows_spread_models
        assert not hasattr(replaced.__wrapped__, "_knows_spread_models")
    assert callable(ParamWrapper.get_delta_factors)


def test_all_linear_leaves_the_router_alone():
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(tiny_model(gate_type="switch"), config)
    targeted = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert targeted
    assert not any("gate" in name for name in targeted)


def test_router_state_moves_under_lora(tmp_path):
    model = with_lora("experts", tiny_model(balance_bias_update_rate=0.01, gate_centering=True))
    ids = random_ids(4, 10)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    for block in model.base_model.model.sparse_blocks:
        assert block.gate.e_score_correction_bias.any()
        assert block.gate.hidden_mean_updates == 2


@pytest.mark.parametrize("target", ["experts", "attention"])
def test_a_capacity_holds_whichever_implementation_runs_the_experts(target):
    losses = []
    for implementation in ("eager", "capacity_bmm"):
        base = tiny_model(capacity_mode="factor", expert_capacity_factor=0.5)
        base.set_experts_implementation(implementation)
        model = with_lora(target, base)
        losses.append(train(model))
    assert_close(losses[1], losses[0])


def test_statistics_are_those_of_the_base_model():
    ids = random_ids()
    model, plain = with_lora("both").train(), base_model("both").train()
    assert_close(
        model(input_ids=ids, labels=ids).router_stats[:, RouterStat.TOKENS],
        plain(ids, labels=ids).router_stats[:, RouterStat.TOKENS],
    )
