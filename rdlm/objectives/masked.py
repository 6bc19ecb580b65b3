"""Masked diffusion of text (MD4, Shi et al. 2024, arXiv 2406.04329): a bidirectional model predicts masked
tokens.

Shapes: ids [B, T] int64 with ``mask_id`` where masked; level [B] fp32 in (0, 1], the probability that a token
is masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.diffusion.corruption import mask_tokens
from rdlm.diffusion.masked_likelihood import bound
from rdlm.diffusion.schedules import low_discrepancy, masking_schedule
from rdlm.diffusion.unmasking import unmask
from rdlm.models.recurrent import Recurrent
from rdlm.nn.attention import PaddedContext
from rdlm.nn.layers import Condition
from rdlm.objectives.base import DEFAULT_DRAWS, Draws, Keys, LossTerms, Objective, ReadOut
from rdlm.random_streams import host_generator
from rdlm.sampling_params import SamplingParams

_NOISE_KEY = 2


class MaskedDiffusion(Objective):
    """Cross-entropy of masked tokens, weighted by -alpha' / (1 - alpha) (MD4 Sec. 3; DiffusionBlocks Eq. 8)."""

    @property
    def mask_id(self) -> int:
        """The id of a masked token."""
        return cast(Recurrent, self.model).mask_id

    # Training -----------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        """One level a sequence. Over all levels the expectation is the bound in continuous time, in nats,
        less what lies below t_min.

        The model learns the sequence ``targets`` itself, all T tokens at once; ``inputs`` are not used.
        Positions outside ``batch.mask`` are never masked and never count, in the level neither: it is the
        masked share of the others.
        """
        which = () if self.block is None else (self.block.index,)
        rng = host_generator(keys.stream(_NOISE_KEY, *which))
        schedule, uniform = masking_schedule(self.settings.masking), low_discrepancy(len(batch.targets), rng)
        level = schedule.icdf(uniform).float() if self.block is None else self.block.levels_at(uniform)
        masked = mask_tokens(level, batch.counted, rng)
        targets, device = batch.targets, batch.targets.device
        rows = staged(masked.flatten().nonzero().squeeze(1), device)
        ids = targets.flatten().index_fill(0, rows, self.mask_id).view(targets.shape)
        hidden = self.hidden(ids, level).flatten(0, 1).index_select(0, rows)
        weight = schedule.weight(level).unsqueeze(1).expand(masked.shape)[masked]
        total, losses = self.cross_entropy(hidden, targets.flatten()[rows], staged(weight, device))
        metrics = {
            "core_steps": torch.ones(()),
            "ce": losses.sum() / max(1, len(losses)),
        }  # a tiny batch may mask nothing
        return LossTerms(total, batch.mask.sum().float(), metrics)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        return read_out(self.hidden(inputs, torch.ones(len(inputs))).flatten(0, 1), None, None)

    # Single steps -------------------------------------------------------------------------------------------

    def condition(self, level: Tensor | None, like: Tensor) -> Condition | None:
        """The conditioning of the layers on levels [B, 1]; None means 1, where everything is masked."""
        return self.model.condition(torch.ones((1, 1), device=like.device) if level is None else level)

    def hidden(self, ids: Tensor, level: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D], of which ``predict`` and ``cross_entropy`` read the rows that matter.

        lengths: [B] int64, for rows that are padded at their ends; None: all have T tokens.
        """
        ctx = self.model.context(ids) if lengths is None else PaddedContext(lengths, ids.shape[1], ids.device)
        e = self.model.encode(ids, ctx)
        cond = self.condition(staged(level.float(), ids.device).unsqueeze(1), e)
        return self.model.decode(self.model.core(self.model.initial_state(e), e, cond, ctx), ctx)

    # Evaluation ---------------------------------------------------------------------------------------------

    def token_logprobs(
        self,
        inputs: Tensor,
        targets: Tensor,
        num_steps: Sequence[int],
        *,
        mask: Tensor | None = None,
        seed: int = 0,
        num_draws: int = 8,
        documents: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Terms whose sum over a row estimates a lower bound of log p(targets); ``inputs`` are not used.

        mask: bool [B, T], the ``Batch.mask`` of training: the bound is that of the targets where it is True,
        given the others.
        """
        given = mask is not None
        return {
            k: -bound(self, targets, k, mask=mask, always_given=given, seed=seed, num_draws=num_draws)
            for k in num_steps
        }

    def answer(
        self, inputs: Tensor, num_steps: Sequence[int], draws: Draws = DEFAULT_DRAWS
    ) -> dict[int, Tensor]:
        """K unmasking steps in the order of ``draws``; inputs are rows of ``FilledIn`` with the mask's id at every
        answer that counts."""
        return {k: self._unmasked(inputs, k, draws) for k in num_steps}

    def _unmasked(self, inputs: Tensor, num_steps: int, draws: Draws) -> Tensor:
        greedy, order = SamplingParams(temperature=0), draws.order
        return unmask(
            self,
            inputs,
            num_steps,
            greedy,
            seed=draws.seed,
            order=order,
            first=draws.first,
            always_given=True,
        )
