"""Generated tasks that need serial or joint computation, as rows of token ids with an answer at each
position that counts.

- ``GroupProduct``: the running product in a group (Liu et al. 2023, "Transformers Learn Shortcuts to
  Automata"; Barrington 1986 for
  why S5 cannot be done in constant depth, S3 being the solvable, easier case).
- ``PointerChasing``: follow a table of pointers, one hop further at every position.
- ``LatinSquare``: complete a square whose answers depend on each other and may be ambiguous.

Inputs and answers are two rows of equal length, as a causal model needs them; ``FilledIn`` puts them into
one row for masked diffusion. Every example is a pure function of (split, seed, row), so the order of
generation, batch sizes and restarts change nothing.
"""

from __future__ import annotations

import re
from functools import cached_property
from itertools import permutations
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.random_streams import mix64

Split = Literal["train", "valid", "test"]
GROUPS = {"s3": 3, "s5": 5}
_SPLIT_KEY = {"train": 1, "valid": 2, "test": 3}


class Task(Protocol):
    """What training and evaluation ask of a task."""

    identity: str
    """Names task and size: a resumed run compares it."""
    unit: str
    """What ``--lengths`` of ``rdlm eval depth`` counts."""
    size: int
    """How many of these units an example has."""
    length: int
    """Positions of an example."""
    vocab_size: int
    chance: float
    """Share of right answers of a guess."""
    whole: str
    """Name of what ``solved`` says."""

    def rows(self, indices: np.ndarray, seed: int, split: Split = "train") -> Batch:
        """Examples by number, [len(indices), length]. Equal arguments give equal examples; the splits draw
        from different random streams whatever their seeds are."""

    def solved(self, batch: Batch, answers: Tensor) -> Tensor:
        """bool [rows]: whether the example's hardest part is right. answers: ids [rows, length]."""


class GroupProduct:
    """Inputs are elements g_1 .. g_T; the target at position i is g_1 * ... * g_i, in the same ids 0 ..
    |G|-1.

    Element n is the n-th permutation of ``itertools.permutations(range(k))``; (a * b)(x) = a(b(x)). Id 0
    is the identity.
    """

    unit, whole, answers_from = "positions", "last", 0
    answers_fill_blanks = False

    def __init__(self, group: str, length: int) -> None:
        """UserError for another group or a length below 1."""
        if group not in GROUPS:
            raise UserError("data.group", group, "there is no such group", f"use one of {', '.join(GROUPS)}")
        if length < 1:
            raise UserError("data.length", length, "a product needs at least one factor", "use 1 or more")
        self.group, self.length, self.size = group, length, length
        self.elements = np.array(list(permutations(range(GROUPS[group]))))
        self.vocab_size = len(self.elements)
        self.chance = 1 / self.vocab_size
        self.identity = f"group_product:{group}:{length}"

    @cached_property
    def table(self) -> np.ndarray:
        """table[a, b] = id of a * b, int64 [|G|, |G|]."""
        base = GROUPS[self.group] ** np.arange(GROUPS[self.group])
        composed = self.elements[:, self.elements]  # [a, b, x] = a(b(x))
        keys = (self.elements * base).sum(-1)
        order = np.argsort(keys)
        return order[np.searchsorted(keys[order], (composed * base).sum(-1))]

    def rows(self, indices: np.ndarray, seed: int, split: Split = "train") -> Batch:
        """Every position counts."""
        factors = (_draws(indices, self.length, seed, split) % np.uint64(self.vocab_size)).astype(np.int64)
        products = factors.copy()
        for i in range(1, self.length):
            products[:, i] = self.table[products[:, i - 1], factors[:, i]]
        targets = torch.from_numpy(products)
        return Batch(torch.from_numpy(factors), targets, torch.ones_like(targets, dtype=torch.bool))

    def batch(self, n: int, seed: int, split: Split = "train") -> Batch:
        """The first ``n`` examples of a seed."""
        return self.rows(np.arange(n), seed, split)

    def solved(self, batch: Batch, answers: Tensor) -> Tensor:
        """The last product, which needs the longest computation."""
        return answers[:, -1] == batch.targets[:, -1]


class PointerChasing:
    """Inputs are a table f(0) .. f(n-1), a start s, then "again" (id n): the target j positions after the
    start is f^(j+1)(s).

    f is one random cycle through all nodes. Only the start and what follows counts: hops 1 .. h.
    """

    unit, whole, answers_fill_blanks = "hops", "last", False

    def __init__(self, nodes: int, hops: int) -> None:
        """UserError for fewer than 2 nodes or no hop."""
        if nodes < 2:
            raise UserError("data.nodes", nodes, "a cycle needs two nodes", "use 2 or more")
        if hops < 1:
            raise UserError("data.hops", hops, "there is nothing to follow", "use 1 or more")
        self.nodes, self.size, self.length, self.vocab_size, self.chance = (
            nodes,
            hops,
            nodes + hops,
            nodes + 1,
            1 / nodes,
        )
        self.identity, self.answers_from = f"pointer_chasing:{nodes}:{hops}", nodes

    def rows(self, indices: np.ndarray, seed: int, split: Split = "train") -> Batch:
        """The table's positions do not count."""
        drawn = _draws(indices, self.nodes + 1, seed, split)
        cycle = np.argsort(drawn[:, :-1], axis=1)
        table = np.empty_like(cycle)
        np.put_along_axis(table, cycle, np.roll(cycle, -1, axis=1), axis=1)
        here = (drawn[:, -1:] % np.uint64(self.nodes)).astype(np.int64)
        inputs = np.concatenate([table, here, np.full((len(indices), self.size - 1), self.nodes)], axis=1)
        targets = np.zeros_like(inputs)
        for j in range(self.nodes, self.length):
            here = np.take_along_axis(table, here, axis=1)
            targets[:, j] = here[:, 0]
        mask = torch.zeros(targets.shape, dtype=torch.bool)
        mask[:, self.nodes :] = True
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), mask)

    def solved(self, batch: Batch, answers: Tensor) -> Tensor:
        """The last hop."""
        return answers[:, -1] == batch.targets[:, -1]


