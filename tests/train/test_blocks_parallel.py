"""The watcher of parallel blocks, with scripts in the place of training."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from train.launcher import _Launches

SCRIPT = """
import os, sys, time
from pathlib import Path
block = sys.argv[sys.argv.index("--block") + 1]
folder = Path({folder!r})
log = folder / block
log.write_text((log.read_text() if log.exists() else "") + "x")
runs = len(log.read_text())
{body}
"""


@pytest.fixture
def crew(tmp_path: Path):
    """``crew(body, retries)``: launches that run ``body``, which knows ``block`` and the number of its
    ``runs``."""
    return lambda body, retries: _Launches(
        [sys.executable, "-c", SCRIPT.format(folder=str(tmp_path), body=body)], 0, retries
    )


def runs(folder: Path) -> dict[str, int]:
    return {path.name: len(path.read_text()) for path in sorted(folder.iterdir())}


def test_what_dies_is_started_again(crew, tmp_path: Path, capsys) -> None:
    assert (
        crew("os.kill(os.getpid(), 9) if block == '1' and runs < 3 else None", retries=2).run([0, 1, 2], 2)
        == 0
    )
    assert runs(tmp_path) == {"0": 1, "1": 3, "2": 1}
    assert capsys.readouterr().err.count("block 1: ended with status -9; restarting it") == 2


def test_a_block_that_keeps_dying_ends_the_others(crew, tmp_path: Path, capsys) -> None:
    """Bounded restarts; the sleeping block is asked to save and stop, and the waiting one never starts."""
    assert crew("sys.exit(3) if block == '1' else time.sleep(600)", retries=1).run([0, 1, 2], 2) == 1
    assert runs(tmp_path) == {"0": 1, "1": 2}
    assert "block 1 ended with status 3 after 1 restarts" in capsys.readouterr().err


def test_a_mistake_of_the_user_is_not_tried_again(crew, tmp_path: Path) -> None:
    assert crew("sys.exit(2) if block == '1' else time.sleep(600)", retries=5).run([0, 1], 2) == 2
    assert runs(tmp_path) == {"0": 1, "1": 1}


def test_blocks_take_turns_where_they_do_not_fit(crew, tmp_path: Path) -> None:
    body = "busy = folder / 'busy'; assert not busy.exists(); busy.touch(); time.sleep(0.2); busy.unlink()"
    assert crew(body, retries=0).run([0, 1, 2], 1) == 0
    assert runs(tmp_path) == {"0": 1, "1": 1, "2": 1}


def test_sigterm_is_passed_on(crew, tmp_path: Path) -> None:
    """Nothing is restarted once the command was told to stop; the status says which signal."""

    def stop() -> None:
        while len(runs(tmp_path)) < 2:
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    assert crew("time.sleep(600)", retries=5).run([0, 1, 2], 2) == 128 + signal.SIGTERM
    assert runs(tmp_path) == {"0": 1, "1": 1}


def test_each_lane_has_gpus_of_its_own(crew, tmp_path: Path) -> None:
    watcher = crew(
        "(folder / f'gpus{block}').write_text(sys.argv[sys.argv.index('--devices') + 1])", retries=0
    )
    watcher.gpus = 2
    assert watcher.run([0, 1], 2) == 0
    assert {(tmp_path / f"gpus{b}").read_text() for b in (0, 1)} == {"0,1", "2,3"}
