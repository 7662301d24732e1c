# SPDX-License-Identifier: Apache-2.0
"""Forward, outputs, masks, checkpointing and router state of the model."""

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_map
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM, LocMoeModel
from hf_locmoe.moe.routing import RouterStat
from tests.tiny_models import TINY_SHAPE, gradients, random_ids, tiny_config, tiny_model
from tests.tolerances import assert_close


GATE_VARIANTS = {
    "locmoe": {},
    "paper": dict(gate_affinity="mean", gate_relu=True),
    "centred and rotated": dict(gate_centering=True, gate_rotation=True),
    "switch": dict(gate_type="switch"),
    "hash": dict(gate_type="hash"),
    "grouped": dict(num_expert_groups=2),
    "group-limited": dict(num_expert_groups=4, topk_group=2, num_experts_per_tok=2),
    "shared experts": dict(num_shared_experts=2, gated_mlp=True, hidden_act="silu"),
    "balance bias": dict(balance_bias_update_rate=0.01),
}


class TestOutputs:
    def test_evaluation_returns_what_other_models_do(self):
        ids = random_ids()
        outputs = tiny_model()(ids)
        assert isinstance(outputs, MoeCausalLMOutputWithPast)
        assert outputs.logits.shape == (2, 12, 61)
        assert sorted(outputs.keys()) == ["logits", "past_key_values"]

    def test_training_returns_losses_and_statistics(self):
        ids = random_ids()
        outputs = tiny_model().train()(ids, labels=ids)
        assert outputs.router_stats.shape == (2, len(RouterStat), 4)
        assert outputs.router_stats.dtype == torch.float32
        assert not outputs.router_stats.requires_grad
        assert outputs.aux_loss is outputs.router_aux_loss
        assert outputs.router_aux_loss.dtype == torch.float32
        assert outputs.locality_loss == 0
        assert_close(outputs.router_stats[:, RouterStat.TOKENS].sum(-1), torch.full((2,), 24.0))
        assert_close(outputs.router_stats[:, RouterStat.PROB_SUM].sum(-1), torch.full((2,), 24.0))

    def test_everything_that_can_be_asked_for(self):
        outputs = tiny_model(attn_implementation="eager")(
            random_ids(), output_hidden_states=True, output_attentions=True, output_router_logits=True
        )
        assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 12, 32)] * 3
        assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 12, 12)] * 2
        assert_close(outputs.attentions[0].sum(-1), torch.ones(2, 4, 12))
        assert [tuple(logits.shape) for logits in outputs.router_logits] == [(24, 4)] * 2

    def test_hidden_states_are_the_embeddings_to_the_normed_last(self):
        model, ids = tiny_model(), random_ids()
        outputs = model.model(ids, output_hidden_states=True)
        assert torch.equal(outputs.hidden_states[0], model.model.embed_tokens(ids))
        assert_close(outputs.hidden_states[-1], outputs.last_hidden_state)

    def test_router_logits_in_training_and_by_config(self):
        ids = random_ids()
        model = tiny_model(output_router_logits=True).train()
        outputs = model(ids, labels=ids)
        assert len(outputs.router_logits) == 2
        counted = outputs.router_logits[0].softmax(-1).sum(0)
        assert_close(counted, outputs.router_stats[0, RouterStat.PROB_SUM])

    def test_as_a_tuple(self):
        model, ids = tiny_model(), random_ids()
        logits, _ = model(ids, return_dict=False)
        assert torch.equal(logits, model(ids).logits)

    def test_statistics_on_request_and_off_on_request(self):
        ids = random_ids()
        model = tiny_model()
        stats = model(ids, output_router_stats=True).router_stats
        assert_close(stats, model.train()(ids).router_stats)
        assert model(ids, output_router_stats=False).router_stats is None
        assert tiny_model(output_router_stats=True)(ids).router_stats is not None
        assert tiny_model(output_router_stats=False).train()(ids, labels=ids).router_aux_loss is None

    def test_dense_layers_have_no_router(self):
        model = tiny_model(num_hidden_layers=5, mlp_only_layers=[1], decoder_sparse_step=2)
        assert model.config.sparse_layers == [3]
        outputs = model(random_ids(), output_router_logits=True, output_router_stats=True)
        assert len(outputs.router_logits) == 1
        assert outputs.router_stats.shape[0] == 1
        assert [name for name, _ in model.named_parameters() if ".experts." in name] == [
            "model.layers.3.mlp.experts.up_proj",
            "model.layers.3.mlp.experts.down_proj",
        ]

    def test_a_model_of_dense_layers_only(self):
        model, ids = tiny_model(mlp_only_layers=[0, 1]).train(), random_ids()
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        assert outputs.router_stats is None

    def test_logits_to_keep(self):
        model, ids = tiny_model(), random_ids()
        whole = model(ids).logits
        assert_close(model(ids, logits_to_keep=3).logits, whole[:, -3:])
        assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, whole[:, [1, 5]])

    def test_embeddings_instead_of_ids(self):
        model, ids = tiny_model(), random_ids()
        assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)

    def test_one_or_the_other(self):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            tiny_model()()


