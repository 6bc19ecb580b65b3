"""Diffusion transformer (Peebles and Xie 2023): patches of a noised image in, patches of what the denoiser makes of it out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdlm.config.model import DitConfig
from rdlm.models.prenorm import init_pre_norm, pre_norm_layers, through
from rdlm.nn.context import BidirectionalContext
from rdlm.nn.modulation import NoiseEmbedding, modulate
from rdlm.nn.norm import RMSNorm
from rdlm.nn.patches import PatchEmbedding, assemble
from rdlm.nn.table import TokenTable


class Dit(nn.Module):
    """Level and class are added up and drive AdaLN in every layer and before the read-out. It knows nothing of what the numbers mean.

    Deviations from the publication: RMSNorm and gated MLPs, gates of 1 + gate, learned places; all layers start as plain ones.
    """

    modulates_in_layers = True
    """Layers are given the embedding, see Backbone."""

    def __init__(self, config: DitConfig, layers: range | None = None) -> None:
        """layers: which of the network's layers, None for all: a block has stem and read-out of its own."""
        super().__init__()
        self.config, self.no_class, width = config, config.num_classes, config.noise_embed_dim
        self.patches = PatchEmbedding(config)
        self.classes = TokenTable(config.num_classes + 1, width)
        self.noise_embedding = NoiseEmbedding(width)
        self.layers = pre_norm_layers(config, layers)
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.modulation = nn.Linear(width, 2 * config.d_model)
        self.pixels = nn.Linear(config.d_model, config.num_channels * config.patch_size**2)

    def empty_inputs(self, count: int, length: int) -> Tensor:
        """See Backbone."""
        return self.patches.empty_images(count)

    def forward(self, images: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
        """images [B, C, H, W], c_noise [B] fp32, classes [B] int64 (``no_class``: none is told) -> fp32 [B, C, H, W]."""
        told = self.noise_embedding(c_noise) + self.classes(classes)
        told = told.unsqueeze(1)  # [B, 1, C]: the same for all patches
        ctx = BidirectionalContext(self.config.num_patches, images.device)
        x = through(self.layers, self.patches(images), [told] * len(self.layers), ctx)
        shift, scale = self.modulation(told).chunk(2, dim=-1)
        rows = self.pixels(modulate(self.ln_f(x), shift, 1 + scale))
        return assemble(rows.float(), self.config.patch_size, self.config.num_channels)

    def init_weights(self, generator: torch.Generator) -> None:
        """See init_pre_norm; the read-out starts at zero, so that the first estimate is c_skip z."""
        init_pre_norm(self, len(self.layers), generator)
