"""The benchmark for GPUs runs its parts at a tiny size on a CPU, so that minutes on a GPU are not lost to a typo."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import gpu
from rdlm.registry import build


def run(out: Path, *more: str, session: str = "1") -> int:
    return gpu.main(["--out", str(out), "--tiny", "--here", session, *more])


@pytest.mark.parametrize("part", [name for name in gpu.PARTS if name != "step"])
def test_every_part_runs(part: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert run(out, "--only", part) == 0
    found = json.loads(out.read_text())[part]
    assert found and all(case["seconds"] > 0 and "error" not in case for case in found.values())
    if part == "losses":
        assert all(each["close"] for each in found.values())
    if part in ("decode", "published"):
        for name, case in found.items():
            assert case["tokens_sha256"] == found[name.removesuffix(", graphs")]["tokens_sha256"]
    assert len(gpu.render({part: found}).splitlines()) == len(found)


@pytest.mark.parametrize(("name", "billions"), [("Huginn-0125", 3.56), ("Ouro-1.4B", 1.43)])
def test_published_shapes_have_the_published_sizes(name: str, billions: float) -> None:
    network = build(gpu.published_config(name), device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e9 == pytest.approx(
        billions, abs=0.01
    )


def test_the_parts_fit_into_their_time() -> None:
    assert gpu.LIMITS.keys() == gpu.PARTS.keys() and sum(gpu.LIMITS.values()) <= 15 * 60


@pytest.mark.slow
def test_the_step_is_timed_and_traced(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert run(out, "--only", "step") == 0
    assert all(Path(each["trace"]).exists() for each in json.loads(out.read_text())["step"].values())


def test_cases_that_are_done_are_not_run_again_and_errors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def case(name: str, fails: bool = False):
        def run() -> dict[str, object]:
            ran.append(name)
            if fails:
                raise RuntimeError("out of memory")
            return {"ms": 1.0}

        return name, run

    monkeypatch.setattr(
        gpu,
        "PARTS",
        {"p": lambda *_: iter([case("a"), case("b", fails=True)]), "q": lambda *_: iter([case("c")])},
    )
    out = tmp_path / "gpu.json"
    assert run(out) == 1 and ran == ["a", "b", "c"], "a case that fails does not stop the others"
    assert run(out) == 0 and ran == ["a", "b", "c"], "a process that goes on leaves out what has just failed"
    assert run(out, session="2") == 1 and ran == ["a", "b", "c", "b"]
    with pytest.raises(SystemExit):
        run(out, "--only", "nothing")


def test_a_part_that_hangs_or_dies_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes of ``bad``: the first dies in its first case, the second ends it; ``slow`` takes too long."""
    out, calls = tmp_path / "gpu.json", []

    def start(command: list[str], timeout: float) -> Any:
        part = command[command.index("--only") + 1]
        calls.append(part)
        if part == "slow":
            raise subprocess.TimeoutExpired(command, timeout)
        broken = part == "bad" and calls.count("bad") == 1
        out.write_text(json.dumps({**json.loads(out.read_text()), part: {"x": {"ms": 1.0}}}))
        return SimpleNamespace(returncode=-11 if broken else 0)

    names = ("bad", "slow", "good")
    monkeypatch.setattr(gpu, "PARTS", dict.fromkeys(names))
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(names, 5))
    processes = SimpleNamespace(run=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu, "subprocess", processes)
    assert gpu.main(["--out", str(out), "--tiny"]) == 1, "nothing of slow is known"
    assert calls == ["bad", "bad", "slow", "good"]
    assert json.loads(out.read_text()).keys() == {"machine", "bad", "good"}
