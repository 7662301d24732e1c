# SPDX-License-Identifier: Apache-2.0
"""Adapters of a spread model on disk: PEFT's own format, between one process and any layout; and what is refused."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

from hf_locmoe.distributed.layouts import LAYOUTS
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.accelerator import is_spread
from tests.distributed.adapter_runs import base_config, losses_of_training, with_lora
from tests.distributed.test_accelerator import prepared
from tests.harness import RankError, run_ranks
from tests.tiny_models import random_ids
from tests.tolerances import assert_close


peft = pytest.importorskip("peft", reason="needs peft")
pytestmark = pytest.mark.multiprocess

ONE_EACH = {"LOCMOE_RANKS_PER_NODE": "1"}
SETTINGS = [dict(layout=layout) for layout in LAYOUTS]
SHARDED_ADAPTER = dict(layout="sharded", tp_size=2)


def base_model(family="locmoe"):
    set_seed(3)
    return AutoModelForCausalLM.from_config(base_config(family))


def logits_of(model):
    with torch.no_grad():
        return model.eval()(random_ids(2, 10)).logits.detach().clone()


def name_of(settings):
    return "_".join(map(str, settings.values()))


# ---- from a spread model to one process -----------------------------------------------------------------------------


def save_adapters(folder, family):
    """Saved by PEFT itself; by rank 0 alone, where nothing of the adapter is in shards. The logits that belong to it."""
    logits = []
    for settings in [*SETTINGS, SHARDED_ADAPTER]:
        accelerator, model, *_ = prepared(config=base_config(family), wrap=with_lora, **settings)
        inner = accelerator.unwrap_model(model)
        if settings is SHARDED_ADAPTER or dist.get_rank() == 0:
            inner.save_pretrained(folder / name_of(settings), is_main_process=dist.get_rank() == 0)
        logits.append(logits_of(model))
        dist.barrier()
    return logits


@pytest.mark.parametrize("family", ["locmoe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_one_process_loads_and_merges_what_peft_saved(family, tmp_path):
    expected = with_lora(base_model(family)).state_dict()
    shapes = {name.replace(".default", ""): value.shape for name, value in expected.items() if "lora_" in name}
    all_logits = run_ranks(save_adapters, 2, tmp_path, family, env=ONE_EACH)[0]
    for settings, logits in zip([*SETTINGS, SHARDED_ADAPTER], all_logits, strict=True):
        folder = tmp_path / name_of(settings)
        assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        stored = load_file(folder / "adapter_model.safetensors")
        assert {name: value.shape for name, value in stored.items()} == shapes
        model = peft.PeftModel.from_pretrained(base_model(family), folder)
        assert_close(logits_of(model), logits, torch.float32)
        assert_close(logits_of(model.merge_and_unload()), logits, torch.float32)
        assert (logits_of(base_model(family)) - logits).abs().max() > 1e-2


# ---- from one process to a spread model -----------------------------------------------------------------------------


def load_adapter(folder, all_settings):
    """Into a spread model, further trained by two steps, and switched off."""
    results = []
    for settings in all_settings:

        def loaded(model):
            return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)

        accelerator, model, optimizer, loader = prepared(wrap=loaded, **settings)
        before = logits_of(model)
        losses = list(islice(losses_of_training(accelerator, model, optimizer, loader), 4))
        with accelerator.unwrap_model(model).disable_adapter():
            switched_off = logits_of(model)
        results.append((before, losses, switched_off))
    return results


def save_one_adapter(folder):
    accelerator, model, *_ = prepared(wrap=with_lora)
    accelerator.unwrap_model(model).save_pretrained(folder)


def test_a_spread_model_goes_on_with_the_adapter_of_one_process(tmp_path):
    run_ranks(save_one_adapter, 1, tmp_path)
    alone = run_ranks(load_adapter, 1, tmp_path, SETTINGS[:1])[0][0]
    for result in run_ranks(load_adapter, 2, tmp_path, [*SETTINGS, SHARDED_ADAPTER], env=ONE_EACH)[0]:
        assert_close(result, alone, torch.float32)
    assert_close(alone[2], logits_of(base_model()), torch.float32)


def save_with_base(folder):
    model = base_model()
    model.save_pretrained(folder / "base")
    model = with_lora(AutoModelForCausalLM.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "adapter")
    return logits_of(model)


def load_as_a_checkpoint(folder):
    logits = []
    for settings in [*SETTINGS, SHARDED_ADAPTER]:
        LocMoePlugin(**settings, slices="1").activate()
        model = AutoModelForCausalLM.from_pretrained(folder / "adapter")
        assert is_spread(model)
        logits.append(logits_of(model))
    return logits


@pytest.mark.slow
def test_an_adapter_is_loaded_as_a_checkpoint(tmp_path):
    """By transformers, which adds it to the base model by itself."""
    expected = run_ranks(save_with_base, 1, tmp_path)[0]
    for logits in run_ranks(load_as_a_checkpoint, 4, tmp_path, env={"LOCMOE_RANKS_PER_NODE": "2"})[0]:
        assert_close(logits, expected, torch.float32)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(settings, merge):
    accelerator, model, _, loader = prepared(wrap=with_lora, **settings)
    inner = accelerator.unwrap_model(model)
    if merge:
        inner.merge_and_unload()
    inner(**next(iter(loader)))


@pytest.mark.parametrize(
    ("settings", "merge", "message"),
    [
        (
            dict(plugin=dict(ep_implementation="all_to_all")),
            False,
            r"`target_parameters` \(down_proj\).* expert parallelism",
        ),
        pytest.param(
            dict(plugin=dict(ep_size=1), tp_size=2),
            False,
            r"`target_parameters` \(down_proj\).*`ep_size` above 1",
            marks=pytest.mark.slow,
        ),
        ({}, True, r"An adapter cannot be merged into a model that is spread over ranks"),
    ],
    ids=["another implementation", "experts in shards", "merging"],
)
def test_what_is_refused(settings, merge, message):
    with pytest.raises(RankError, match=message):
        run_ranks(refused, 2, settings, merge, env={"LOCMOE_RANKS_PER_NODE": "2"})
