"""Adaptive exits in the engine: which segments are checked by the criteria of rdlm/exit_criteria.py, and which exit.

Shapes: N rows of states, M rows read out, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from typing import TYPE_CHECKING, Literal

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.errors import UserError
from rdlm.exit_criteria import CRITERIA, GateCriterion, Memory, PredictionCriterion, StateCriterion, Weighted

if TYPE_CHECKING:
    from torch import Tensor

    from serve.engine.sequence import Sequence


def default_thresholds(config: CheckpointConfig) -> dict[str, float]:
    """Default threshold of each criterion that the checkpoint supports: its own, else that of ``CRITERIA``."""
    if not config.objective.supports_exits:
        return {}
    own = config.recurrence.exit_thresholds
    return {
        name: own.get(name, criterion.default_threshold)
        for name, criterion in CRITERIA.items()
        if config.model.has_exit_gate or criterion.reads != "gate"
    }


def check_exit_gate(criterion: str, config: CheckpointConfig) -> None:
    """Raises UserError where the criterion reads an exit gate that the checkpoint lacks."""
    if CRITERIA[criterion].reads == "gate" and criterion not in default_thresholds(config):
        remedy = f"use one of {', '.join([*default_thresholds(config), 'none'])}"
        raise UserError("exit.criterion", criterion, "this model has no trained exit gate", remedy)


def is_measured(sequence: Sequence, reads: Literal["states", "predictions", "gate"]) -> bool:
    """Whether the step now taken is checked by a criterion on ``reads``, or is one that a later check
    compares with."""
    rule = sequence.request.budget.exit
    if rule is None or (not rule.prefill and sequence.start < len(sequence.request.prompt)):
        return False
    criterion, taken = CRITERIA[rule.criterion], sequence.step + 1
    if criterion.reads != reads or taken >= sequence.counts.drawn:
        return False
    if taken % rule.check_every and reads != "gate":  # a gate's probabilities add up over all steps
        return False
    return taken >= criterion.first_check(rule)


def mixes_steps(sequence: Sequence) -> bool:
    """Whether the token that is drawn comes from the read-outs of all steps."""
    rule = sequence.request.budget.exit
    if rule is None or rule.criterion != Weighted.name or not sequence.draws:
        return False
    return rule.prefill or sequence.start >= len(sequence.request.prompt)


def _exits(sequence: Sequence, value: float) -> bool:
    rule = sequence.request.budget.exit
    assert rule is not None
    taken = sequence.step + 1
    if taken < rule.min_steps or taken % rule.check_every:
        return False
    return CRITERIA[rule.criterion].settled(value, rule.threshold)


def exits_on_states(batch: list[Sequence], lengths: list[int], before: Tensor, after: Tensor) -> set[int]:
    """Ids of the sequences whose segment exits: states [1, N, D], ``lengths`` rows each; all rows must have
    settled."""
    exiting: set[int] = set()
    measured = {s.id: s.request.budget.exit for s in batch if is_measured(s, "states")}
    for name in sorted({rule.criterion for rule in measured.values() if rule is not None}):
        criterion = CRITERIA[name]
        assert issubclass(criterion, StateCriterion)
        values = iter(criterion.measure(before, after)[0].tolist())
        for sequence, length in zip(batch, lengths, strict=True):
            largest, rule = max(islice(values, length)), measured.get(sequence.id)
            if rule is not None and rule.criterion == name and _exits(sequence, largest):
                exiting.add(sequence.id)
    return exiting


def exits_on_rows(
    sequences: list[Sequence], measured: Tensor, memory: Memory
) -> tuple[set[int], list[Tensor]]:
    """Ids of the sequences whose segment exits, and what to remember of each row: log-probabilities [M, V] or
    gate probabilities [M] as their criteria read them, memory of their last checks."""
    exiting: set[int] = set()
    kept: dict[int, Tensor] = {}
    groups: dict[str, list[int]] = defaultdict(list)
    for i, sequence in enumerate(sequences):
        assert sequence.request.budget.exit is not None
        groups[sequence.request.budget.exit.criterion].append(i)
    for name, rows in groups.items():
        criterion = CRITERIA[name]
        assert issubclass(criterion, PredictionCriterion | GateCriterion)
        values, new = criterion.measure(measured[rows], [memory[i] for i in rows])
        kept.update(zip(rows, new, strict=True))
        exiting |= {
            sequences[i].id
            for i, value in zip(rows, values.tolist(), strict=True)
            if _exits(sequences[i], value)
        }
    return exiting, [kept[i] for i in range(len(sequences))]
