"""Rows of open segments: what is kept of them between two steps, and the parts of a step.

The parts are functions of tensors in buffers alone. K is in none of them, nor anything else that differs between
two steps: positions, places and noise levels are data. So a part can be captured once and replayed.

Shapes: L rows of a segment, N rows of several, P places, D d_model, V vocabulary; e is [1, .., E] and a
state [1, .., S] (rdlm/models/base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rdlm.device import staged
from rdlm.diffusion.samplers import Flow
from rdlm.flops import Costs
from rdlm.nn.attention import AttentionContext
from rdlm.nn.layers import Condition
from rdlm.objectives.next_token import NextToken
from rdlm.sampling import Kind, Settings, drawn
from serve.engine.cpu.modules import PackedCore
from serve.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Rows:
    """Where the rows of an open segment are, and what belongs to them. It is replaced and never modified, so
    that a failed step can be undone.

    first, length: which places of the sequence. half: which of the two states of a place counts. Of the position
    that is drawn: z [D], its noised target; prior [V], its normalised next-token logits; flow, its place on the
    ODE. memory: of the exit criterion; of a wavefront, the states [1, L, S] at its last read-out. mixed [D]: its
    weighted read-outs so far. proposals [V]: what the tokens of a sampled draft were drawn from. ids: of a
    wavefront, the tokens that e was computed from; is_read: whether it has been read out since.
    """

    length: int
    first: int = 0
    half: int = 0
    z: Tensor | None = None
    prior: Tensor | None = None
    flow: Flow | None = None
    memory: Tensor | None = None
    mixed: Tensor | None = None
    proposals: tuple[Tensor, ...] = ()
    ids: tuple[int, ...] = ()
    is_read: bool = False


def rows_of(sequence: Sequence) -> Rows:
    rows = sequence.rows
    assert isinstance(rows, Rows)
    return rows


class RowBuffers:
    """e and states of all rows in flight, in places that sequences own: e [1, P, E], state [1, 2 P, S].

    A core step reads one half of a place and writes the other: a step that fails leaves what it has read. Slot
    s owns place s, and more while its segment is longer; the place behind those of the slots is nobody's. Both
    are made when the first rows are written, whose widths and dtypes are the model's affair.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.e = self.state = torch.empty(1, 0, 0, device=device)
        self._places = [np.array([slot]) for slot in range(num_slots)]
        """By slot."""
        self._free: list[int] = []
        self._count = num_slots + 1
        self.moved = 0
        """How often a buffer has got another address."""
        self.spare = 2 * num_slots
        """Index of a state that nobody reads."""

    def own(self, slot: int, length: int) -> None:
        """Give a slot ``length`` places; the first ones it keeps."""
        places = self._places[slot]
        more = length - len(places)
        if (missing := more - len(self._free)) > 0:
            grown = self._count + max(missing, self._count)
            self._free += range(self._count, grown)
            self._count = grown
        if more > 0:
            self._places[slot] = np.append(places, self._free[-more:])
            del self._free[-more:]
        elif more < 0:
            self._free += places[length:].tolist()
            self._places[slot] = places[:length]

    def where(self, sequences: Seq[Sequence], last: bool = False) -> np.ndarray:
        """Indices into ``state`` of the segments' rows, or of their last ones: int64 [N]. Those of the other halves
        are ``^ 1``, those into ``e`` ``>> 1``. A segment that has shrunk to the position that is drawn keeps its
        last row."""
        return np.concatenate(
            [self.places(s.slot, rows_of(s))[-1 if last else -s.length :] for s in sequences]
        )

    def places(self, slot: int, rows: Rows) -> np.ndarray:
        """As ``where``, of all rows."""
        return 2 * self._places[slot][rows.first : rows.first + rows.length] + rows.half

    def index(self, where: np.ndarray) -> Tensor:
        return staged(torch.from_numpy(where), self.device)

    def states(self, where: np.ndarray) -> Tensor:
        """[1, N, S]."""
        return self.state.index_select(1, self.index(where))

    def keep(self, where: np.ndarray, state: Tensor) -> None:
        """``write_state`` at indices of the host."""
        self.write_state(self.index(where), state)

    def write_state(self, at: Tensor, state: Tensor) -> None:
        """Keep states [1, N, S] at indices [N]."""
        self.state = self._with_room(self.state, state, 2 * self._count)
        self.state.index_copy_(1, at, state)

    def write_e(self, places: Tensor, e: Tensor) -> None:
        """Keep e [1, N, E] at places [N]."""
        self.e = self._with_room(self.e, e, self._count)
        self.e.index_copy_(1, places, e)

    def make_room(self) -> None:
        """Let the buffers have a row for every place, so that no write moves them; not before they are made."""
        if self.e.numel() and self.state.numel():
            self.e = self._with_room(self.e, self.e, self._count)
            self.state = self._with_room(self.state, self.state, 2 * self._count)

    def _with_room(self, buffer: Tensor, like: Tensor, count: int) -> Tensor:
        more = count - buffer.shape[1]
        if more <= 0:
            return buffer
        self.moved += 1
        room = like.new_zeros(1, more, like.shape[2])
        return torch.cat([buffer, room], 1) if buffer.numel() else room


