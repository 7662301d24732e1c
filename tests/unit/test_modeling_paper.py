# SPDX-License-Identifier: Apache-2.0
"""`LocMoeConfig.paper(...)` against equations 1-7 of arXiv 2401.13920, written out."""

import pytest
import torch

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from hf_locmoe.distributed.router_scope import RouterScope
from tests.tiny_models import TINY_SHAPE, gradients, random_ids
from tests.tolerances import assert_close


NEAR = torch.tensor([True, True, False, False])
ALPHA, MU, REMOTE_SHARE = 0.01, 0.03, 0.1


def paper_layer(x, w_in, w_out):
    """Eq. 1-4: x (T, d) to y (T, d), the softmax G (T, n) and the chosen experts (T,). Straight from the formulas."""
    d, n = x.shape[1], len(w_in)
    w = torch.stack(
        [(n / d) * ((i * d / n <= torch.arange(d)) & (torch.arange(d) < (i + 1) * d / n)) for i in range(n)]
    )
    scores = x @ w.T.to(x.dtype)
    gate = scores.relu().softmax(dim=-1)
    chosen = scores.argmax(dim=-1)
    y = [gate[m, i] * w_out[i] @ torch.nn.functional.gelu(w_in[i] @ x[m]) for m, i in enumerate(chosen)]
    return torch.stack(y), gate, chosen


def paper_losses(gate, chosen):
    """Eq. 5 and 6 with alpha and mu; D_l has `REMOTE_SHARE` of its mass on the other node's experts."""
    n = gate.shape[1]
    f = torch.stack([(chosen == i).double().mean() for i in range(n)])
    p = gate.mean(dim=0)
    d_l = torch.where(NEAR, (1 - REMOTE_SHARE) / NEAR.sum(), REMOTE_SHARE / (~NEAR).sum()).double()
    return ALPHA * n * (f * p).sum(), MU * (p * (p / d_l).log()).sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LocMoeConfig.paper(
        **TINY_SHAPE,
        gate_noise_std=0.0,
        locality_loss_coef=MU,
        locality_remote_share=REMOTE_SHARE,
        experts_implementation="eager",
    )
    # in float64 but for the router, which is float32 always
    model = LocMoeForCausalLM(config).double().train()
    model.model.router_scope = RouterScope(node_local_experts=NEAR)
    return model


def record_moe_inputs(model):
    inputs = []
    for block in model.sparse_blocks:
        block.register_forward_hook(lambda module, args, output: inputs.append((args[0], output[0])))
    return inputs


def test_the_preset_is_the_papers_method():
    config = LocMoeConfig.paper()
    assert (config.gate_type, config.gate_affinity, config.gate_relu) == ("locmoe", "mean", True)
    assert config.gate_noise_std > 0
    assert (config.num_experts_per_tok, config.norm_topk_prob) == (1, False)
    assert (config.gated_mlp, config.hidden_act) == (False, "gelu")
    assert config.router_aux_loss_coef == ALPHA
    assert config.capacity_mode == "dropless"
    assert config.balance_bias_update_rate == 0
    assert LocMoeConfig.paper(num_experts=4, gate_noise_std=0.5).gate_noise_std == 0.5


def test_layers_and_losses_are_equations_1_to_7(model):
    ids = random_ids(3, 10)
    recorded = record_moe_inputs(model)
    outputs = model(ids, labels=ids)
    aux, locality = [], []
    for (x, y), block in zip(recorded, model.sparse_blocks, strict=True):
        expected, gate, chosen = paper_layer(x.flatten(0, 1), block.experts.up_proj, block.experts.down_proj)
        assert_close(y.flatten(0, 1), expected, torch.float32)
        layer_aux, layer_locality = paper_losses(gate, chosen)
        aux.append(layer_aux)
        locality.append(layer_locality)
    aux, locality = torch.stack(aux).mean(), torch.stack(locality).mean()
    assert_close(ALPHA * outputs.router_aux_loss, aux, torch.float32)
    assert_close(MU * outputs.locality_loss, locality, torch.float32)
    cross_entropy = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(outputs.loss, cross_entropy + aux + locality, torch.float32)


def test_gradients_are_those_of_the_equations(model):
    """One layer with its losses alone: through the gate's softmax to the tokens, and to the experts."""
    block = model.sparse_blocks[0]
    x = torch.randn(20, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(20, 32, dtype=torch.float64)
    inputs = [x, block.experts.up_proj, block.experts.down_proj]

    y, gate, chosen = paper_layer(x, block.experts.up_proj, block.experts.down_proj)
    expected = torch.autograd.grad((y * direction).sum() + sum(paper_losses(gate, chosen)), inputs)

    y, stats = block(x[None], output_router_stats=True)
    losses = model.weighted_router_loss(*model.router_losses(stats[None]))
    actual = torch.autograd.grad((y[0] * direction).sum() + losses, inputs)
    for a, b in zip(actual, expected):
        assert_close(a, b, torch.float32)


def test_evaluation_is_the_cross_entropy_alone(model):
    ids = random_ids(3, 10)
    training, evaluation = model(ids, labels=ids), model.eval()(ids, labels=ids)
    assert_close(training.logits, evaluation.logits)
    expected = torch.nn.functional.cross_entropy(evaluation.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    assert_close(evaluation.loss, expected, torch.float32)
    assert evaluation.router_stats is None
    assert evaluation.router_aux_loss is None


def test_losses_can_be_turned_off(model):
    ids = random_ids()
    model.config.router_aux_loss_coef = model.config.locality_loss_coef = 0.0
    loss = model(ids, labels=ids).loss
    loss.backward()
    with_zero = gradients(model)
    model.zero_grad()
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    expected.backward()
    assert_close(loss, expected, torch.float32)
    assert_close(with_zero, gradients(model), torch.float32)
