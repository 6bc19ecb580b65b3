"""Images that a checkpoint draws, over settings of its sampler, kept on disk so that a run resumes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from eval.cache import Bar, cached
from rdlm.checkpoints.folder import Loaded
from rdlm.config.model import ImageConfig
from rdlm.data.image_files import ImageSet
from rdlm.errors import UserError
from rdlm.objectives.edm import Edm, pixels

BATCH = 64
"""Images of one network call (twice as many rows with guidance)."""


@dataclass(frozen=True)
class Setting:
    """One way of drawing."""

    num_steps: int
    guidance: float = 1.0
    sampler: str = "euler"

    @property
    def rest(self) -> str:
        """What is not K: settings with an equal rest form a curve."""
        return f"guidance {self.guidance:g}, {self.sampler}"

    def __str__(self) -> str:
        return f"K {self.num_steps}, {self.rest}"


def settings(
    steps: Sequence[int], guidance: Sequence[float], samplers: Sequence[str], most: int
) -> list[Setting]:
    """All combinations, K changing fastest; UserError for values out of range (``most``: the checkpoint's
    largest K)."""
    for k in steps:
        if not 1 <= k <= most:
            raise UserError("--num-steps", k, "is out of range", f"this checkpoint takes 1 to {most}")
    for g in guidance:
        if not 0 <= g <= 100:
            raise UserError("--guidance", g, "must lie in [0, 100]", "1 is none, the usual values are 1 to 4")
    return [Setting(k, g, sampler) for sampler, g, k in product(samplers, guidance, steps)]


def drawn(
    loaded: Loaded,
    facts: dict[str, Any],
    setting: Setting,
    count: int,
    seed: int,
    dtype: str,
    cache: Path,
    bar: Bar,
) -> ImageSet:
    """``count`` images, of the classes 0, 1, 2, .. in turn. facts: eval.provenance.checkpoint_facts, which
    names them on disk."""
    shape, device = cast(ImageConfig, loaded.config.model), next(loaded.denoiser.parameters()).device
    key = (
        "images",
        facts["weights_sha256"],
        facts["config_sha256"],
        asdict(setting),
        seed,
        dtype,
        device.type,
    )

    def compute(numbers: Sequence[int], progress: Callable[[int], object] | None) -> np.ndarray:
        out = []
        for first in range(0, len(numbers), BATCH):
            chunk = numbers[first : first + BATCH]
            classes = torch.tensor(chunk, device=device) % shape.num_classes
            images = cast(Edm, loaded.denoiser).sample_images(
                classes,
                setting.num_steps,
                first=chunk[0],
                guidance=setting.guidance,
                sampler=setting.sampler,
                seed=seed,
            )
            out.append(pixels(images).numpy())
            if progress:
                progress(len(chunk))
        return np.concatenate(out)

    found = cached(cache, key, list(range(count)), compute, bar(f"drawing at {setting}", count))
    return ImageSet("--checkpoint", Path(f"{facts['name']}, {setting}"), count, lambda i: found[i])
