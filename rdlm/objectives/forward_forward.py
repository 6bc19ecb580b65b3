"""A ViT whose layers learn each for itself, with no backward pass through the others: Forward-Forward (Hinton 2022, arXiv 2212.13345).

A layer is to be excited by an image beside its class, and calm beside another class. Its goodness is the mean square of what it puts out at
the row of the class; what comes in has length 1, so that it cannot read how good the layer before was, and carries no gradient.

Shapes: B images [B, C, H, W] fp32, classes [B] int64, L layers, N classes.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.models.vision import Vit
from rdlm.objectives.denoiser import Rowless

THRESHOLD, STEEPNESS = 2.0, 4.0
"""Of ``goodness_loss``: the mean square between right and wrong, and alpha of Lee and Song 2023."""


class ForwardForward(Rowless):
    """What Denoiser is, without noise and without a read-out: a class is judged by what the layers make of it."""

    def goodness(self, images: Tensor, classes: Tensor) -> Tensor:
        """[L, B] fp32. Gradients of a layer's reach its own weights; the first one's the patches and the rows of classes, too."""
        model = cast(Vit, self.model)
        ctx = model.context(images)
        row = model.wte(classes)
        row = F.rms_norm(row, row.shape[-1:]) + model.class_row(
            torch.zeros_like(classes)
        )  # of size 1, as the patches are
        x = torch.cat([model.encode(images, ctx), row.unsqueeze(1)], 1)
        found = []
        for layer in model.layers:
            x = layer(F.rms_norm(x, x.shape[-1:]), ctx)
            found.append(x[:, -1].float().square().mean(1))
            x = x.detach()
        return torch.stack(found)

    def class_logits(self, images: Tensor) -> Tensor:
        """Goodness of every class, summed over all layers but the first (of one layer: its own) -> [B, N] fp32 (Hinton 2022, Sec. 3.3).

        A pass for each class. Their softmax is normalised, but nothing has calibrated it.
        """
        columns = []
        for number in range(self.model.vocab_size):
            found = self.goodness(images, torch.full((len(images),), number, device=images.device))
            columns.append(found[1:].sum(0) if len(found) > 1 else found[0])
        return torch.stack(columns, 1)


def goodness_loss(right: Tensor, wrong: Tensor, kind: Literal["threshold", "difference"]) -> Tensor:
    """Goodness [L, B] beside the right class and beside a wrong one -> [B], summed over layers.

    threshold: softplus(2 - right) + softplus(wrong - 2) (Hinton 2022, Eq. 1). difference: softplus(4 (wrong - right)) (Lee and Song 2023,
    arXiv 2303.08418), which lets every layer find its own level.
    """
    if kind == "threshold":
        return (F.softplus(THRESHOLD - right) + F.softplus(wrong - THRESHOLD)).sum(0)
    return F.softplus(STEEPNESS * (wrong - right)).sum(0)
