"""Denoising of images with EDM preconditioning (Karras et al. 2022): D = c_skip z + c_out F(c_in z; c_noise,
class).

Shapes: z, images [B, C, H, W] fp32, pixels in [-1, 1]; sigma [B] fp32; classes [B] int64.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rdlm.config.model import ImageConfig
from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.diffusion.corruption import draw_levels
from rdlm.diffusion.partition import partition_of
from rdlm.diffusion.samplers import solve
from rdlm.diffusion.schedules import denoise_scalings, edm_weight
from rdlm.models.vision import Dit
from rdlm.objectives.base import HeldOut, Keys, LossTerms, Objective, ReadOut
from rdlm.random_streams import generator, host_generator, normals

_NOISE_KEY, _IMAGE_KEY = 2, 8


class Edm(Objective):
    """Weighted squared error of the denoised image, mean over its values (Karras et al. 2022, Eq. 8;
    DiffusionBlocks Eq. 6)."""

    @property
    def network(self) -> Dit:
        return cast(Dit, self.model)

    @property
    def no_class(self) -> int:
        """The class that stands for none."""
        return self.network.no_class

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        """One level an image. ``label_dropout`` of the images are denoised without their class (Ho and
        Salimans 2022)."""
        which = () if self.block is None else (self.block.index,)
        stream = keys.stream(_NOISE_KEY, *which)
        images, classes = batch.inputs, batch.targets[:, 0]
        drawn, _ = draw_levels(self.settings.corruption, self.noise, self.block, (len(images), 1), stream)
        sigma = staged(drawn[:, 0], images.device)
        dropped = torch.rand(len(images), generator=host_generator(stream)) < self.settings.label_dropout
        classes = classes.masked_fill(staged(dropped, images.device), self.no_class)
        every, width = torch.arange(len(images)), images[0].numel()
        eps = normals(stream, every, len(images), width, images.device).view(images.shape)
        x0 = self.estimate(images + sigma.view(-1, 1, 1, 1) * eps, sigma, classes)
        losses = (x0 - images).square().flatten(1).mean(1)  # [B]
        weight = batch.mask[:, 0].float()
        if self.settings.loss_weighting == "edm":
            weight = weight * edm_weight(sigma, self.noise.sigma_data)
        metrics = {"core_steps": torch.ones(()), "squared_error": losses.detach().mean()}
        return LossTerms((losses * weight).sum(), batch.mask.sum().float(), metrics)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        z, sigma = inputs + torch.empty_like(inputs), torch.ones(len(inputs))
        x0 = self.estimate(z, sigma, torch.zeros(len(inputs), dtype=torch.int64))
        return (x0 - inputs).square().flatten(1).mean(1).sum()

    def evaluate(self, batch: Batch, held_out: HeldOut) -> dict[str, Tensor]:
        return {"denoising": self._denoising(batch, held_out)}

    def estimate(self, z: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """The denoised image x0 [B, C, H, W] fp32 of z = image + sigma eps (Karras et al. 2022, Eq. 7)."""
        c = denoise_scalings(sigma, self.noise.sigma_data)
        skip, out, into = (each.view(-1, 1, 1, 1) for each in (c.c_skip, c.c_out, c.c_in))
        dtype = self.network.ln_f.weight.dtype
        return skip * z + out * self.network((into * z).to(dtype), c.c_noise, classes)

    def guided(self, z: Tensor, sigma: float, classes: Tensor, guidance: float) -> Tensor:
        """x0 with classifier-free guidance, 1 being none (Ho and Salimans 2022, Eq. 6 with 1 + w)."""
        levels = torch.full((len(z),), sigma, device=z.device)
        if guidance == 1:
            return self.estimate(z, levels, classes)
        none = torch.full_like(classes, self.no_class)
        both = self.estimate(torch.cat([z, z]), torch.cat([levels, levels]), torch.cat([classes, none]))
        with_class, without = both.chunk(2)
        return without + guidance * (with_class - without)

    @torch.no_grad()
    def sample_images(
        self,
        classes: Tensor,
        num_steps: int,
        *,
        first: int = 0,
        guidance: float = 1.0,
        sampler: str = "euler",
        seed: int = 0,
    ) -> Tensor:
        """Images first .. first + B - 1 of a seed, of the classes given [B] int64 -> [B, C, H, W] fp32, about
        [-1, 1].

        num_steps: K steps from the highest level to 0, at equal training mass. A step is one network call,
        two with ``heun`` except the last; each is twice as large where guidance is not 1. In a network of
        blocks each level is denoised by its owner. Image i starts from noise that depends on (seed, i) alone:
        not on the batch, K, sampler or guidance; noise that a sampler adds depends on the step, too.
        """
        shape, grid = cast(ImageConfig, self.config.model), partition_of(self.config).grid(num_steps)
        size = (shape.num_channels, shape.image_size, shape.image_size)

        def noise(*step: int) -> Tensor:
            rows = range(first, first + len(classes))
            drawn = [torch.randn(size, generator=generator(seed, _IMAGE_KEY, row, *step)) for row in rows]
            return torch.stack(drawn).to(classes.device)

        def denoise(z: Tensor, sigma: float) -> Tensor:
            return cast(Edm, self.at(sigma)).guided(z, sigma, classes, guidance)

        return solve(denoise, grid[0] * noise(), [*grid, 0.0], sampler, noise)


def pixels(images: Tensor) -> Tensor:
    """[B, C, H, W] in [-1, 1], clipped -> uint8 [B, H, W, C]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
