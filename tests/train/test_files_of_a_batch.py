"""What a reader opens to understand one training batch: the files whose functions run in it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from train.data.prepare import Preparation, prepare

REPO = Path(__file__).resolve().parents[2]


def test_a_batch_runs_through_few_files(trainer: Any, tmp_path: Path) -> None:
    """The second batch of `single_pass` on tokens, without logging, evaluation or checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text("in the beginning was the word and so on. " * 400)
    options = Preparation(str(text), tmp_path / "data", vocab_size=257, valid_fraction=0.0, test_fraction=0.0)
    prepare(options, progress=False)
    changes = {
        "data": {"kind": "tokens", "path": str(tmp_path / "data"), "seq_len": 16}, "model.vocab_size": 300,
        "log.interval_steps": 100, "checkpoint": {"interval_steps": 100, "keep": 1},
    }  # fmt: skip
    run, files = trainer(changes), set[str]()

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and run.step == 1 and file.is_relative_to(REPO) and ".venv" not in file.parts:
            files.add(str(file.relative_to(REPO)))

    def at_the_second(_: object = None) -> bool:
        sys.setprofile(note if run.step == 1 else None)
        return bool(run.step == 2)

    threading.setprofile(note)  # the thread that reads ahead
    try:
        run.fit(at_the_second)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    ours = sorted(file for file in files if not file.startswith("tests/"))
    assert {"train/trainer.py", "rdlm/objectives/next_token.py", "rdlm/data/token_shards.py"} <= set(ours)
    assert len(ours) <= 19, ours
