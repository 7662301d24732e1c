# SPDX-License-Identifier: Apache-2.0
"""
What a checkpoint holds of a model and its optimizer, independent of the layout that it is saved from or loaded into.

Weights are whole tensors in safetensors, under the names `from_pretrained` knows; every rank reads the slices it owns.
Optimizer state is in torch's distributed checkpoint format, by parameter name: a parameter's state finds it in whichever
group, on whichever mesh, in however many pieces. Everything else is small and kept as it is, packed.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel
from transformers.distributed.checkpoint import _redistribute_state_dict, load_optimizer_distributed
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..distributed.adapters import adapter_weights
from ..distributed.expert_move import canonical_experts
from ..distributed.parallel_run import current_parallel_run, set_parallel_run
from ..pretrained_io import CheckpointError


ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_NAMED = 3


# ---- weights --------------------------------------------------------------------------------------------------------


def gathered_weights(model: Any, on_this_rank: bool) -> dict[str, torch.Tensor]:
    """
    The whole weights of a model that is spread over ranks, on the CPU; of an adapter model, the adapter's. All ranks call it.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        on_this_rank (`bool`): Whether this rank gets them; the others get `{}`.
    """
    if isinstance(model, PreTrainedModel):
        config = getattr(model.config, "distributed_config", None)
        with canonical_experts(model):
            state_dict = model.state_dict()
            return model.gather_sharded_state_dict_for_save(model, state_dict, config, save_on_this_rank=on_this_rank)
    return adapter_weights(model, on_this_rank)


def detached_from(model: nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`weights` on the CPU, copied where they are the model's own memory; what was tied is tied."""
    own = {tensor.data_ptr() for tensor in model.state_dict().values() if not isinstance(tensor, DTensor)}
    copies: dict[tuple, torch.Tensor] = {}
    detached = {}
    for name, tensor in weights.items():
        if tensor.data_ptr() in own or tensor.device.type != "cpu":
            key = (tensor.data_ptr(), tensor.shape)
            if key not in copies:
                copies[key] = tensor.detach().to("cpu", copy=True)
            tensor = copies[key]
        detached[name] = tensor
    return detached


def one_process_view(model: Any) -> Any:
    """The model as `save_pretrained` of one process sees it, to be called with a `state_dict`: without collectives."""
    view = object.__new__(type(model))  # FSDP's `__new__`, which `copy.copy` calls, makes another model
    view.__dict__.update(model.__dict__)
    if isinstance(model, PreTrainedModel):
        view.config = copy.copy(model.config)
        view.config.__dict__.pop("distributed_config", None)
    return view


def load_weights(model: Any, folder: str | Path) -> None:
    """
    Copies a checkpoint's weights into a model, sharded or not, in place.

    Where the names in the files are not the model's (transformers stores the experts of some architectures one by one), the
    checkpoint is loaded as `from_pretrained` does it, which converts them, and copied from there.

    Raises:
        CheckpointError: Weights are missing, or have another shape.
    """
    if isinstance(model, PreTrainedModel):
        targets = _by_all_names(model)
    else:
        targets = {(name,): tensor for name, tensor in _by_adapter_names(model).items()}
    files = _files_of_weights(Path(folder))
    places = {names: next((name for name in names if name in files), None) for names in targets}
    missing = sorted(names[0] for names, name in places.items() if name is None)
    if missing and isinstance(model, PreTrainedModel) and set(files) - set(sum(targets, ())):
        _copy_converted(model, folder)
        return
    if missing:
        raise CheckpointError(
            f"`resume_from_checkpoint` ({folder}) lacks weights of this {type(model).__name__}, {_some(missing)}: resume "
            "from a checkpoint of the same model."
        )
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as opened, torch.no_grad():
            for names, target in targets.items():
                if files[places[names]] == file:
                    _read_into(target, opened, places[names], folder)


def router_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers of a model, which training changes and an adapter's weights leave out."""
    stored = model.state_dict()
    return {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in stored}


def load_router_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Copies what [`router_state`] gave into the model."""
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in state.items():
            buffers[name].copy_(tensor)


def _by_all_names(model: nn.Module) -> dict[tuple[str, ...], torch.Tensor]:
    """Parameters and persistent buffers by all their names: a tied one is stored under one of them."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return {tuple(names[key]): tensor for key, tensor in tensors.items()}


def _by_adapter_names(model: Any) -> dict[str, torch.Tensor]:
    """An adapter's own tensors, not copies, by their names in its file."""
    from peft import get_peft_model_state_dict

    live = list(model.state_dict().items())
    # PEFT copies what it is given, on a spread model gathered and to the CPU: it is given numbers
    places = {name: torch.tensor(place) for place, (name, _) in enumerate(live)}
    stored = get_peft_model_state_dict(model, state_dict=places)
    return {name: live[int(place)][1] for name, place in stored.items()}


