"""The exit gate alone: the second stage of Ouro (Zhu et al. 2025, arXiv 2510.25741, Sec. 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.nn.attention import AttentionContext
from rdlm.objectives.base import Keys, LossTerms, ReadOut
from rdlm.objectives.next_token import STATE_KEY, mean_depth, mean_of
from rdlm.objectives.per_step import EveryStep


class GateOnly(EveryStep):
    """Binary cross-entropy of going on, 1 - lambda_t, against w_t = sigmoid(slope (max(0, CE_{t-1} - CE_t) -
    margin)), the mean over t = 2 .. r. The network only says what CE_t is: no other weight is trained."""

    def is_trained(self, name: str) -> bool:
        return name.startswith("model.exit_gate.")

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        depths, mask = self.depths(batch, keys), batch.mask.float()
        states: list[Tensor] = []
        losses: list[Tensor] = []

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            states.append(state)
            losses.append(self.step_losses(state, ctx, batch, None, mask[: len(state)])[1])

        with torch.no_grad():
            self.run_core(batch.inputs, None, depths, keys.stream(STATE_KEY), batch.documents, read)
        total = torch.zeros_like(mask)
        going_on = torch.zeros_like(mask)
        for earlier, later, state in zip(losses, losses[1:], states[1:], strict=False):
            improved = (earlier - later[: len(earlier)]).clamp_min(0)
            target = torch.sigmoid(self.settings.slope * (improved - self.settings.margin))
            gate = self.model.gate(state[: len(earlier)])
            missing = len(total) - len(earlier)
            loss = F.binary_cross_entropy(gate, 1 - target, reduction="none")
            total = total + F.pad(loss, (0, 0, 0, missing))
            going_on = going_on + F.pad(target, (0, 0, 0, missing))
        checked = staged(torch.tensor([[max(1, r - 1)] for r in depths]), mask.device)
        terms = (mask * total / checked).sum()
        if not terms.requires_grad:  # every r is 1: there is nothing to learn, and yet a backward pass
            terms = terms + 0 * self.model.gate(states[-1][:1, :1]).sum()
        counted = batch.counted.flatten()
        metrics = {
            "core_steps": mean_depth(depths),
            "ce": mean_of(losses[-1].flatten(), counted),
            "continuation_target": mean_of((going_on / checked).flatten(), counted),
        }
        return LossTerms(terms, batch.mask.sum().float(), metrics)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        with torch.no_grad():
            state, _ = self.run_core(inputs, None, [num_steps] * len(inputs), torch.Generator())
        return self.model.gate(state).sum()
