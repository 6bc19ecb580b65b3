"""Exit criteria: when a position stops before its last core step. One class per criterion, and ``CRITERIA`` lists
them.

Criteria, names and default thresholds are those of Huginn's code (Geiping et al. 2025, arXiv 2502.05171). A
criterion on states compares the states before and after a step and costs nothing. A criterion on predictions
runs coda and head at every check, about half a step. A criterion on a trained exit gate (Ouro, LoopUS) costs
one product with a vector, and is for checkpoints that have such a gate. This module imports torch only where
it computes, so that configs and the HTTP interface can read the table.

Shapes: N rows of states, M rows read out, D d_model, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from rdlm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Memory = Sequence["Tensor | None"]
"""What each row's last check left behind; None before the first."""
MIN_P = 0.1
"""minp-kl treats tokens less likely than this times the likeliest token as noise."""


@dataclass(frozen=True, slots=True)
class ExitRule:
    """A position exits before its K steps once ``criterion`` is satisfied, after ``min_steps`` steps at the
    earliest.

    In a chunk of a prompt all positions must satisfy a criterion on states, the last one a criterion on
    predictions or on the exit gate. Raises UserError.
    """

    criterion: str
    """A name of ``CRITERIA``."""
    threshold: float
    """0 never exits."""
    min_steps: int = 1
    check_every: int = 1
    """Steps between two checks: a criterion on predictions pays for each."""
    prefill: bool = True
    """Whether chunks of the prompt may exit early too."""

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            problem, remedy = "there is no such exit criterion", f"use one of {', '.join(CRITERIA)}"
            raise UserError("exit.criterion", self.criterion, problem, remedy)
        if not self.threshold >= 0:
            raise UserError("exit.threshold", self.threshold, "must be 0 or more", "0 never exits")
        for name in ("min_steps", "check_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"exit.{name}", getattr(self, name), "must be 1 or more", "leave it out for 1"
                )


class Criterion(ABC):
    """Base of the criteria: their description for the API, and when a measured value means that a position
    has settled."""

    name: ClassVar[str]
    default_threshold: ClassVar[float]
    description: ClassVar[str]
    """The value after a step, in the words of the API's documentation."""
    reads: ClassVar[Literal["states", "predictions", "gate"]]
    exits: ClassVar[bool] = True
    """Whether a position may exit, at a threshold and from ``min_steps`` on; otherwise these mean nothing."""

    @classmethod
    def settled(cls, value: float, threshold: float) -> bool:
        """Whether ``value`` lets a position exit. A threshold of 0 never does."""
        return value < threshold

    @classmethod
    def first_check(cls, rule: ExitRule) -> int:
        """Number of the first step (1-based) that is measured."""
        return rule.min_steps


class StateCriterion(Criterion):
    """A criterion on the recurrent state: free."""

    reads = "states"

    @staticmethod
    @abstractmethod
    def measure(before: Tensor, after: Tensor) -> Tensor:
        """States [N, D] before and after a step -> values fp32 [N]."""


