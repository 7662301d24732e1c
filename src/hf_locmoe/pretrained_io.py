# SPDX-License-Identifier: Apache-2.0
"""Loading that refuses what is damaged, pickled or another model's; saving that never damages an earlier checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import create_repo, upload_folder
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import create_and_tag_model_card

from .staged_save import staged_save


if TYPE_CHECKING:  # at run time it stands before the model among a class's bases
    from transformers import PreTrainedModel as _PreTrainedModel
else:
    _PreTrainedModel = object


_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TRAINER_FILES = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_MAX_NAMED = 5


class CheckpointError(ValueError, RuntimeError):
    """
    A checkpoint that is damaged or another model's. A `ValueError`, as what a user can put right is in this package, and
    a `RuntimeError`, which transformers raises for some of the cases.
    """


class SafePretrainedMixin(_PreTrainedModel):
    """Put before [`~transformers.PreTrainedModel`] among a model's bases: guards `from_pretrained`, `save_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        allow_missing_weights: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but safetensors only, and never with weights of the
        decoder left random in silence.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`, *optional*): Folder, Hub name, or None with
                `state_dict`, whose contents are the caller's business and not judged.
            use_safetensors (`bool`, *optional*): `False` is refused.
            ignore_mismatched_sizes (`bool`, *optional*, defaults to `False`): Weights of another shape start afresh.
            allow_missing_weights (`bool`, *optional*, defaults to `False`): Weights of the decoder that the checkpoint
                has not start afresh. A task's head may always be missing, and so may router buffers, which start from
                their defaults: transformers warns of either.
            output_loading_info (`bool`, *optional*, defaults to `False`): Also return the loading report.

        Raises:
            CheckpointError: (a `ValueError`) Weights that are pickled, damaged, missing or of another shape, or the
                configuration of another architecture.
        """
        if use_safetensors is False:
            raise ValueError(
                "`use_safetensors` (False) asks for pickled weights, which can run any code when they are loaded: leave"
                " it out and load a safetensors checkpoint."
            )
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig) and config.model_type != cls.config_class.model_type:
            raise CheckpointError(
                f"`config` (model_type {config.model_type!r}) is not for {cls.__name__} (model_type"
                f" {cls.config_class.model_type!r}): load the checkpoint with `AutoModel` and its relatives."
            )
        path, given_weights = pretrained_model_name_or_path, kwargs.get("state_dict") is not None
        if path is not None and os.path.exists(path) and kwargs.get("gguf_file") is None:
            _check_local_weights(Path(path), kwargs.get("subfolder", ""), kwargs.get("variant"))
        try:
            model, info = super().from_pretrained(
                path,
                *model_args,
                use_safetensors=None if path is None else True,
                ignore_mismatched_sizes=True,  # judged below, by name
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:  # a file of the Hub's cache: local ones were checked above
            raise CheckpointError(
                f"A weight file of `{path}` is damaged ({error}): load again with `force_download=True`."
            ) from error
        if not given_weights and not getattr(model, "_hf_peft_config_loaded", False):  # the report is the adapter's
            _check_loaded(model, info, path, ignore_mismatched_sizes, allow_missing_weights)
        elif info["mismatched_keys"] and not ignore_mismatched_sizes:
            raise CheckpointError(_mismatch_message(model, info, path))
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        **kwargs,
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], but all or nothing (see [`staged_save`]): a save that
        fails or is killed leaves the earlier checkpoint, and one that succeeds removes files of an earlier layout.

        With `distributed_checkpoint=True` every rank writes its own files, straight into the folder. With
        `push_to_hub=True` a model card that is in the folder already is uploaded as it is.

        Raises:
            OSError: The folder cannot be written to or has no room; it is as it was. On a model spread over ranks only
                the rank that writes raises.
        """
        if kwargs.pop("safe_serialization", True) is False:
            raise ValueError(
                "`safe_serialization` (False) asks for pickled weights: leave it out, this model has none."
            )
        save = super().save_pretrained
        options: dict[str, Any] = {
            "is_main_process": is_main_process,
            "state_dict": state_dict,
            "max_shard_size": max_shard_size,
            "variant": variant,
            "save_peft_format": save_peft_format,
            "save_original_format": save_original_format,
        }
        if distributed_checkpoint:
            options.update(distributed_checkpoint=True, push_to_hub=push_to_hub, token=token, **kwargs)
            save(save_directory, **options)
            return
        if not self.should_save_on_this_rank(is_main_process):
            save(save_directory, **options)  # takes part in gathering the weights and writes nothing
        else:
            repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
            commit = {"commit_message": kwargs.pop("commit_message", None) or "Upload model"}
            commit["create_pr"] = kwargs.pop("create_pr", False)
            if push_to_hub:  # before the work: the name or the token may be wrong
                repo_id = create_repo(repo_id, exist_ok=True, token=token, **kwargs).repo_id
            with staged_save(save_directory, _bytes_to_save(self, state_dict)) as staging:
                save(staging, **options)
                written = sorted(os.listdir(staging))
            if push_to_hub:
                card = Path(save_directory, "README.md")
                if not card.exists():
                    create_and_tag_model_card(repo_id, self.model_tags, token=token).save(card)
                    if (write_card := getattr(self, "model_card_writer", None)) is not None:
                        write_card(save_directory, self.config, architecture=type(self), model_id=repo_id)
                files = [*written, card.name]
                upload_folder(repo_id=repo_id, folder_path=save_directory, allow_patterns=files, token=token, **commit)
        # once more after the files are in place: no rank reads what is still being moved in
        self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))


def _bytes_to_save(model: Any, state_dict: dict[str, torch.Tensor] | None) -> int:
    """At least so many bytes the weights take; 0 for an adapter alone."""
    if getattr(model, "_hf_peft_config_loaded", False):
        return 0
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if state_dict is None or name in state_dict
    )


def _check_local_weights(path: Path, subfolder: str, variant: str | None) -> None:
    """Opens every weight file that will be read; raises for a pickle, a missing file and a damaged one, by name."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise _pickled(path)
        _check_weight_file(path)
        return
    folder = path / subfolder
    for file in _weight_files(folder, variant):
        _check_weight_file(file)


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files transformers will read, in its order of preference; none where it will look elsewhere or complain."""

    def with_variant(name: str) -> str:
        stem, extension = name.rsplit(".", 1)
        return f"{stem}.{variant}.{extension}" if variant else name

    candidates = [with_variant(SAFE_WEIGHTS_NAME), with_variant(SAFE_WEIGHTS_INDEX_NAME)]
    config = _read_json(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    if config.get("transformers_weights"):
        candidates = [config["transformers_weights"]]
    entry = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if entry is not None and entry.suffix == ".json":
        weight_map = _read_json(entry).get("weight_map")
        if not isinstance(weight_map, dict):
            raise _damaged(entry, "it has no `weight_map`")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if entry is not None:
        return [entry]
    adapter = folder / "adapter_model.safetensors"
    if adapter.is_file():
        return [adapter]
    pickles = sorted(
        file for file in folder.glob("*") if file.suffix in _PICKLE_SUFFIXES and file.name not in _TRAINER_FILES
    )
    if pickles:
        raise _pickled(pickles[0])
    return []


def _check_weight_file(file: Path) -> None:
    if not file.is_file():
        raise _damaged(file, "the file is missing")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise _damaged(file, str(error)) from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, "it holds no JSON object")
    return content


def _damaged(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} cannot be read ({reason}): it is damaged or was copied in part. Copy or download it again (from the"
        " Hub with `force_download=True`), or load an earlier checkpoint."
    )


def _pickled(file: Path) -> CheckpointError:
    return CheckpointError(
        f"{file} is a pickle, which can run any code when it is loaded: only safetensors are read. If you trust it,"
        f' convert it once: `safetensors.torch.save_file(torch.load("{file.name}", weights_only=True), "{SAFE_WEIGHTS_NAME}")`.'
    )


def _check_loaded(
    model: Any, info: dict, path: Any, ignore_mismatched_sizes: bool, allow_missing_weights: bool
) -> None:
    """Raises where weights of the decoder were not in the checkpoint or had another shape."""
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        raise CheckpointError(_mismatch_message(model, info, path))
    decoder = f"{model.base_model_prefix}." if model.base_model is not model else ""
    parameters = {name for name, _ in model.named_parameters()}
    missing = sorted(key for key in info["missing_keys"] if key in parameters and key.startswith(decoder))
    if missing and not allow_missing_weights:
        unexpected = sorted(info["unexpected_keys"])
        instead = f" It has others that this architecture does not know, {_some(unexpected)}." if unexpected else ""
        raise CheckpointError(
            f"`{path}` is no checkpoint of this {_name(model)}: it lacks {_some(missing)}.{instead} Check the path"
            " and the configuration, or pass `allow_missing_weights=True` to let these weights start afresh."
        )


def _mismatch_message(model: Any, info: dict, path: Any) -> str:
    shapes = sorted(
        f"{key} {tuple(in_checkpoint)} there, {tuple(in_model)} here"
        for key, in_checkpoint, in_model in info["mismatched_keys"]
    )
    of_one_rank = " (shapes of this rank's part)" if getattr(model.config, "distributed_config", None) else ""
    return (
        f"`{path}` does not fit the configuration of this {_name(model)}: {_some(shapes, '; ')}{of_one_rank}. Load it"
        " with its own configuration, or pass `ignore_mismatched_sizes=True` to let these weights start afresh."
    )


def _name(model: Any) -> str:
    return type(model).__name__.removeprefix("FSDP")


def _some(names: list[str], separator: str = ", ") -> str:
    rest = len(names) - _MAX_NAMED
    return separator.join(names[:_MAX_NAMED]) + (f"{separator}and {rest} more" if rest > 0 else "")
