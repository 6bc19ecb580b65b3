"""What every training objective answers: its loss, its scores and predictions, what K means for it.

An objective is a module around a network. Its ``forward`` is the loss of a micro-batch, so that DeepSpeed can
wrap it and ZeRO stage 3 gathers parameters inside it. Everything that training, serving and evaluation need
to know about an objective is a method or an attribute of its class or its config (rdlm/config/objective.py);
nobody else branches on its kind.

Shapes: B examples, T positions (text) or one target (the class of an image), D width, V vocabulary or number
of classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import Noised
from rdlm.diffusion.partition import Block
from rdlm.diffusion.samplers import StepPlan
from rdlm.models.base import Backbone
from rdlm.nn.cross_entropy import linear_cross_entropy
from rdlm.nn.layers import Condition
from rdlm.random_streams import Stream, counter_stream, generator
from rdlm.sampling_params import Order

ReadOut = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
"""(hidden [N, D], precision-weighted z [N, D] or None, target table [V, D] or None) -> a scalar; see
``Objective.traced_loss``."""


NoiseSource = Literal["generator", "counter"]


@dataclass(frozen=True)
class Keys:
    """What the randomness of one micro-batch depends on, besides the block that is trained."""

    seed: int
    step: int
    rank: int = 0
    micro: int = 0
    source: NoiseSource = "generator"
    """What makes many numbers: torch's CPU generator, or a counter on the device of the network."""

    def stream(self, purpose: int, *more: int) -> Stream:
        """The random numbers of this micro-batch for one purpose."""
        make = counter_stream if self.source == "counter" else generator
        return make(self.seed, purpose, self.step, self.rank, self.micro, *more)


@dataclass(frozen=True)
class LossTerms:
    """total: sum of weighted losses, fp32 scalar. count: targets counted, fp32 scalar. metrics: detached
    scalars."""

    total: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class HeldOut:
    """What a held-out evaluation during training asks for: the K to read at, and keys of its random draws."""

    num_steps: tuple[int, ...]
    seed: int = 0
    index: int = 0
    """Number of the batch."""
    denoising: bool = False
    """Measure the training loss at this network's own levels instead: all that a block alone can say."""
    answers: bool = False
    """Give the most probable target at every position instead of a sum: {"K=4": [B, T] int64}."""


@dataclass(frozen=True)
class Draws:
    """How answers are drawn, where anything is drawn."""

    seed: int = 0
    draw: int = 0
    """Which of several draws."""
    first: int = 0
    """Number of the first row."""
    sampler: str = "renoise"
    """Sampler of models that sample through noise levels (rdlm/diffusion/samplers.py)."""
    order: Order = "random"
    """Unmasking order of masked models (rdlm/diffusion/unmasking_plan.py)."""


DEFAULT_DRAWS = Draws()


@dataclass(frozen=True)
class TokenScores:
    """logprobs [B, T] fp32: log p of the targets. is_greedy [B, T] bool: whether the target is the arg max
    (for a mixture over draws: whether its probability exceeds 1/2, which is sufficient and not necessary)."""

    logprobs: Tensor
    is_greedy: Tensor


@dataclass(frozen=True)
class Prediction:
    """Logits over the vocabulary, fp32. ``prior`` is what the network predicts; ``evidence`` what z adds
    (None without z).

    Temperature, top-p, penalties, bias and log-probabilities act on ``prior``, so that they mean the same at
    every K.
    """

    prior: Tensor
    evidence: Tensor | None = None

    def logits(self) -> Tensor:
        """Unnormalised log posterior of the token, [..., V]."""
        return self.prior if self.evidence is None else self.prior + self.evidence