class PredictionCriterion(Criterion):
    """A criterion on the next-token distribution: each check costs coda and head."""

    reads = "predictions"

    @classmethod
    def first_check(cls, rule: ExitRule) -> int:
        return (
            rule.min_steps - rule.check_every
        )  # one check earlier: the first comparison needs a prediction before it

    @staticmethod
    @abstractmethod
    def measure(logp: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities [M, V] and what the rows' last checks left -> values [M], and what to remember of
        each row."""


class GateCriterion(Criterion):
    """A criterion on the trained exit gate, which reads the last position's state after every step."""

    reads = "gate"

    @classmethod
    def first_check(cls, rule: ExitRule) -> int:
        return 1

    @staticmethod
    @abstractmethod
    def measure(gates: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """Gate probabilities lambda fp32 [M] and what the rows' last steps left -> values [M], and what to
        remember of each row."""


class LatentDiff(StateCriterion):
    name, default_threshold = "latent-diff", 0.03
    description = "relative change of the state in this step"

    @staticmethod
    def measure(before: Tensor, after: Tensor) -> Tensor:
        """|x' - x| / |x'|; 1 after a first step from zero."""
        import torch

        after = after.float()
        smallest = torch.finfo(torch.float32).tiny
        return (after - before.float()).norm(dim=-1) / after.norm(dim=-1).clamp(min=smallest)


class Cosine(StateCriterion):
    name, default_threshold = "cosine", 1e-3
    description = "1 - cosine of the states before and after"

    @staticmethod
    def measure(before: Tensor, after: Tensor) -> Tensor:
        """1 - cos(x, x'); 1 after a first step from zero."""
        import torch.nn.functional as F

        return 1 - F.cosine_similarity(before.float(), after.float(), dim=-1)


class KL(PredictionCriterion):
    name, default_threshold = "kl", 1e-3
    description = "KL(previous, new) of the prediction, nats"

    @staticmethod
    def measure(logp: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """KL to the distribution of the last check; before the first one it is uniform."""
        import torch

        uniform = logp.new_full(logp.shape[1:], -math.log(logp.shape[1]))
        before = torch.stack([uniform if row is None else row for row in memory])
        return (before.exp() * (before - logp)).sum(-1).clamp(min=0), list(logp)


class MinPKL(PredictionCriterion):
    name, default_threshold = "minp-kl", 1e-5
    description = "the same, with probabilities below a tenth of the largest one set to 1/V"

    @staticmethod
    def measure(logp: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """``KL`` of what min-p keeps: probabilities below 0.1 of the largest count as 1 / V, renormalised."""
        noise = logp < logp.amax(-1, keepdim=True) + math.log(MIN_P)
        return KL.measure(logp.masked_fill(noise, -math.log(logp.shape[1])).log_softmax(-1), memory)


class EntropyDiff(PredictionCriterion):
    name, default_threshold = "entropy-diff", 1e-3
    description = "change of the prediction's entropy, nats"

    @staticmethod
    def measure(logp: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """|H' - H|, from H = 100 before the first check."""
        import torch

        entropy = -(logp.exp() * logp).sum(-1)
        before = torch.stack([entropy.new_tensor(100.0) if row is None else row for row in memory])
        return (entropy - before).abs(), list(entropy)


class ArgmaxStability(PredictionCriterion):
    name, default_threshold = "argmax-stability", 5.0
    description = (
        "consecutive steps with the same most probable token; exits once it is at least the threshold"
    )

    @classmethod
    def settled(cls, value: float, threshold: float) -> bool:
        return 0 < threshold <= value

    @classmethod
    def first_check(cls, rule: ExitRule) -> int:
        return 1  # repeats count from the first step

    @staticmethod
    def measure(logp: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """Remembers (token, repeats)."""
        import torch

        best = logp.argmax(-1)
        before = torch.stack([best.new_tensor([-1, 0]) if row is None else row for row in memory])
        repeats = torch.where(best == before[:, 0], before[:, 1] + 1, 0)
        return repeats.float(), list(torch.stack([best, repeats], dim=1))


class Gate(GateCriterion):
    """Ouro's rule (arXiv 2510.25741): p_u = lambda_u prod_{j<u} (1 - lambda_j); the last step takes the rest,
    so that nothing of it depends on K but which step is the last."""

    name, default_threshold = "gate", 1.0
    description = "cumulated exit probability of the trained gate; exits once it is as large, 1 never"

    @classmethod
    def settled(cls, value: float, threshold: float) -> bool:
        return 0 < threshold < 1 and value >= threshold

    @staticmethod
    def measure(gates: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """Remembers the probability of not having exited, prod (1 - lambda)."""
        import torch

        left = torch.stack([gates.new_ones(()) if row is None else row for row in memory]) * (1 - gates)
        return 1 - left, list(left)


class Halt(GateCriterion):
    """LoopUS' rule "threshold" (arXiv 2605.11011): lambda of this step alone."""

    name, default_threshold = "halt", 0.9
    description = "exit probability of the trained gate in this step; exits once it is larger"

    @classmethod
    def settled(cls, value: float, threshold: float) -> bool:
        return 0 < threshold < value

    @staticmethod
    def measure(gates: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        return gates, list(gates)


class Weighted(GateCriterion):
    """Ouro's use_weighted_exit: no position exits, and a token is drawn from the read-outs of all steps,
    weighted with the exit distribution p_u of ``Gate``, whose last step takes the rest."""

    name, default_threshold = "weighted", 0.0
    description = "none: all steps run, and their logits are mixed with the gate's exit distribution"
    exits = False

    @classmethod
    def settled(cls, value: float, threshold: float) -> bool:
        return False

    @staticmethod
    def measure(gates: Tensor, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """Remembers (probability of not having exited, p_u of this step)."""
        import torch

        before = torch.stack([gates.new_ones(()) if row is None else row[0] for row in memory])
        return gates, list(torch.stack([before * (1 - gates), before * gates], dim=1))


CRITERIA: dict[str, type[Criterion]] = {
    criterion.name: criterion
    for criterion in (LatentDiff, Cosine, KL, MinPKL, EntropyDiff, ArgmaxStability, Gate, Halt, Weighted)
}
"""Every exit criterion by name. Configs, the API's schema, the page and the documentation read this table."""