class LatinSquare:
    """Inputs are the cells of an n x n square row by row, blanks as id n, and the same again; in the
    second half each blank's target is its symbol. So answers come after all that is given, and only
    through their own noised targets do they see each other.

    Squares are the cyclic one with rows, columns and symbols permuted. Several completions may exist:
    ``solved`` accepts each.
    """

    unit, whole = "blanks", "valid"
    answers_fill_blanks = True

    def __init__(self, side: int, fewest: int, most: int) -> None:
        """fewest, most: blanks of an example. UserError for what fits in no square."""
        if side < 2:
            raise UserError("data.side", side, "a square needs two rows", "use 2 or more")
        if not 1 <= fewest <= most <= side * side:
            problem = f"a square of {side} x {side} cells can have 1 to {side * side}, the fewest first"
            raise UserError("data.blanks", [fewest, most], problem, "correct the range")
        self.side, self.fewest, self.size = side, fewest, most
        self.length, self.vocab_size, self.chance = 2 * side * side, side + 1, 1 / side
        self.identity, self.answers_from = f"latin_square:{side}:{fewest}-{most}", side * side

    def rows(self, indices: np.ndarray, seed: int, split: Split = "train") -> Batch:
        """The blanks of the second half count."""
        n, cells = self.side, self.side**2
        drawn = _draws(indices, 3 * n + cells + 1, seed, split)
        row, column, symbol = (np.argsort(drawn[:, i * n : (i + 1) * n], axis=1) for i in range(3))
        place = (row[:, :, None] + column[:, None, :]) % n
        solution = np.take_along_axis(symbol, place.reshape(len(indices), cells), axis=1)
        blanks = self.fewest + (drawn[:, -1] % np.uint64(self.size - self.fewest + 1)).astype(np.int64)
        rank = np.argsort(np.argsort(drawn[:, 3 * n : -1], axis=1), axis=1)
        open_ = rank < blanks[:, None]
        given = np.where(open_, n, solution)
        mask = np.concatenate([np.zeros_like(open_), open_], axis=1)
        targets = np.where(mask, np.concatenate([solution, solution], axis=1), 0)
        inputs = np.concatenate([given, given], axis=1)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask))

    def solved(self, batch: Batch, answers: Tensor) -> Tensor:
        """Whether the completed square has every symbol once in each row and column."""
        n = self.side
        filled = torch.where(batch.mask, answers, batch.inputs)[:, -n * n :].view(-1, n, n)
        wanted = torch.arange(n)
        return ((filled.sort(1).values == wanted[:, None]).all((1, 2))) & (
            (filled.sort(2).values == wanted).all((1, 2))
        )


Generated = GroupProduct | PointerChasing | LatinSquare


class FilledIn:
    """A task as one row for a model that fills in hidden tokens: what is given stays visible, the answers
    that count are hidden.

    The row is the inputs with the answers behind them, position by position from ``answers_from``, the
    first that may count. A Latin square stands there once: its blanks are in the answers' places, so the
    hidden tokens are the blanks. Nothing else tells an answer.
    """

    def __init__(self, task: Generated) -> None:
        self.task, self.unit, self.whole = task, task.unit, task.whole
        self.size, self.vocab_size, self.chance = task.size, task.vocab_size, task.chance
        self.identity = f"{task.identity}:filled_in"
        answers = task.length - task.answers_from
        self.length = answers if task.answers_fill_blanks else task.length + answers

    def rows(self, indices: np.ndarray, seed: int, split: Split = "train") -> Batch:
        """inputs and targets are the same whole row; where ``mask`` is True is what must be hidden."""
        batch, first = self.task.rows(indices, seed, split), self.task.answers_from
        mask = batch.mask[:, first:]
        if self.task.answers_fill_blanks:
            row = torch.where(mask, batch.targets[:, first:], batch.inputs[:, first:])
        else:
            row = torch.cat([batch.inputs, batch.targets[:, first:]], dim=1)
            mask = torch.cat([torch.zeros_like(batch.mask), mask], dim=1)
        return Batch(row, row, mask)

    def solved(self, batch: Batch, answers: Tensor) -> Tensor:
        """See the task."""
        return self.task.solved(batch, answers)


def parse_task(name: str, size: int) -> Generated:
    """ "s3", "s5": products of ``size`` factors; "pointer16": ``size`` hops over 16 nodes; "latin5":
    ``size``
     blanks of 5 x 5 cells.

    Raises UserError for another name.
    """
    if name in GROUPS:
        return GroupProduct(name, size)
    found = re.fullmatch(r"(pointer|latin)(\d+)", name)
    if found is None:
        raise UserError(
            "--task", name, "there is no such task", "use s3, s5, pointerN (N nodes) or latinN (N x N cells)"
        )
    number = int(found[2])
    return PointerChasing(number, size) if found[1] == "pointer" else LatinSquare(number, size, size)


def _draws(indices: np.ndarray, count: int, seed: int, split: Split) -> np.ndarray:
    """``count`` numbers of each example, uint64 [len(indices), count], uniform."""
    key = np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, _SPLIT_KEY[split]]).generate_state(
        1, np.uint64
    )[0]
    counters = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    return mix64(mix64(counters) ^ key)
