# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from transformers import Trainer, TrainingArguments

from arguments import parse_recipe, prepare_output_dir, run_as_script


@dataclass
class Settings:
    needed: str = field()
    model: dict | str | None = None
    files: list[str] | None = None
    rate: float = 0.1
    on: bool = False


def parse(*argv: str) -> Settings:
    (settings,) = parse_recipe([Settings], list(argv))
    return settings


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("needed: yes-it-is\nrate: 3e-4\nmodel:\n  num_experts: 8\n  eps: 1e-6\n  layers: [0, 1]\n")
    return str(path)


@pytest.mark.parametrize("form", ["{path}", "--config {path}", "--config={path}", "--on true --config {path}"])
def test_a_file_satisfies_required_options(config, form):
    settings = parse(*form.format(path=config).split())
    assert settings.needed == "yes-it-is"
    assert settings.on is ("--on" in form)
    assert settings.model == {"num_experts": 8, "eps": 1e-6, "layers": [0, 1]}


def test_numbers_without_a_point_are_numbers(config):
    assert parse(config).rate == 3e-4
    assert isinstance(parse(config).model["eps"], float)


def test_the_command_line_wins(config):
    settings = parse(
        config, "--rate", "1", "--model.num_experts", "16", "--model.mlp_only_layers=[1, 2]", "--files", "a", "b"
    )
    assert settings.rate == 1.0
    assert settings.model == {"num_experts": 16, "eps": 1e-6, "layers": [0, 1], "mlp_only_layers": [1, 2]}
    assert settings.files == ["a", "b"]


def test_dotted_options_without_a_file():
    assert parse("--needed", "x", "--model.a", "null", "--model.b", "1e-3").model == {"a": None, "b": 1e-3}


def test_a_file_starts_from_another(config, tmp_path):
    (tmp_path / "more.yaml").write_text("base: run.yaml\nrate: 0.5\nmodel:\n  num_experts: 2\n")
    settings = parse(str(tmp_path / "more.yaml"))
    assert settings.rate == 0.5
    assert settings.needed == "yes-it-is"
    assert settings.model == {"num_experts": 2, "eps": 1e-6, "layers": [0, 1]}


def test_training_arguments_from_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: x\nlearning_rate: 3e-4\nsave_strategy: 'no'\nreport_to: none\n")
    (training_args,) = parse_recipe([TrainingArguments], [str(tmp_path / "run.yaml"), "--max_steps", "7"])
    assert training_args.learning_rate == 3e-4
    assert training_args.max_steps == 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("neded: x", "Unknown key `neded`.* did you mean `needed`"),
        ("[1, 2]", "must hold `name: value` lines"),
        ("a: [", "is not valid YAML"),
        ("base: missing.yaml", "missing.yaml.* is not a file"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse(str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["missing.yaml"], r"`config` \(missing.yaml\) is not a file"),
        (["--config"], "`--config` needs the path"),
        (["--needed", "x", "--rat", "1"], "Unknown option `--rat`: did you mean `rate`"),
        (["--needed", "x", "--model.a"], "`--model.a` needs a value"),
    ],
)
def test_wrong_command_lines(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


def training_args(folder, **others) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **others)


def test_output_dir_is_made_and_left_empty(tmp_path):
    prepare_output_dir(training_args(tmp_path / "a" / "b"), overwrite=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_model_in_output_dir_is_not_replaced_unasked(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"`output_dir` .* already holds a model.*--overwrite_output_dir true"):
        prepare_output_dir(training_args(tmp_path), overwrite=False)
    prepare_output_dir(training_args(tmp_path), overwrite=True)
    prepare_output_dir(training_args(tmp_path, resume_from_checkpoint="last"), overwrite=False)


def test_unwritable_output_dir(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"`output_dir` .*file.* cannot be written"):
        prepare_output_dir(training_args(tmp_path / "file" / "run"), overwrite=False)


def test_a_user_s_mistake_is_one_line(monkeypatch):
    def main():
        raise ValueError("`rate` (-1) must be positive.")

    monkeypatch.delenv("RECIPES_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match=r"error: `rate` \(-1\)"):
        run_as_script(main)
    monkeypatch.setenv("RECIPES_TRACEBACK", "1")
    with pytest.raises(ValueError, match="`rate`"):
        run_as_script(main)


def test_what_goes_wrong_in_training_keeps_its_traceback(tmp_path, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("shapes differ")

    monkeypatch.delenv("RECIPES_TRACEBACK", raising=False)
    trainer = Trainer(Broken(), training_args(tmp_path), train_dataset=[{"x": 1}])
    with pytest.raises(ValueError, match="shapes differ"):
        run_as_script(trainer.train)
