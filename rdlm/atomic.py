"""Folders and files that are written completely or not at all, and what may be replaced by them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from rdlm.errors import UserError, reason


def contents(folder: Path, option: str) -> list[str]:
    """Names in an output folder, none where it does not exist yet. UserError, which names ``option``, for what
    cannot be an output folder: a file, a path that cannot be reached, the current folder."""
    try:
        place, here = folder.resolve(), Path.cwd()
        found = sorted(os.listdir(place)) if place.exists() else []
    except NotADirectoryError:
        raise UserError(option, str(folder), "is not a folder", "name another one") from None
    except (OSError, ValueError, RuntimeError) as error:  # links that go round are a RuntimeError
        raise _unwritable(option, folder, error, "name another folder") from None
    if place == here or place in here.parents:
        raise UserError(option, str(folder), "is the current folder, or holds it", "name a folder to create")
    return found


def check_out(folder: Path, option: str, ours: Sequence[str], force: bool) -> None:
    """UserError unless ``folder`` may be written: it is not there, is empty, or (with ``force``) holds nothing
    but what a command of the same kind wrote, so that nothing else is deleted.

    ours: patterns of the names that such a command writes.
    """
    found = contents(folder, option)
    if found and not force:
        remedy = "name another folder, or replace it with --force"
        raise UserError(option, str(folder), "holds something already", remedy)
    foreign = next((name for name in found if not any(fnmatch(name, pattern) for pattern in ours)), None)
    if foreign is not None:
        problem = f"holds {foreign!r}, which this command does not write and --force would delete"
        raise UserError(option, str(folder), problem, "move it away, or name another folder")


@contextmanager
def replacing(folder: str | Path, option: str = "OUT", keep: bool = False) -> Iterator[Path]:
    """A new folder to fill. It takes the place of ``folder`` (where a link points, if it is one) once it is
    complete and on disk, and vanishes if filling it fails. What a killed process left is replaced by the next.

    keep: what ``folder`` holds and the new one does not, as a file that somebody put there, stays.
    Raises UserError, which names ``option``, where it cannot be written or another process is writing it.
    """
    folder = Path(folder).resolve()
    temporary, outdated = (folder.with_name(f".{what}-{folder.name}") for what in ("tmp", "old"))
    with ExitStack() as held:
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            lock = os.open(temporary, os.O_RDONLY)
            held.callback(os.close, lock)
            _lock(lock)
            for entry in temporary.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        except BlockingIOError:
            problem, remedy = "another process is writing it", "wait, or name another folder"
            raise UserError(option, str(folder), problem, remedy) from None
        except OSError as error:
            raise _unwritable(option, folder, error, "name another folder") from None
        try:
            yield temporary
            for entry in folder.iterdir() if keep and folder.is_dir() else ():
                if not (temporary / entry.name).exists():
                    _copy(entry, temporary / entry.name)
            for path in [*temporary.rglob("*"), temporary]:
                if not path.is_symlink():
                    sync(path)
            shutil.rmtree(outdated, ignore_errors=True)
            if folder.exists():
                os.rename(folder, outdated)
            os.rename(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):  # a full disk; what cannot be read is a UserError of its source
                raise _unwritable(option, folder, error, "make room, or name another folder") from error
            raise
        shutil.rmtree(outdated, ignore_errors=True)


def check_out_file(file: Path, option: str, force: bool = True) -> None:
    """UserError unless ``file`` may be written: it is not there, or (with ``force``) is a file; devices and
    folders are never replaced."""
    try:
        found = file.is_symlink() or file.exists()
        whole = not found or file.is_file()
        above = next((folder for folder in file.absolute().parents if folder.exists()), file)
        if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            raise PermissionError(f"{above} cannot be written")
    except (OSError, ValueError) as error:
        raise _unwritable(option, file, error, "name another file") from None
    if not whole:
        raise UserError(option, str(file), "is not a file", "name a file to create")
    if found and not force:
        remedy = "name another file, or replace it with --force"
        raise UserError(option, str(file), "holds something already", remedy)


@contextmanager
def replacing_file(file: Path, option: str = "OUT") -> Iterator[Path]:
    """The path of a new file, with the same ending. It takes the place of ``file`` once it is complete, and vanishes
    if filling it fails. UserError, which names ``option``, where it cannot be written."""
    temporary = file.with_name(f".tmp-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, file)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _unwritable(option, file, error, "make room, or name another file") from error
        raise


def _lock(descriptor: int) -> None:
    """Raises BlockingIOError where another process holds it; file systems without locks hold nothing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF):
            raise


def _copy(entry: Path, to: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.copytree(entry, to, symlinks=True)
    else:
        shutil.copy2(entry, to, follow_symlinks=False)


def _unwritable(option: str, folder: Path, error: Exception, remedy: str) -> UserError:
    return UserError(option, str(folder), f"cannot be written ({reason(error)})", remedy)


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, text: str) -> None:
    """A text file that is there as a whole or as it was before."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    os.replace(temporary, path)
