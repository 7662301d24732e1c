# SPDX-License-Identifier: Apache-2.0
"""The layout that upstream's meshes cannot say trains like one process, and what a layout costs is predicted and chosen."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_locmoe.distributed import parallel_run
from hf_locmoe.distributed.layouts import (
    LAYOUTS,
    LayoutCost,
    ModelSize,
    SpreadConfig,
    choose_layout,
    layout_config,
    predict_layouts,
    with_spread_layout,
)
from hf_locmoe.distributed.topology import NodeTopology
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from tests.distributed.expert_parallel_runs import Variant, compare, full_model, tiny_config
from tests.harness import run_ranks
from tests.tolerances import TOLERANCES


SPREAD = dict(dp_replicate_size=2, fsdp_size=2, ep_size=4)


def compare_spread(variants):
    for variant in variants:
        model_class = with_spread_layout(type(full_model(variant)))
        model = compare(variant, TOLERANCES[torch.float32], config_class=SpreadConfig, model_class=model_class)
        dense = model.model.layers[0].self_attn.q_proj.weight
        experts = model.model.layers[0].mlp.experts.down_proj
        assert isinstance(dense, DTensor) and isinstance(experts, DTensor)
        # The dense layers: a copy per node, sharded in it. The experts: over all ranks, or whole where replicated.
        parts = variant.mesh["ep_size"] if "replicate_experts" in variant.mesh else 4
        assert experts.to_local().size(0) * parts == variant.num_experts
        assert dense.to_local().numel() * 2 == dense.numel()


COPIES_SHARDED = dict(SPREAD, ep_size=2)
COPIES_WHOLE = dict(SPREAD, ep_size=2, replicate_experts=True)
WITH_TP = dict(dp_replicate_size=2, fsdp_size=1, tp_size=2, ep_size=4)


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "variants",
    [
        [
            Variant(SPREAD, dict(slices=2, fan_out="node"), checkpointing=False, accumulation=2),
            Variant(COPIES_WHOLE, dict(slices=1), family="locmoe", num_experts=2),
        ],
        pytest.param(
            [
                Variant(COPIES_SHARDED, dict(slices=1), family="mixtral", num_experts=4),
                Variant(WITH_TP, dict(slices=1), family="mixtral"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["spread", "copies and TP"],
)
def test_spread_layout_equals_one_process(variants):
    run_ranks(compare_spread, 4, variants, env={"LOCMOE_RANKS_PER_NODE": "2"})


def compare_tied(variants):
    for variant in variants:
        config_class = SpreadConfig if variant.mesh.get("dp_replicate_size", 1) > 1 else DistributedConfig
        model_class = with_spread_layout(type(full_model(variant)))
        model = compare(variant, TOLERANCES[torch.float32], config_class=config_class, model_class=model_class)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.vocab_size % variant.mesh["fsdp_size"]


@pytest.mark.multiprocess
def test_tied_embeddings_whose_rows_do_not_divide():
    variants = [
        Variant(dict(fsdp_size=4, ep_size=4), family="locmoe", tied=True, steps=4, accumulation=2),
        Variant(SPREAD, family="olmoe", tied=True, steps=4),
    ]
    run_ranks(compare_tied, 4, variants, env={"LOCMOE_RANKS_PER_NODE": "2"})


def shards_of_one_of_many(layout, num_nodes, on_node, num_experts, tp_size):
    """Builds a layout as the last of many ranks that do not exist: experts it holds, its weights' placements, its peers."""
    world_size = num_nodes * on_node
    dist.init_process_group("fake", rank=world_size - 1, world_size=world_size, store=FakeStore())
    truth = full_model(Variant({}, num_experts=num_experts))
    topology = NodeTopology.from_ranks_per_node(on_node, world_size)
    model = with_spread_layout(type(truth)).from_pretrained(
        None,
        config=truth.config,
        state_dict=truth.state_dict(),
        distributed_config=layout_config(layout, topology, num_experts, tp_size),
    )
    layer = model.model.layers[0]
    embedding = model.model.embed_tokens.weight
    ranks = dist.get_process_group_ranks(model._mesh_manager.get_mesh("ep").get_group())
    dist.destroy_process_group()
    return layer.mlp.experts.down_proj.to_local().size(0), embedding.placements, ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_nodes, on_node, num_experts, tp_size", [(32, 8, 256, 1), (2, 2, 8, 2)])
