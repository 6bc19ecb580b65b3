"""What may be replaced by an output folder or file, and that it is there as a whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from rdlm.atomic import check_out, check_out_file, replacing, replacing_file
from rdlm.errors import UserError

OURS = ("config.json", "*.safetensors")


def _fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_force_replaces_what_such_a_command_wrote_and_nothing_else(tmp_path: Path) -> None:
    check_out(tmp_path / "new", "OUT", OURS, force=False)
    check_out(_fill(tmp_path / "empty"), "OUT", OURS, force=False)
    model = _fill(tmp_path / "model", "config.json", "model.safetensors")
    with pytest.raises(UserError, match="holds something already.*--force"):
        check_out(model, "OUT", OURS, force=False)
    check_out(model, "OUT", OURS, force=True)
    home = _fill(tmp_path / "home", "config.json", "thesis.txt")
    with pytest.raises(UserError, match="thesis.txt"):
        check_out(home, "OUT", OURS, force=True)


@pytest.mark.parametrize(
    ("out", "problem"),
    [("file", "not a folder"), (".", "current folder"), ("..", "current folder"), ("x" * 300, "cannot be written"),
     ("a\0b", "cannot be written"), ("loop", "cannot be written")],
)  # fmt: skip
def test_what_is_no_output_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, problem: str
) -> None:
    monkeypatch.chdir(_fill(tmp_path / "here", "file"))
    Path("loop").symlink_to("loop")
    with pytest.raises(UserError, match=problem):
        check_out(Path(out), "OUT", OURS, force=True)


def test_devices_and_folders_are_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a file"):
        check_out_file(Path("/dev/null"), "--out")
    with pytest.raises(UserError, match="--out='/': is not a file|cannot be written"):
        check_out_file(Path("/"), "--out")
    with pytest.raises(UserError, match="not a file"):
        check_out_file(tmp_path, "--out")
    (tmp_path / "file").write_text("")
    check_out_file(tmp_path / "file", "--out")
    with pytest.raises(UserError, match="--force"):
        check_out_file(tmp_path / "file", "--out", force=False)
    with pytest.raises(UserError, match="cannot be written"):
        check_out_file(tmp_path / "file" / "below", "--out")


def test_a_link_stays_and_what_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    for text in ("one", "two"):
        with replacing(tmp_path / "link") as folder:
            (folder / "file").write_text(text)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "out" / "file").read_text() == "two"
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


def test_two_writers_of_one_folder_do_not_mix(tmp_path: Path) -> None:
    with replacing(tmp_path / "out", "--out") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(UserError, match="--out=.*another process"), replacing(tmp_path / "out", "--out"):
            pass
    assert (tmp_path / "out" / "file").read_text() == "first"
    (tmp_path / ".tmp-out").mkdir()
    (tmp_path / ".tmp-out" / "half").write_text("of a process that was killed")
    with replacing(tmp_path / "out") as folder:
        assert not list(folder.iterdir())


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No space left"), replacing(tmp_path / "out") as folder:
        (folder / "file").write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_somebody_put_into_a_folder_stays_where_it_is_rewritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "mine").mkdir(parents=True)
    (out / "mine" / "notes.md").write_text("by hand")
    (out / "link").symlink_to("nowhere")
    (out / "written").write_text("before")
    with replacing(out, keep=True) as folder:
        (folder / "written").write_text("now")
    assert (out / "mine" / "notes.md").read_text() == "by hand" and (out / "link").is_symlink()
    assert (out / "written").read_text() == "now"
    with replacing(out) as folder:
        (folder / "written").write_text("again")
    assert [path.name for path in out.iterdir()] == ["written"]


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "a.npz"
    with replacing_file(file) as new:
        new.write_text("first")
    for error, seen in (
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(seen), replacing_file(file, "--out") as new:
            new.write_text("half")
            raise error
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"] and file.read_text() == "first"
    with pytest.raises(UserError, match="--out=.*cannot be written.*name another file"):
        with replacing_file(file / "below.npz", "--out"):
            pass
