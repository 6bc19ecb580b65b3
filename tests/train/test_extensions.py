"""A compile that was killed does not stop the runs after it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from train.optim import building


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch puts its lock for the extension ``thing``."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Path(cpp_extension._get_build_directory("thing", verbose=False)) / "lock"


def test_a_lock_without_owner_is_removed_and_said(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock.touch()
    with building("thing"):
        assert FileBaton(str(lock)).try_acquire(), "torch would wait for ever"
    assert str(lock) in capsys.readouterr().err


def test_a_lock_whose_owner_lives_stays(lock: Path) -> None:
    baton = FileBaton(str(lock))
    assert baton.try_acquire()  # holds the file open, as a compiling process does
    with building("thing"):
        assert lock.exists()
    baton.release()
