"""Training a network of blocks: one DeepSpeed engine each, of which an update touches one.

One engine over all blocks would move idle ones: DeepSpeed fills missing gradients with zeros, on which AdamW still decays weights and
lets momentum coast. An engine that is not called cannot; its step count, clipping and momentum are those of the block alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from train.offload import Rest, Sleeper

Start = Callable[[int], deepspeed.DeepSpeedEngine]
"""Builds the engine of a block."""


class BlockEngines:
    """The engines of a run in block order, all on the device; a network that is not cut has one. Saves and loads as one engine does.

    Whoever wants an engine asks for it by ``choose``, or iterates, which chooses one after the other.
    """

    swap_seconds = 0.0
    """Time spent on moving blocks."""

    def __init__(self, count: int, start: Start) -> None:
        self._engines: list[deepspeed.DeepSpeedEngine] = []
        self.index = 0
        for block in range(count):
            self._admit(start, block)

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[deepspeed.DeepSpeedEngine]:
        return (self.choose(block) for block in range(len(self)))

    @property
    def active(self) -> deepspeed.DeepSpeedEngine:
        """The engine that was chosen last."""
        return self._engines[self.index]

    def choose(self, block: int) -> deepspeed.DeepSpeedEngine:
        """The engine of a block, ready for use until another is chosen."""
        self.index = block
        return self.active

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        """One engine writes ``folder/tag``, several ``folder/tag/block_<n>``. Collective."""
        for engine, name in self.parts(tag):
            engine.save_checkpoint(folder, tag=name, save_latest=save_latest)

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        """What ``save_checkpoint`` wrote: (path or None, the last engine's client state), as DeepSpeed returns it. Collective."""
        results = [engine.load_checkpoint(folder, tag=name) for engine, name in self.parts(tag)]
        path, state = results[-1]
        return (None if any(found is None for found, _ in results) else path), state

    def parts(self, tag: str) -> Iterator[tuple[deepspeed.DeepSpeedEngine, str]]:
        """Each engine with the tag of its own files under a checkpoint's ``tag``, to be used before the next is asked for."""
        return ((engine, tag if len(self) == 1 else f"{tag}/block_{self.index}") for engine in self)

    def _admit(self, start: Start, block: int) -> None:
        self._engines.append(start(block))
        self.index = block


class ResidentEngines(BlockEngines):
    """One block on the device at a time: choosing another puts the one before to rest and fetches the other."""

    def __init__(self, count: int, start: Start, rest: Callable[[], Rest], device: torch.device) -> None:
        """rest: makes the resting place of a block."""
        self._sleepers: list[Sleeper] = []
        self._rest, self._device = rest, device
        super().__init__(count, start)

    def choose(self, block: int) -> deepspeed.DeepSpeedEngine:
        if block != self.index:
            get_accelerator().synchronize()  # what is still computing is not part of the move
            begun = time.perf_counter()
            self._sleepers[self.index].sleep()
            self._sleepers[block].wake()
            self.swap_seconds += time.perf_counter() - begun
        return super().choose(block)

    def _admit(self, start: Start, block: int) -> None:
        if block:
            self._sleepers[self.index].sleep()
        super()._admit(start, block)
        self._sleepers.append(Sleeper(self.active, self._rest(), self._device))
