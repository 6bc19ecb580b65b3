"""Vision transformers: one that names the class of an image, one that denoises images, and the patches of
both."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from rdlm.config.model import PLAIN_STD, DitConfig, ImageConfig, VitConfig
from rdlm.models.base import Backbone, Take, init_weights
from rdlm.nn.attention import AttentionContext, BidirectionalContext
from rdlm.nn.layers import Condition, Layers, NoiseEmbedding, RMSNorm, TokenTable, TransformerLayer, modulate
from rdlm.random_streams import HashedStream, Stream


def _layers(config: ImageConfig, layers: range | None) -> Layers:
    """The layers of a network, or those of them that ``layers`` names."""
    cond_width = config.noise_embed_dim if config.noise_conditioning else None
    return Layers(
        TransformerLayer(config.layer, config.d_model, place, cond_width)
        for place in layers or range(config.num_layers)
    )


def _init_weights(model: nn.Module, num_layers: int, generator: torch.Generator, take: Take | None) -> None:
    residual_std = PLAIN_STD * (1 / math.sqrt(2 * num_layers))
    init_weights(model, generator, std=PLAIN_STD, residual_std=residual_std, take=take)


class PatchEmbedding(nn.Module):
    """[B, C, H, W] -> [B, P, D]: a linear map of each patch, row by row, plus a learned vector of its place
    (Dosovitskiy et al. 2021)."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        patch_size, num_channels, d_model = config.patch_size, config.num_channels, config.d_model
        self.image_shape = (num_channels, config.image_size, config.image_size)
        self.patch_size = patch_size
        self.linear = nn.Linear(num_channels * patch_size**2, d_model)
        self.places = nn.Parameter(torch.empty(config.num_patches, d_model))

    def empty_images(self, count: int) -> Tensor:
        """[count, C, H, W] without values."""
        return torch.empty(count, *self.image_shape)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(patches(images, self.patch_size).to(self.places.dtype)) + self.places


def patches(images: Tensor, size: int) -> Tensor:
    """[B, C, H, W] -> [B, (H/size) (W/size), C size^2]."""
    tiles = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [B, C, h, p, w, p]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def assemble(rows: Tensor, size: int, num_channels: int) -> Tensor:
    """The way back, of square images: [B, P, C size^2] -> [B, C, H, W]."""
    side = round(rows.shape[1] ** 0.5)
    tiles = rows.unflatten(2, (num_channels, size, size)).unflatten(1, (side, side))  # [B, h, w, C, p, p]
    return tiles.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Vit(Backbone):
    """Rows are the patches and, last, one that the class is read from (Dosovitskiy et al. 2021); the state is
    that row: [B, 1, D].

    inputs: images [B, C, H, W]. ``wte`` are the rows of the classes: what is noised (DiffusionBlocks App. B),
    and the read-out.
    """

    is_causal = False

    def __init__(self, config: VitConfig, layers: range | None = None) -> None:
        """layers: which of the network's layers, None for all: a block has stem and read-out of its own."""
        super().__init__()
        width = config.d_model
        self.config, self.vocab_size = config, config.vocab_size
        self.head_dim, self.num_kv_heads = width // config.num_heads, config.num_heads
        self.num_cache_layers = config.num_layers
        self.wte = TokenTable(config.vocab_size, width)
        self.noise_embedding = NoiseEmbedding(config.noise_embed_dim) if config.noise_conditioning else None
        self.patches = PatchEmbedding(config)
        self.class_row = TokenTable(1, width)
        self.adapter = nn.Linear(width, width, bias=False) if config.noise_conditioning else None
        self.layers = _layers(config, layers)
        self.ln_f = RMSNorm(width, config.norm_eps)
        self.lm_head = None

    @property
    def core_layers(self) -> nn.ModuleList:
        return self.layers

    def context(self, inputs: Tensor, documents: Tensor | None = None) -> AttentionContext:
        return BidirectionalContext(self.config.num_patches + 1, inputs.device)

    def empty_inputs(self, count: int, length: int) -> Tensor:
        return self.patches.empty_images(count)

    def target_shape(self, inputs: Tensor) -> tuple[int, int]:
        return inputs.shape[0], 1

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.patches(inputs)

    def initial_latent(self, e: Tensor, generator: Stream | HashedStream | None) -> Tensor:
        """Zeros [B, 1, D]."""
        return torch.zeros_like(e[:, :1])

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        row = self.class_row(torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device))
        if self.adapter is not None:
            row = row + self.adapter(PLAIN_STD * state)  # it starts silent, and at the scale of the row
        return self.layers.through(torch.cat([e, row], 1), ctx, cond)[:, -1:]

    def decode(self, state: Tensor, ctx: AttentionContext) -> Tensor:
        return self.ln_f(state)

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        _init_weights(self, len(self.layers), generator, take)


class Dit(nn.Module):
    """Level and class are added up and drive AdaLN in every layer and before the read-out (Peebles and Xie
    2023).

    Deviations from the publication: RMSNorm and gated MLPs, gates of 1 + gate, learned places; all layers
    start as plain ones.
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
        self.layers = _layers(config, layers)
        self.ln_f = RMSNorm(config.d_model, config.norm_eps)
        self.modulation = nn.Linear(width, 2 * config.d_model)
        self.pixels = nn.Linear(config.d_model, config.num_channels * config.patch_size**2)

    def empty_inputs(self, count: int, length: int) -> Tensor:
        """See Backbone."""
        return self.patches.empty_images(count)

    def target_shape(self, inputs: Tensor) -> tuple[int, int]:
        """See Backbone; an image has one target, its class."""
        return inputs.shape[0], 1

    def forward(self, images: Tensor, c_noise: Tensor, classes: Tensor) -> Tensor:
        """images [B, C, H, W], c_noise [B] fp32, classes [B] int64 (``no_class``: unconditional) -> fp32 [B,
        C, H, W]."""
        cond = self.noise_embedding(c_noise) + self.classes(classes)
        cond = cond.unsqueeze(1)  # [B, 1, C]: the same for all patches
        ctx = BidirectionalContext(self.config.num_patches, images.device)
        x = self.layers.through(self.patches(images), ctx, [cond] * len(self.layers))
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        rows = self.pixels(modulate(self.ln_f(x), shift, 1 + scale))
        return assemble(rows.float(), self.config.patch_size, self.config.num_channels)

    def init_weights(self, generator: torch.Generator, take: Take | None = None) -> None:
        """The read-out starts at zero, so that the first estimate is c_skip z."""
        _init_weights(self, len(self.layers), generator, take)
