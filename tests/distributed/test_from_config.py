# SPDX-License-Identifier: Apache-2.0
"""Models from a config alone: every rank gets its shards of what one process would have started from, bit for bit."""

from __future__ import annotations

import ctypes
import gc
import itertools
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.models.olmoe.modeling_olmoe import OlmoePreTrainedModel

from hf_locmoe import LocMoeConfig
from hf_locmoe.distributed import deferred_init, one_process_start
from hf_locmoe.distributed.layouts import LAYOUTS
from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from tests.distributed.expert_parallel_runs import tiny_config, whole
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "2"}
FAMILIES = ("locmoe", "olmoe", "mixtral", "qwen3")


def configs():
    """The families, and a LocMoe of every kind of buffer, tied, in bfloat16."""
    for family in FAMILIES:
        yield tiny_config(family)
    for gate_type in ("locmoe", "hash"):
        yield LocMoeConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_experts=4,
            gate_type=gate_type,
            gate_rotation=gate_type == "locmoe",
            gated_mlp=True,
            attention_bias=True,
            tie_word_embeddings=True,
            dtype="bfloat16",
        )


def spread_from_config(config, **choices):
    plugin = LocMoePlugin(**choices)
    plugin.activate()
    try:
        return AutoModelForCausalLM.from_config(config)
    finally:
        plugin.deactivate()


def assert_equal(model, expected, of_what):
    actual, expected = model.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    assert any(isinstance(tensor, DTensor) for tensor in actual.values())
    for name, tensor in expected.items():
        assert torch.equal(whole(actual[name]), tensor), (of_what, name)


def start_as_one_process(pairs, tp_size):
    """Each rank has a seed of its own, and rank 0's counts."""
    deferred_init.SMALLEST_RECORDED = 1
    spread_every_model()
    for config, layout in pairs:
        torch.manual_seed(1)
        expected = AutoModelForCausalLM.from_config(config)
        drawn_next = torch.rand(3)
        torch.manual_seed(1 + dist.get_rank())
        with patch.object(one_process_start.logger, "warning") as warning:
            model = spread_from_config(config, layout=layout, tp_size=tp_size)
        warning.assert_not_called()
        # on rank 0 as on one process; ranks that were seeded differently stay so
        assert torch.equal(torch.rand(3), drawn_next) == (dist.get_rank() == 0)
        assert model.training
        assert model.dtype == expected.dtype
        assert_equal(model, expected, (config.model_type, layout))


def test_every_family_starts_as_one_process():
    run_ranks(start_as_one_process, 4, list(zip(configs(), LAYOUTS * 2)), 1, env=TWO_NODES)


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_family_starts_as_one_process_in_every_layout(tp_size):
    pairs = list(itertools.product(configs(), LAYOUTS))
    run_ranks(start_as_one_process, 4, pairs, tp_size, env=TWO_NODES, timeout_s=600)


# ---- what cannot be recorded ----------------------------------------------------------------------------------------


def start_from_a_model_that_looks_at_its_values(rank_that_looks):
    deferred_init.SMALLEST_RECORDED = 1
    spread_every_model()
    initialize = OlmoePreTrainedModel._init_weights

    def look(self, module):
        initialize(self, module)
        if isinstance(module, torch.nn.Linear) and dist.get_rank() in rank_that_looks:
            module.weight.data.mul_(max(module.weight.flatten().tolist()))

    def do_not_look(self, module):
        initialize(self, module)
        if isinstance(module, torch.nn.Linear):
            module.weight.data.mul_(module.weight.max())

    config = tiny_config("olmoe")
    with patch.object(OlmoePreTrainedModel, "_init_weights", do_not_look):
        torch.manual_seed(1)
        expected = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(1 + dist.get_rank())
    with (
        patch.object(OlmoePreTrainedModel, "_init_weights", look),
        patch.object(one_process_start.logger, "warning") as warning,
    ):
        model = spread_from_config(config, layout="sharded")
    return model, expected, warning


def start_whole():
    model, expected, warning = start_from_a_model_that_looks_at_its_values({0, 1})
    assert_equal(model, expected, "whole")
    return [str(call.args[0]) for call in warning.call_args_list]


def test_what_cannot_be_recorded_is_built_whole_and_said_once():
    first, second = run_ranks(start_whole, 2)
    assert second == []
    (message,) = first
    assert "OlmoeForCausalLM cannot be initialised shard by shard (RuntimeError: tolist() " in message
    assert "every rank holds all of it" in message


def warnings_when_one_rank_fails():
    """Its error would be a hang on the others."""
    _, _, warning = start_from_a_model_that_looks_at_its_values({1})
    return len(warning.call_args_list)


def test_one_rank_that_cannot_takes_all_with_it():
    assert run_ranks(warnings_when_one_rank_fails, 2) == [0, 1]


# ---- memory ---------------------------------------------------------------------------------------------------------


_MMAP_THRESHOLD = -3  # of malloc.h


def resident(field):
    """In bytes: `VmRSS` now, `VmHWM` at most since it was last forgotten."""
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1])


def most_memory(build):
    """What `build` gives, and the bytes that this process had at most while it ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the most
    return build(), resident("VmHWM")


def memory_of_a_rank(config, layout):
    """Bytes: most while the model is built, its shards, its largest parameter; most and all of it on one process."""
    # freed memory goes back at once, as that of large parameters always does: what is measured is what is held
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    torch.manual_seed(0)
    small = tiny_config("locmoe")
    AutoModelForCausalLM.from_config(small)
    spread_from_config(small, layout=layout)  # whatever is loaded once, is loaded
    before = resident("VmRSS")
    model, peak = most_memory(lambda: spread_from_config(config, layout=layout))
    shards = 4 * sum(local(parameter).numel() for parameter in model.parameters())
    largest = 4 * max(parameter.numel() for parameter in model.parameters())
    del model
    alone, whole_peak = most_memory(lambda: AutoModelForCausalLM.from_config(config))
    return peak - before, shards, largest, whole_peak - before, 4 * alone.num_parameters()


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see the most memory used"
)
@pytest.mark.parametrize("layout", ["sharded", pytest.param("spread", marks=pytest.mark.slow)])
def test_no_rank_holds_more_than_its_shards_and_one_parameter(layout):
    config = LocMoeConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_experts=8,
    )
    for peak, shards, largest, whole_peak, size in run_ranks(memory_of_a_rank, 4, config, layout, env=TWO_NODES):
        assert size > 200e6
        assert whole_peak > size  # what is measured would show a model that is held whole
        assert shards < 0.3 * size
        # besides its shards: one parameter that is drawn, and what is no tensor
        assert peak < shards + 2 * largest