def test_one_of_many_ranks_holds_what_it_should(layout, num_nodes, on_node, num_experts, tp_size):
    arguments = (layout, num_nodes, on_node, num_experts, tp_size)
    env = {"LOCMOE_RANKS_PER_NODE": str(on_node), "WORLD_SIZE": str(num_nodes * on_node)}
    ((experts, placements, ranks),) = run_ranks(shards_of_one_of_many, 1, *arguments, init=False, env=env)
    spread_over = on_node if layout == "replicated" else num_nodes * on_node
    assert experts == num_experts // spread_over
    assert ranks == list(range(num_nodes * on_node - spread_over, num_nodes * on_node))
    assert placements[0].is_replicate() == (layout != "sharded")


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_configs_of_the_layouts():
    topology = NodeTopology.from_ranks_per_node(4, 8)
    sizes = {
        layout: (config.dp_replicate_size, config.fsdp_size, config.tp_size, config.ep_size, config.efsdp_size)
        for layout in LAYOUTS
        for config in [layout_config(layout, topology, 16, tp_size=2)]
    }
    assert sizes == {"sharded": (1, 4, 2, 8, 1), "replicated": (2, 2, 2, 4, 1), "spread": (2, 2, 2, 8, 1)}
    assert layout_config("spread", topology, 4).ep_size == 4
    assert layout_config("spread", topology, 4).efsdp_size == 1
    assert layout_config("spread", topology, 4).expert_copies == 2
    assert layout_config("spread", topology, 16, ep_size=4).efsdp_size == 2
    # Fewer experts than ranks: upstream's layouts fall back to no expert parallelism.
    assert layout_config("sharded", topology, 4).ep_size == 1
    assert layout_config("spread", topology, 5).ep_size == 1


@pytest.mark.multiprocess
@pytest.mark.slow
def test_more_nodes_than_experts_equal_one_process():
    mesh = dict(dp_replicate_size=4, fsdp_size=1, ep_size=2, replicate_experts=True)
    variants = [Variant(mesh, dict(slices=2), num_experts=2, num_experts_per_tok=top_k) for top_k in (1, 2)]
    run_ranks(compare_nodes_without_dense_shards, 4, variants, env={"LOCMOE_RANKS_PER_NODE": "1"})


def compare_nodes_without_dense_shards(variants):
    for variant in variants:
        model_class = with_spread_layout(type(full_model(variant)))
        compare(variant, TOLERANCES[torch.float32], config_class=SpreadConfig, model_class=model_class)


