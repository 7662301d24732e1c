# SPDX-License-Identifier: Apache-2.0
"""LoRA of the attention on a model that is spread: the training of one process, in every layout, and PEFT's own format."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, set_seed

from hf_locmoe.distributed.layouts import LAYOUTS
from tests.distributed.test_accelerator import LOCMOE, prepared, train
from tests.harness import run_ranks
from tests.tiny_models import random_ids, tiny_config
from tests.tolerances import assert_close


peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.multiprocess


def with_adapter(model):
    set_seed(5)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


def train_in(layouts):
    return [train(wrap=with_adapter, layout=layout)[0] for layout in layouts]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_layout_trains_as_one_process(world):
    alone = run_ranks(train_in, 1, ["sharded"])[0][0]
    runs = run_ranks(train_in, world, LAYOUTS, env={"LOCMOE_RANKS_PER_NODE": str(world // 2)})[0]
    for steps in runs:
        assert_close(steps, alone, torch.float32)


def save_adapters(folder):
    """Saved by PEFT itself, called on all ranks; the logits that belong to it."""
    logits = []
    for layout in LAYOUTS:
        _, model, *_ = prepared(wrap=with_adapter, layout=layout)
        model.save_pretrained(folder / layout, is_main_process=dist.get_rank() == 0)
        with torch.no_grad():
            logits.append(model.eval()(random_ids(2, 10)).logits)
        dist.barrier()
    return logits


def test_one_process_loads_what_peft_saved(tmp_path):
    for layout, logits in zip(LAYOUTS, run_ranks(save_adapters, 2, tmp_path, env={"LOCMOE_RANKS_PER_NODE": "1"})[0]):
        files = {path.name for path in (tmp_path / layout).iterdir()}
        assert files >= {"adapter_config.json", "adapter_model.safetensors"}
        set_seed(3)
        base = AutoModelForCausalLM.from_config(tiny_config(**LOCMOE))
        model = peft.PeftModel.from_pretrained(base, tmp_path / layout).eval()
        with torch.no_grad():
            assert_close(model(random_ids(2, 10)).logits, logits, torch.float32)
