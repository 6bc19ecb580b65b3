"""DiT read as a denoiser of images: D = c_skip z + c_out F(c_in z; c_noise, class).

Shapes: z, images [B, C, H, W] fp32, pixels in [-1, 1]; sigma [B] fp32; classes [B] int64.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rdlm.diffusion.noise import denoise_scalings
from rdlm.models.vision import Dit
from rdlm.objectives.denoiser import Rowless


class ImageDenoiser(Rowless):
    """What Denoiser is, with pixels noised in the place of rows of a table. There is no read-out: its estimate is the image."""

    @property
    def network(self) -> Dit:
        return cast(Dit, self.model)

    @property
    def no_class(self) -> int:
        """The class that stands for none."""
        return self.network.no_class

    def estimate(self, z: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """The denoised image x0 [B, C, H, W] fp32 of z = image + sigma eps (Karras et al. 2022, Eq. 7)."""
        c = denoise_scalings(sigma, self.noise.sigma_data)
        skip, out, into = (each.view(-1, 1, 1, 1) for each in (c.c_skip, c.c_out, c.c_in))
        dtype = self.network.ln_f.weight.dtype
        return skip * z + out * self.network((into * z).to(dtype), c.c_noise, classes)

    def guided(self, z: Tensor, sigma: float, classes: Tensor, guidance: float) -> Tensor:
        """x0 pushed away from what no class would give, ``guidance`` 1 being no push (Ho and Salimans 2022, Eq. 6 with 1 + w)."""
        levels = torch.full((len(z),), sigma, device=z.device)
        if guidance == 1:
            return self.estimate(z, levels, classes)
        none = torch.full_like(classes, self.no_class)
        both = self.estimate(torch.cat([z, z]), torch.cat([levels, levels]), torch.cat([classes, none]))
        with_class, without = both.chunk(2)
        return without + guidance * (with_class - without)
