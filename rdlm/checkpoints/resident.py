"""A network of blocks of which only a few have their weights in memory: a position asks one block at a time.

Every weight is used inside the forward of the module that owns it (ZeRO stage 3 needs that too), so a hook
before each of these forwards knows which block is at work. Blocks that are not hold one number in the place
of each weight, with its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rdlm.objectives.blockwise import Blockwise

Read = Callable[[list[str]], Mapping[str, Tensor]]
"""Names -> weights, ready to use on their device."""


class ResidentBlocks:
    """Reads a block when it is used and forgets the one that was used longest ago. Not for several threads."""

    def __init__(self, denoiser: Blockwise, limit: int, read: Read) -> None:
        """limit: most blocks in memory. The denoiser's weights must be placeholders (``absent``), but for the
        evidence scales."""
        self.limit, self._read = limit, read
        self.loads: list[int] = []
        """Every block that was read, in order."""
        self.present: list[int] = []
        """The blocks in memory, the one used last at the end."""
        self._weights: list[dict[str, torch.nn.Parameter]] = []
        for index, block in enumerate(denoiser.parts):
            prefix = f"blocks.{index}.model."
            self._weights.append({prefix + name: weight for name, weight in block.model.named_parameters()})
            for module in block.model.modules():
                if any(True for _ in module.parameters(recurse=False)):
                    module.register_forward_pre_hook(self._hook(index))

    def use(self, block: int) -> None:
        """See to it that a block is in memory, as the one used last."""
        if self.present and self.present[-1] == block:
            return
        if block in self.present:
            self.present.remove(block)
        else:
            while len(self.present) >= self.limit:
                for weight in self._weights[self.present.pop(0)].values():
                    weight.data = absent(weight)
            self._fill(block)
        self.present.append(block)

    def _fill(self, block: int) -> None:
        weights = self._weights[block]
        with torch.inference_mode(False):  # or these weights could serve in no other mode
            for name, value in self._read(list(weights)).items():
                weights[name].data = value
        self.loads.append(block)

    def _hook(self, block: int) -> Callable[..., None]:
        def before(module: torch.nn.Module, args: Any) -> None:
            self.use(block)

        return before


def absent(like: Tensor, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape that takes the memory of one number, which is NaN: nothing computed from it
    looks right."""
    with torch.inference_mode(False):
        return torch.full((), torch.nan, dtype=dtype or like.dtype, device=device or like.device).expand(
            like.shape
        )