@dataclass(frozen=True)
class Block:
    """One block of the network, or the whole of one that is not cut into blocks, and what its parts cost."""

    index: int
    denoiser: NextToken
    costs: Costs
    base: list[Condition | None]
    """Its conditioning where no row has a noised target, once it has been computed."""
    num_tokens: int
    """Ids that may be drawn."""

    @cached_property
    def kernels(self) -> PackedCore | None:
        """Its core, where the kernels have all of it; asked for once weights are packed."""
        return PackedCore.of(self.denoiser.model)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a part reads of the rows of a pass.

    ids int64 [N]: of the positions. at, other, places int64 [N]: indices of the rows' states, of the other
    halves of their places, and of these places. levels fp32 [1, N]: noise levels; None where all rows are at
    z = 0. sampling: of rows that a token is drawn from, in parts that draw. spans fp32 [1, N] each: when the steps
    of the rows begin and how long they are; None where no request says so.
    """

    ids: Tensor
    at: Tensor
    other: Tensor
    places: Tensor
    levels: Tensor | None
    context: AttentionContext
    sampling: tuple[Settings, Kind] | None = None
    spans: tuple[Tensor, Tensor] | None = None


Part = Callable[[Block, RowBuffers, Inputs], tuple[Tensor, ...]]
"""-> tensors [1, N, ...]."""


def encode(block: Block, rows: RowBuffers, inputs: Inputs) -> tuple[Tensor]:
    """Embedding and prelude -> e [1, N, E], which is also kept."""
    e = block.denoiser.model.encode(inputs.ids[None], inputs.context)
    rows.write_e(inputs.places, e)
    return (e,)


def enter(block: Block, rows: RowBuffers, inputs: Inputs) -> tuple[Tensor]:
    """``encode``, and the states before the first step, of models that neither draw them nor count steps."""
    (e,) = encode(block, rows, inputs)
    rows.write_state(inputs.at, block.denoiser.model.initial_state(e))
    return (e,)


def core(
    block: Block, rows: RowBuffers, inputs: Inputs, later: Seq[AttentionContext] = ()
) -> tuple[Tensor, Tensor]:
    """One core step, and one more for each context of ``later``, from each row's state into the other half of its
    place -> states before and after [1, N, S]."""
    before, e = rows.state.index_select(1, inputs.at), rows.e.index_select(1, inputs.places)
    if inputs.spans is not None:  # of one step: ``later`` is empty
        after = block.denoiser.model.sized_core(before, e, *inputs.spans, inputs.context)
        rows.write_state(inputs.other, after)
        return before, after
    if inputs.levels is not None:
        condition = block.denoiser.condition(inputs.levels, before)
    else:
        if not block.base:
            block.base.append(block.denoiser.condition(None, before))
        condition = block.base[0]
    contexts = (inputs.context, *later)
    if block.kernels is not None:
        after = block.kernels.steps(before, e, condition, contexts)
    else:
        after = before
        for context in contexts:
            after = block.denoiser.model.core(after, e, condition, context)
    rows.write_state(inputs.other, after)
    return before, after


def leave(block: Block, rows: RowBuffers, inputs: Inputs) -> tuple[Tensor]:
    """Coda and final norm -> hidden [1, N, D]."""
    return (block.denoiser.model.decode(rows.state.index_select(1, inputs.at), inputs.context),)


def draw_tokens(block: Block, rows: RowBuffers, inputs: Inputs) -> tuple[Tensor]:
    """``leave``, read-out and a draw at z = 0 -> what rdlm.sampling.drawn returns, fp64 [1, N, 2]."""
    assert inputs.sampling is not None
    (hidden,) = leave(block, rows, inputs)
    return (drawn(block.denoiser.predict(hidden[0]).prior[:, : block.num_tokens], *inputs.sampling)[None],)
