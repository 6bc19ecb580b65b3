"""The group-product task against brute-force composition of permutations."""

from itertools import permutations

import numpy as np
import pytest
import torch

from rdlm.errors import UserError
from rdlm.tasks import GroupProduct


@pytest.mark.parametrize(("group", "degree"), [("s3", 3), ("s5", 5)])
def test_targets_are_running_products(group: str, degree: int) -> None:
    batch = GroupProduct(group, 9).batch(20, seed=3)
    elements = list(permutations(range(degree)))
    for inputs, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
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
    inputs = GroupProduct("s3", 4).batch(6000, seed=0).input_ids.numpy()
    counts = np.stack([np.bincount(inputs[:, i], minlength=6) for i in range(4)])
    assert (abs(counts - 1000) < 150).all()  # five standard deviations
    pairs = np.bincount(inputs[:, 0] * 6 + inputs[:, 1], minlength=36)
    assert (abs(pairs - 6000 / 36) < 65).all()


def test_rows_depend_on_seed_split_and_number_only() -> None:
    task = GroupProduct("s5", 12)
    whole = task.batch(10, seed=7)
    part = task.rows(np.array([8, 2]), seed=7)
    assert torch.equal(part.input_ids, whole.input_ids[[8, 2]]) and torch.equal(part.targets, whole.targets[[8, 2]])
    rows = [
        tuple(r)
        for split in ("train", "valid", "test")
        for seed in (0, 1, 7)
        for r in task.rows(np.arange(50), seed, split).input_ids.tolist()
    ]  # type: ignore[arg-type]
    assert len(set(rows)) == len(rows)


def test_unknown_group_and_length_are_refused() -> None:
    with pytest.raises(UserError, match="data.group='s4'"):
        GroupProduct("s4", 8)
    with pytest.raises(UserError, match="data.length=0"):
        GroupProduct("s3", 0)
