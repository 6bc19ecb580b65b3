"""The generated tasks against brute force."""

from itertools import permutations

import numpy as np
import pytest
import torch

from rdlm.data.synthetic import FilledIn, GroupProduct, LatinSquare, PointerChasing, Task, parse_task
from rdlm.errors import UserError


@pytest.mark.parametrize(("group", "degree"), [("s3", 3), ("s5", 5)])
def test_targets_are_running_products(group: str, degree: int) -> None:
    batch = GroupProduct(group, 9).batch(20, seed=3)
    elements = list(permutations(range(degree)))
    for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        product = tuple(range(degree))
        for factor, target in zip(inputs, targets, strict=True):
            product = tuple(product[elements[factor][x]] for x in range(degree))  # (a * b)(x) = a(b(x))
            assert elements[target] == product
    assert batch.mask.all()


@pytest.mark.parametrize("group", ["s3", "s5"])
def test_the_table_is_a_group_that_does_not_commute(group: str) -> None:
    table = GroupProduct(group, 2).table
    n = len(table)
    assert (table[0] == np.arange(n)).all() and (table[:, 0] == np.arange(n)).all()
    assert all(sorted(row) == list(range(n)) for row in table.tolist())
    assert (table[table] == table[:, table]).all()  # (a b) c == a (b c) for every triple
    assert (table != table.T).any()


def test_every_element_is_equally_likely_at_every_position() -> None:
    inputs = GroupProduct("s3", 4).batch(6000, seed=0).inputs.numpy()
    counts = np.stack([np.bincount(inputs[:, i], minlength=6) for i in range(4)])
    assert (abs(counts - 1000) < 150).all()  # five standard deviations
    pairs = np.bincount(inputs[:, 0] * 6 + inputs[:, 1], minlength=36)
    assert (abs(pairs - 6000 / 36) < 65).all()


def test_rows_depend_on_seed_split_and_number_only() -> None:
    task = GroupProduct("s5", 12)
    whole = task.batch(10, seed=7)
    part = task.rows(np.array([8, 2]), seed=7)
    assert torch.equal(part.inputs, whole.inputs[[8, 2]]) and torch.equal(part.targets, whole.targets[[8, 2]])
    rows = [
        tuple(r)
        for split in ("train", "valid", "test")
        for seed in (0, 1, 7)
        for r in task.rows(np.arange(50), seed, split).inputs.tolist()
    ]  # type: ignore[arg-type]
    assert len(set(rows)) == len(rows)


def test_unknown_group_and_length_are_refused() -> None:
    with pytest.raises(UserError, match="data.group='s4'"):
        GroupProduct("s4", 8)
    with pytest.raises(UserError, match="data.length=0"):
        GroupProduct("s3", 0)


def test_pointers_are_followed_one_hop_further_at_every_position() -> None:
    nodes, hops = 7, 5
    batch = PointerChasing(nodes, hops).rows(np.arange(50), seed=1)
    assert batch.inputs.shape == (50, nodes + hops) and batch.mask.sum(1).unique().tolist() == [hops]
    for inputs, targets, mask in zip(
        batch.inputs.tolist(), batch.targets.tolist(), batch.mask.tolist(), strict=True
    ):
        table, here = inputs[:nodes], inputs[nodes]
        assert sorted(table) == list(range(nodes)) and inputs[nodes + 1 :] == [nodes] * (hops - 1)
        for j in range(nodes, nodes + hops):
            here = table[here]
            assert targets[j] == here and mask[j]
        assert len(set(targets[nodes:])) == hops  # one cycle: five hops never come back
    assert len({tuple(row[:nodes]) for row in batch.inputs.tolist()}) > 40


def test_squares_are_latin_and_their_blanks_are_asked_for() -> None:
    task = LatinSquare(5, 13, 16)
    batch = task.rows(np.arange(200), seed=2)
    given, again = batch.inputs[:, :25], batch.inputs[:, 25:]
    assert torch.equal(given, again) and not batch.mask[:, :25].any()
    assert torch.equal(batch.mask[:, 25:], given == 5)
    assert sorted(batch.mask.sum(1).unique().tolist()) == [13, 14, 15, 16]
    whole = torch.where(given == 5, batch.targets[:, 25:], given).view(-1, 5, 5)
    for square in whole.tolist():
        for line in (*square, *zip(*square, strict=True)):
            assert sorted(line) == list(range(5))
    assert len({str(square) for square in whole.tolist()}) > 150


