# SPDX-License-Identifier: Apache-2.0
"""`torch.compile` as one graph, forward and backward, and `torch.export`."""

import pytest
import torch

from tests.tiny_models import gradients, random_ids, tiny_model
from tests.tolerances import assert_close


PATHS = {
    "dropless grouped_mm": ("grouped_mm", {}),
    "dropless batched_mm": ("batched_mm", {}),
    "paper": ("grouped_mm", dict(gate_affinity="mean", gate_relu=True)),
    "switch, two experts": ("grouped_mm", dict(gate_type="switch", num_experts_per_tok=2)),
    "hash": ("grouped_mm", dict(gate_type="hash")),
    "groups, centred, rotated": (
        "grouped_mm",
        dict(num_expert_groups=2, gate_centering=True, gate_rotation=True, balance_bias_update_rate=0.01),
    ),
    "uneven blocks": ("grouped_mm", dict(num_experts=5)),
    "capacity": ("capacity_bmm", dict(capacity_mode="factor", expert_capacity_factor=0.8)),
    "capacity, next best": (
        "capacity_bmm",
        dict(capacity_mode="factor", expert_capacity_factor=0.8, capacity_overflow="next_best", num_experts_per_tok=2),
    ),
    "critical capacity": ("capacity_bmm", dict(capacity_mode="critical")),
}


# compiling takes seconds; these differ in the gate and in where overflow goes
QUICK = ("dropless grouped_mm", "dropless batched_mm", "capacity")
EACH_PATH = [path if path in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in PATHS]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def build(path):
    implementation, settings = PATHS[path]
    model = tiny_model(num_hidden_layers=1, **settings).train()
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("path", EACH_PATH)
def test_a_training_step_is_one_graph(path):
    ids = random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    results = []
    for compiled in (False, True):
        model = build(path)
        run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        outputs = run(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False)
        outputs.loss.backward()
        results.append([outputs.loss.detach(), outputs.logits.detach(), outputs.router_stats, gradients(model)])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("path", ["dropless grouped_mm", "capacity"])
def test_layers_under_activation_checkpointing_are_one_graph_each(path):
    """Compiled one by one: the checkpoint is inside of the graph, where no module may be written to."""
    ids, results = random_ids(2, 10), []
    for compiled in (False, True):
        model = build(path)
        if compiled:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            for layer in model.model.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
        outputs = model(input_ids=ids, labels=ids, use_cache=False)
        outputs.loss.backward()
        results.append([outputs.loss.detach(), outputs.router_stats, gradients(model)])
    assert_close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["dropless grouped_mm", "capacity"])
def test_with_the_default_backend(path):
    ids = random_ids(2, 10)
    results = []
    for compiled in (False, True):
        model = build(path)
        run = torch.compile(model, fullgraph=True) if compiled else model
        outputs = run(input_ids=ids, labels=ids, use_cache=False)
        outputs.loss.backward()
        results.append([outputs.loss.detach(), outputs.router_stats, gradients(model)])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("path", ["dropless grouped_mm", pytest.param("capacity", marks=pytest.mark.slow)])
def test_evaluation_is_one_graph(path):
    model, ids = build(path).eval(), random_ids(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)


@pytest.mark.slow
def test_several_batch_shapes_do_not_break_the_graph():
    """Also with a capacity, which follows the number of tokens."""
    model = build("capacity")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch_size, length in ((2, 10), (3, 7), (4, 12)):
        ids = random_ids(batch_size, length)
        outputs = compiled(input_ids=ids, labels=ids, use_cache=False)
        assert_close(outputs.loss, model(ids, labels=ids).loss)


def test_generation_with_a_static_cache_is_one_graph():
    model, ids = tiny_model(num_hidden_layers=1), random_ids(2, 6)
    settings = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    actual = model.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "path", ["dropless grouped_mm", *(pytest.param(p, marks=pytest.mark.slow) for p in ("paper", "hash"))]
)
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_shapes(path, strict):
    model = build(path).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    batch, length = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(
        Logits(), (random_ids(2, 10),), dynamic_shapes={"input_ids": {0: batch, 1: length}}, strict=strict
    ).module()
    for shape in ((2, 10), (3, 7)):
        ids = random_ids(*shape)
        assert_close(exported(ids), model(ids).logits)
