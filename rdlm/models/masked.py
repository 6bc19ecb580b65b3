"""Bidirectional transformer that fills in hidden tokens (MD4, Shi et al. 2024). Its layers are the core; it runs once a level."""

from __future__ import annotations

import torch
from torch import Tensor

from rdlm.config.model import MaskedConfig, TextConfig, VitConfig
from rdlm.models.prenorm import PreNormModel
from rdlm.nn.context import AttentionContext, BidirectionalContext
from rdlm.nn.modulation import Condition
from rdlm.nn.table import TokenTable


class Masked(PreNormModel):
    """hidden = norm(layers(embed(ids))), where ids may be ``mask_id``; reach and order of the rows are the context's business."""

    def __init__(self, config: MaskedConfig, layers: range | None = None) -> None:
        """layers: see PreNormModel."""
        super().__init__(config, layers)

    is_causal = False

    def _add_stem(self, config: TextConfig | VitConfig) -> None:
        # A table of its own, so that the read-out, tied to the other one, has no mask among its answers.
        self.mask_row = TokenTable(1, config.d_model)

    @property
    def mask_id(self) -> int:
        """The id that stands for a hidden token: the first one behind the vocabulary."""
        return self.vocab_size

    def embed(self, input_ids: Tensor) -> Tensor:
        hidden = input_ids == self.mask_id
        rows = self.wte(input_ids.masked_fill(hidden, 0))
        return torch.where(hidden.unsqueeze(-1), self.mask_row(torch.zeros_like(input_ids)), rows)

    def context(self, inputs: Tensor) -> AttentionContext:
        return BidirectionalContext(inputs.shape[1], inputs.device)

    def initial_state(self, e: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The embedded rows."""
        return e

    def core(self, state: Tensor, e: Tensor, cond: Condition | None, ctx: AttentionContext) -> Tensor:
        return self.through_layers(state, cond, ctx)
