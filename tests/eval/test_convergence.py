"""Step-by-step convergence against an iteration whose steps are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from eval.metrics.convergence import check_iterates, evaluate_convergence
from rdlm.checkpoints.folder import Loaded
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives import Objective


@pytest.fixture
def loaded(tiny: Callable[..., Objective], tiny_config: Callable) -> Loaded:
    return Loaded(tiny("huginn", "onestep").eval(), tiny_config("huginn", "onestep"), None)


def _batches(parts: int = 1) -> list[Batch]:
    ids = torch.randint(0, 64, (8, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return [Batch(i, i, m) for i, m in zip(ids.chunk(parts), mask.chunk(parts), strict=True)]


def test_a_halving_state_has_the_distances_of_a_halving_state(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s_1 = e, s_k = s_(k-1) / 2: every step moves the state by its own length, and no top token changes."""
    first: list[bool] = []

    def halve(state: torch.Tensor, e: torch.Tensor, *_: object) -> torch.Tensor:
        first.append(True)
        return e if len(first) == 1 else state / 2

    monkeypatch.setattr(loaded.denoiser.model, "core", halve)
    monkeypatch.setattr(loaded.denoiser.model, "decode", lambda state, ctx: state)
    results = evaluate_convergence(loaded, _batches(), 4)["results"]
    assert [r["K"] for r in results] == [2, 3, 4]
    assert [r["distance"] for r in results] == pytest.approx([1, 1, 1], abs=1e-4)
    assert [r["changed"] for r in results] == [0, 0, 0]


def test_a_state_that_flips_changes_every_top_token(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[bool] = []

    def flip(state: torch.Tensor, e: torch.Tensor, *_: object) -> torch.Tensor:
        first.append(True)
        return e if len(first) == 1 else -state

    monkeypatch.setattr(loaded.denoiser.model, "core", flip)
    monkeypatch.setattr(loaded.denoiser.model, "decode", lambda state, ctx: state)
    found = evaluate_convergence(loaded, _batches(), 3)
    assert [r["distance"] for r in found["results"]] == pytest.approx([2, 2], abs=1e-4)
    assert [r["changed"] for r in found["results"]] == [1, 1] and found["picture"]["changed"] == [
        [1] * 12
    ] * 2


def test_only_counted_positions_matter_whatever_the_batches(loaded: Loaded) -> None:
    torch.nn.init.normal_(loaded.denoiser.model.adapter.weight, std=0.3)  # type: ignore[union-attr]
    whole, parts = (evaluate_convergence(loaded, _batches(n), 3)["results"] for n in (1, 2))
    assert [r["distance"] for r in whole] == pytest.approx([r["distance"] for r in parts], rel=1e-4)
    (masked,) = _batches()
    masked.mask[:, :6] = False
    late = evaluate_convergence(loaded, [masked], 3)
    assert len(late["picture"]["distance"][0]) == 6 and late["results"][0]["distance"] != whole[0]["distance"]


def test_what_does_not_iterate_is_refused(tiny: Callable[..., Objective], tiny_config: Callable) -> None:
    for arguments in (("huginn", "evidence"), ("llama", "next_token")):
        with pytest.raises(UserError, match="not an iteration"):
            check_iterates(Loaded(tiny(*arguments), tiny_config(*arguments), None))
