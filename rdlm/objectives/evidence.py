"""Objectives whose models draw a token through K noise levels: ``evidence``, and DiffusionBlocks as published
(``paper``). Shapes and how they are trained: see rdlm/objectives/next_token.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from rdlm.diffusion.corruption import Noised, noised_everywhere
from rdlm.diffusion.partition import partition_of
from rdlm.diffusion.samplers import StepPlan, expected_target, ode_chain, renoise_chain, sampler_named
from rdlm.diffusion.schedules import denoise_scalings, schedule_of
from rdlm.objectives.base import DEFAULT_DRAWS, Draws, Prediction, TokenScores
from rdlm.objectives.next_token import NextToken, renoise
from rdlm.random_streams import generator


class Evidence(NextToken):
    """One core run; K noise levels at inference, with a token drawn at each.

    z = 0 at sigma_max (K = 1) is a normalised likelihood. For K > 1 the law of the token drawn last is a
    mixture over noise and earlier draws, which ``num_draws`` paths estimate. That estimate is normalised but
    biased (by Jensen its logarithm is too low).
    """

    def sampling_levels(self, num_steps: int) -> list[float | None]:
        """Noise levels of ``num_steps`` network calls, noisiest first; the first is z = 0 (None).

        They are the schedule's grid, or that of the partition where the network is cut into blocks.
        """
        cut = partition_of(self.config)
        grid = cut.grid(num_steps) if cut.num_blocks > 1 else schedule_of(self.config).grid(num_steps)
        return [self.readout_level, *grid[1:]]

    @property
    def readout_level(self) -> float | None:
        """The level at which z = 0 is read; None is sigma_max."""
        if self.settings.readout_quantile == 1:
            return None
        quantile = torch.tensor(self.settings.readout_quantile, dtype=torch.float64)
        return float(schedule_of(self.config).icdf(quantile))

    def read_at_zero(self, inputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(z, sigma) of a read-out without a noised target: [B, T, D] zeros and [B, T], or None for both at
        sigma_max."""
        return self._zero_at(self.model.target_shape(inputs), self.readout_level, inputs.device)

    def _zero_at(
        self, shape: tuple[int, int], level: float | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        if level is None:
            return None, None
        z = torch.zeros(*shape, self.config.model.d_model, device=device)
        return z, torch.full(shape, level, device=device)

    def step_plan(self, num_steps: int) -> StepPlan:
        """K noise levels. Every block in use first fills its own cache at z = 0.

        Block 0 comes last of these: in place, its first prediction is itself the pass that fills its cache.
        With two streams a clean pass fills every cache, then each level is a noisy row that also sees the
        clean one.
        """
        k, cut = num_steps, partition_of(self.config)
        levels = self.sampling_levels(k)
        owners = [cut.block_of(level) for level in levels]
        fills = [block for block in sorted(set(owners), reverse=True) if block or self.sees_own_clean]
        committing = len(fills) + (not self.sees_own_clean)
        count = len(fills) + k
        return StepPlan(
            (None,) * len(fills) + tuple(levels), (True,) * count, (True,) * committing + (False,
                ) * (count - committing),
            (*fills, *owners), append_own=self.sees_own_clean, num_draws_skipped=len(fills),
        )  # fmt: skip

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
        return {
            k: cast(Evidence, self.at(None)).score_at_prior(inputs, targets, documents)
            if k == 1
            else self._mixture(inputs, targets, k, seed, num_draws, documents)
            for k in num_steps
        }

    def score_at_prior(self, inputs: Tensor, targets: Tensor, documents: Tensor | None = None) -> TokenScores:
        """Normalised scores of the network that owns sigma_max, at z = 0."""
        z, sigma = self.read_at_zero(inputs)
        if self.two_streams:
            hidden = self.two_stream_hidden(inputs, z, sigma, documents=documents)
            return self.read_scores(hidden, targets, z, sigma)
        model = self.model
        ctx = model.context(inputs, documents)
        e = model.encode(inputs, ctx)
        state = model.core(model.initial_state(e), e, self.condition(sigma, e), ctx)
        return self.read_scores(model.decode(state, ctx), targets, z, sigma)

    def _mixture(
        self,
        inputs: Tensor,
        targets: Tensor,
        num_steps: int,
        seed: int,
        num_draws: int,
        documents: Tensor | None,
    ) -> TokenScores:
        """log mean over paths of the last level's posterior of the target. Context is always the clean
        stream."""
        paths = []
        for draw_index in range(num_draws):
            rng = generator(seed, draw_index)

            def predict(z: Tensor | None, sigma: float | None) -> Prediction:
                zeros, levels = self._zero_at(self.model.target_shape(inputs), sigma, inputs.device)
                z = zeros if z is None else z
                owner = cast(Evidence, self.at(sigma))
                hidden = owner.two_stream_hidden(inputs, z, levels, self.sees_own_clean, documents)
                return owner.predict(hidden, z, levels)

            def draw(prediction: Prediction, rng: torch.Generator = rng) -> Tensor:
                logits = prediction.logits()
                uniform = torch.rand(logits.shape, generator=rng).clamp_(1e-9, 1 - 1e-7).to(logits.device)
                return (logits - (-uniform.log()).log()).argmax(-1)  # Gumbel-max

            def again(ids: Tensor, sigma: float, rng: torch.Generator = rng) -> Tensor:
                shape = (*ids.shape, self.config.model.d_model)
                eps = torch.randn(shape, generator=rng).to(ids.device)
                return renoise(self.at(sigma), ids, torch.full(ids.shape, sigma, device=ids.device), eps)

            _, last = renoise_chain(predict, draw, again, self.sampling_levels(num_steps))
            logits = last.logits()
            paths.append(logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(2))
        logprobs = torch.stack(paths).logsumexp(0) - math.log(num_draws)
        return TokenScores(logprobs, logprobs > math.log(0.5))

    @torch.no_grad()
    def answer(
        self, inputs: Tensor, num_steps: Sequence[int], draws: Draws = DEFAULT_DRAWS
    ) -> dict[int, Tensor]:
        """K noise levels. With ``renoise`` the arg max of all positions is noised again together in between,
        so that a position may use what earlier positions have answered so far; other samplers follow the
        mean estimate."""
        return {k: self._denoised(inputs, k, draws) for k in num_steps}

    def _denoised(self, inputs: Tensor, num_steps: int, draws: Draws) -> Tensor:
        key = draws.seed, draws.draw
        rng, shape = generator(*key), self.model.target_shape(inputs)
        levels, top, sampler = (
            self.sampling_levels(num_steps),
            self.noise.sigma_max,
            sampler_named(draws.sampler),
        )
        if sampler.starts_from_noise:
            levels = [top, *levels[1:]]

        def predict(z: Tensor | None, sigma: float | None) -> Prediction:
            zeros, level = self._zero_at(shape, sigma, inputs.device)
            z, noised = zeros if z is None else z, None
            if z is not None and level is not None:
                noised = noised_everywhere(z, level)
            owner = cast(Evidence, self.at(sigma))
            return owner.predict(owner.hidden(inputs, noised, [1] * len(inputs), rng), z, level)

        def noise(number: int) -> Tensor:
            size = shape[1], self.config.model.d_model
            rows = [
                torch.randn(size, generator=generator(*key, draws.first + row, number))
                for row in range(shape[0])
            ]
            return torch.stack(rows).to(inputs.device)

        numbers = itertools.count()

        def again(ids: Tensor, sigma: float) -> Tensor:
            level = torch.full(shape, sigma, device=ids.device)
            return renoise(self.at(sigma), ids, level, noise(next(numbers)))

        if sampler.draws_tokens:
            return renoise_chain(predict, lambda p: p.logits().argmax(-1), again, levels)[0]

        def estimate(prediction: Prediction, sigma: float | None) -> Tensor:
            return expected_target(prediction.logits(), cast(Evidence, self.at(sigma)).unit_table())

        start = top * noise(0)
        last = ode_chain(predict, estimate, start, levels, top, sampler, lambda k: noise(k + 1))
        return last.logits().argmax(-1)


class Paper(Evidence):
    """DiffusionBlocks as published (App. E.4): a noisy stream beside the clean one, and the EDM read-out.

    A model that is not causal (ViT) noises the row of its target in place, as in App. B.
    """

    sees_own_clean = True

    @property
    def two_streams(self) -> bool:
        return self.model.is_causal

    def predict(self, hidden: Tensor, z: Tensor | None = None, sigma: Tensor | None = None) -> Prediction:
        return Prediction(self.model.logits(self.denoised(hidden, z, sigma)))

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        noised: Noised | None = None,
    ) -> tuple[Tensor, Tensor]:
        z_and_sigma = (None, None) if noised is None else (noised.dense.flatten(0, 1), noised.sigma.flatten())
        return super().cross_entropy(self.denoised(hidden, *z_and_sigma), targets, weight)

    def denoised(self, hidden: Tensor, z: Tensor | None, sigma: Tensor | None) -> Tensor:
        """c_skip z + c_out F in fp32, returned in the network's dtype; z = 0 at sigma_max where absent."""
        if z is None or sigma is None:
            sigma_max = torch.full((), self.noise.sigma_max, device=hidden.device)
            return hidden * denoise_scalings(sigma_max, self.noise.sigma_data).c_out.to(hidden.dtype)
        c = denoise_scalings(sigma, self.noise.sigma_data)
        return (c.c_skip.unsqueeze(-1) * z + c.c_out.unsqueeze(-1) * hidden.float()).to(hidden.dtype)
