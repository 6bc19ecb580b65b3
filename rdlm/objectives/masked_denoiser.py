"""A masked text model read as a denoiser: from tokens of which some are hidden to a distribution of each hidden one.

Shapes: ids [B, T] int64 with ``mask_id`` where hidden; level [B] fp32 in (0, 1], the share that is hidden.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from rdlm.models.recurrent import Recurrent
from rdlm.nn.attention import PaddedContext
from rdlm.nn.layers import Condition
from rdlm.objectives.denoiser import Rowless


class MaskedDenoiser(Rowless):
    """What Denoiser is, without rows that are noised: ids are hidden instead. The read-out is plain."""

    @property
    def mask_id(self) -> int:
        """The id of a hidden token."""
        return cast(Recurrent, self.model).mask_id

    def condition(self, sigma: Tensor | None, like: Tensor) -> Condition | None:
        """What the layers are told about levels sigma [B, 1]; None means 1: all is hidden."""
        return self.model.condition(torch.ones((1, 1), device=like.device) if sigma is None else sigma)

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D], of which ``predict`` and ``loss`` read the rows that are asked for.

        lengths: [B] int64, of rows that are padded at their ends; None: all have T tokens.
        """
        ctx = self.model.context(ids) if lengths is None else PaddedContext(lengths, ids.shape[1], ids.device)
        e = self.model.encode(ids, ctx)
        cond = self.condition(level.float().to(ids.device).unsqueeze(1), e)
        return self.model.decode(self.step(self.model.initial_state(e), e, cond, ctx), ctx)