@pytest.mark.parametrize("variant", GATE_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate_trains(variant, dtype):
    model = tiny_model(**GATE_VARIANTS[variant]).to(dtype).train()
    ids = random_ids()
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.router_stats.dtype == torch.float32
    for name, grad in gradients(model).items():
        assert torch.isfinite(grad).all(), name
    model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
    assert model(ids, labels=ids).loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "capacity_bmm"])
@pytest.mark.parametrize("capacity", [{}, dict(capacity_mode="factor", expert_capacity_factor=0.7)])
@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_a_gpu_trains_as_a_cpu_does(variant, capacity, implementation):
    results = []
    for device in ("cpu", "cuda"):
        model = tiny_model(**GATE_VARIANTS[variant], **capacity).to(device).train()
        model.set_experts_implementation(implementation)
        ids = random_ids().to(device)
        outputs = model(ids, labels=ids)
        outputs.loss.backward()
        model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
        results.append([outputs.loss.detach(), outputs.router_stats, gradients(model), dict(model.named_buffers())])
    assert_close(tree_map(lambda tensor: tensor.cpu(), results[1]), results[0])


@pytest.mark.parametrize("variant", GATE_VARIANTS)
def test_autocast_keeps_the_router_in_float32(variant):
    model, ids = tiny_model(**GATE_VARIANTS[variant]).train(), random_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, output_router_logits=True)
    outputs.loss.backward()
    assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    assert outputs.router_aux_loss.dtype == torch.float32
    assert outputs.logits.dtype == torch.bfloat16


