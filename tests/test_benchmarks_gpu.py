"""The benchmark for GPUs runs its parts at a tiny size on a CPU, so that minutes on a GPU are not lost to a typo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


@pytest.mark.parametrize("part", [name for name in gpu.PARTS if name != "step"])
def test_every_part_runs(part: str, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--out", str(out), "--tiny", "--only", part]) == 0
    found = json.loads(out.read_text())[part]
    assert found.pop("seconds") > 0 and found and "error" not in found
    if part == "losses":
        assert all(each["close"] for each in found.values())


@pytest.mark.slow
def test_the_step_is_timed_and_traced(tmp_path: Path) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.json"), "--tiny", "--only", "step"]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["step"]
    assert all(Path(each["trace"]).exists() for each in found.values() if isinstance(each, dict))


def test_parts_that_are_done_are_not_run_again_and_errors_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def part(name: str, fails: bool = False):
        def run(*_: object) -> dict[str, object]:
            ran.append(name)
            if fails:
                raise RuntimeError("out of memory")
            return {"ms": 1.0}

        return run

    monkeypatch.setattr(gpu, "PARTS", {"a": part("a"), "b": part("b", fails=True), "c": part("c")})
    command = ["--out", str(tmp_path / "gpu.json"), "--tiny"]
    assert gpu.main(command) == 1 and ran == ["a", "b", "c"], "a part that fails does not stop the others"
    assert gpu.main(command) == 1 and ran == ["a", "b", "c", "b"]
    with pytest.raises(SystemExit):
        gpu.main([*command, "--only", "nothing"])
