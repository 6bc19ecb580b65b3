"""What only a GPU can show; `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from rdlm.random_streams import counter_stream

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_of_the_benchmark_runs(part: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out), "--tiny", "--only", part]) == 0
    found = json.loads(out.read_text())[part]
    if part == "losses":
        wrong = {name: each for name, each in found.items() if isinstance(each, dict) and not each["close"]}
        waiting = {
            name: each["waits"] for name, each in found.items() if isinstance(each, dict) and each["waits"]
        }
        assert wrong == {} and waiting == {}
    if part == "deterministic":
        assert found["on"]["equal_bits"]


def test_noise_has_the_integers_of_the_cpu() -> None:
    rows = torch.arange(1000)
    stream = counter_stream(1, 2)
    assert torch.equal(stream.bits(rows.cuda()).cpu(), stream.bits(rows))
    torch.testing.assert_close(
        stream.normals(rows.cuda(), 33).cpu(), stream.normals(rows, 33), rtol=1e-5, atol=1e-5
    )
