"""Floating-point operations of one position, by part of the network: what usage reports, counted once when a
model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rdlm.config.model import RopeScaling
from rdlm.nn.attention import rotary_table
from rdlm.objectives import Objective


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of one pass through a part; a multiplication and an addition are two. Norms, gates and the like
    are left out, as is usual."""

    weights: int
    """FLOPs in the matrices, for each position."""
    scores: int
    """FLOPs in attention, for each position that a position sees, itself included."""

    def of(self, seen: int, length: int) -> int:
        """FLOPs of ``length`` positions in a row, the first of which sees ``seen`` before itself."""
        return length * self.weights + (length * seen + length * (length + 1) // 2) * self.scores

    def of_all(self, length: int) -> int:
        """FLOPs of ``length`` positions that all see each other."""
        return length * self.weights + length * length * self.scores


@dataclass(frozen=True, slots=True)
class Costs:
    """Costs of the parts of one denoiser. condition: what conditioning on a noise level adds to a core step;
    head: one read-out."""

    encode: Cost
    core: Cost
    decode: Cost
    condition: int
    head: int


class _Tally:
    """Attention context of a single row that counts what it is asked for instead of attending."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.weights, self.scores = device, 0, 0

    def positions(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.long, device=self.device)

    def rope(self, num_dims: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
        return rotary_table(num_dims, base, 1, self.device, scaling)[None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        self.scores += 4 * q.shape[2] * q.shape[3]  # q k^T and its product with v, over all heads
        return q

    def add(self, module: nn.Module, *_: object) -> None:
        assert isinstance(module, nn.Linear)
        self.weights += 2 * module.in_features * module.out_features


@torch.inference_mode()
def costs_of(denoiser: Objective) -> Costs:
    """One row is sent through each part, and the matrices it meets are counted."""
    model = denoiser.model
    device = model.head.weight.device
    tally = _Tally(device)
    hooks = [
        module.register_forward_hook(tally.add) for module in model.modules() if isinstance(module, nn.Linear)
    ]
    found: list[Cost] = []

    def count(part: Callable[[], Tensor]) -> Tensor:
        tally.weights = tally.scores = 0
        out = part()
        found.append(Cost(tally.weights, tally.scores))
        return out

    try:
        e = count(lambda: model.encode(torch.zeros(1, 1, dtype=torch.long, device=device), tally))
        tally.weights = 0
        cond = denoiser.condition(None, e)
        condition = tally.weights
        state = count(lambda: model.core(model.initial_state(e, num_steps=1), e, cond, tally))
        count(lambda: model.decode(state, tally))
    finally:
        for hook in hooks:
            hook.remove()
    encode, core, decode = found
    return Costs(encode, core, decode, condition, head=2 * model.head.weight.numel())
