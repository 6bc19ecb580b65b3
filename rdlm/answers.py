"""Answers to what is asked all at once, against K: every position of a task (rdlm/data/synthetic.py), or the class of an image."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.samplers import (
    hard_bridge_chain,
    renoise,
    sampling_levels,
    soft_bridge,
    soft_bridge_chain,
)
from rdlm.diffusion.unmasking import unmask
from rdlm.nn.attention import AttentionContext
from rdlm.objectives.denoiser import Denoiser, Prediction
from rdlm.objectives.forward_forward import ForwardForward
from rdlm.objectives.losses import Noised, in_place_hidden, two_stream_hidden
from rdlm.random_streams import generator
from rdlm.sampling_params import Bridge, Order, SamplingParams
from rdlm.scoring import think


@torch.no_grad()
def greedy_answers(
    denoiser: Denoiser,
    config: CheckpointConfig,
    inputs: Tensor,
    ks: Sequence[int],
    seed: int = 0,
    *,
    order: Order = "random",
    bridge: Bridge = "hard",
    first: int = 0,
    draw: int = 0,
) -> dict[int, Tensor]:
    """Most probable answer to each target: inputs [B, T] int64 -> {K: [B, T] int64}, images [B, C, H, W] -> {K: [B, 1]}.

    thinking: arg max after K core steps. sampling: K noise levels, over hard bridges the arg max of all positions re-noised together
    in between, so that a position may use what earlier positions have answered so far; over soft ones the ODE (``check_bridge``).
    Its noise depends on (seed, draw, number of the row, step), the first row being number ``first``. Masked models: K unmasking steps in
    ``order``; inputs are rows of ``FilledIn`` with the mask's id at every answer that counts.
    """
    if config.objective.masking is not None:
        greedy = SamplingParams(temperature=0)
        return {
            k: unmask(denoiser, inputs, k, greedy, seed=seed, order=order, first=first, always_given=True)
            for k in ks
        }
    if isinstance(denoiser, ForwardForward):
        return dict.fromkeys(ks, denoiser.class_logits(inputs).argmax(1, keepdim=True))
    if config.objective.k_meaning == "sampling":
        return {k: _denoised(denoiser, config, inputs, k, bridge, (seed, draw), first) for k in ks}
    out, wanted = {}, set(ks)

    def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
        if k in wanted:
            out[k] = denoiser.predict(denoiser.model.decode(state, ctx)).prior.argmax(-1)

    think(denoiser, inputs, max(wanted), seed + first, read)
    return out


def _denoised(
    denoiser: Denoiser,
    config: CheckpointConfig,
    inputs: Tensor,
    num_steps: int,
    bridge: Bridge,
    key: tuple[int, int],
    first: int,
) -> Tensor:
    rng, shape = generator(*key), denoiser.model.target_shape(inputs)
    levels, top = sampling_levels(config, num_steps), config.noise.sigma_max
    steps = itertools.count()

    def predict(z: Tensor | None, sigma: float | None) -> Prediction:
        if z is None or sigma is None:
            told, noised = None, None
        else:
            told = torch.full(shape, sigma, device=inputs.device)
            noised = Noised(z, told, torch.ones(shape, dtype=torch.bool, device=inputs.device))
        owner = denoiser.at(sigma)
        if owner.two_streams:
            return owner.predict(two_stream_hidden(owner, inputs, z, told), z, told)
        return owner.predict(in_place_hidden(owner, inputs, noised, 1, rng), z, told)

    def noise() -> Tensor:
        step, size = next(steps), (shape[1], config.model.d_model)
        rows = [torch.randn(size, generator=generator(*key, first + row, step)) for row in range(shape[0])]
        return torch.stack(rows).to(inputs.device)

    def again(ids: Tensor, sigma: float) -> Tensor:
        return renoise(denoiser.at(sigma), ids, torch.full(shape, sigma, device=ids.device), noise())

    if bridge == "hard":
        return hard_bridge_chain(predict, lambda p: p.logits().argmax(-1), again, levels)[0]

    def estimate(prediction: Prediction, sigma: float | None) -> Tensor:
        return soft_bridge(prediction.logits(), denoiser.at(sigma).unit_table())

    return (
        soft_bridge_chain(predict, estimate, top * noise(), levels, top, bridge == "multistep")
        .logits()
        .argmax(-1)
    )
