"""What a reader opens to understand one training batch: the files whose functions run in it."""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable
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
    run, lines = trainer(changes), defaultdict[str, set[int]](set)

    def note(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(REPO) or ".venv" in file.parts or file.is_relative_to(REPO / "tests"):
            return None
        if event == "line" and run.step == 1:
            lines[str(file.relative_to(REPO))].add(frame.f_lineno)
        return note

    def at_the_second(_: object = None) -> bool:
        sys.settrace(note if run.step == 1 else None)
        return bool(run.step == 2)

    threading.settrace(note)  # the thread that reads ahead
    try:
        run.fit(at_the_second)
    finally:
        sys.settrace(None)
        threading.settrace(None)
    assert {"train/trainer.py", "rdlm/objectives/next_token.py", "rdlm/data/token_shards.py"} <= lines.keys()
    assert len(lines) <= 17, sorted(lines)
    most = sorted(map(len, lines.values()), reverse=True)
    assert sum(most[:15]) >= 0.95 * sum(most), (most, sum(most))