class TestDomains:
    MODEL = dict(num_experts=6, num_expert_groups=3)

    @pytest.mark.parametrize("per_token", [False, True])
    @pytest.mark.parametrize("gate_type", ["locmoe", "switch", "hash"])
    def test_a_domain_has_its_group(self, per_token, gate_type):
        model = tiny_model(**self.MODEL, gate_type=gate_type)
        ids = random_ids(3, 5)
        domain_ids = torch.tensor([2, 0, 1])
        if per_token:
            domain_ids = domain_ids[:, None].expand(3, 5).flip(1)
        outputs = model(ids, domain_ids=domain_ids, output_router_logits=True)
        groups = outputs.router_logits[0].argmax(-1).view(3, 5) // 2
        assert torch.equal(groups, torch.tensor([2, 0, 1])[:, None].expand(3, 5))

    def test_an_unknown_domain_is_refused(self):
        with pytest.raises(ValueError, match=r"`domain_ids` hold 3 to 3 and must be from 0 to 2"):
            tiny_model(**self.MODEL)(random_ids(1, 4), domain_ids=torch.tensor([3]))

    def test_generation_with_domains(self):
        model = tiny_model(**self.MODEL)
        ids, domain_ids = random_ids(2, 5), torch.tensor([2, 0])
        generated = model.generate(ids, domain_ids=domain_ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for length in range(5, 10):
            logits = model(generated[:, :length], domain_ids=domain_ids).logits[:, -1]
            assert torch.equal(logits.argmax(-1), generated[:, length])


class TestPadding:
    def test_padding_counts_nowhere(self):
        model, ids = tiny_model().train(), random_ids(2, 10)
        mask = torch.ones_like(ids)
        mask[1, 6:] = 0
        stats = model(ids, attention_mask=mask).router_stats
        short = model(ids[1:, :6]).router_stats + model(ids[:1]).router_stats
        assert_close(stats, short)

    @pytest.mark.parametrize("overflow", ["drop", "next_best"])
    def test_padding_takes_no_room_in_an_expert(self, overflow):
        model = tiny_model(capacity_mode="factor", expert_capacity_factor=1.0, capacity_overflow=overflow).train()
        ids = random_ids(1, 16)
        mask = (torch.arange(16) >= 12).long()[None]
        stats = model(ids, attention_mask=mask).router_stats  # room for 4 each, and there are 4 tokens
        assert_close(stats[:, RouterStat.TOKENS].sum(-1), torch.full((2,), 4.0))
        assert not stats[:, RouterStat.DROPPED].any()
        assert not stats[:, RouterStat.REROUTED].any()


def test_packed_sequences_do_not_see_each_other():
    model = tiny_model()
    first, second = random_ids(1, 7, seed=1), random_ids(1, 5, seed=2)
    position_ids = torch.cat([torch.arange(7), torch.arange(5)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=position_ids, use_cache=False).logits
    assert_close(packed, torch.cat([model(first).logits, model(second).logits], dim=1))


def test_causal():
    model, ids = tiny_model(), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 8:] = 3
    assert_close(model(ids).logits[:, :8], model(changed).logits[:, :8])
    assert not torch.allclose(model(ids).logits[:, 8:], model(changed).logits[:, 8:])


class TestDroplessEvaluation:
    """What a token gets does not depend on what else is in the batch, also for models trained with a capacity."""

    @pytest.fixture(params=["dropless", "factor", "critical"])
    def model(self, request):
        settings = {}
        if request.param == "factor":
            settings = dict(capacity_mode="factor", expert_capacity_factor=0.5)
        elif request.param == "critical":
            settings = dict(capacity_mode="critical", critical_capacity_steps=1)
        model = tiny_model(**settings, num_experts_per_tok=2)
        model.set_experts_implementation("capacity_bmm")
        if request.param == "critical":
            stats = model(random_ids(), output_router_stats=True).router_stats
            model.update_router_state(stats)
        return model

    def test_alone_or_in_a_batch(self, model):
        ids = random_ids(4, 9)
        batch = model(ids).logits
        for row in range(4):
            assert_close(model(ids[row : row + 1]).logits[0], batch[row])

    def test_padded_on_the_left(self, model):
        ids = random_ids(2, 9)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids[:1, :6]], dim=1)
        mask = torch.ones(2, 9, dtype=torch.int64)
        mask[0, :3] = 0
        position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
        batch = model(torch.cat([padded, ids[1:]]), attention_mask=mask, position_ids=position_ids).logits
        assert_close(batch[0, 3:], model(ids[:1, :6]).logits[0])
        assert_close(batch[1], model(ids[1:]).logits[0])

    def test_step_by_step(self, model):
        ids = random_ids(2, 9)
        whole = model(ids).logits
        cache, steps = None, []
        for position in range(9):
            outputs = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            steps.append(outputs.logits)
        assert_close(torch.cat(steps, dim=1), whole)


def test_capacity_at_eval_is_what_training_does():
    settings = dict(capacity_mode="factor", expert_capacity_factor=0.5)
    ids = random_ids()
    limited = tiny_model(**settings, capacity_at_eval=True)
    training = tiny_model(**settings).train()
    assert_close(limited(ids).logits, training(ids).logits)
    assert not torch.allclose(limited(ids).logits, tiny_model(**settings)(ids).logits)
    assert training(ids).router_stats[:, RouterStat.DROPPED].sum() > 0


def test_a_dropped_token_keeps_its_residual_and_its_shared_expert():
    model = tiny_model(capacity_mode="factor", expert_capacity_factor=1.0, num_shared_experts=1).train()
    block = model.sparse_blocks[0]
    x = torch.randn(1, 1, 32).repeat(1, 8, 1)  # eight equal tokens, room for two
    output, stats = block(x, output_router_stats=True)
    assert stats[RouterStat.DROPPED].sum() == 6
    assert_close(output[0, 2:], block.shared_experts(x)[0, 2:])
    assert not torch.allclose(output[0, :2], block.shared_experts(x)[0, :2])