def test_a_square_is_solved_by_any_completion_and_by_nothing_else() -> None:
    task = LatinSquare(3, 9, 9)  # nothing is given: any Latin square will do
    batch = task.rows(np.arange(3), seed=0)
    other = (batch.targets + 1) % 3
    wrong = batch.targets.clone()
    wrong[:, 9] = (wrong[:, 9] + 1) % 3
    assert (
        task.solved(batch, batch.targets).all()
        and task.solved(batch, other).all()
        and not task.solved(batch, wrong).any()
    )
    partly = LatinSquare(3, 1, 1)
    few = partly.rows(np.arange(3), seed=0)
    assert partly.solved(few, torch.where(few.mask, few.targets, 99)).all()  # only blanks are read


@pytest.mark.parametrize("task", [PointerChasing(6, 3), LatinSquare(4, 2, 9)])
def test_new_tasks_depend_on_seed_split_and_number_only(task: Task) -> None:
    whole, part = task.rows(np.arange(10), seed=7), task.rows(np.array([8, 2]), seed=7)
    assert torch.equal(part.inputs, whole.inputs[[8, 2]]) and torch.equal(part.targets, whole.targets[[8, 2]])
    others = [task.rows(np.arange(10), seed=7, split="test"), task.rows(np.arange(10), seed=8)]
    assert all(not torch.equal(whole.inputs, other.inputs) for other in others)


@pytest.mark.parametrize("task", [GroupProduct("s3", 7), PointerChasing(6, 3)])
def test_filled_in_rows_are_the_inputs_and_behind_them_the_answers(
    task: GroupProduct | PointerChasing,
) -> None:
    filled_in = FilledIn(task)
    beside, row = (
        task.rows(np.arange(30), seed=4, split="test"),
        filled_in.rows(np.arange(30), seed=4, split="test"),
    )
    assert row.targets is row.inputs and row.targets.shape == row.mask.shape == (30, filled_in.length)
    for inputs, targets, counts, ids, hidden in zip(
        *(t.tolist() for t in (beside.inputs, beside.targets, beside.mask, row.targets, row.mask)),
        strict=True,
    ):
        answers = [target for target, counted in zip(targets, counts, strict=True) if counted]
        assert ids == inputs + answers and hidden == [False] * len(inputs) + [True] * len(answers)
    assert filled_in.identity != task.identity and filled_in.solved(row, row.targets).all()
    assert not filled_in.solved(row, (row.targets + 1) % task.vocab_size).any()


def test_filled_in_squares_stand_there_once_and_hide_their_blanks() -> None:
    task = LatinSquare(4, 3, 9)
    filled_in = FilledIn(task)
    beside, row = task.rows(np.arange(60), seed=4), filled_in.rows(np.arange(60), seed=4)
    assert row.targets.shape == (60, 16) == (60, filled_in.length)
    for given, ids, hidden in zip(
        beside.inputs[:, 16:].tolist(), row.targets.tolist(), row.mask.tolist(), strict=True
    ):
        assert hidden == [symbol == 4 for symbol in given]
        assert all(a == b for a, b in zip(given, ids, strict=True) if b != a != 4)
        for line in (*(ids[4 * i : 4 * i + 4] for i in range(4)), *(ids[i::4] for i in range(4))):
            assert sorted(line) == list(range(4))
    assert (
        filled_in.solved(row, row.targets).all()
        and filled_in.solved(row, torch.where(row.mask, row.targets, 99)).all()
    )
    assert filled_in.solved(row, (row.targets + row.mask.long()) % 4).float().mean() < 0.1


def test_tasks_are_named() -> None:
    assert [parse_task(name, 8).identity for name in ("s3", "pointer16", "latin5")] == [
        "group_product:s3:8", "pointer_chasing:16:8", "latin_square:5:8-8",
    ]  # fmt: skip
    for name in ("s4", "pointer", "latin", "5", ""):
        with pytest.raises(UserError, match="--task"):
            parse_task(name, 8)
    with pytest.raises(UserError, match=r"data.blanks=\[26, 26\]"):
        parse_task("latin5", 26)
