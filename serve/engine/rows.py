"""What runners keep of a segment between two steps, what they ask of a sequence or its plan, and log-probabilities as reported."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rdlm.diffusion.samplers import Flow, StepPlan
from rdlm.sampling import top_logprobs
from serve.engine.sequence import Sequence, TokenLogprobs


@dataclass(slots=True)
class Live:
    """Rows of an open segment. e, state [L, D]; z [D] and sigma of the row being drawn; prior [V] its normalised distribution.

    before [D]: the state of the last row before the step, where a stream shows how far it moved.
    flow: of a soft bridge under way.
    """

    e: Tensor
    state: Tensor
    z: Tensor | None = None
    prior: Tensor | None = None
    before: Tensor | None = None
    flow: Flow | None = None


def step_of(sequence: Sequence) -> int:
    assert sequence.segment is not None
    return sequence.segment.step


def slot_of(sequence: Sequence) -> int:
    assert sequence.slot is not None
    return sequence.slot


def length_of(sequence: Sequence) -> int:
    assert sequence.segment is not None
    return sequence.segment.length


def shows(sequence: Sequence) -> bool:
    """Whether a stream is told of the step now taken: one of a position that is drawn from, and not its last."""
    show, taken = sequence.request.show, step_of(sequence) + 1
    return show is not None and sequence.draws and taken < sequence.depth.drawn and taken % show.every == 0


def predicts(plan: StepPlan, step: int) -> bool:
    """Whether the step's read-out is a prediction, and not one that only fills the cache."""
    return plan.readout[step] and sum(plan.readout[:step]) >= plan.num_draws_skipped


def score_step(plan: StepPlan) -> int:
    """The step whose read-out is the normalised likelihood: the first prediction (rdlm/scoring.py says why)."""
    return next(step for step in range(plan.num_core_steps) if predicts(plan, step))


def logprobs_of(prior: Tensor, chosen: Tensor, count: int) -> list[TokenLogprobs]:
    """prior [M, V], chosen [M] -> one entry a row, ``count`` alternatives each."""
    picked, values, ids = (part.tolist() for part in top_logprobs(prior, chosen, count))
    return [
        TokenLogprobs(p, tuple(zip(i, v, strict=True))) for p, v, i in zip(picked, values, ids, strict=True)
    ]
