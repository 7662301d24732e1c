# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, TrainingArguments

import finetune
import pretrain
from arguments import parse_recipe
from demo import dense_overrides
from hf_locmoe import LocMoeConfig
from hf_locmoe.training.accelerate_plugin import LocMoePlugin
from text_data import DataArguments

from .conftest import RECIPES


CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
PRETRAINING = [path for path in CONFIGS if not path.name.startswith(("accelerate", "finetune", "plugin"))]


class Tokenizer:
    """Stands for any tokenizer of 1,000 tokens."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __init__(self, size: int = 1000):
        self.size = size

    def __len__(self) -> int:
        return self.size


def parsed(path, *overrides: str) -> tuple[pretrain.ModelArguments, DataArguments, TrainingArguments]:
    kinds = [pretrain.ModelArguments, DataArguments, TrainingArguments]
    return parse_recipe(kinds, [str(path), "--use_cpu", "true", "--bf16", "false", *overrides])


def config_of(name: str, *overrides: str) -> PreTrainedConfig:
    model_args, data_args, _ = parsed(RECIPES / "configs" / f"{name}.yaml", *overrides)
    return pretrain.build_config(model_args, Tokenizer(50_000), data_args.block_size)


def count(config: PreTrainedConfig) -> tuple[int, int]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    return model.num_parameters(), model.num_parameters() - experts * (config.num_experts - 1) // config.num_experts


@pytest.mark.parametrize("path", PRETRAINING, ids=lambda path: path.stem)
def test_every_configuration_makes_a_model(path):
    model_args, data_args, training_args = parsed(path)
    config = pretrain.build_config(model_args, Tokenizer(), data_args.block_size)
    total, active = count(config)
    assert active <= total
    assert training_args.max_steps > 0
    assert config.sparse_layers


def test_the_finetuning_configuration():
    kinds = [finetune.FinetuneArguments, DataArguments, TrainingArguments]
    args, data_args, _ = parse_recipe(kinds, [str(RECIPES / "configs" / "finetune_tiny.yaml")])
    assert args.model_name_or_path == parsed(RECIPES / "configs" / "tiny_cpu.yaml")[2].output_dir
    assert data_args.train_file


def test_several_nodes():
    """The plugin's figures are those of the run, and Accelerate's file makes as many processes."""
    plugin = LocMoePlugin.from_yaml(RECIPES / "configs" / "plugin_several_nodes.yaml")
    _, data_args, training_args = parsed(RECIPES / "configs" / "several_nodes.yaml")
    assert plugin.tokens_per_rank == training_args.per_device_train_batch_size * data_args.block_size
    assert plugin.accumulation_steps == training_args.gradient_accumulation_steps
    launch = load_config_from_file(str(RECIPES / "configs" / "accelerate_two_nodes.yaml"))
    assert launch.num_processes == 16
    total, active = count(config_of("several_nodes"))
    assert 1.5e9 < active < 2.5e9
    assert 18e9 < total < 22e9
    assert config_of("several_nodes").num_experts % launch.num_processes == 0


def test_one_gpu_is_about_a_billion():
    total, active = count(config_of("one_gpu_1b"))
    assert 0.8e9 < active < 1.2e9
    assert total * 8 < 45e9  # bytes of weights, gradients and two moments in bfloat16


def test_one_gpu_runs_on_the_fast_experts(caplog):
    assert config_of("one_gpu_1b")._experts_implementation == "capacity_bmm"
    assert "experts_implementation" not in caplog.text


def test_paper_is_the_paper_s():
    config = config_of("paper")
    paper = LocMoeConfig.paper()
    fields = "gate_type gate_affinity gate_relu gate_noise_std gate_centering gate_rotation balance_bias_update_rate "
    fields += "num_experts_per_tok norm_topk_prob gated_mlp hidden_act router_aux_loss_coef locality_loss_coef"
    assert {name: getattr(config, name) for name in fields.split()} == {
        name: getattr(paper, name) for name in fields.split()
    }
    assert config.num_experts == 16


def test_pangu_sigma_is_dense_below_and_sparse_above():
    path = RECIPES / "configs" / "pangu_sigma.yaml"
    config = config_of("pangu_sigma")
    layers = list(range(config.num_hidden_layers))
    assert config.sparse_layers == layers[-len(config.sparse_layers) :]
    assert len(config.sparse_layers) * 5 == config.num_hidden_layers  # 8 of 40
    assert (config.num_experts, config.num_expert_groups) == (16, 4)
    _, data_args, _ = parsed(path)
    from corpus import DOMAINS

    assert set(data_args.domain_groups) == set(DOMAINS)
    pretrain.check_domains(config, data_args.domain_groups)
    assert config_of("pangu_sigma", "--model.gate_type", "hash").gate_type == "hash"


@pytest.mark.parametrize("name, gate", [("baseline_switch", "switch"), ("baseline_hash", "hash")])
def test_baselines_differ_in_the_gate_alone(name, gate):
    ours, theirs = config_of("tiny_cpu").to_dict(), config_of(name).to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} <= {"gate_type", "router_aux_loss_coef"}
    assert theirs["gate_type"] == gate
    same, baseline = (
        dataclasses.asdict(parsed(RECIPES / "configs" / f"{stem}.yaml")[1]) for stem in ("tiny_cpu", name)
    )
    assert same == baseline


def test_the_dense_reference_is_of_equal_active_size():
    sparse = config_of("tiny_cpu")
    dense = config_of("tiny_cpu", *dense_overrides(sparse))
    assert dense.sparse_layers == []
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(dense).num_parameters()
    assert parameters == count(sparse)[1]