class TestGradientCheckpointing:
    VARIANTS = {
        "plain": {},
        "capacity and centring": dict(
            capacity_mode="factor", expert_capacity_factor=0.7, gate_centering=True, num_experts_per_tok=2
        ),
        "noise": dict(gate_noise_std=0.5),
    }

    @pytest.mark.parametrize("use_reentrant", [False, True])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_the_same_gradients_and_nothing_counted_twice(self, variant, use_reentrant):
        ids = random_ids(2, 10)
        results = []
        for checkpointing in (False, True):
            model = tiny_model(**self.VARIANTS[variant], router_aux_loss_coef=0.5).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                assert model.is_gradient_checkpointing
            runs = []
            model.sparse_blocks[0].gate.register_forward_hook(lambda *args: runs.append(1))
            torch.manual_seed(3)
            outputs = model(ids, labels=ids)
            outputs.loss.backward()
            assert len(runs) == 1 + checkpointing
            results.append([outputs.loss.detach(), outputs.router_stats, outputs.router_hidden_sum, gradients(model)])
            if outputs.router_hidden_sum is None:
                del results[-1][2]
        assert_close(results[1], results[0])

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_router_losses_reach_the_weights_through_it(self, use_reentrant):
        """The gradient of the router losses alone: nothing else could hide its absence."""
        ids = random_ids(2, 10)
        results = []
        for checkpointing in (False, True):
            model = tiny_model(gate_type="switch").train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
                model.enable_input_require_grads()
            outputs = model(ids)
            outputs.router_aux_loss.backward()
            results.append(gradients(model))
        assert results[0]["model.layers.0.mlp.gate.weight"].abs().sum() > 0
        assert_close(results[1], results[0])


class TestRouterState:
    def test_nothing_stays_on_a_module(self):
        model, ids = tiny_model(gate_centering=True).train(), random_ids()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        model(ids, labels=ids, output_router_logits=True).loss.backward()
        hooks = {"_output_capturing_hooks_installed"}  # transformers' own flag
        after = {name: set(vars(module)) - hooks for name, module in model.named_modules()}
        assert after == before
        held = [
            (name, key)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        ]
        assert held == []

    def test_a_forward_leaves_the_state_alone(self):
        settings = dict(gate_centering=True, balance_bias_update_rate=0.1, capacity_mode="critical")
        model, ids = tiny_model(**settings).train(), random_ids()
        before = copy.deepcopy(model.state_dict())
        outputs = model(ids, labels=ids)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
        changed = {
            name.split(".")[-1] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }
        assert changed == {"e_score_correction_bias", "hidden_mean", "hidden_mean_updates", "steps", "cos_angle"}

    def test_hidden_sum_is_the_sum_of_what_the_gate_sees(self):
        model, ids = tiny_model(gate_centering=True).train(), random_ids()
        seen = []
        for block in model.sparse_blocks:
            block.register_forward_hook(lambda module, args, output: seen.append(args[0]))
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        outputs = model(ids, attention_mask=mask)
        expected = torch.stack([(x * mask.unsqueeze(-1)).sum((0, 1)) for x in seen])
        assert_close(outputs.router_hidden_sum, expected.detach())

    @pytest.mark.parametrize("variant", GATE_VARIANTS)
    def test_copies_and_pickles(self, variant):
        model, ids = tiny_model(**GATE_VARIANTS[variant]), random_ids()
        expected = model(ids).logits
        assert torch.equal(copy.deepcopy(model)(ids).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, expected)


