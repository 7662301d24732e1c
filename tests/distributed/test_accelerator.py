# SPDX-License-Identifier: Apache-2.0
"""
A loop written with Accelerate, on a model that is spread over ranks: what it trains, clips, saves and resumes is what one
process has.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, OlmoeConfig, TrainingArguments, set_seed

from hf_locmoe.distributed.parallel_run import spread_every_model
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from hf_locmoe.training.accelerator import LocMoeAccelerator, is_spread
from hf_locmoe.training.checkpoint import LocMoeTrainer
from tests.harness import RankError, run_ranks
from tests.tiny_models import TINY_SHAPE, random_ids, tiny_config
from tests.tolerances import assert_close


pytestmark = pytest.mark.multiprocess

BATCH, STEPS, ACCUMULATION = 4, 4, 2
# off: on one node there is no locality loss to compare with
LOCMOE = dict(vocab_size=64, balance_bias_update_rate=0.02, locality_loss_coef=0.0)
TWO_NODES = {"LOCMOE_RANKS_PER_NODE": "1"}


def prepared(layout="spread", config=None, tp_size=1, wrap=None, plugin=None, batch=BATCH, **options):
    """Accelerator, model, optimizer and loader, as a script has them; on however many ranks this is called."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    world = num_ranks // tp_size
    LocMoePlugin(layout=layout, tp_size=tp_size, **{"slices": "1", **(plugin or {})}).activate()
    spread_every_model()
    accelerator = LocMoeAccelerator(gradient_accumulation_steps=ACCUMULATION, **{"cpu": True, **options})
    set_seed(3)
    model = AutoModelForCausalLM.from_config(config or tiny_config(**LOCMOE))
    model = wrap(model) if wrap else model
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(batch * STEPS * ACCUMULATION, 10)]
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows, batch // world))
    assert is_spread(model) == (num_ranks > 1)
    return accelerator, model, optimizer, loader


def train(save=None, resume=None, stop=STEPS, **settings):
    """Loss and gradient norm of every step, and the weights at the end."""
    accelerator, model, optimizer, loader = prepared(**settings)
    model.train()
    if resume:
        accelerator.load_state(resume)
    skipped = int(str(resume).rpartition("_")[2]) if resume else 0
    steps, total = [], 0.0
    for batch in accelerator.skip_first_batches(loader, skipped * ACCUMULATION):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            total += accelerator.gather(loss.detach()).mean().item() / ACCUMULATION
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
                steps.append((total, norm.item()))
                total = 0.0
            optimizer.step()
            optimizer.zero_grad()
        if save and accelerator.sync_gradients and len(steps) + skipped == 2:
            accelerator.save_state(f"{save}/step_2")
        if len(steps) + skipped == stop:
            break
    weights = accelerator.get_state_dict(model)
    return steps, {name: tensor.clone() for name, tensor in weights.items()}


def train_all(*runs):
    return [train(**run) for run in runs]


