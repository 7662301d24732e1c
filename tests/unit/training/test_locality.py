# SPDX-License-Identifier: Apache-2.0
"""What steers locality while a model trains, on one process that is told which experts are near."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_locmoe.distributed.parallel_run import LocalityOptions, ParallelRun, set_parallel_run
from hf_locmoe.moe.routing import RouterStat
from hf_locmoe.training.locality import BIAS_RATE, EASING, MAX_BIAS, LocalityControl, locality_control_for
from tests.tiny_models import random_ids, tiny_model


LAYERS, EXPERTS = 2, 4
NEAR = torch.tensor([[True, True, False, False], [False, True, False, True]])


def spread_model(**overrides):
    """As on a node of two, without any other."""
    model = tiny_model(router_aux_loss_coef=0.0, **overrides).train()
    model.base_model.router_scope = replace(model.base_model.router_scope, num_nodes=2, node_local_experts=NEAR)
    return model


def routed(shares):
    """Statistics of 100 assignments a layer of which these shares are for near experts."""
    stats = torch.zeros(LAYERS, len(RouterStat), EXPERTS)
    for layer, share in enumerate(shares):
        stats[layer, RouterStat.TOKENS] = torch.where(NEAR[layer], 50 * share, 50 * (1 - share))
    return stats


def scale_of(model):
    return model.base_model.router_scope.locality_scale


def test_the_weight_rises_over_the_warm_up():
    model = spread_model()
    control = LocalityControl(model, LocalityOptions(locality_warmup_steps=4))
    seen = [scale_of(model).tolist()]
    for _ in range(5):
        control.update(routed([0.5, 0.5]))
        seen.append(scale_of(model).tolist())
    assert seen == [[weight] * LAYERS for weight in (0, 0.25, 0.5, 0.75, 1, 1)]


def test_a_layer_that_has_reached_the_target_is_left_alone():
    model = spread_model()
    control = LocalityControl(model, LocalityOptions(locality_target_share=0.8))
    assert scale_of(model).tolist() == [1, 1]
    control.update(routed([0.5, 0.9]))
    assert scale_of(model).tolist() == [1, 0]
    # half of the easing below the target: half the weight; the running mean of two is the plain one
    wanted = 2 * (0.8 - EASING / 2) - 0.5
    control.update(routed([wanted, 0.9]))
    assert scale_of(model)[0].item() == pytest.approx(0.5, abs=1e-4)


def test_the_scale_weighs_each_layers_loss_and_its_gradient():
    ids = random_ids()
    models = [spread_model(locality_loss_coef=1.0) for _ in range(2)]
    LocalityControl(models[1], LocalityOptions(locality_target_share=0.9))
    scale_of(models[1]).copy_(torch.tensor([0.5, 0.0]))
    plain, scaled = (model(input_ids=ids, labels=ids) for model in models)
    by_layer = []
    for layer in range(LAYERS):
        model = spread_model()
        LocalityControl(model, LocalityOptions(locality_target_share=0.9))
        scale_of(model).copy_(torch.eye(LAYERS)[layer])
        by_layer.append(LAYERS * model(input_ids=ids, labels=ids).locality_loss.item())
    assert plain.locality_loss.item() == pytest.approx(sum(by_layer) / LAYERS, rel=1e-5)
    assert scaled.locality_loss.item() == pytest.approx(0.5 * by_layer[0] / LAYERS, rel=1e-5)
    assert (plain.loss - scaled.loss).item() == pytest.approx(
        (plain.locality_loss - scaled.locality_loss).item(), rel=1e-3
    )


def test_the_bias_goes_towards_its_target_within_bounds():
    model = spread_model()
    control = LocalityControl(model, LocalityOptions(node_bias_target=0.7))
    control.update(routed([0.5, 0.9]))
    assert control.bias.tolist() == pytest.approx([BIAS_RATE * 0.2, 0])
    for block, bias, near in zip(model.sparse_blocks, control.bias, NEAR, strict=True):
        assert torch.equal(block.gate.node_bias, bias * near)
    for _ in range(1000):
        control.update(routed([0.0, 0.9]))
    assert control.bias.tolist() == pytest.approx([MAX_BIAS, 0])


def test_the_controller_reaches_its_target_on_a_model():
    model, ids = spread_model(), random_ids(8, 32)
    control = LocalityControl(model, LocalityOptions(node_bias_target=0.8))
    for _ in range(200):
        with torch.no_grad():
            control.update(model(input_ids=ids).router_stats)
    assert control.local_share.tolist() == pytest.approx([0.8, 0.8], abs=0.02)


def test_the_bias_chooses_and_does_not_score_and_is_off_at_inference():
    model = spread_model()
    gate, near = model.sparse_blocks[0].gate, NEAR[0]
    tokens = torch.randn(64, model.config.hidden_size)
    logits, weights, index = gate(tokens)
    gate.node_bias = 100.0 * near
    biased_logits, biased_weights, biased_index = gate(tokens)
    assert not near[index].all()
    assert near[biased_index].all()
    assert torch.equal(logits, biased_logits)
    assert torch.equal(biased_weights, logits.softmax(dim=-1).gather(-1, biased_index))
    model.eval()
    assert all(torch.equal(now, then) for now, then in zip(gate(tokens), (logits, weights, index), strict=True))
    assert not any("node_bias" in name for name in model.state_dict())


@pytest.fixture
def run():
    """Sets the options of the run that models belong to."""
    yield lambda **options: set_parallel_run(ParallelRun(locality=LocalityOptions(**options)))
    set_parallel_run(None)


def test_options_without_effect_are_named(run, monkeypatch):
    from hf_locmoe.training import locality

    said = []
    monkeypatch.setattr(locality.logger, "warning_once", said.append)
    run()
    assert locality_control_for(spread_model()) is None
    run(locality_target_share=0.7)
    assert locality_control_for(tiny_model()) is None
    assert locality_control_for(spread_model(gate_type="hash")) is None
    assert said == [
        "`locality_target_share` (0.7) has no effect: no experts are on other nodes.",
        "`locality_target_share` (0.7) has no effect: a hash gate has nothing to learn.",
    ]
    run(locality_warmup_steps=3, node_bias_target=0.5)
    assert locality_control_for(spread_model(locality_loss_coef=0.0)) is not None
    assert said[2:] == ["`locality_warmup_steps` (3) has no effect: `locality_loss_coef` is 0."]
