"""Training objectives: one function with two dials, and the published two-stream form. No loop, no optimizer.

Dial one, ``objective.depth``: how often the core runs (r) and how many of those runs carry gradient.
Dial two, ``objective.corruption``: which positions start from a noised copy of their target, and at which level sigma.

| name        | r                          | gradient | noised positions | K at inference | normalised likelihood        |
|-------------|----------------------------|----------|------------------|----------------|------------------------------|
| next_token  | 1                          | all      | none             | thinking (1)   | logits at K                  |
| bptt        | 1 + Poisson(LogNormal(32)) | last 8   | none             | thinking       | logits at K                  |
| onestep     | 1 + Poisson(LogNormal)     | last 1   | none             | thinking       | logits at K                  |
| single_pass | 1 + Poisson(LogNormal)     | last 1   | a share          | thinking       | logits at K with z = 0       |
| evidence    | 1                          | all      | most             | sampling       | logits at sigma_max, z = 0   |
| paper       | 1                          | all      | all (2 streams)  | sampling       | logits at sigma_max, z = 0   |
| masked      | 1                          | all      | some are hidden  | sampling       | none; a bound on sequences   |

Each makes one backward pass through at most ``grad_steps`` core runs and minimises the cross-entropy of the next token given
clean context (and, where noised, z = y + sigma eps of that token): a mixture over sigma and r of proper scoring rules.

``masked`` is no next-token objective: see ``masked_terms``. Of images, ``classify`` is ``next_token`` with the class of an image as the
one target, ``paper`` and ``evidence`` noise the row of that class, ``edm`` denoises the image: see ``edm_terms``, and
``forward_forward`` is a baseline without a backward pass from layer to layer.

Shapes: B sequences, T positions, D width. Row i predicts targets[i] and may see targets[j >= i] in no way but through its own z_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rdlm.config.checkpoint import CorruptionConfig, DepthConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.masking import LinearMasking, hide, spread
from rdlm.diffusion.noise import edm_weight
from rdlm.diffusion.partition import partition
from rdlm.diffusion.samplers import run
from rdlm.nn.attention import TwoStreamContext
from rdlm.objectives.denoiser import Denoiser
from rdlm.objectives.forward_forward import ForwardForward, goodness_loss
from rdlm.objectives.image_denoiser import ImageDenoiser
from rdlm.objectives.masked_denoiser import MaskedDenoiser
from rdlm.random_streams import generator

_DEPTH_KEY, _NOISE_KEY, _STATE_KEY = 1, 2, 3


@dataclass(frozen=True)
class LossTerms:
    """total: sum of weighted losses, fp32 scalar. count: positions summed, fp32 scalar. metrics: detached scalars."""

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Noised:
    """z [B, T, D] fp32, zero where not noised; sigma [B, T] fp32, sigma_max there; is_noised [B, T] bool."""

    z: Tensor
    sigma: Tensor
    is_noised: Tensor


def num_recurrences(depth: DepthConfig, step: int, seed: int) -> int:
    """r of one optimizer step: a pure function of (step, seed), the same on every rank and micro-batch.

    lognormal_poisson: 1 + Poisson(rate), log rate ~ N(log mean - spread^2/2, spread^2) (Geiping et al. 2025, Sec. 3.3; the code
    adds the 1, so a mean of 32 runs 33 times on average).
    """
    if depth.distribution == "fixed":
        return min(depth.mean, depth.max_steps)
    rng = np.random.default_rng([seed & 0xFFFF_FFFF_FFFF_FFFF, _DEPTH_KEY, step])
    if depth.distribution == "uniform":
        drawn = int(rng.integers(1, 2 * depth.mean))
    else:
        drawn = 1 + int(rng.poisson(rng.lognormal(np.log(depth.mean) - depth.spread**2 / 2, depth.spread)))
    return min(drawn, depth.max_steps)


def draw_levels(
    corruption: CorruptionConfig, denoiser: Denoiser, shape: tuple[int, int], rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(sigma [B, T] fp32, is_noised [B, T] bool); sigma is sigma_max where not noised."""
    rows = shape if corruption.per == "position" else (shape[0], 1)
    is_noised = torch.rand(rows, generator=rng) < corruption.share
    if denoiser.block is not None:
        sigma = denoiser.block.sample_level(rows, rng)
    elif corruption.distribution == "lognormal":
        sigma = partition(denoiser.noise, 1, 1).sample_level(0, rows, rng)
    else:
        use_low = torch.rand(rows, generator=rng) < 0.5
        bands = torch.tensor([corruption.high_band, corruption.low_band]).log()[use_low.long()]  # [..., 2]
        sigma = (bands[..., 0] + torch.rand(rows, generator=rng) * (bands[..., 1] - bands[..., 0])).exp()
    sigma = torch.where(is_noised, sigma, torch.tensor(denoiser.noise.sigma_max))
    return sigma.expand(shape), is_noised.expand(shape)


