"""Network and exit gate together: the first stage of Ouro (Zhu et al. 2025, arXiv 2510.25741, Sec. 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.nn.attention import AttentionContext
from rdlm.objectives.base import Keys, LossTerms
from rdlm.objectives.next_token import STATE_KEY, mean_depth, mean_of
from rdlm.objectives.per_step import EveryStep

SMALLEST = 1e-9
"""Smallest exit probability whose logarithm is taken."""


@dataclass
class Exits:
    """What the runs so far say of each position [n, T]: mass that has not left, and sums over the exits."""

    left: Tensor
    expected: Tensor
    entropy: Tensor
    mean_step: Tensor

    def joined(self, count: int) -> Exits:
        """The exits with the sequences that join in now, which are whole: [count, T]."""
        new = count - len(self.left)
        if new == 0:
            return self
        none = self.left.new_zeros(new, self.left.shape[1])
        whole = torch.ones_like(none)
        return Exits(
            torch.cat([self.left, whole]),
            torch.cat([self.expected, none]),
            torch.cat([self.entropy, none]),
            torch.cat([self.mean_step, none]),
        )


class ExitGate(EveryStep):
    """sum_t p_t CE_t - beta H(p), with p_t = lambda_t prod_{j<t} (1 - lambda_j) and the last run taking the
    rest. Up to a constant the second term is beta KL(p, uniform)."""

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        noised, depths = self.corrupt(batch.targets, self.noise_stream(keys)), self.depths(batch, keys)
        whole, beta = self.position_weights(batch, noised), self.settings.beta
        totals: list[Tensor] = []
        empty = whole[:0]
        exits, last = Exits(empty, empty, empty, empty), empty

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            nonlocal exits, last
            count, before = len(state), depths[0] - k
            exits = exits.joined(count)
            gate = self.model.gate(state) if before else torch.ones_like(exits.left)
            p = exits.left * gate
            # Two gradients: of the network through its cross-entropies, of the gate through their weights.
            total, last = self.step_losses(state, ctx, batch, noised, whole[:count] * p.detach())
            totals.append(total)
            step = staged(torch.tensor([[float(r - before)] for r in depths[:count]]), p.device)
            exits = Exits(
                exits.left * (1 - gate),
                exits.expected + p * last,
                exits.entropy - p * p.clamp_min(SMALLEST).log(),
                exits.mean_step + p.detach() * step,
            )

        self.run_core(batch.inputs, noised, depths, keys.stream(STATE_KEY), batch.documents, read)
        of_gate = whole * (exits.expected - exits.expected.detach())
        entropy = batch.mask * exits.entropy
        total = torch.stack(totals).sum() + of_gate.sum() - beta * entropy.sum()

        def mean(values: Tensor) -> Tensor:
            return mean_of(values.flatten(), batch.counted.flatten())

        metrics = {
            "core_steps": mean_depth(depths),
            "ce": mean(last),
            "ce_expected": mean(exits.expected.detach()),
            "exit_entropy": mean(exits.entropy.detach()),
            "exit_step": mean(exits.mean_step),
        }
        return LossTerms(total, batch.mask.sum().float(), metrics)
