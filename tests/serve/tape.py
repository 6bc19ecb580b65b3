"""What a CUDA graph does, with operations of the CPU: a pass is recorded once, and afterwards the same operations run
on the same memory. No line of Python of the pass runs again."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from serve.engine.replay import Key, Pass

aten = torch.ops.aten
OF_VALUES = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.lift_fresh.default,
}  # fmt: skip
"""Operations that read values on the host, or make a tensor of the host's: a graph has neither."""


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in OF_VALUES, f"{func} in a part that is to be captured"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class Tape:
    """A Replayer."""

    def __init__(self) -> None:
        self.tapes: dict[Key, tuple[Recording, tuple[Tensor, ...]]] = {}
        self.replays = 0
        self.forgotten: list[weakref.ref[Tensor]] = []
        """Pools of keys and values, [layers, pages, ...], that dropped recordings read."""

    def forget(self) -> None:
        for recording, _ in self.tapes.values():
            for call in recording.calls:
                pools = (leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() == 5)
                self.forgotten += map(weakref.ref, pools)
        self.tapes.clear()

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        if key not in self.tapes:
            run()  # makes tables, as before a capture
            with Recording() as recording:
                out = run()
            self.tapes[key] = recording, out
            return out
        recording, out = self.tapes[key]
        self.replays += 1
        for func, args, kwargs, recorded in recording.calls:
            for new, old in zip(tree_leaves(func(*args, **kwargs)), tree_leaves(recorded), strict=True):
                if new.untyped_storage().data_ptr() != old.untyped_storage().data_ptr():
                    old.copy_(new)
        return out


class Signatures:
    """A Replayer that notes what each pass of a key does, and where."""

    def __init__(self) -> None:
        self.found: dict[Key, list[Any]] = defaultdict(list)
        self.before: list[dict[Key, list[Any]]] = []
        """Those of passes before a buffer moved."""

    def forget(self) -> None:
        self.before.append(self.found)
        self.found = defaultdict(list)

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        run()
        with Recording() as recording:
            out = run()
        made: set[int] = set()
        kept: set[int] = set()
        for _, args, kwargs, each in recording.calls:
            kept |= _storages((args, kwargs)) - made
            made |= _storages(each) - kept
        signature = [
            (str(func), [_signed(leaf, kept) for leaf in tree_leaves((args, kwargs, each))])
            for func, args, kwargs, each in recording.calls
        ]
        self.found[key].append(signature)
        return out


def _storages(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _signed(leaf: Any, kept: set[int]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    storage = leaf.untyped_storage().data_ptr()
    return leaf.shape, leaf.stride(), leaf.dtype, storage if storage in kept else None
