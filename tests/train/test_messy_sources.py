"""Inputs as people have them: links, folders that cannot be read, rows that are not quite right, options that
would change nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rdlm.errors import UserError
from train.data.file_formats import Reading
from train.data.prepare import Preparation, prepare
from train.data.sources import open_source

ROWS = [{"text": f"row {n}"} for n in range(3)]


def _jsonl(file: Path, rows: list[dict[str, object]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _texts(given: Path | str) -> list[str]:
    return list(open_source(str(given), Reading())["train"].documents())


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    _jsonl(tmp_path / "disk" / "b.jsonl", [{"text": "b"}])
    folder = _jsonl(tmp_path / "in" / "a.jsonl", [{"text": "a"}]).parent
    (folder / "more").symlink_to(tmp_path / "disk")
    (folder / "again").symlink_to(tmp_path / "disk")
    (folder / "round").symlink_to(folder)
    assert _texts(folder) == ["a", "b"]
    assert _texts(folder / "**" / "*.jsonl") == ["a", "b"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _jsonl(tmp_path / "in" / "a.jsonl", ROWS).parent
    (folder / "locked").mkdir()

    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(UserError, match="locked"):
        _texts(folder)


def test_an_empty_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_jsonl(tmp_path / "in" / "a.jsonl", ROWS).parent)
    with pytest.raises(UserError, match="SOURCE=''"):
        _texts("")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "\ud800"}, r"a\.jsonl:4.*surrogate"),
        ({"text": 5}, r"a\.jsonl:4 has no such text, nor another"),
        ({"body": "x"}, r"a\.jsonl:4 has no such text; use one of 'body'"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _texts(_jsonl(tmp_path / "a.jsonl", [*ROWS, row]))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    with pytest.raises(UserError, match="'text' twice"):
        _texts(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("name", "value", "rest"),
    [
        ("separator", "\n", {}),
        ("text_files", "pieces", {}),
        ("vocab_size", 300, {"tokenizer": "TOKENIZER"}),
        ("kind", "sentencepiece", {"tokenizer": "TOKENIZER"}),
        ("text_column", "body", {"rows": "chat", "tokenizer": "TOKENIZER"}),
    ],
)
def test_an_option_that_changes_nothing_is_refused(
    tmp_path: Path, name: str, value: object, rest: dict[str, str]
) -> None:
    source = _jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')}=.*changes nothing"):
        prepare(Preparation(str(source), tmp_path / "out", **{name: value}, **rest), progress=False)  # type: ignore[arg-type]


def test_a_vocabulary_that_nothing_could_hold_is_refused(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="--vocab-size"):
        prepare(Preparation(str(source), tmp_path / "out", vocab_size=10**30), progress=False)
    assert not (tmp_path / "out").exists()


def test_force_does_not_delete_what_was_not_prepared(tmp_path: Path) -> None:
    source = _jsonl(tmp_path / "in" / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"holds 'a\.jsonl'"):
        prepare(Preparation(str(source.parent), source.parent), force=True, progress=False)
    assert source.is_file()
