"""What the code computes is what it computed when the golden file was recorded; see tests/guard/record.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.guard.record import FAST, HERE, compare, differences, load_adapter, record

TOLERANCE = 1e-4
"""Of numbers, on another CPU or with another build of torch."""
ROUNDED = 5e-2
"""The same of a run in bf16."""
INTENDED = {
    ("plans/huginn_70m",): "the loss of a large vocabulary holds the logits of more rows at once on a CPU",
    ("plans/ar_lm1b",): "the same",
    ("usage/kv_bytes",): "the cache allocates pages of 64 positions, for the steps that were taken",
    (
        "served/llama",
        "in 2 blocks",
        "[15]",
    ): "a schedule over blocks read cache entries that no position had written",
}
"""Parts of the paths of values that have changed on purpose, and why."""


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads((HERE / "golden.json").read_text())


@pytest.fixture(scope="module")
def guard() -> Any:
    return load_adapter()


def beyond(golden: dict[str, Any], found: dict[str, Any], section: str, tolerance: float) -> Iterator[str]:
    for path, what, within in differences(golden[section], found[section], tolerance, section):
        intended = any(all(part in path for part in parts) for parts in INTENDED)
        if not within and not intended:
            yield f"{path}: {what}"


@pytest.mark.parametrize("section", FAST)
def test_nothing_has_changed(guard: Any, golden: dict[str, Any], section: str) -> None:
    assert list(beyond(golden, record(guard, [section]), section, TOLERANCE)) == []


@pytest.mark.slow
@pytest.mark.multiproc
def test_training_runs_have_not_changed(guard: Any, golden: dict[str, Any]) -> None:
    """And a resumed run has the bits of the whole one, on any machine."""
    found = record(guard, ["runs"])
    rough = {"runs": {"in bf16": found["runs"]["in bf16"]}}
    assert list(beyond({"runs": {"in bf16": golden["runs"]["in bf16"]}}, rough, "runs", ROUNDED)) == []
    for records in (golden, found):
        assert records["runs"]["resumed"] == records["runs"]["whole"]
    exact = [
        {"runs": {name: case for name, case in each["runs"].items() if name != "in bf16"}}
        for each in (golden, found)
    ]
    assert list(beyond(*exact, "runs", TOLERANCE)) == []


def test_a_comparison_tells_bits_from_values(capsys: pytest.CaptureFixture[str]) -> None:
    old = {"machine": {}, "scores": {"a": {"sha": "1", "shape": [2], "values": [1.0, -2.0]}, "text": "x"}}
    assert compare(old, json.loads(json.dumps(old)), TOLERANCE) == 0
    near = {"scores": {"a": {"sha": "2", "shape": [2], "values": [1.00001, -2.0]}, "text": "x"}}
    assert compare(old, near, TOLERANCE) == 1
    assert [within for *_, within in differences(old["scores"], near["scores"], TOLERANCE)] == [True]
    for other in (
        {"a": {"sha": "2", "shape": [2], "values": [1.1, -2.0]}, "text": "x"},
        {"a": old["scores"]["a"], "text": "y"},
        {"a": old["scores"]["a"]},
    ):
        assert [within for *_, within in differences(old["scores"], other, TOLERANCE)] == [False]
    assert "equal to the bit" in capsys.readouterr().out
