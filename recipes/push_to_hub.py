# SPDX-License-Identifier: Apache-2.0
"""Pushes a checkpoint folder with its model card to the Hub.

Usage:

    python recipes/push_to_hub.py --checkpoint_dir runs/tiny_cpu --repo_id me/tiny-locmoe --dry_run
    python recipes/push_to_hub.py --checkpoint_dir runs/tiny_cpu --repo_id me/tiny-locmoe

`--dry_run` does everything except the upload and needs no network. For the upload log in with `hf auth login`.
"""

import fnmatch
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from arguments import parse_recipe, run_as_script
from hf_locmoe import LocMoeConfig
from hf_locmoe.model_card import write_model_card


# What a run leaves beside the model: optimizer states, logs, and pickles, which nobody should have to load.
NOT_PUSHED = ["*.bin", "*.pt", "*.pth", "*.pkl", "checkpoint-*", "report", "trainer_state.json", "runs", ".*", "_*"]


@dataclass
class PushArguments:
    """What to push, and where."""

    checkpoint_dir: str = field(metadata={"help": "Folder with config.json, *.safetensors and the tokenizer."})
    repo_id: str = field(metadata={"help": "Name on the Hub, `owner/name`."})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    commit_message: str = field(default="Upload model", metadata={"help": "Message of the commit."})
    license: str | None = field(default=None, metadata={"help": "For the card: a license identifier of the Hub."})
    language: list[str] | None = field(default=None, metadata={"help": "For the card: ISO 639 codes, or `code`."})
    datasets: list[str] | None = field(default=None, metadata={"help": "For the card: Hub names of the data."})
    dry_run: bool = field(default=False, metadata={"help": "Check and list everything, and upload nothing."})


def check_weights(folder: Path) -> int:
    """Opens every weight file.

    Args:
        folder (`Path`): A checkpoint.

    Returns:
        `int`: Number of tensors.

    Raises:
        ValueError: If there is none, or one cannot be read.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(
            f"`checkpoint_dir` ({folder}) holds no *.safetensors: name the folder that `save_pretrained` wrote."
        )
    num_tensors = 0
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                num_tensors += len(file.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"`checkpoint_dir` holds a damaged file ({path}): {error}. Save the model again."
            ) from error
    return num_tensors


def prepare_card(folder: Path, config: PreTrainedConfig, args: PushArguments) -> ModelCard:
    """Writes the card where there is none yet or the old one is ours, and reads it as the Hub will.

    Raises:
        ValueError: If the card's metadata is not what the Hub accepts.
    """
    facts = {"license": args.license, "language": args.language, "datasets": args.datasets}
    given = {name: value for name, value in facts.items() if value is not None}
    path = folder / "README.md"
    # a card with the measured values of its run is worth more than a new one from the config alone
    if isinstance(config, LocMoeConfig) and not path.is_file():
        write_model_card(folder, config, model_id=args.repo_id, **given)
    if not path.is_file():
        raise ValueError(f"`checkpoint_dir` ({folder}) has no README.md: write a model card for it.")
    card = ModelCard.load(path)
    if given:
        for name, value in given.items():
            card.data[name] = value
        card.save(path)
    return card


def files_to_push(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that go to the Hub, relative to it."""
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    return [
        path for path in paths if not any(fnmatch.fnmatch(part, rule) for part in path.parts for rule in NOT_PUSHED)
    ]


def main(argv: list[str] | None = None) -> list[Path]:
    """Runs the recipe; returns the files that were, or would be, pushed."""
    (args,) = parse_recipe([PushArguments], argv, __doc__)
    folder = Path(args.checkpoint_dir)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"`checkpoint_dir` ({folder}) holds no config.json: name the folder that `save_pretrained` wrote."
        )
    try:
        validate_repo_id(args.repo_id)
    except HFValidationError as error:
        raise ValueError(f"`repo_id` ({args.repo_id}) is not a name the Hub takes, `owner/name`: {error}") from error
    config = AutoConfig.from_pretrained(folder)
    num_tensors = check_weights(folder)
    AutoTokenizer.from_pretrained(folder)
    card = prepare_card(folder, config, args)

    files = files_to_push(folder)
    print(f"{config.model_type}, {num_tensors} tensors, card: {', '.join(card.data.to_dict())}")
    for path in files:
        print(f"  {(folder / path).stat().st_size:>14,}  {path}")
    if args.dry_run:
        print(f"dry run: nothing was sent to {args.repo_id}")
        return files
    api = HfApi()
    api.create_repo(args.repo_id, private=args.private, exist_ok=True)
    api.upload_folder(
        repo_id=args.repo_id,
        folder_path=folder,
        allow_patterns=[path.as_posix() for path in files],
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"pushed to https://huggingface.co/{args.repo_id}")
    return files


if __name__ == "__main__":
    run_as_script(main)
