"""EDM preconditioning: the coefficients of a denoiser and the weight of its loss (Karras et al. 2022, Table
1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scalings:
    """EDM coefficients of D(z) = c_skip z + c_out F(c_in z, c_noise), each shaped as sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def denoise_scalings(sigma: Tensor, sigma_data: float) -> Scalings:
    """sigma [...] > 0 -> four fp32 tensors [...]. Karras et al. 2022, Table 1; DiffusionBlocks App. C.

    Computed in fp32 or wider: at sigma 0.002 the weight is 2.5e5 and bf16 would lose it.
    """
    sigma = sigma.double() if sigma.dtype == torch.float64 else sigma.float()
    total = sigma.square() + sigma_data**2
    return Scalings(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / total.sqrt(),
        c_in=total.rsqrt(),
        c_noise=sigma.log() / 4,
    )


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """w(sigma) = (sigma^2 + sd^2) / (sigma sd)^2 = 1 / c_out^2. [...] -> [...] (Karras et al. 2022, Table 1)."""
    return (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
