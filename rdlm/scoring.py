"""The one likelihood path: token log-probabilities at several K for the price of the largest.

Which numbers are likelihoods:
- thinking models: softmax of the logits after K core steps from z = 0. Normalised at every K.
- sampling models (evidence, paper): softmax of the logits at sigma_max with z = 0 is normalised and deterministic; that is K = 1.
  For K > 1 the law of the token drawn last is a mixture over noise and earlier draws, which ``num_draws`` paths estimate. The
  estimate is normalised but biased (by Jensen its logarithm is too low), so it is reported as a mixture, never as the likelihood.
- masked models: one token a step from left to right the likelihood is exact, of K steps in random order there is a bound on that of a
  whole row (both in rdlm/diffusion/masked_likelihood.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.masked_likelihood import bound
from rdlm.diffusion.samplers import hard_bridge_chain, renoise, run, sampling_levels
from rdlm.nn.attention import AttentionContext
from rdlm.objectives.denoiser import Denoiser, Prediction
from rdlm.objectives.forward_forward import ForwardForward
from rdlm.objectives.losses import two_stream_hidden
from rdlm.random_streams import generator

LOGITS_AT_ONCE = 1 << 24
"""Read-out rows are processed in chunks of at most this many logits (64 MiB of fp32)."""


def estimator_of(
    config: CheckpointConfig, num_steps: int, num_draws: int | None = None, *, in_order: bool = False
) -> str:
    """Name of what ``token_logprobs`` returns at K = num_steps; in_order: of ``masked_likelihood.left_to_right``, at any K."""
    if in_order or config.objective.goodness is not None:
        return config.estimator
    if config.objective.masking is not None:
        drawn = (
            "exact"
            if num_steps == 1
            else "stratified draws"
            if num_draws is None
            else f"{num_draws} stratified draws"
        )
        return f"upper bound of the NLL, not its value: K = {num_steps} unmasking steps, {drawn}"
    if config.objective.k_meaning == "thinking":
        return f"normalised: logits after K = {num_steps} core steps"
    return (
        "normalised: logits at sigma_max with z = 0"
        if num_steps == 1
        else f"mixture over noise draws at K = {num_steps} (biased upward in NLL)"
    )


@dataclass(frozen=True)
class TokenScores:
    """logprobs [B, T] fp32: log p of the targets. is_greedy [B, T] bool: whether the target is the arg max (of a mixture over draws:
    whether its probability exceeds 1/2, which is enough but not necessary)."""

    logprobs: Tensor
    is_greedy: Tensor


@torch.no_grad()
def token_scores(
    denoiser: Denoiser,
    config: CheckpointConfig,
    input_ids: Tensor,
    targets: Tensor,
    ks: Sequence[int],
    *,
    seed: int = 0,
    num_draws: int = 8,
) -> dict[int, TokenScores]:
    """Scores of targets[i] given input_ids[<= i] at each K in ``ks``: input_ids, targets [B, T] int64.

    One pass to max(ks) for thinking models. See the module docstring for what the numbers are; ``estimator_of`` names them.
    UserError for masked models: theirs are ``rdlm.diffusion.masked_likelihood.left_to_right``'s, of rows that stand by themselves.
    """
    config.check_next_token("a score of each token")
    if config.objective.k_meaning == "thinking":
        return _thinking(denoiser, input_ids, targets, ks, seed)
    return {
        k: _at_prior(denoiser.at(None), input_ids, targets)
        if k == 1
        else _mixture(denoiser, config, input_ids, targets, k, seed, num_draws)
        for k in ks
    }


def token_logprobs(
    denoiser: Denoiser,
    config: CheckpointConfig,
    input_ids: Tensor,
    targets: Tensor,
    ks: Sequence[int],
    *,
    mask: Tensor | None = None,
    seed: int = 0,
    num_draws: int = 8,
) -> dict[int, Tensor]:
    """The ``logprobs`` of ``token_scores`` alone: {K: [B, T] fp32}.

    Of masked models: terms whose sum over a row is an estimate of a lower bound of log p(targets); they do not see ``input_ids``.
    mask: bool [B, T], the ``Batch.mask`` of their training: the bound is that of the targets where it is True, given the others.
    """
    if config.objective.masking is not None:
        given = mask is not None
        return {
            k: -bound(denoiser, targets, k, mask=mask, always_given=given, seed=seed, num_draws=num_draws)
            for k in ks
        }
    found = token_scores(denoiser, config, input_ids, targets, ks, seed=seed, num_draws=num_draws)
    return {k: scores.logprobs for k, scores in found.items()}


@torch.no_grad()
def class_scores(denoiser: Denoiser, images: Tensor, classes: Tensor) -> TokenScores:
    """Log p of the classes [B, 1] of images [B, C, H, W] after one pass at z = 0: normalised, that is K = 1."""
    if isinstance(denoiser, ForwardForward):
        logits = denoiser.class_logits(images)
        return TokenScores(
            logits.log_softmax(1).gather(1, classes), logits.argmax(1, keepdim=True) == classes
        )
    return _at_prior(denoiser.at(None), images, classes)


@torch.no_grad()
def think(
    denoiser: Denoiser,
    inputs: Tensor,
    num_steps: int,
    seed: int,
    on_step: Callable[[int, Tensor, AttentionContext], None],
) -> None:
    """Core steps of a thinking model from z = 0 over whole rows [B, T]; on_step(k, state [B, T, D], ctx) after each, k = 1, 2, ..

    ``denoiser.predict(denoiser.model.decode(state, ctx)).prior`` are the logits at K = k.
    """
    model = denoiser.model
    ctx = model.context(inputs)
    e = model.encode(inputs, ctx)
    cond = denoiser.condition(None, e)
    start = model.initial_state(e, generator(seed))
    run(
        lambda s, _: denoiser.step(s, e, cond, ctx),
        start,
        num_steps,
        on_step=lambda k, state: on_step(k, state, ctx),
    )


def _thinking(
    denoiser: Denoiser, inputs: Tensor, targets: Tensor, ks: Sequence[int], seed: int
) -> dict[int, TokenScores]:
    wanted, out = set(ks), {}

    def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
        if k in wanted:
            out[k] = _gather(denoiser, denoiser.model.decode(state, ctx), targets)

    think(denoiser, inputs, max(wanted), seed, read)
    return {k: out[k] for k in ks}


def _gather(denoiser: Denoiser, hidden: Tensor, targets: Tensor) -> TokenScores:
    """Softmax of the prior logits at the targets, a chunk of rows at a time. [B, T, D], [B, T] -> [B, T]."""
    rows, ids = hidden.flatten(0, 1), targets.flatten()
    chunk = max(1, LOGITS_AT_ONCE // denoiser.model.vocab_size)
    parts, hits = [], []
    for part, index in zip(rows.split(chunk), ids.split(chunk), strict=True):
        logits = denoiser.predict(part).prior
        parts.append(logits.gather(1, index.unsqueeze(1)).squeeze(1) - logits.logsumexp(1))
        hits.append(logits.argmax(1) == index)
    return TokenScores(torch.cat(parts).view(targets.shape), torch.cat(hits).view(targets.shape))


def _at_prior(denoiser: Denoiser, inputs: Tensor, targets: Tensor) -> TokenScores:
    model = denoiser.model
    if denoiser.two_streams:
        return _gather(denoiser, two_stream_hidden(denoiser, inputs, None, None), targets)
    ctx = model.context(inputs)
    e = model.encode(inputs, ctx)
    state = denoiser.step(model.initial_state(e), e, denoiser.condition(None, e), ctx)
    return _gather(denoiser, model.decode(state, ctx), targets)


def _mixture(
    denoiser: Denoiser,
    config: CheckpointConfig,
    input_ids: Tensor,
    targets: Tensor,
    num_steps: int,
    seed: int,
    num_draws: int,
) -> TokenScores:
    """log mean over paths of the last level's posterior of the target. Context is always the clean stream."""
    beside = config.objective.name == "paper"
    paths = []
    for draw_index in range(num_draws):
        rng = generator(seed, draw_index)

        def predict(z: Tensor | None, sigma: float | None) -> Prediction:
            levels = None if sigma is None else torch.full(input_ids.shape, sigma, device=input_ids.device)
            owner = denoiser.at(sigma)
            hidden = two_stream_hidden(owner, input_ids, z, levels, sees_own_clean=beside)
            return owner.predict(hidden, z, levels)

        def draw(prediction: Prediction, rng: torch.Generator = rng) -> Tensor:
            logits = prediction.logits()
            uniform = torch.rand(logits.shape, generator=rng).clamp_(1e-9, 1 - 1e-7).to(logits.device)
            return (logits - (-uniform.log()).log()).argmax(-1)  # Gumbel-max

        def again(ids: Tensor, sigma: float, rng: torch.Generator = rng) -> Tensor:
            shape = (*ids.shape, config.model.d_model)
            noise = torch.randn(shape, generator=rng).to(ids.device)
            return renoise(denoiser.at(sigma), ids, torch.full(ids.shape, sigma), noise)

        _, last = hard_bridge_chain(predict, draw, again, sampling_levels(config, num_steps))
        logits = last.logits()
        paths.append(logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(2))
    logprobs = torch.stack(paths).logsumexp(0) - math.log(num_draws)
    return TokenScores(logprobs, logprobs > math.log(0.5))