def equals(run, other):
    assert_close(run[0], other[0], torch.float32)
    # Adam's first steps are the sign of the gradient, whatever its size: rounding shows in weights of no consequence
    assert run[1].keys() == other[1].keys()
    for name, weight in other[1].items():
        assert (run[1][name] - weight).abs().float().mean() < 1e-4, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, run_ranks(train_all, 1, dict(save=folder))[0][0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Four steps; the last two once more; and the last two from the state of one process."""
    folder = tmp_path_factory.mktemp("two")
    runs = run_ranks(train_all, 2, dict(save=folder), dict(resume=f"{folder}/step_2"), env=TWO_NODES)
    return folder, *runs[0]


def test_two_nodes_train_as_one_process(one_process, two_ranks):
    assert len(two_ranks[1][0]) == STEPS
    equals(two_ranks[1], one_process[1])


def test_resumed_bit_for_bit(two_ranks):
    _, whole, resumed = two_ranks
    assert resumed[0] == whole[0][2:]
    assert all(torch.equal(resumed[1][name], weight) for name, weight in whole[1].items())


def test_a_state_moves_between_one_process_and_two_ranks(one_process, two_ranks):
    rest = one_process[1][0][2:]
    alone = run_ranks(train_all, 1, dict(resume=f"{two_ranks[0]}/step_2"))[0][0]
    spread = run_ranks(train_all, 2, dict(resume=f"{one_process[0]}/step_2"), env=TWO_NODES)[0][0]
    assert_close(alone[0], rest, torch.float32)
    assert_close(spread[0], rest, torch.float32)


def test_the_weights_of_a_state_are_a_checkpoint(two_ranks, tmp_path):
    from safetensors.torch import load_file

    from hf_locmoe import LocMoeForCausalLM

    saved = load_file(f"{two_ranks[0]}/step_2/model.safetensors")
    model = LocMoeForCausalLM(tiny_config(**LOCMOE))
    model.load_state_dict(saved, strict=True)


def autocast_dtypes(layout):
    """What a projection computes in, in a loop and in a Trainer, both asked for bfloat16."""
    seen = []

    def record(module, inputs, output):
        seen.append(str(output.dtype))

    accelerator, model, _, loader = prepared(layout, mixed_precision="bf16")
    accelerator.unwrap_model(model).model.layers[0].self_attn.q_proj.register_forward_hook(record)
    outputs = model(**next(iter(loader)))
    logits = str(outputs.logits.dtype)
    model = AutoModelForCausalLM.from_config(tiny_config(**LOCMOE))
    model.model.layers[0].self_attn.q_proj.register_forward_hook(record)
    options = dict(bf16=True, use_cpu=True, max_steps=1, report_to=[], save_strategy="no", disable_tqdm=True)
    arguments = TrainingArguments(output_dir="unused", per_device_train_batch_size=2, **options)
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 10)]
    LocMoeTrainer(model, arguments, train_dataset=rows).train()
    return is_spread(model), logits, set(seen)


def test_autocast_reaches_a_spread_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_ranks(autocast_dtypes, 2, "spread", env=TWO_NODES) == [(True, "torch.float32", {"torch.bfloat16"})] * 2


@pytest.mark.slow
def test_another_architecture():
    fields = {**TINY_SHAPE, "vocab_size": 64, "num_experts_per_tok": 2}
    config = OlmoeConfig(**fields)
    alone = run_ranks(train_all, 1, dict(config=config))[0][0]
    spread, replicated = run_ranks(
        train_all,
        4,
        *(dict(config=config, layout=layout) for layout in ("spread", "replicated")),
        env={"LOCMOE_RANKS_PER_NODE": "2"},
    )[0]
    equals(spread, alone)
    equals(replicated, alone)


@pytest.mark.slow
def test_a_tensor_parallel_group_reads_the_same_batches(one_process):
    [(steps, _)] = run_ranks(train_all, 4, dict(tp_size=2), env={"LOCMOE_RANKS_PER_NODE": "2"})[0]
    assert_close(steps, one_process[1][0], torch.float32)


def with_adapter(model):
    from peft import LoraConfig, get_peft_model

    set_seed(5)
    experts = ["mlp.experts.up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=experts, r=2, init_lora_weights=False)
    return get_peft_model(model, config)


@pytest.mark.slow
def test_an_adapter(tmp_path):
    pytest.importorskip("peft", reason="needs peft")
    alone = run_ranks(train_all, 1, dict(wrap=with_adapter))[0][0]
    runs = dict(wrap=with_adapter, save=tmp_path), dict(wrap=with_adapter, resume=f"{tmp_path}/step_2")
    whole, resumed = run_ranks(train_all, 2, *runs, env=TWO_NODES)[0]
    assert_close(whole[0], alone[0], torch.float32)
    assert resumed[0] == whole[0][2:]
    again = dict(wrap=with_adapter, resume=f"{tmp_path}/step_2")
    assert_close(run_ranks(train_all, 1, again)[0][0][0], alone[0][2:], torch.float32)
    others = dict(again, layout="replicated"), dict(again, layout="sharded", tp_size=2)
    for resumed, _ in run_ranks(train_all, 4, *others, env={"LOCMOE_RANKS_PER_NODE": "2"})[0]:
        assert_close(resumed, alone[0][2:], torch.float32)


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(kind, folder):
    accelerator, model, *_ = prepared()
    if kind == "two models":
        accelerator.prepare(torch.nn.Linear(2, 2))
        accelerator.save_state(folder)
    elif kind == "pickles":
        accelerator.save_state(folder, safe_serialization=False)
    else:
        if dist.get_rank() == 0:
            os.makedirs(f"{folder}/other")
        accelerator.wait_for_everyone()
        accelerator.load_state(f"{folder}/other")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("two models", r"`prepare` got 2 models, of which one is spread over ranks"),
        ("pickles", r"`safe_serialization` \(False\) asks for pickled weights"),
        ("another accelerator", r"has no .*distributed_optimizer: it was saved by accelerate's own"),
    ],
)
def test_what_is_refused(kind, message, tmp_path):
    with pytest.raises(RankError, match=message):
        run_ranks(refused, 2, kind, str(tmp_path), env=TWO_NODES)
