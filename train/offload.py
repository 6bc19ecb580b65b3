"""Moving everything that a DeepSpeed engine holds on the device to host memory or disk, and back, bit for
bit.

What moves is storage, not tensors: the bytes of each storage are copied away and the storage is resized to
nothing; it gets its size and bytes back before it is used. Every view (flat buffers and the parameters inside
them) stays valid, at every ZeRO stage and precision.

``engine.offload_states`` of DeepSpeed is not used: it knows ZeRO 1 to 3 and host memory only, and moves
nothing where the device is the CPU.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, UntypedStorage

from train.process import return_freed_memory

_SEARCHED = ("deepspeed", "torch", "rdlm", "train")
"""Packages whose objects are searched for tensors."""


class Store(Protocol):
    """Keeps the bytes of one object. ``parts``: uint8 vectors, the same sizes in the same order at ``write``
    and ``read``."""

    def write(self, parts: Iterator[Tensor]) -> None: ...
    def read(self, parts: Iterator[Tensor]) -> None: ...


class OnDisk:
    """A file without a name, which the system removes when the process ends.

    It is read straight into place: a mapping would count against the memory of the process in addition to the
    copy.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder, buffering=0)

    def write(self, parts: Iterator[Tensor]) -> None:
        self._file.seek(0)
        for part in parts:
            host = part.cpu()
            left = _memory(host)
            while left:  # one call writes 2 GiB at most
                left = left[self._file.write(left) :]

    def read(self, parts: Iterator[Tensor]) -> None:
        self._file.seek(0)
        for part in parts:
            target = part if part.device.type == "cpu" else torch.empty_like(part, device="cpu")
            left = _memory(target)
            while left:
                left = left[self._file.readinto(left) :]
            if target is not part:
                part.copy_(target)


class InHost:
    """Buffers in host memory, allocated when they are first needed."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def write(self, parts: Iterator[Tensor]) -> None:
        old, self._buffers = iter(self._buffers), []
        for part in parts:
            buffer = next(old, None)
            fits = buffer is not None and len(buffer) == len(part)
            self._buffers.append(
                buffer.copy_(part) if buffer is not None and fits else part.to("cpu", copy=True)
            )

    def read(self, parts: Iterator[Tensor]) -> None:
        for part, buffer in zip(parts, self._buffers, strict=True):
            part.copy_(buffer)


class Mover:
    """Moves all tensors that an object holds on ``device`` into a store and back."""

    def __init__(self, root: object, store: Store, device: torch.device) -> None:
        self._root, self._store, self._device = root, store, device
        self._moved: list[tuple[UntypedStorage, int]] = []

    def leave(self) -> None:
        """None of the object's storages has a byte on the device afterwards."""
        storages = list(_storages(self._root, self._device))

        def emptied() -> Iterator[Tensor]:
            for storage, _ in self._moved:
                yield _bytes(storage)
                storage.resize_(0)

        self._moved = [(storage, storage.nbytes()) for storage in storages]
        self._store.write(emptied())
        if self._device.type == "cpu":
            return_freed_memory()

    def come_back(self) -> None:
        """Every storage has its size and bytes again."""

        def filled() -> Iterator[Tensor]:
            for storage, size in self._moved:
                storage.resize_(size)
                yield _bytes(storage)

        self._store.read(filled())
        self._moved = []


def _bytes(storage: UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory(part: Tensor) -> memoryview:
    """The bytes of a uint8 vector in host memory. ``part.numpy()`` would forbid for good that its storage is
    resized."""
    return memoryview((ctypes.c_ubyte * len(part)).from_address(part.data_ptr())).cast("B")


def _storages(root: object, device: torch.device) -> Iterator[UntypedStorage]:
    """Every storage with bytes on the device that the object's tensors lie in, once each.

    Those of a loaded checkpoint cannot be resized; tensors that lie in one move to a copy that can.
    """
    found: set[int] = set()
    moved: dict[int, UntypedStorage] = {}
    for tensor in _tensors(root):
        if tensor.device.type != device.type:
            continue
        storage = tensor.untyped_storage()
        if not storage.resizable():
            address = storage.data_ptr()
            storage = moved[address] = moved[address] if address in moved else storage.clone()
            place = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, *place)
        if storage.nbytes() and storage.data_ptr() not in found:
            found.add(storage.data_ptr())
            yield storage


def _tensors(root: object) -> Iterator[Tensor]:
    """Tensors that can be reached from an object through containers, attributes, bound methods and partial
    functions."""
    waiting: deque[Any] = deque([root])
    seen: dict[int, Any] = {}  # objects are kept: an id must not be used again while the search lasts
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            yield item
            if item.is_leaf and item.grad is not None:
                waiting.append(item.grad)
            waiting.extend(vars(item).values())
        elif isinstance(item, Mapping):
            waiting.extend(item.keys())
            waiting.extend(item.values())
        elif isinstance(item, Sequence | set | deque) and not isinstance(
            item, str | bytes | bytearray | range
        ):
            waiting.extend(item)
        elif isinstance(item, MethodType):
            waiting.append(item.__self__)
        elif isinstance(item, partial):
            waiting.extend((item.func, item.args, item.keywords))
        elif type(item).__module__.partition(".")[0] in _SEARCHED and hasattr(item, "__dict__"):
            waiting.extend(vars(item).values())
