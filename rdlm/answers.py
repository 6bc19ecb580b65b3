"""Answers at every position of a task whose targets are not the input shifted by one (rdlm/tasks.py), against K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rdlm.config import CheckpointConfig
from rdlm.context import AttentionContext
from rdlm.decoding_types import Order, SamplingParams
from rdlm.denoiser import Denoiser, Prediction
from rdlm.objectives import Noised, in_place_hidden, two_stream_hidden
from rdlm.randomness import generator
from rdlm.sampler import hard_bridge_chain, renoise, sampling_levels
from rdlm.scoring import think
from rdlm.unmasking import unmask


@torch.no_grad()
def greedy_answers(
    denoiser: Denoiser, config: CheckpointConfig, input_ids: Tensor, ks: Sequence[int], seed: int = 0, order: Order = "random"
) -> dict[int, Tensor]:
    """Most probable answer at each position: input_ids [B, T] int64 -> {K: [B, T] int64}.

    thinking: arg max after K core steps. sampling: K noise levels, the arg max of all positions re-noised together in between,
    so that a position may use what earlier positions have answered so far. Masked models: K unmasking steps in ``order``; input_ids are
    rows of ``FilledIn`` with the mask's id at every answer that counts.
    """
    if config.objective.masking is not None:
        greedy = SamplingParams(temperature=0)
        return {k: unmask(denoiser, input_ids, k, greedy, seed=seed, order=order, always_given=True) for k in ks}
    if config.objective.k_meaning == "sampling":
        return {k: _denoised(denoiser, config, input_ids, k, seed) for k in ks}
    out, wanted = {}, set(ks)

    def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
        if k in wanted:
            out[k] = denoiser.predict(denoiser.model.decode(state, ctx)).prior.argmax(-1)

    think(denoiser, input_ids, max(wanted), seed, read)
    return out


def _denoised(denoiser: Denoiser, config: CheckpointConfig, input_ids: Tensor, num_steps: int, seed: int) -> Tensor:
    rng, width = generator(seed), denoiser.model.wte.weight.shape[1]

    def predict(z: Tensor | None, sigma: float | None) -> Prediction:
        if z is None or sigma is None:
            levels, noised = None, None
        else:
            levels = torch.full(input_ids.shape, sigma, device=input_ids.device)
            noised = Noised(z, levels, torch.ones_like(input_ids, dtype=torch.bool))
        owner = denoiser.at(sigma)
        if owner.two_streams:
            return owner.predict(two_stream_hidden(owner, input_ids, z, levels), z, levels)
        return owner.predict(in_place_hidden(owner, input_ids, noised, 1, rng), z, levels)

    def again(ids: Tensor, sigma: float) -> Tensor:
        noise = torch.randn((*ids.shape, width), generator=rng).to(ids.device)
        return renoise(denoiser.at(sigma), ids, torch.full(ids.shape, sigma, device=ids.device), noise)

    ids, _ = hard_bridge_chain(predict, lambda p: p.logits().argmax(-1), again, sampling_levels(config, num_steps))
    return ids
