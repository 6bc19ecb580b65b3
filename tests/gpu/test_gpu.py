"""What only a GPU can show; `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from benchmarks import gpu
from rdlm.random_streams import counter_stream
from serve.engine.replay import CudaGraphs, Eager, Key, Pass
from tests.serve import test_replay

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("part", gpu.PARTS)
def test_every_part_of_the_benchmark_runs(part: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out), "--tiny", "--only", part, "--here", "1"]) == 0
    found = json.loads(out.read_text())[part]
    if part == "losses":
        wrong = {name: each for name, each in found.items() if not each["close"]}
        waiting = {name: each["waits"] for name, each in found.items() if each["waits"]}
        assert wrong == {} and waiting == {}
    if part == "deterministic":
        assert found["on"]["equal_bits"]


@pytest.mark.parametrize(
    ("name", "cache"), [("huginn onestep", "full"), ("huginn evidence", "shared"), ("llama paper", "shared")]
)
def test_graphs_give_the_bits_of_what_they_capture(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: Literal["shared", "full"]
) -> None:
    """Requests that join and leave at different K, through graphs and without; a graph is captured once, and its
    replay makes the host wait for nothing."""
    plain = test_replay.network_of
    monkeypatch.setattr(test_replay, "network_of", lambda name: (plain(name)[0].cuda(), plain(name)[1]))

    class Watched(CudaGraphs):
        captured: set[Key] = set()

        def __call__(self, key: Key, run: Pass) -> tuple[torch.Tensor, ...]:
            if key not in self.captured:
                self.captured.add(key)
                return super().__call__(key, run)
            with gpu.no_waits(torch.device("cuda")):
                return super().__call__(key, run)

        def forget(self) -> None:
            self.captured.clear()
            super().forget()

    expected = test_replay.answers(name, None, Eager(), cache)
    assert test_replay.answers(name, None, Watched(), cache) == expected
    assert test_replay.close(test_replay.answers(name, None, None, cache), expected)


def test_noise_has_the_integers_of_the_cpu() -> None:
    rows = torch.arange(1000)
    stream = counter_stream(1, 2)
    assert torch.equal(stream.bits(rows.cuda()).cpu(), stream.bits(rows))
    torch.testing.assert_close(
        stream.normals(rows.cuda(), 33).cpu(), stream.normals(rows, 33), rtol=1e-5, atol=1e-5
    )