class Objective(nn.Module, ABC):
    """A network and what it is trained to do. Runs single steps; loops live in rdlm/diffusion/samplers.py and
    in the engine."""

    noises_rows: ClassVar[bool] = False
    """Whether what is noised are rows of a table [V, D]."""
    targets: Callable[[torch.device], Tensor] | None = None
    """device -> frozen unit rows [V, D] that are noised; None where the network's own embedding is, or
    nothing."""

    def __init__(self, config: CheckpointConfig, model: Backbone, block: Block | None = None) -> None:
        """block: the range of levels the network is trained on; None for all."""
        super().__init__()
        self.config, self.model, self.block, self.noise = config, model, block, config.noise

    @property
    def settings(self) -> Any:
        """The objective's section of the config."""
        return self.config.objective

    def at(self, sigma: float | None) -> Objective:
        """The network that owns a level: this one, unless the network is cut into blocks
        (rdlm/objectives/blockwise.py)."""
        return self

    @property
    def parts(self) -> Sequence[Objective]:
        """The networks that train independently: this one, or the blocks."""
        return [self]

    # Training -----------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, keys: Keys | None = None, held_out: HeldOut | None = None) -> Any:
        """The loss of a micro-batch as (total, count, metrics), or with ``held_out`` the sums of
        ``evaluate``.

        Plain tuples and dictionaries of tensors, because the hooks of ZeRO stage 3 look for tensors in
        nothing else.
        """
        if held_out is not None:
            return self.evaluate(batch, held_out)
        assert keys is not None
        terms = self.loss(batch, keys)
        return terms.total, terms.count, terms.metrics

    @abstractmethod
    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        """The loss of one micro-batch. Its randomness is a function of ``keys`` and of the block."""

    @abstractmethod
    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        """A loss that allocates what ``loss`` allocates, of inputs without values: for predicting memory
        (train/memory_trace.py)."""

    def evaluate(self, batch: Batch, held_out: HeldOut) -> dict[str, Tensor]:
        """Sums over the batch's targets by name: {"K=4": nats}, {"denoising": loss}, ..."""
        if held_out.denoising:
            return {"denoising": self._denoising(batch, held_out)}
        if held_out.answers:
            found = self.answer(batch.inputs, held_out.num_steps, Draws(held_out.seed))
            return {f"K={k}": ids for k, ids in found.items()}
        scores = self.token_logprobs(
            batch.inputs, batch.targets, held_out.num_steps, mask=batch.mask, documents=batch.documents
        )
        return {f"K={k}": -scores[k][batch.mask].double().sum() for k in held_out.num_steps}

    def _denoising(self, batch: Batch, held_out: HeldOut) -> Tensor:
        """Mean over the blocks of the loss at their own levels, with the same noise at every call."""
        keys = Keys(held_out.seed, 0, 0, held_out.index)
        parts = [part.loss(batch, keys) for part in self.parts]
        totals = [
            terms.metrics["ce"] * terms.count if "ce" in terms.metrics else terms.total for terms in parts
        ]
        return torch.stack(totals).mean()

    def evaluate_classes(self, batch: Batch, held_out: HeldOut) -> dict[str, Tensor]:
        """``evaluate`` of image classifiers: nats at K = 1, and how many classes are right at each K."""
        answers = self.answer(batch.inputs, held_out.num_steps, Draws(held_out.index))
        nats = -self.score(batch.inputs, batch.targets, (1,))[1].logprobs.sum()
        right = {f"accuracy at K={k}": (answers[k] == batch.targets).sum() for k in held_out.num_steps}
        return {"K=1": nats, **right}

    @property
    def own_weights(self) -> dict[str, Tensor]:
        """Initial values of the parameters that the objective has beside its network's."""
        return {}

    def is_trained(self, name: str) -> bool:
        """Whether training may move a parameter; the optimizer freezes the others."""
        return True

    def drops_modulation_activations(self) -> None:
        """Let layers compute their modulation themselves, so that recomputing a layer recomputes it too."""
        self.model.modulates_in_layers = True

    def fix_tables(self) -> None:
        """Keep what is computed from weights alone: they do not change any more."""

    # Evaluation ---------------------------------------------------------------------------------------------

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
        """Log-probability of each target at each K: inputs, targets [B, T]; ``config.objective.estimator_at``
        names the numbers.

        Raises UserError where the objective has no log-probability of a single token.
        """
        self.config.check_next_token("a score of each token")
        raise NotImplementedError

    def token_logprobs(
        self,
        inputs: Tensor,
        targets: Tensor,
        num_steps: Sequence[int],
        *,
        mask: Tensor | None = None,
        seed: int = 0,
        num_draws: int = 8,
        documents: Tensor | None = None,
    ) -> dict[int, Tensor]:
        """Terms [B, T] whose sum over a row is its log-probability, or a bound on it, at each K.

        documents: of rows that are made of several, see Batch.
        """
        found = self.score(inputs, targets, num_steps, seed=seed, num_draws=num_draws, documents=documents)
        return {k: scores.logprobs for k, scores in found.items()}

    def answer(
        self, inputs: Tensor, num_steps: Sequence[int], draws: Draws = DEFAULT_DRAWS
    ) -> dict[int, Tensor]:
        """The most probable target at every position: inputs [B, T] int64 -> {K: [B, T] int64}, images -> {K:
        [B, 1]}.

        Random draws depend on (seed, draw, number of the row, step).
        """
        self.config.check_text("an answer to every target")
        raise NotImplementedError

    # Single steps: what the engine and the loops call -------------------------------------------------------

    def condition(self, sigma: Tensor | None, like: Tensor) -> Condition | None:
        """The conditioning of the network on levels; None means the highest one. None if it is unconditioned."""
        return None

    def predict(self, hidden: Tensor, z: Tensor | None = None, sigma: Tensor | None = None) -> Prediction:
        """Read-out of ``hidden`` = model.decode(state, ctx), [..., D] -> logits [..., V] fp32."""
        return Prediction(self.model.logits(hidden))

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        noised: Noised | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies and the unweighted ones: hidden [N, D], targets, weight [N] ->
        (scalar, [N]) fp32. noised: what is known of the N = B T rows.

        The same logits as ``predict``, without ever holding [N, V] of them.
        """
        return self.model.head(use=lambda table: linear_cross_entropy(hidden, table, targets, weight))

    # Generation ---------------------------------------------------------------------------------------------

    def step_plan(self, num_steps: int) -> StepPlan:
        """What each core step of one token does at K = num_steps: K iterations, then one read-out."""
        k = num_steps
        return StepPlan((None,) * k, (False,) * (k - 1) + (True,), (True,) * k, (0,) * k)
