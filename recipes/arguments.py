# SPDX-License-Identifier: Apache-2.0
"""How every recipe reads its settings: a YAML file, the command line over it, both or one of them.

Usage:

    python recipes/pretrain.py recipes/configs/tiny_cpu.yaml --max_steps 50 --model.num_experts 16

The file may stand first or behind `--config`. Its keys are the options' names. An option whose value is a mapping, such
as `model`, takes single entries by a dotted name. `base: other.yaml` in a file starts from the settings of another one in
the same folder.
"""

import dataclasses
import difflib
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments


class _Loader(yaml.SafeLoader):
    """Reads `3e-4` as a number; YAML 1.1 wants `3.0e-4` and makes it a string otherwise."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_recipe(dataclass_types: list[type], argv: list[str] | None = None, description: str | None = None) -> tuple:
    """Reads settings from a YAML file and the command line; the command line wins.

    Args:
        dataclass_types (`list[type]`): Dataclasses to fill, such as `TrainingArguments`.
        argv (`list[str]`, *optional*): Command line without the program's name; that of the process by default.
        description (`str`, *optional*): Text above the options in `--help`.

    Returns:
        `tuple`: One object per dataclass.

    Raises:
        ValueError: If the file is missing or no mapping, or an option is unknown.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    settings = _read_yaml(_take_config_path(argv))
    hints = {name: hint for kind in dataclass_types for name, hint in get_type_hints(kind).items()}
    known = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    for name in settings:
        if name not in known:
            raise ValueError(f"Unknown key `{name}` in the configuration file{_suggest(name, known)}")
    mappings = {name for name in known if "dict" in str(hints[name])}
    _take_dotted(argv, settings, mappings)

    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.set_defaults(**settings)
    for action in parser._actions:  # argparse has no public way to satisfy a required option by a default
        action.required = action.required and action.dest not in settings
    *parsed, remaining = parser.parse_args_into_dataclasses(
        argv, return_remaining_strings=True, look_for_args_file=False
    )
    if remaining:
        name = remaining[0].lstrip("-").split("=")[0]
        raise ValueError(f"Unknown option `{remaining[0]}`{_suggest(name, known)}")
    return tuple(parsed)


def _take_config_path(argv: list[str]) -> str | None:
    if argv and not argv[0].startswith("-") and argv[0].endswith((".yaml", ".yml")):
        return argv.pop(0)
    for index, argument in enumerate(argv):
        if argument == "--config":
            if index + 1 == len(argv):
                raise ValueError("`--config` needs the path of a YAML file behind it.")
            del argv[index]
            return argv.pop(index)
        if argument.startswith("--config="):
            return argv.pop(index).partition("=")[2]
    return None


def _read_yaml(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    if not Path(path).is_file():
        raise ValueError(f"`config` ({path}) is not a file: name one of recipes/configs/*.yaml or your own.")
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"`config` ({path}) is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"`config` ({path}) must hold `name: value` lines, one for each option.")
    base = settings.pop("base", None)
    if base is None:
        return settings
    inherited = _read_yaml(str(Path(path).parent / base))
    for name, value in settings.items():
        is_mapping = isinstance(value, dict) and isinstance(inherited.get(name), dict)
        inherited[name] = {**inherited[name], **value} if is_mapping else value
    return inherited


def _take_dotted(argv: list[str], settings: dict[str, Any], mappings: set[str]) -> None:
    """Moves `--model.num_experts 4` from the command line into `settings["model"]["num_experts"]`."""
    index = 0
    while index < len(argv):
        option, equals, value = argv[index].partition("=")
        name, dot, entry = option.removeprefix("--").partition(".")
        if not (option.startswith("--") and dot and name in mappings):
            index += 1
            continue
        del argv[index]
        if not equals:
            if index == len(argv):
                raise ValueError(f"`{option}` needs a value behind it.")
            value = argv.pop(index)
        settings[name] = {**(settings.get(name) or {}), entry: yaml.load(value, Loader=_Loader)}


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f": did you mean `{close[0]}`?" if close else ": `--help` lists the options."


def prepare_output_dir(training_args: TrainingArguments, overwrite: bool) -> None:
    """Makes sure, before any work, that results can be written and none is lost.

    Args:
        training_args (`TrainingArguments`): Names `output_dir`.
        overwrite (`bool`): Whether a model that is already there may be replaced.

    Raises:
        ValueError: If the folder cannot be written, or holds a model and neither `overwrite` nor
            `resume_from_checkpoint` is given.
    """
    output_dir = Path(training_args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise ValueError(
            f"`output_dir` ({output_dir}) cannot be written ({error.strerror}): name a folder you may write to."
        ) from error
    finished = any((output_dir / name).exists() for name in ("config.json", "adapter_config.json"))
    if finished and not (overwrite or training_args.resume_from_checkpoint):
        raise ValueError(
            f"`output_dir` ({output_dir}) already holds a model: name another folder, or pass "
            "`--overwrite_output_dir true` to replace it or `--resume_from_checkpoint last` to go on."
        )


def run_as_script(main: Callable[[], object]) -> None:
    """Runs a recipe's `main`; a mistake found before training ends it with one line in place of a traceback.

    What goes wrong inside the Trainer keeps its traceback, and so does everything with `RECIPES_TRACEBACK=1` in the
    environment.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        frames = traceback.walk_tb(error.__traceback__)
        in_training = any(frame.f_globals.get("__name__") == "transformers.trainer" for frame, _ in frames)
        if in_training or os.environ.get("RECIPES_TRACEBACK") == "1":
            raise
        sys.exit(f"error: {error}")
