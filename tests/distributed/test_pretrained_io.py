# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a model that is spread over ranks: all ranks save, and each may load as soon as it is through."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hf_locmoe import LocMoeConfig, LocMoeForCausalLM
from tests.harness import run_ranks


pytestmark = pytest.mark.multiprocess

_LAYOUTS = [dict(fsdp_size=2, ep_size=2), dict(fsdp_size=2), dict(tp_size=2)]


def make_model(seed: int) -> LocMoeForCausalLM:
    torch.manual_seed(seed)
    shape = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LocMoeForCausalLM(LocMoeConfig(**shape, num_experts=4, gate_type="switch"))


def same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> bool:
    state = model.state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in expected.state_dict().items())


def save_and_load_at_once(folder: str, layout: dict[str, int]) -> None:
    first, second = make_model(0), make_model(1)
    config = DistributedConfig(**layout)
    for expected in (first, second, first):  # into a new folder, and twice over an earlier checkpoint
        spread = LocMoeForCausalLM.from_pretrained(
            None, config=expected.config, state_dict=expected.state_dict(), distributed_config=config
        )
        spread.save_pretrained(f"{folder}/target", max_shard_size="12KB", is_main_process=dist.get_rank() == 0)
        assert same_weights(LocMoeForCausalLM.from_pretrained(f"{folder}/target"), expected)
        dist.barrier()
    again = LocMoeForCausalLM.from_pretrained(f"{folder}/target", distributed_config=config)
    again.save_pretrained(f"{folder}/whole")
    assert same_weights(LocMoeForCausalLM.from_pretrained(f"{folder}/whole"), first)
    assert not [name for name in os.listdir(f"{folder}/target") if name.startswith("_saving-")]


def save_distributed(folder: str) -> None:
    expected = make_model(0)
    config = DistributedConfig(fsdp_size=2)
    spread = LocMoeForCausalLM.from_pretrained(
        None, config=expected.config, state_dict=expected.state_dict(), distributed_config=config
    )
    spread.save_pretrained(folder, distributed_checkpoint=True)
    dist.barrier()
    LocMoeForCausalLM.from_pretrained(folder, distributed_config=config).save_pretrained(f"{folder}/whole")
    assert same_weights(LocMoeForCausalLM.from_pretrained(f"{folder}/whole"), expected)


def load_foreign(folder: str) -> str:
    """Every rank is told the same, before a collective that one of them would wait in."""
    with pytest.raises(ValueError) as raised:
        LocMoeForCausalLM.from_pretrained(
            folder, num_experts=8, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2)
        )
    dist.barrier()
    return str(raised.value)


@pytest.mark.parametrize("layout", _LAYOUTS, ids=["experts", "fsdp", "tensor"])
def test_every_rank_loads_right_after_saving(tmp_path, layout):
    run_ranks(save_and_load_at_once, 2, str(tmp_path), layout)


def test_distributed_checkpoint(tmp_path):
    run_ranks(save_distributed, 2, str(tmp_path))


def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(tmp_path):
    make_model(0).save_pretrained(tmp_path)
    first, second = run_ranks(load_foreign, 2, str(tmp_path))
    assert first == second
    assert "this LocMoeForCausalLM: model.layers.0.mlp.experts.down_proj (2, 16, 24) there, (4, 16, 24) here" in first
    assert "shapes of this rank's part" in first