def test_copies_of_an_expert_share_a_node_where_they_can():
    assert SpreadConfig(dp_replicate_size=2, fsdp_size=4, ep_size=4).expert_ranks()[0, 0].tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
    ]
    assert SpreadConfig(dp_replicate_size=4, fsdp_size=2, ep_size=2).expert_ranks()[0, 0].tolist() == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize(
    "arguments, field",
    [
        (dict(layout="ring", topology=NodeTopology((0, 1)), num_experts=4), "layout"),
        (dict(layout="spread", topology=NodeTopology((0, 0, 1)), num_experts=4), "layout"),
        (dict(layout="spread", topology=NodeTopology((0, 0, 1, 1)), num_experts=4, ep_size=3), "ep_size"),
        (dict(layout="replicated", topology=NodeTopology((0, 0, 1, 1)), num_experts=4, tp_size=4), "tp_size"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        layout_config(**arguments)
    with pytest.raises(ValueError, match="`ep_size`"):
        SpreadConfig(dp_replicate_size=2, fsdp_size=2, ep_size=3)


# ---- choice ---------------------------------------------------------------------------------------------------------


def test_size_of_a_model_counts_every_parameter_once():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("olmoe", 8, 2))
    size = ModelSize.of(model)
    assert size.dense_parameters + size.expert_parameters == model.num_parameters()
    assert size.expert_parameters == 2 * 8 * 3 * 16 * 16  # layers, experts, matrices, hidden, intermediate
    assert (size.num_moe_layers, size.num_experts, size.num_experts_per_tok, size.hidden_size) == (2, 8, 2, 16)


def test_predicted_bytes_by_hand():
    size = ModelSize(1000, 8000, num_moe_layers=2, num_experts=8, num_experts_per_tok=1, hidden_size=10)
    topology = NodeTopology.from_ranks_per_node(2, 4)
    costs = {cost.layout: cost for cost in predict_layouts(size, topology, tokens_per_rank=3)}
    tokens = 4 * (2 * 3) * 0.5 * 2 * 10 * 4  # transfers, tokens of a node, share that leaves, layers, width, bytes
    assert costs["sharded"].bytes_inter_node == pytest.approx(1000 * 3 / 4 * 3 * 4 + tokens)
    assert costs["replicated"].bytes_inter_node == pytest.approx(9000 * 4)
    assert costs["spread"].bytes_inter_node == pytest.approx(1000 * 4 + tokens)
    assert [cost.bytes_memory for cost in costs.values()] == pytest.approx([2250 * 16, 4500 * 16, 2500 * 16])


def test_choice_follows_bytes_and_memory_and_says_why():
    costs = [LayoutCost("sharded", 5e9, 1e9), LayoutCost("replicated", 1e9, 8e9), LayoutCost("spread", 2e9, 2e9)]
    assert choose_layout(costs)[0] == "replicated"
    layout, why = choose_layout(costs, memory_limit_bytes=4e9)
    assert layout == "spread"
    assert '"replicated" 1 GB (does not fit)' in why
    assert choose_layout(costs, memory_limit_bytes=1e6)[0] == "sharded"
    one_node = predict_layouts(ModelSize(10, 80, 1, 4, 1, 8), NodeTopology((0, 0)), 4)
    assert choose_layout(one_node) == ("sharded", '"sharded" is the only layout for these nodes.')
    assert one_node[0].bytes_inter_node == 0


def test_few_tokens_spread_the_experts_and_many_replicate_them():
    topology = NodeTopology.from_ranks_per_node(8, 16)
    size = ModelSize(10**9, 7 * 10**9, 16, 64, 8, 2048)
    for tokens_per_rank, expected in ((512, "spread"), (65536, "replicated")):
        assert choose_layout(predict_layouts(size, topology, tokens_per_rank))[0] == expected


CHOICES = {
    "spread": dict(tokens_per_rank=512),
    "replicated": dict(tokens_per_rank=65536),
    "sharded": dict(tokens_per_rank=65536, memory_limit_gb=34.0),  # of the 32 that it needs, the others 36 and 64
}


def chosen():
    """What `"auto"` comes to on this rank, as sizes, and what this rank says about it."""
    size = ModelSize(10**9, 7 * 10**9, 16, 64, 8, 2048)
    choices = []
    for choice in CHOICES.values():
        with patch.object(parallel_run.logger, "warning") as warning:
            config = LocMoePlugin(layout="auto", **choice).distributed_config(size)
        sizes = (type(config), config.dp_replicate_size, config.fsdp_size, config.ep_size)
        choices.append((sizes, [call.args[0] for call in warning.call_args_list]))
    return choices


@pytest.mark.multiprocess
def test_auto_is_the_same_on_all_ranks_and_said_by_the_first():
    first, *others = run_ranks(chosen, 4, env={"LOCMOE_RANKS_PER_NODE": "2"})
    topology = NodeTopology.from_ranks_per_node(2, 4)
    for (sizes, (said,)), layout in zip(first, CHOICES, strict=True):
        expected = layout_config(layout, topology, 64)
        assert sizes == (type(expected), expected.dp_replicate_size, expected.fsdp_size, expected.ep_size)
        assert said.startswith(f'layout: "{layout}" sends least between nodes')
    for other in others:
        assert [sizes for sizes, _ in other] == [sizes for sizes, _ in first]
        assert [said for _, said in other] == [[]] * len(CHOICES)