def corrupt(denoiser: Denoiser, targets: Tensor, rng: torch.Generator) -> Noised | None:
    """Noise the targets as the objective asks; None where it asks for none."""
    corruption = denoiser.objective.corruption
    if corruption.share == 0:
        return None
    shape = (targets.shape[0], targets.shape[1])
    sigma, is_noised = (t.to(targets.device) for t in draw_levels(corruption, denoiser, shape, rng))
    y = denoiser.clean(targets)
    noise = torch.randn(y.shape, generator=rng).to(y.device)
    z = torch.where(is_noised.unsqueeze(-1), y + sigma.unsqueeze(-1) * noise, torch.zeros_like(y))
    return Noised(z, sigma, is_noised)


def loss_terms(
    denoiser: Denoiser, batch: Batch, *, step: int, seed: int, rank: int = 0, micro: int = 0
) -> LossTerms:
    """The loss of one micro-batch under ``denoiser.objective``; its randomness depends on (seed, step, rank, micro)
    and the block alone."""
    which = () if denoiser.block is None else (denoiser.block.index,)
    noise_rng = generator(seed, _NOISE_KEY, step, rank, micro, *which)
    if isinstance(denoiser, MaskedDenoiser):
        return masked_terms(denoiser, batch, noise_rng)
    if isinstance(denoiser, ImageDenoiser):
        return edm_terms(denoiser, batch, noise_rng)
    if isinstance(denoiser, ForwardForward):
        return forward_forward_terms(denoiser, batch, noise_rng)
    noised = corrupt(denoiser, batch.targets, noise_rng)
    num_steps = num_recurrences(denoiser.objective.depth, step, seed)
    if denoiser.two_streams:
        assert noised is not None
        hidden = two_stream_hidden(denoiser, batch.inputs, noised.z, noised.sigma)
    else:
        state_rng = generator(seed, _STATE_KEY, step, rank, micro)
        hidden = in_place_hidden(denoiser, batch.inputs, noised, num_steps, state_rng)
    return _reduce(denoiser, hidden, batch, noised, num_steps)


def masked_terms(denoiser: MaskedDenoiser, batch: Batch, rng: torch.Generator) -> LossTerms:
    """Masked diffusion (MD4, Shi et al. 2024, Sec. 3; DiffusionBlocks Eq. 8): -alpha'/(1 - alpha) times the cross-entropy of each hidden
    token, one level a sequence. Over all levels its expectation is the bound in continuous time, in nats, less what lies below t_min.

    What is modelled is the sequence ``targets`` itself, all T of them at once: ``input_ids`` are not looked at, so the first target has
    no predecessor in sight. Positions outside ``batch.mask`` are never hidden and never count, in the level neither: it is the share that
    is hidden of the others (``always_given`` of rdlm/diffusion/unmasking.py).
    """
    masking = denoiser.objective.masking
    assert masking is not None
    schedule, uniform = LinearMasking(masking), spread(len(batch.targets), rng)
    level = schedule.icdf(uniform).float() if denoiser.block is None else denoiser.block.levels_at(uniform)
    hidden_ones = hide(level, batch.mask, rng)
    hidden = denoiser.hidden(batch.targets.masked_fill(hidden_ones, denoiser.mask_id), level)
    weight = schedule.weight(level).to(hidden.device).unsqueeze(1).expand(hidden_ones.shape)
    total, losses = denoiser.loss(hidden[hidden_ones], batch.targets[hidden_ones], weight[hidden_ones])
    metrics = {
        "core_steps": torch.ones(()),
        "ce": losses.sum() / max(1, len(losses)),
    }  # a tiny batch may hide nothing
    return LossTerms(total, batch.mask.sum().float(), metrics)


def edm_terms(denoiser: ImageDenoiser, batch: Batch, rng: torch.Generator) -> LossTerms:
    """Weighted squared error of the denoised image, mean over its values (Karras et al. 2022, Eq. 8; DiffusionBlocks Eq. 6).

    One level an image. ``label_dropout`` of the images are denoised without their class (Ho and Salimans 2022).
    """
    images, classes = batch.inputs, batch.targets[:, 0]
    sigma = draw_levels(denoiser.objective.corruption, denoiser, (len(images), 1), rng)[0][:, 0].to(
        images.device
    )
    untold = torch.rand(len(images), generator=rng) < denoiser.objective.label_dropout
    classes = classes.masked_fill(untold.to(classes.device), denoiser.no_class)
    noise = torch.randn(images.shape, generator=rng).to(images.device)
    x0 = denoiser.estimate(images + sigma.view(-1, 1, 1, 1) * noise, sigma, classes)
    losses = (x0 - images).square().flatten(1).mean(1)  # [B]
    weight = batch.mask[:, 0].float()
    if denoiser.objective.loss_weighting == "edm":
        weight = weight * edm_weight(sigma, denoiser.noise.sigma_data)
    metrics = {"core_steps": torch.ones(()), "squared_error": losses.detach().mean()}
    return LossTerms((losses * weight).sum(), batch.mask.sum().float(), metrics)


