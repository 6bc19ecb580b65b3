"""Vision transformer (Dosovitskiy et al. 2021) that may be given a noised row of the class it is asked for (DiffusionBlocks App. B)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdlm.config.model import TextConfig, VitConfig
from rdlm.models.prenorm import INIT_STD, PreNormModel
from rdlm.nn.context import AttentionContext, BidirectionalContext
from rdlm.nn.modulation import Condition
from rdlm.nn.patches import PatchEmbedding
from rdlm.nn.table import TokenTable


class Vit(PreNormModel):
    """Rows are the patches and, last, one that the class is read from; the state is that row: [B, 1, D].

    inputs: images [B, C, H, W]. ``wte`` are the rows of the classes: what is noised, and the read-out.
    """

    is_causal = False

    def __init__(self, config: VitConfig, layers: range | None = None) -> None:
        """layers: see PreNormModel."""
        super().__init__(config, layers)

    def _add_stem(self, config: TextConfig | VitConfig) -> None:
        assert isinstance(config, VitConfig)
        self.config = config
        self.patches = PatchEmbedding(config)
        self.class_row = TokenTable(1, config.d_model)
        self.adapter = (
            nn.Linear(config.d_model, config.d_model, bias=False) if config.noise_conditioning else None
        )

    def context(self, inputs: Tensor) -> AttentionContext:
        return BidirectionalContext(self.config.num_patches + 1, inputs.device)

    def empty_inputs(self, count: int, length: int) -> Tensor:
        return self.patches.empty_images(count)

    def target_shape(self, inputs: Tensor) -> tuple[int, int]:
        return inputs.shape[0], 1

    def encode(self, inputs: Tensor, ctx: AttentionContext) -> Tensor:
        return self.patches(inputs)

    def initial_state(self, e: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros [B, 1, D]."""
        return torch.zeros_like(e[:, :1])

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        row = self.class_row(torch.zeros(state.shape[:2], dtype=torch.int64, device=state.device))
        if self.adapter is not None:
            row = row + self.adapter(INIT_STD * state)  # it starts silent, and at the scale of the row
        return self.through_layers(torch.cat([e, row], 1), cond, ctx)[:, -1:]
