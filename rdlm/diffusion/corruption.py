"""How targets are corrupted in training: Gaussian noise on target embeddings, masks on tokens.

What is drawn for each position (whether it is noised, its level) is drawn in host memory, so that the number of
noised positions is known without waiting for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.config.objective import CorruptionConfig, NoiseConfig
from rdlm.device import staged
from rdlm.diffusion.partition import Block
from rdlm.diffusion.schedules import noise_schedule
from rdlm.random_streams import CounterStream, Stream, host_generator, normals


@dataclass(frozen=True)
class Noised:
    """Noised targets of M of the B T positions. z [M, D] fp32; sigma [B, T] fp32: sigma_max where not noised;
    is_noised [B, T] bool in host memory; rows [M], others [B T - M] int64: numbers of the positions that are
    noised, and that are not. rows is None where all are."""

    z: Tensor
    sigma: Tensor
    is_noised: Tensor
    rows: Tensor | None = None
    others: Tensor | None = None

    @property
    def levels(self) -> Tensor:
        """Levels of the noised positions, fp32 [M]."""
        flat = self.sigma.flatten()
        return flat if self.rows is None else flat[self.rows]

    @property
    def dense(self) -> Tensor:
        """fp32 [B, T, D], zero where not noised."""
        shape = (*self.sigma.shape, self.z.shape[-1])
        if self.rows is None:
            return self.z.view(shape)
        flat = self.z.new_zeros(self.sigma.numel(), self.z.shape[-1])
        return flat.index_copy(0, self.rows, self.z).view(shape)

    def first(self, count: int) -> Noised:
        """The noised targets of the first ``count`` sequences."""
        if count == len(self.sigma):
            return self
        sigma, is_noised = self.sigma[:count], self.is_noised[:count]
        if self.rows is None or self.others is None:
            return Noised(self.z[: sigma.numel()], sigma, is_noised)
        noised = int(is_noised.sum())
        others = self.others[: sigma.numel() - noised]
        return Noised(self.z[:noised], sigma, is_noised, self.rows[:noised], others)

    def put(self, values: Tensor, into: Tensor) -> Tensor:
        """``into`` [B, T, D] with ``values`` [M, D] at the noised positions."""
        if self.rows is None:
            return values.view(into.shape)
        return into.flatten(0, 1).index_copy(0, self.rows, values).view(into.shape)


def noised_everywhere(z: Tensor, sigma: Tensor) -> Noised:
    """All positions noised: z [B, T, D], sigma [B, T]."""
    return Noised(z.flatten(0, 1), sigma, torch.ones(sigma.shape, dtype=torch.bool))


def draw_levels(
    corruption: CorruptionConfig,
    noise: NoiseConfig,
    block: Block | None,
    shape: tuple[int, int],
    stream: Stream,
) -> tuple[Tensor, Tensor]:
    """(sigma [B, T] fp32, is_noised [B, T] bool) in host memory; sigma is sigma_max where a position is not
    noised.

    block: draw from the range that trains this block; None draws from the whole distribution. From a generator
    positions are noised independently; from a counter their number is the share of all, rounded at random.
    """
    rows, rng = shape if corruption.per == "position" else (shape[0], 1), host_generator(stream)
    if isinstance(stream, CounterStream):
        is_noised = _exact_share(corruption.share, rows, rng)
    else:
        is_noised = torch.rand(rows, generator=rng) < corruption.share
    schedule = noise_schedule(noise, corruption)
    sigma = schedule.sample(rows, rng) if block is None else block.sample_level(rows, rng)
    sigma = torch.where(is_noised, sigma, torch.tensor(noise.sigma_max))
    return sigma.expand(shape), is_noised.expand(shape)


def _exact_share(share: float, shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    count = math.prod(shape)
    wanted = int(share * count + float(torch.rand((), generator=rng, dtype=torch.float64)))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count, generator=rng)[:wanted]] = True
    return chosen.view(shape)


def add_noise(
    clean: Callable[[Tensor], Tensor],
    targets: Tensor,
    width: int,
    sigma: Tensor,
    is_noised: Tensor,
    stream: Stream,
) -> Noised:
    """z = y + sigma * eps of the noised targets [B, T]. sigma, is_noised [B, T] in host memory; clean: ids [M] ->
    y [M, width] fp32."""
    device, flags = targets.device, is_noised.flatten()
    chosen = flags.nonzero().squeeze(1)
    rows = staged(chosen, device)
    levels = staged(sigma.flatten()[chosen], device)
    eps = normals(stream, chosen, len(flags), width, device)
    z = clean(targets.flatten()[rows]) + levels.unsqueeze(-1) * eps
    sigma = staged(sigma, device)
    if len(chosen) == len(flags):
        return Noised(z, sigma, is_noised)
    return Noised(z, sigma, is_noised, rows, staged((~flags).nonzero().squeeze(1), device))


def mask_tokens(level: Tensor, maskable: Tensor, rng: torch.Generator) -> Tensor:
    """Which tokens are masked: each independently with probability level [B], where ``maskable`` [B, T]. ->
    bool [B, T]; all in host memory."""
    return (torch.rand(maskable.shape, generator=rng) < level.unsqueeze(1)) & maskable