def forward_forward_terms(denoiser: ForwardForward, batch: Batch, rng: torch.Generator) -> LossTerms:
    """Every layer tells an image beside its class from the same image beside another one, drawn evenly (Hinton 2022, Sec. 3.3)."""
    right, kind = batch.targets[:, 0], denoiser.objective.goodness
    assert kind is not None
    others = denoiser.model.vocab_size - 1
    wrong = (right + 1 + torch.randint(others, right.shape, generator=rng).to(right.device)) % (others + 1)
    both = denoiser.goodness(torch.cat([batch.inputs, batch.inputs]), torch.cat([right, wrong]))
    good, bad = both.split(len(right), 1)
    losses = goodness_loss(good, bad, kind) * batch.mask[:, 0].float()
    metrics = {"core_steps": torch.ones(()), "goodness_gap": (good - bad).detach().mean()}
    return LossTerms(losses.sum(), batch.mask.sum().float(), metrics)


def in_place_hidden(
    denoiser: Denoiser, inputs: Tensor, noised: Noised | None, num_steps: int, rng: torch.Generator
) -> Tensor:
    """Hidden states [B, T, D] after r core steps, the noised target standing in the recurrent state's place at the start.

    z_j of a past position reveals only token j + 1, which position i > j reads in clean form anyway: nothing leaks.
    """
    model = denoiser.model
    ctx = model.context(inputs)
    e = model.encode(inputs, ctx)
    state = model.initial_state(e, rng)
    levels = None if noised is None else noised.sigma
    if levels is not None and denoiser.objective.corruption.per == "sequence":
        levels = levels[:, :1]  # one level a sequence: the layers are told once, not at every position
    cond = denoiser.condition(levels, e)
    if noised is not None:
        state = torch.where(noised.is_noised.unsqueeze(-1), denoiser.inject(noised.z, noised.sigma), state)
    state = run(
        lambda s, _: denoiser.step(s, e, cond, ctx),
        state,
        num_steps,
        grad_steps=denoiser.objective.depth.grad_steps,
    )
    return model.decode(state, ctx)


def two_stream_hidden(
    denoiser: Denoiser, input_ids: Tensor, z: Tensor | None, sigma: Tensor | None, sees_own_clean: bool = True
) -> Tensor:
    """Hidden states [B, T, D] of the noisy stream beside a clean one (DiffusionBlocks App. E.4): one pass over 2T rows.

    Both streams inject the same clean prelude states; the clean stream is read at sigma_max with z = 0: its keys know no noise.
    z, sigma: [B, T, D] and [B, T], or None for z = 0 at sigma_max.
    """
    model, length = denoiser.model, input_ids.shape[1]
    e = model.encode(input_ids, model.context(input_ids))
    quiet = torch.zeros_like(e)
    noisy = quiet if z is None or sigma is None else denoiser.inject(z, sigma)
    ctx = TwoStreamContext(length, sees_own_clean, input_ids.device)
    sigma_max = torch.full(input_ids.shape, denoiser.noise.sigma_max, device=input_ids.device)
    cond = denoiser.condition(torch.cat([sigma_max, sigma_max if sigma is None else sigma], 1), e)
    state = denoiser.step(torch.cat([quiet, noisy], 1), torch.cat([e, e], 1), cond, ctx)
    return model.decode(state, ctx)[:, length:]


def _reduce(
    denoiser: Denoiser, hidden: Tensor, batch: Batch, noised: Noised | None, num_steps: int
) -> LossTerms:
    weight = batch.mask.float()
    if denoiser.objective.loss_weighting == "edm" and noised is not None:
        weight = weight * edm_weight(noised.sigma, denoiser.noise.sigma_data)
    z, sigma = (None, None) if noised is None else (noised.z.flatten(0, 1), noised.sigma.flatten())
    total, losses = denoiser.loss(hidden.flatten(0, 1), batch.targets.flatten(), weight.flatten(), z, sigma)
    counted = batch.mask.flatten()
    metrics = {"core_steps": torch.tensor(float(num_steps)), "ce": losses[counted].mean()}
    if noised is not None:
        flags = noised.is_noised.flatten()
        for name, chosen in (("ce_prior", counted & ~flags), ("ce_noised", counted & flags)):
            if bool(chosen.any()):
                metrics[name] = losses[chosen].mean()
    return LossTerms(total, batch.mask.sum().float(), metrics)
