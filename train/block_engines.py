"""Joint training of blocks: one DeepSpeed engine each, of which an update touches one.

One engine over all blocks would move idle ones: DeepSpeed fills missing gradients with zeros, on which AdamW still decays weights and
lets momentum coast. An engine that is not called cannot; its step count, clipping and momentum are those of the block alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import deepspeed


class BlockEngines:
    """The engines of a run in block order; a network that is not cut has one. Saves and loads as one engine does."""

    def __init__(self, engines: Sequence[deepspeed.DeepSpeedEngine]) -> None:
        self._engines, self.index = list(engines), 0

    def __len__(self) -> int:
        return len(self._engines)

    def __iter__(self) -> Iterator[deepspeed.DeepSpeedEngine]:
        return iter(self._engines)

    @property
    def active(self) -> deepspeed.DeepSpeedEngine:
        """The engine of the last update."""
        return self._engines[self.index]

    def choose(self, block: int) -> deepspeed.DeepSpeedEngine:
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

    def parts(self, tag: str) -> list[tuple[deepspeed.DeepSpeedEngine, str]]:
        """Each engine with the tag of its own files under a checkpoint's ``tag``."""
        tags = [tag] if len(self) == 1 else [f"{tag}/block_{b}" for b in range(len(self))]
        return list(zip(self._engines, tags, strict=True))