def _files_of_weights(folder: Path) -> dict[str, Path]:
    """The file that holds each stored tensor."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    present = [folder / name for name in (SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) if (folder / name).is_file()]
    if not present:
        return {}
    file = present[0]
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _read_into(target: torch.Tensor, opened: Any, name: str, folder: str | Path) -> None:
    stored = tuple(opened.get_slice(name).get_shape())
    if stored != tuple(target.shape):
        raise CheckpointError(
            f"`resume_from_checkpoint` ({folder}) has `{name}` of shape {stored} where the model's is "
            f"{tuple(target.shape)}: resume from a checkpoint of the same model."
        )
    if not isinstance(target, DTensor):
        target.copy_(opened.get_tensor(name))
        return
    # a strided shard is no contiguous piece: read a plain one and let the ranks exchange
    plain = [Shard(placement.dim) if placement.is_shard() else placement for placement in target.placements]
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, plain)
    piece = opened.get_slice(name)[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
    local = target.to_local()
    if tuple(plain) != tuple(target.placements):
        whole = DTensor.from_local(
            piece.to(local.device), target.device_mesh, plain, shape=target.shape, stride=target.stride()
        )
        piece = whole.redistribute(placements=target.placements).to_local()
    local.copy_(piece)


def _copy_converted(model: PreTrainedModel, folder: str | Path) -> None:
    """Through a second model of the same layout: the memory of two, for as long as it takes."""
    config = copy.copy(model.config)
    layout = config.__dict__.pop("distributed_config", None)
    run = current_parallel_run()
    set_parallel_run(None)  # the layout is given
    try:
        loaded = type(model).from_pretrained(folder, config=config, dtype=model.dtype, distributed_config=layout)
    finally:
        set_parallel_run(run)
    sources = loaded.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            local = target.to_local() if isinstance(target, DTensor) else target
            source = sources[name].to_local() if isinstance(target, DTensor) else sources[name]
            local.copy_(source)


# ---- optimizer, scheduler, and what is small ------------------------------------------------------------------------


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """
    The optimizer's state and options by parameter name, as pieces that DCP can save.

    Raises:
        NotImplementedError: The optimizer keeps something that is neither tensor nor number.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return _redistribute_state_dict(get_optimizer_state_dict(model, _bare(optimizer), options=options))


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """
    Loads what [`optimizer_state`] gave, saved under `optimizer`, from any layout into any. All ranks call it.

    Raises:
        CheckpointError: The optimizer's parameters are others. Equal on all ranks, and before any collective.
    """
    saved = {key.split(".", 2)[2].rpartition(".")[0] for key in _stored_keys(folder, "optimizer.param_groups.")}
    inner = _bare(optimizer)
    ours = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    wanted = {name for name, parameter in model.named_parameters() if id(parameter) in ours}
    if saved != wanted:
        missing, unknown = sorted(wanted - saved), sorted(saved - wanted)
        raise CheckpointError(
            f"`resume_from_checkpoint` ({folder.parent}) holds the optimizer state of other parameters (without "
            f"{_some(missing) or 'none of these'}, with {_some(unknown) or 'no others'}): train the same parameters, or "
            "start a new run from its weights."
        )
    with _without_empty_groups(inner):
        load_optimizer_distributed(model, inner, str(folder))


@contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """torch looks a group's options up by its first parameter, and a group may have none."""
    empty = [(place, group) for place, group in enumerate(optimizer.param_groups) if not group["params"]]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    try:
        yield
    finally:
        for place, group in empty:
            optimizer.param_groups.insert(place, group)


def load_scheduler_state(scheduler: Any, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """
    Loads a scheduler's state after the optimizer's. Its lists have an entry per parameter group, and the groups depend on
    the layout: rates are the groups' own, which the optimizer has by now; other lists have to say the same for all groups.

    Raises:
        CheckpointError: They do not, and the number of groups differs.
    """
    groups = _bare(optimizer).param_groups
    own = {"base_lrs": "initial_lr", "_last_lr": "lr"}
    present = scheduler.state_dict()
    adapted = dict(state)
    for name, value in state.items():
        if not isinstance(value, list) or not isinstance(present.get(name), list) or len(value) == len(present[name]):
            continue
        if name in own and all(own[name] in group for group in groups):
            adapted[name] = [group[own[name]] for group in groups]
        elif all(entry == value[0] for entry in value):
            adapted[name] = value[:1] * len(present[name])
        else:
            raise CheckpointError(
                f"`{name}` ({value}) of the saved {type(scheduler).__name__} has an entry for each of {len(value)} "
                f"parameter groups, and here are {len(present[name])}: resume with the layout it was saved with."
            )
    scheduler.load_state_dict(adapted)


def packed(value: Any) -> bytes:
    """Anything small, as one entry of a DCP checkpoint."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_packed(folder: Path, key: str) -> Any:
    """An entry that [`packed`] made; None where there is none. No collective."""
    if key not in _stored_keys(folder, key):
        return None
    value = {key: b""}
    dcp.load(value, checkpoint_id=folder, no_dist=True)
    with safe_globals():
        return torch.load(io.BytesIO(value[key]), weights_only=True)


def _stored_keys(folder: Path, prefix: str) -> list[str]:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return [key for key in metadata.state_dict_metadata if key.startswith(prefix)]


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _some(names: list[str]) -> str:
    rest = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


__all__ = [
    "detached_from",
    "gathered_weights",
    "load_optimizer_state",
    "load_router_state",
    "load_scheduler_state",
    "load_weights",
    "one_process_view",
    "optimizer_state",
    "packed",
    "read_packed",
    "router_state",
]
