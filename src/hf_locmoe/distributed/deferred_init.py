# SPDX-License-Identifier: Apache-2.0
"""
Parameters initialised shard by shard, and still those of one process from the same seed.

What a parameter starts from depends on every draw before it, so its values cannot be had from the seed alone. They can be had
from the state of the generator at its own draw, which is a few KB. So a model is built once without memory for its parameters:

    while it is built   `torch.empty(8, 64, 32)`    gives a tensor on `meta`, which has a shape and no values
                        `weight.normal_(0, 0.02)`   the generator's state is noted; the numbers are drawn all the same, because
                                                    the next state depends on them, and thrown away
    afterwards          a parameter is asked for    its own few operations are done again, from the noted states

[`InitializationRecorder`] sees what is computed and not who asks, and knows no architecture. Recorded are tensors of
`SMALLEST_RECORDED` elements or more, which pass themselves off as tensors on the CPU; the others are made as ever. What cannot
go on without a recorded tensor's values raises, and the caller builds the model whole.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten


# Elements. Norms, biases and tables below it cost next to nothing, and constructors do all sorts of things with them.
SMALLEST_RECORDED = 1 << 16

_CPU, _META = torch.device("cpu"), torch.device("meta")
_aten = torch.ops.aten


def _overloads(*packets: str) -> set[Any]:
    return {getattr(getattr(_aten, packet), name) for packet in packets for name in getattr(_aten, packet).overloads()}


_OF_A_SIZE = _overloads("empty", "empty_strided", "zeros", "ones", "full", "rand", "randn")
_NEW_OF_A_SIZE = _overloads("new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full")
_LIKE_ANOTHER = _overloads("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
# In these, how many numbers are drawn depends on shapes alone, and it does not matter what was in the tensor before.
_DRAWING = _overloads("normal_", "uniform_", "exponential_", "random_", "cauchy_", "log_normal_")
_OVERWRITING = _DRAWING | _overloads("zero_", "fill_", "copy_")


class _Window(NamedTuple):
    """A recorded tensor: what it shows of a storage that has no memory yet."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Window:
        key = tensor.untyped_storage()._cdata
        return cls(key, tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())

    def on(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class _Operation(NamedTuple):
    number: int
    function: Any
    leaves: list[Any]  # of (args, kwargs), with a `_Window` for a recorded tensor
    structure: Any
    state: torch.Tensor | None  # of the generator, where numbers are drawn
    created: list[_Window | None]  # leaves of the result, where they are new tensors


@dataclass
class _Storage:
    kept: torch.UntypedStorage  # on `meta`; its address is the key
    operations: list[_Operation] = field(default_factory=list)  # what its contents come from, in order


class RecordedTensor:
    """
    A tensor that is made when it is asked for, whole for a moment and then cut: `tensor[rows]` is a copy that holds the rows
    alone. It stands in a state dict as a slice of a safetensors file does.
    """

    def __init__(self, recorder: InitializationRecorder, window: _Window):
        self._recorder, self._window = recorder, window

    def get_shape(self) -> list[int]:
        return list(self._window.size)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._recorder._part(self._window, index)


class InitializationRecorder:
    """
    Inside `with recorder.recording():`, floating-point tensors of `smallest` elements or more that are made on the CPU are on
    `meta`, and what they come from is recorded. Generators end up where they would have without.

    Args:
        smallest (`int`, *optional*): `SMALLEST_RECORDED` if not given.

    Raises:
        RuntimeError: Inside, by torch or here, where values of a recorded tensor are needed for anything but one number.
    """

    def __init__(self, smallest: int | None = None):
        self.smallest = SMALLEST_RECORDED if smallest is None else smallest
        self._storages: dict[int, _Storage] = {}
        self._num_operations = 0
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()  # however many threads load, one tensor is whole at a time

    @contextmanager
    def recording(self) -> Iterator[None]:
        with _SeenByFunctions(self), _SeenByOperations(self):
            yield

    @property
    def fingerprint(self) -> bytes:
        """32 bytes, the same on two ranks whose recorded tensors have the same values."""
        return self._digest.digest()

    def recorded(self, tensor: torch.Tensor) -> RecordedTensor | None:
        """What gives the values of a tensor that was made inside; None where it has them."""
        return RecordedTensor(self, _Window.of(tensor)) if self.knows(tensor) else None

    # ---- recording ----------------------------------------------------------------------------------------------

    def operation(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One operation of ATen, whatever it is on."""
        if kwargs.get("device") == _META:
            kwargs = {**kwargs, "device": _CPU}  # torch puts a number beside the tensor that it is for
        given, structure = tree_flatten((args, kwargs))
        is_derived = any(self.knows(leaf) for leaf in given)
        if not is_derived and not self._makes_large_tensor(function, args, kwargs):
            return function(*args, **kwargs)
        if function is _aten._local_scalar_dense.default:
            return self._part(_Window.of(args[0]), ...).item()  # initialisations that draw until all is well
        leaves = [self._encoded(leaf) for leaf in given]
        written = _written_tensors(function, args, kwargs)
        if not all(self.knows(tensor) for tensor in written):
            raise NotImplementedError(
                f"{function} puts values that were not computed into a tensor that is not recorded"
            )
        state = None
        if torch.Tag.nondeterministic_seeded in function.tags:
            if function not in _DRAWING | _OF_A_SIZE | _LIKE_ANOTHER:
                raise NotImplementedError(f"{function} draws by values that were not computed")
            state = _generator_of(leaves).get_state()
            drawn = self._run(_Operation(0, function, leaves, structure, None, []), {})
            result = args[0] if written else tree_map_only(torch.Tensor, _on_meta, drawn)
        elif is_derived:
            shape_args, shape_kwargs = tree_unflatten([_without_values(leaf) for leaf in given], structure)
            result = function(*shape_args, **shape_kwargs)
        else:
            result = function(*args, **{**kwargs, "device": _META})
        if not is_derived:
            # what is the default dtype here need not be it later
            leaves, structure = tree_flatten((args, {**kwargs, "dtype": result.dtype}))
        read = {leaf.storage for leaf in leaves if isinstance(leaf, _Window)}
        created = [self._created(leaf, read) for leaf in tree_flatten(result)[0]]
        if written or any(created):
            operation = _Operation(self._num_operations, function, leaves, structure, state, created)
            self._note(operation, read, [_Window.of(tensor) for tensor in written])
        return result

    def _makes_large_tensor(self, function, args, kwargs) -> bool:
        if function in _OF_A_SIZE:
            device, dtype, size = _CPU, torch.get_default_dtype(), math.prod(args[0])
        elif function in _NEW_OF_A_SIZE:
            device, dtype, size = args[0].device, args[0].dtype, math.prod(args[1])
        elif function in _LIKE_ANOTHER:
            device, dtype, size = args[0].device, args[0].dtype, args[0].numel()
        else:
            return False
        device, dtype = kwargs.get("device") or device, kwargs.get("dtype") or dtype
        is_plain = torch.device(device).type == "cpu" and not kwargs.get("pin_memory")
        return is_plain and dtype.is_floating_point and size >= self.smallest

    def knows(self, leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.is_meta and leaf.untyped_storage()._cdata in self._storages

    def _encoded(self, leaf: Any) -> Any:
        if self.knows(leaf):
            return _Window.of(leaf)
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.is_meta:
            raise NotImplementedError("a tensor on meta that is not recorded, among those that are")
        return leaf.detach().clone()  # by the time it is used it may have changed

    def _created(self, leaf: Any, read: set[int]) -> _Window | None:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_meta:
            return None
        window = _Window.of(leaf)
        if window.storage in read:
            return None
        self._storages[window.storage] = _Storage(leaf.untyped_storage())
        return window

    def _note(self, operation: _Operation, read: set[int], written: list[_Window]) -> None:
        self._num_operations += 1
        shown = [str(operation.function), *map(_fingerprint, operation.leaves), _fingerprint(operation.state)]
        self._digest.update(repr(shown).encode())
        overwritten = {window.storage for window in written if self._covers(operation.function, window)}
        before = {earlier.number: earlier for key in read - overwritten for earlier in self._storages[key].operations}
        operations = [before[number] for number in sorted(before)] + [operation]
        for window in [*written, *filter(None, operation.created)]:
            self._storages[window.storage].operations = operations

    def _covers(self, function, window: _Window) -> bool:
        num_bytes = math.prod(window.size) * window.dtype.itemsize
        return function in _OVERWRITING and num_bytes == self._storages[window.storage].kept.nbytes()

    # ---- doing it -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _part(self, window: _Window, index: Any) -> torch.Tensor:
        with self._lock:
            storages: dict[int, torch.UntypedStorage] = {}
            for operation in self._storages[window.storage].operations:
                result = self._run(operation, storages)
                for made, expected in zip(tree_flatten(result)[0], operation.created):
                    if expected is not None:
                        assert (made.shape, made.stride()) == (expected.size, expected.stride), operation.function
                        storages[expected.storage] = made.untyped_storage()
            whole = window.on(self._memory(window.storage, storages))
            part = whole[index]
            return part if part.numel() == whole.numel() else part.clone()

    def _run(self, operation: _Operation, storages: dict[int, torch.UntypedStorage]) -> Any:
        """On memory; what is not in `storages` yet gets some."""
        leaves = [
            leaf.on(self._memory(leaf.storage, storages)) if isinstance(leaf, _Window) else leaf
            for leaf in operation.leaves
        ]
        with nullcontext() if operation.state is None else _generator_at(operation.state, leaves):
            args, kwargs = tree_unflatten(leaves, operation.structure)
            return operation.function(*args, **kwargs)

    def _memory(self, key: int, storages: dict[int, torch.UntypedStorage]) -> torch.UntypedStorage:
        if key not in storages:
            storages[key] = torch.UntypedStorage(self._storages[key].kept.nbytes())
        return storages[key]


class _SeenByOperations(TorchDispatchMode):
    def __init__(self, recorder: InitializationRecorder):
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self._recorder.operation(function, args, kwargs or {})


class _SeenByFunctions(TorchFunctionMode):
    """Recorded tensors are on the CPU for who asks: torch itself skips the initialisation of tensors on `meta`."""

    def __init__(self, recorder: InitializationRecorder):
        super().__init__()
        self._recorder = recorder
        self._answers = {
            torch.Tensor.device.__get__: _CPU,
            torch.Tensor.is_meta.__get__: False,
            torch.Tensor.is_cpu.__get__: True,
        }

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._answers and self._recorder.knows(args[0]):
            return self._answers[function]
        return function(*args, **(kwargs or {}))


def _written_tensors(function, args, kwargs) -> list[torch.Tensor]:
    """The arguments that an operation changes, by its schema."""
    written = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            written += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return written


def _fingerprint(leaf: Any) -> Any:
    """What is the same on two ranks that do the same."""
    if isinstance(leaf, _Window):
        return leaf[1:]
    if isinstance(leaf, torch.Tensor):
        return hashlib.sha256(leaf.contiguous().view(-1).view(torch.uint8).numpy()).digest()
    return type(leaf) if isinstance(leaf, torch.Generator) else leaf


def _without_values(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf if leaf.is_meta else _on_meta(leaf)
    return _META if isinstance(leaf, torch.device) else leaf


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)


def _generator_of(leaves: list[Any]) -> torch.Generator:
    return next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), torch.default_generator)


@contextmanager
def _generator_at(state: torch.Tensor, leaves: list[Any]) -> Iterator[None]:
    generator = _generator_of(leaves)
    before = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(before)


__all__ = ["SMALLEST_RECORDED", "InitializationRecorder", "RecordedTensor"]