class TestBadInput:
    @pytest.mark.parametrize("ids", [[[3, 61]], [[-1, 5]]])
    def test_token_ids_out_of_range(self, ids):
        with pytest.raises(ValueError, match=r"`input_ids` hold .* must be from 0 to 60.*tokenizer"):
            tiny_model()(torch.tensor(ids))

    def test_the_router_check_names_the_layer(self):
        model = tiny_model(router_check_finite=True)
        ids = random_ids()
        model(ids)
        with torch.no_grad():
            model.model.layers[0].mlp.experts.down_proj.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"router of layer 1 .*`router_check_finite=False`"):
            model(ids)

    def test_an_empty_sequence_and_a_single_token(self):
        model = tiny_model()
        assert model(random_ids(1, 1)).logits.shape == (1, 1, 61)

    def test_labels_all_ignored_give_a_finite_router_gradient(self):
        model, ids = tiny_model(gate_type="switch").train(), random_ids()
        labels = torch.full_like(ids, -100)
        loss = model(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
        loss.backward()
        assert loss == 0
        assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([1, 2, 3]))
    num_experts = groups * draw(st.integers(1, 4))
    topk_group = draw(st.integers(1, groups))
    heads = draw(st.sampled_from([1, 2, 4]))
    return dict(
        num_experts=num_experts,
        num_expert_groups=groups,
        topk_group=topk_group,
        num_experts_per_tok=draw(st.integers(1, min(3, num_experts // groups * topk_group))),
        hidden_size=draw(st.sampled_from([16, 28, 32])),
        moe_intermediate_size=draw(st.sampled_from([4, 12])),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([h for h in (1, 2, 4) if h <= heads])),
        head_dim=draw(st.sampled_from([2, 8])),
        num_hidden_layers=draw(st.integers(1, 2)),
        decoder_sparse_step=draw(st.integers(1, 2)),
        num_shared_experts=draw(st.integers(0, 1)),
        gated_mlp=draw(st.booleans()),
        norm_topk_prob=draw(st.booleans()),
        gate_type=draw(st.sampled_from(["locmoe", "switch", "hash"])),
        gate_affinity=draw(st.sampled_from(["cosine", "mean"])),
        gate_relu=draw(st.booleans()),
        gate_noise_std=draw(st.sampled_from([0.0, 0.1])),
        gate_centering=draw(st.booleans()),
        gate_rotation=draw(st.booleans()),
        balance_bias_update_rate=draw(st.sampled_from([0.0, 0.02])),
        capacity_mode=draw(st.sampled_from(["dropless", "factor", "critical"])),
        critical_capacity_steps=1,
        capacity_overflow=draw(st.sampled_from(["drop", "next_best"])),
        capacity_at_eval=draw(st.booleans()),
        qk_norm=draw(st.sampled_from([None, "head", "full"])),
        attention_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        sliding_window=draw(st.sampled_from([None, 3])),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    fields=configs(),
    batch_size=st.integers(1, 3),
    length=st.integers(1, 9),
    implementation=st.sampled_from(["eager", "batched_mm", "grouped_mm", "capacity_bmm"]),
    padded=st.booleans(),
)
def test_any_valid_config_trains_and_evaluates(fields, batch_size, length, implementation, padded):
    if fields["capacity_mode"] == "factor":
        fields["expert_capacity_factor"] = 0.8
    model = LocMoeForCausalLM(LocMoeConfig(**{**TINY_SHAPE, **fields}))
    model.set_experts_implementation(implementation)
    ids = random_ids(batch_size, length)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, : length // 2] = 0
    for _ in range(2):
        outputs = model.train()(ids, attention_mask=mask, labels=ids)
        if length > 1:  # a single token has nothing to predict, and a mean over nothing is no number
            assert torch.isfinite(outputs.loss)
            model.zero_grad()
            outputs.loss.backward()
            assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
        if outputs.router_stats is not None:
            counted = mask.sum() * fields["num_experts_per_tok"]
            assert torch.equal(
                outputs.router_stats[:, RouterStat.TOKENS].sum(-1), counted.expand(len(outputs.router_stats)).float()
            )
            model.update_router_state(outputs.router_stats, outputs.router_hidden_sum)
    logits = model.eval()(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()


def test_model_without_a_head_is_the_same_decoder():
    full = tiny_model()
    bare = LocMoeModel(tiny_config())
    bare.load_state_dict(full.model.state_dict())
    ids = random_ids()
    assert_close(bare.eval()(ids).last_hidden_state, full.model(ids).last_hidden_state)


def test_losses_fall_in_training():
    model, ids = tiny_model(initializer_range=0.02).train(), random_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        outputs = model(ids, labels=ids)
        losses.append(outputs.loss.item())
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.3 * losses[0]
