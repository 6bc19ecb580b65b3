"""Compiling DeepSpeed's C++ extensions without ever waiting for the dead.

torch guards a build with a file that only its owner removes; killed, it leaves the file behind, and every later run waits for ever.
Here a lock of the kernel, which ends with its holder, comes first: who has it and finds torch's file held open by nobody removes it.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from torch.utils import cpp_extension


@contextmanager
def building(name: str) -> Iterator[None]:
    """Around a call that compiles or loads the extension ``name`` (``cpu_adam``): one process of this user at a time."""
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with (folder.parent / f".{name}.rdlm-lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        lock = folder / "lock"
        if lock.exists() and not _held(lock):
            print(f"removing {lock}: whoever was compiling {name} is gone", file=sys.stderr)
            lock.unlink(missing_ok=True)
        yield


def _held(file: Path) -> bool:
    """Whether a process on this machine has the file open, as torch has its lock while it compiles."""
    for process in psutil.process_iter():
        try:
            if any(Path(opened.path) == file for opened in process.open_files()):
                return True
        except psutil.Error:  # gone, or of another user, who cannot be building in our cache
            continue
    return False
