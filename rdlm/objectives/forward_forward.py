"""Forward-Forward (Hinton 2022, arXiv 2212.13345): every layer of a ViT learns for itself, without a backward
pass between layers.

Each layer is trained to have a high goodness for an image with its class, and a low one for the same image
with another class. Its goodness is the mean square of its output at the class row. Its input is normalised,
so that it carries no information about the goodness of the layer before, and no gradient.

Shapes: B images [B, C, H, W] fp32, classes [B] int64, L layers, N classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.models.vision import Vit
from rdlm.objectives.base import (
    DEFAULT_DRAWS,
    Draws,
    HeldOut,
    Keys,
    LossTerms,
    Objective,
    ReadOut,
    TokenScores,
)
from rdlm.random_streams import host_generator

_NOISE_KEY = 2
THRESHOLD, STEEPNESS = 2.0, 4.0
"""Settings of ``goodness_loss``: the mean square between right and wrong, and alpha of Lee and Song 2023."""


class ForwardForward(Objective):
    """A baseline: there is no read-out, a class is chosen by the goodness of the layers."""

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        """The wrong class is drawn uniformly from the others (Hinton 2022, Sec. 3.3)."""
        return self._loss(batch, host_generator(keys.stream(_NOISE_KEY)))

    def _loss(self, batch: Batch, rng: torch.Generator) -> LossTerms:
        right, others = batch.targets[:, 0], self.model.vocab_size - 1
        wrong = (right + 1 + staged(torch.randint(others, right.shape, generator=rng), right.device)) % (
            others + 1
        )
        both = self.goodness(torch.cat([batch.inputs, batch.inputs]), torch.cat([right, wrong]))
        good, bad = both.split(len(right), 1)
        losses = goodness_loss(good, bad, self.settings.goodness) * batch.mask[:, 0].float()
        metrics = {"core_steps": torch.ones(()), "goodness_gap": (good - bad).detach().mean()}
        return LossTerms(losses.sum(), batch.mask.sum().float(), metrics)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        classes = torch.zeros(len(inputs), 1, dtype=torch.int64)
        return self._loss(Batch(inputs, classes, torch.ones_like(classes)), torch.Generator()).total

    def evaluate(self, batch: Batch, held_out: HeldOut) -> dict[str, Tensor]:
        return self.evaluate_classes(batch, held_out)

    def goodness(self, images: Tensor, classes: Tensor) -> Tensor:
        """[L, B] fp32. A layer's gradient reaches its own weights; the first one's the patches and the rows
        of classes, too."""
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
        """Goodness of every class, summed over all layers but the first (of one layer: its own) -> [B, N]
        fp32 (Hinton 2022, Sec. 3.3).

        One pass for each class. Their softmax is normalised, but nothing has calibrated it.
        """
        columns = []
        for number in range(self.model.vocab_size):
            found = self.goodness(images, torch.full((len(images),), number, device=images.device))
            columns.append(found[1:].sum(0) if len(found) > 1 else found[0])
        return torch.stack(columns, 1)

    @torch.no_grad()
    def score(
        self,
        inputs: Tensor,
        targets: Tensor,
        num_steps: Sequence[int],
        *,
        seed: int = 0,
        num_draws: int = 8,
        documents: Tensor | None = None,
    ) -> dict[int, TokenScores]:
        logits = self.class_logits(inputs)
        found = TokenScores(
            logits.log_softmax(1).gather(1, targets), logits.argmax(1, keepdim=True) == targets
        )
        return dict.fromkeys(num_steps, found)

    @torch.no_grad()
    def answer(
        self, inputs: Tensor, num_steps: Sequence[int], draws: Draws = DEFAULT_DRAWS
    ) -> dict[int, Tensor]:
        return dict.fromkeys(num_steps, self.class_logits(inputs).argmax(1, keepdim=True))


def goodness_loss(right: Tensor, wrong: Tensor, kind: Literal["threshold", "difference"]) -> Tensor:
    """Goodness [L, B] with the right class and with a wrong one -> [B], summed over layers.

    threshold: softplus(2 - right) + softplus(wrong - 2) (Hinton 2022, Eq. 1). difference: softplus(4 (wrong -
    right)) (Lee and Song 2023, arXiv 2303.08418), which lets every layer find its own level.
    """
    if kind == "threshold":
        return (F.softplus(THRESHOLD - right) + F.softplus(wrong - THRESHOLD)).sum(0)
    return F.softplus(STEEPNESS * (wrong - right)).sum(0)
