"""Checkpoints and training configs that version 1 wrote are still read, and mean what they meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.guard.record import (
    CHECKPOINTS,
    HERE,
    SERVED_CHECKPOINT,
    differences,
    expected,
    load_adapter,
    spoken,
)

TOLERANCE = 1e-5
CONFIGS = sorted((HERE / "configs_v1").glob("*.yaml"))


@pytest.fixture(scope="module")
def guard() -> Any:
    return load_adapter()


def beyond(old: Any, new: Any, tolerance: float) -> list[str]:
    found = differences(old, json.loads(json.dumps(new)), tolerance)
    pages = "usage/kv_bytes"  # counted in pages now, see INTENDED of test_guard.py
    return [f"{path}: {what}" for path, what, within in found if not within and pages not in path]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_old_checkpoint_says_what_it_said(guard: Any, name: str) -> None:
    folder = HERE / "checkpoints_v1" / name
    said = json.loads((folder / "expected.json").read_text())
    document = said.pop("document")
    assert beyond(said, expected(guard, guard.load(folder), document), TOLERANCE) == []


def test_an_old_checkpoint_is_served(guard: Any) -> None:
    """Its tokenizer with it. Log-probabilities of several steps and whole texts have room for more rounding."""
    folder = HERE / "checkpoints_v1" / SERVED_CHECKPOINT
    said = json.loads((folder / "expected.json").read_text())["said"]
    assert beyond(said, spoken(guard, folder), 10 * TOLERANCE) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_an_old_config_means_what_it_meant(guard: Any, path: Path) -> None:
    """Unchanged, its every field resolves to what it did. Newer fields, which it does not name, are left out."""
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert known_then(guard.train_config(path), recorded) == recorded


def known_then(found: Any, recorded: Any) -> Any:
    """``found`` without the fields that ``recorded`` has not."""
    if not isinstance(found, dict) or not isinstance(recorded, dict):
        return found
    return {name: known_then(value, recorded[name]) for name, value in found.items() if name in recorded}


def test_every_fixture_is_tested() -> None:
    folders = {path.name for path in (HERE / "checkpoints_v1").iterdir() if path.is_dir()}
    assert folders == {*CHECKPOINTS, SERVED_CHECKPOINT} and CONFIGS
