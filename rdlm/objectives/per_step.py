"""A weighted sum of the cross-entropies after every core run: deep supervision over K."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.diffusion.corruption import Noised
from rdlm.nn.attention import AttentionContext
from rdlm.objectives.base import Keys, LossTerms, ReadOut
from rdlm.objectives.next_token import STATE_KEY, NextToken, mean_depth, mean_of

WEIGHTS: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda t, r: 1 / r,
    "linear": lambda t, r: 2 * t / (r * (r + 1)),
    "last": lambda t, r: float(t == r),
}
"""(run t = 1 .. r, r) -> weight of the cross-entropy after it; they add up to 1."""


class EveryStep(NextToken):
    """What objectives share that read out after every core run.

    Gradient reaches the core through the runs inside of ``depth.grad_steps`` only; coda, read-out and exit gate
    learn from all of them.
    """

    def step_losses(
        self,
        state: Tensor,
        ctx: AttentionContext,
        batch: Batch,
        noised: Noised | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies of the states [n, T, S] of the first n sequences, and each of
        them, without gradient: weight [n, T] -> (scalar, [n, T]) fp32."""
        count = len(state)
        hidden = self.model.decode(state, ctx).flatten(0, 1)
        first = None if noised is None else noised.first(count)
        targets = batch.targets[:count].flatten()
        total, losses = self.cross_entropy(hidden, targets, weight.flatten(), first)
        return total, losses.view(weight.shape)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        noised = self.noised_without_values(inputs)
        losses: list[Tensor] = []

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            losses.append(self.read_traced(self.model.decode(state, ctx), noised, read_out))

        self.run_core(inputs, noised, [num_steps] * len(inputs), torch.Generator(), on_step=read)
        return torch.stack(losses).sum()


class PerStep(EveryStep):
    """The cross-entropy after run t of r weighs ``WEIGHTS[weights](t, r)``."""

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        noised, depths = self.corrupt(batch.targets, self.noise_stream(keys)), self.depths(batch, keys)
        whole, share = self.position_weights(batch, noised), WEIGHTS[self.settings.weights]
        totals: list[Tensor] = []
        last: dict[str, Any] = {}

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            left = depths[0] - k
            shares = staged(torch.tensor([share(r - left, r) for r in depths[: len(state)]]), state.device)
            if not left or any(share(r - left, r) for r in depths[: len(state)]):
                weight = whole[: len(state)] * shares.unsqueeze(1)
                total, last["losses"] = self.step_losses(state, ctx, batch, noised, weight)
                totals.append(total)

        self.run_core(batch.inputs, noised, depths, keys.stream(STATE_KEY), batch.documents, read)
        metrics = {
            "core_steps": mean_depth(depths),
            "ce": mean_of(last["losses"].flatten(), batch.counted.flatten()),
        }
        return LossTerms(torch.stack(totals).sum(), batch.mask.sum().float(), metrics)
