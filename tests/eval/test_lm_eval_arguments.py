"""What `rdlm eval lm-eval` makes of its arguments, without lm-eval installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.metrics.lm_eval import TASKS, expand_blimp, with_model
from rdlm.errors import UserError


def test_blimp_helper_speaks_lm_evals_language(tmp_path: Path) -> None:
    expanded = expand_blimp(["--tasks", "blimp_local", "--blimp", str(tmp_path)])
    assert expanded == [
        "run",
        "--tasks",
        "blimp_local",
        "--include_path",
        str(TASKS),
        "--metadata",
        json.dumps({"blimp": str(tmp_path)}),
    ]
    assert expand_blimp(["run", "--model", "hf"]) == ["run", "--model", "hf"]
    assert with_model(["--tasks", "piqa"]) == ["--tasks", "piqa", "--model", "rdlm"]
    for kept in (["run", "--model=hf"], ["-M", "hf"], ["--config", "x.yaml"], ["ls", "tasks"], []):
        assert with_model(kept) == kept
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("task: mine")
    both = ["--blimp", str(tmp_path), "--include_path", str(tmp_path / "own"), "--metadata", "a=1"]
    expanded = expand_blimp(both, tmp_path / "both")
    assert expanded[:3] == ["run", "--metadata", "a=1"] and expanded[4] == str(tmp_path / "both")
    found = {file.name: file.read_text() for file in (tmp_path / "both").glob("**/*.yaml")}
    assert (
        found["mine.yaml"] == "task: mine"
        and found["blimp_local.yaml"] == (TASKS / "blimp_local.yaml").read_text()
    )
    for arguments in (["--blimp", "nowhere"], ["--blimp"], ["--blimp", str(tmp_path), "--include_path", "x"]):
        with pytest.raises(UserError):
            expand_blimp(arguments)
