"""Files of every kind give the same documents; what is not read is said and counted; what is damaged is one
clear line."""

from __future__ import annotations

import csv
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from rdlm.cli import run
from rdlm.data.token_shards import read_manifest
from rdlm.errors import UserError
from train.data.file_formats import Reading
from train.data.prepare import Preparation, prepare
from train.data.sources import EMPTY, NULL, Files, Source, open_source
from train.data_cli import app

DOCUMENTS = [f'Document {i}, "quoted",\nwith é, {chr(0x4E00 + i)} and\ttabs.\n' for i in range(120)]
HOLES: list[str | None] = [*DOCUMENTS[:3], None, "", DOCUMENTS[3], None]
ROWS = [document for document in HOLES if document]


def _source(path: Path, **reading: object) -> Source:
    return open_source(str(path), Reading(**reading))["train"]  # type: ignore[arg-type]


def _documents(path: Path, **reading: object) -> list[str]:
    return list(_source(path, **reading).documents())


def _jsonl(texts: list[str | None]) -> bytes:
    return "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def _table(texts: list[str | None], kind: pyarrow.DataType | None = None) -> pyarrow.Table:
    kind = kind or pyarrow.string()
    if pyarrow.types.is_dictionary(kind):
        column = pyarrow.array(texts, pyarrow.string()).dictionary_encode()
    else:
        column = pyarrow.array(texts, kind)
    return pyarrow.table({"n": list(range(len(texts))), "text": column})


def _write_csv(file: Path, texts: list[str | None], delimiter: str) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["n", "text"])
        writer.writerows(
            [[i] if text is None else [i, text] for i, text in enumerate(texts)]
        )  # a short line is null


def _write_parquet(kind: pyarrow.DataType) -> Callable[[Path, list[str | None]], None]:
    return lambda file, texts: pyarrow.parquet.write_table(_table(texts, kind), file, row_group_size=3)


def _write_arrow(
    new: Callable[..., pyarrow.ipc.RecordBatchFileWriter],
) -> Callable[[Path, list[str | None]], None]:
    def write(file: Path, texts: list[str | None]) -> None:
        table = _table(texts)
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    return write


def _compressed(name: str) -> Callable[[Path, list[str | None]], None]:
    """Two streams one after the other, as tools that compress in parallel write them."""

    def write(file: Path, texts: list[str | None]) -> None:
        content = _jsonl(texts)
        parts = []
        for part in (content[:40], content[40:]):
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, name) as stream:
                stream.write(part)
            parts.append(sink.getvalue().to_pybytes())
        file.write_bytes(b"".join(parts))

    return write


def _zipped(file: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


WRITERS: dict[str, Callable[[Path, list[str | None]], object]] = {
    "a.jsonl": lambda file, texts: file.write_bytes(_jsonl(texts)),
    "a.NDJSON": lambda file, texts: file.write_bytes(_jsonl(texts)),
    "bom.jsonl": lambda file, texts: file.write_bytes(b"\xef\xbb\xbf" + _jsonl(texts)),
    "a.jsonl.gz": _compressed("gzip"),
    "a.JSONL.GZ": _compressed("gzip"),
    "a.jsonl.zst": _compressed("zstd"),
    "a.jsonl.bz2": _compressed("bz2"),
    "a.jsonl.lz4": _compressed("lz4"),
    "a.jsonl.xz": lambda file, texts: file.write_bytes(lzma.compress(_jsonl(texts))),
    "a.jsonl.zip": lambda file, texts: _zipped(file, {"a.jsonl": _jsonl(texts)}),
    "a.csv": lambda file, texts: _write_csv(file, texts, ","),
    "a.tsv": lambda file, texts: _write_csv(file, texts, "\t"),
    "a.parquet": _write_parquet(pyarrow.string()),
    "large.parquet": _write_parquet(pyarrow.large_string()),
    "view.parquet": _write_parquet(pyarrow.string_view()),
    "dictionary.Parquet": _write_parquet(pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
    "file.arrow": _write_arrow(pyarrow.ipc.new_file),
    "stream.arrow": _write_arrow(pyarrow.ipc.new_stream),
    "a.feather": lambda file, texts: pyarrow.feather.write_feather(_table(texts), str(file)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_documents_and_counts(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, list(DOCUMENTS))
    assert _documents(tmp_path / name) == _documents(tmp_path) == DOCUMENTS
    WRITERS[name](tmp_path / name, HOLES)
    source = _source(tmp_path / name)
    for _ in range(2):  # read again from the start
        assert list(source.documents()) == ROWS and source.skipped == {NULL: 2, EMPTY: 1}


def test_what_is_left_out_stands_in_the_manifest_and_in_the_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(_jsonl([*DOCUMENTS, None, "", None]))
    (tmp_path / "in" / "b.txt").write_text("a text file\n")
    (tmp_path / "in" / "c.txt").write_text("another\n")
    (tmp_path / "in" / "picture.png").write_bytes(b"x")
    (tmp_path / "in" / "notes").write_bytes(b"x")
    (tmp_path / "in" / "nothing.md").write_bytes(b"")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "log.txt").write_text("secret\n")
    (tmp_path / "in" / ".hidden.txt").write_text("secret\n")
    command = ["prepare", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert run(app, command, "rdlm data") == 0
    shown = capfd.readouterr()
    assert "SOURCE: read: 1 .jsonl, 2 .txt\n" in shown.err
    assert "SOURCE: not read, no known ending: 2 files (notes, picture.png)\n" in shown.err
    assert "SOURCE: not read, empty: 1 files (nothing.md)\n" in shown.err
    assert "SOURCE: not read, hidden: 2 files\n" in shown.err
    assert f"left out: 2 {NULL}, 1 {EMPTY}\n" in shown.out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.skipped == {NULL: 2, EMPTY: 1}
    assert sum(split.documents for split in manifest.splits.values()) == len(DOCUMENTS) + 2
    assert run(app, ["info", str(tmp_path / "out")], "rdlm data") == 0
    assert f"left out: 2 {NULL}, 1 {EMPTY}\n" in capfd.readouterr().out


def test_a_manifest_of_whole_data_has_no_word_about_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(list(DOCUMENTS)))
    prepare(Preparation(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300), progress=False)
    document = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "skipped" not in document
    assert document["request"]["inputs"]["train"].keys() == {
        "files",
        "column",
        "rows",
    }  # found again since the first version


# What a document of plain text is ---------------------------------------------------------------------------


def test_a_text_file_is_a_document_and_only_a_single_one_is_cut(tmp_path: Path) -> None:
    long = "A line of text.\n\n" * 2000
    for name in ("a.txt", "b.MD", "c.txt.gz"):
        (tmp_path / name).write_bytes(long.encode())
    (tmp_path / "c.txt.gz").unlink()
    assert _documents(tmp_path) == [long, long]
    assert _documents(tmp_path, text_files="files") == [long, long]
    cut = _documents(tmp_path / "a.txt")
    assert (
        len(cut) > 3 and "".join(cut) == long and _documents(tmp_path / "a.txt", text_files="pieces") == cut
    )
    assert _documents(tmp_path, text_files="pieces") == cut * 2
    assert _documents(tmp_path / "a.txt", text_files="files") == [long]
    identities = [
        _source(tmp_path / "a.txt", **chosen).identity
        for chosen in ({}, {"text_files": "files"}, {"separator": "x"}, {"separator": "y"})
    ]
    assert len({json.dumps(each) for each in identities}) == 4
    assert _source(tmp_path / "a.txt", text_files="pieces").identity == identities[0]


@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\n---\n", "é"])
def test_a_separator_cuts_wherever_it_stands(
    tmp_path: Path, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} word{' and more' * (i % 50)}." for i in range(3000)]
    (tmp_path / "a.txt").write_text(separator.join(texts))
    assert _documents(tmp_path / "a.txt", separator=separator) == texts
    (tmp_path / "a.txt").write_text(separator.join(["", *texts[:5], "", ""]))
    source = _source(tmp_path / "a.txt", separator=separator)
    assert list(source.documents()) == texts[:5] and source.skipped[EMPTY] >= 2


def test_the_separator_of_the_command_line_may_hold_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n===\n".join(f"Text {i}.\n\nIts end {i}." for i in range(200)))
    command = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert run(app, [*command, "--separator", r"\n===\n"], "rdlm data") == 0
    assert sum(split.documents for split in read_manifest(tmp_path / "out").splits.values()) == 200


def test_line_ends_and_byte_order_marks_of_text_do_not_reach_the_documents(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert _documents(tmp_path) == ["one\ntwo\n"] * 2


# What cannot be read ----------------------------------------------------------------------------------------


def _damaged_page(file: Path) -> None:
    """The second row group of an intact looking file."""
    pyarrow.parquet.write_table(
        _table(list(DOCUMENTS)), file, row_group_size=60, compression="snappy", use_dictionary=False
    )
    column = pyarrow.parquet.ParquetFile(file).metadata.row_group(1).column(1)
    content = bytearray(file.read_bytes())
    start = column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(content)


def _flipped_bit(file: Path) -> None:
    """One letter of a text that is not compressed: only the checksum of its page tells."""
    pyarrow.parquet.write_table(
        _table(list(DOCUMENTS)), file, compression="none", use_dictionary=False, write_page_checksum=True
    )
    content = bytearray(file.read_bytes())
    place = content.index(max(filter(None, DOCUMENTS), key=len).encode())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "page.parquet": (_damaged_page, "cannot be read (Couldn"),
    "bit.parquet": (_flipped_bit, "cannot be read (could not verify page integrity"),
    "not.parquet": (lambda file: file.write_bytes(b"PAR1 no parquet"), "cannot be read"),
    "not.arrow": (lambda file: file.write_bytes(b"no arrow"), "cannot be read"),
    "cut.jsonl.gz": (
        lambda file: (_compressed("gzip")(file, list(DOCUMENTS)), file.write_bytes(file.read_bytes()[:-30])),
        "cannot be read",
    ),
    "cut.jsonl.zst": (
        lambda file: (_compressed("zstd")(file, list(DOCUMENTS)), file.write_bytes(file.read_bytes()[:-30])),
        "cannot be read",
    ),
    "two.jsonl.zip": (
        lambda file: _zipped(file, dict.fromkeys(("a.jsonl", "b.jsonl"), _jsonl(list(DOCUMENTS)))),
        "the archive holds 2 files",
    ),
    "not.jsonl.zip": (lambda file: file.write_bytes(_jsonl(list(DOCUMENTS))), "cannot be read"),
    "not.jsonl.gz": (lambda file: file.write_bytes(_jsonl(list(DOCUMENTS))), "cannot be read"),
    "latin.txt": (lambda file: file.write_bytes("Grüße".encode("latin-1")), "is not UTF-8 text"),
    "wide.txt": (lambda file: file.write_bytes("text".encode("utf-16")), "is not UTF-8 text"),
    "deep.jsonl": (lambda file: file.write_text("[" * 100_000), "deep.jsonl:1': is not JSON"),
    "digits.jsonl": (lambda file: file.write_text("9" * 10_000), "digits.jsonl:1': is not JSON"),
    "list.jsonl": (lambda file: file.write_text('["text"]\n'), "list.jsonl:1': is not a JSON object"),
    "number.jsonl": (
        lambda file: file.write_text('{"text": 1, "body": "x"}\n'),
        "has no such text; use one of 'body'",
    ),
    "twice.jsonl": (
        lambda file: file.write_text('{"text": "a", "text": "b"}\n'),
        "twice.jsonl:1': is not JSON (a field is there twice)",
    ),
    "other.jsonl": (lambda file: file.write_text('{"body": "x"}\n'), "has no such text; use one of 'body'"),
    "other.csv": (lambda file: file.write_text("a,b\n1,2\n"), "has no such text; use one of 'a', 'b'"),
    "wide.csv": (
        lambda file: file.write_text("n,text\n1,2\n1,2,3\n"),
        "wide.csv:3': has more cells than the header",
    ),
    "quote.csv": (lambda file: file.write_text('n,text\n1,"two\n'), "cannot be read"),
    "number.parquet": (
        lambda file: pyarrow.parquet.write_table(pyarrow.table({"text": [1], "body": ["x"]}), file),
        "has no such text; use one of 'body'",
    ),
    "chat.jsonl": (
        lambda file: file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n'),
        "its 'messages' are conversations",
    ),
    "half.jsonl": (
        lambda file: file.write_text('{"text": "half \\ud800"}\n'),
        "half.jsonl:1': it holds half",
    ),
    "empty.txt": (lambda file: file.write_bytes(b""), "there is no text in it (empty.txt: empty)"),
    "blank.jsonl": (lambda file: file.write_text("\n\n"), "there is no text in it"),
    "null.jsonl": (lambda file: file.write_text('{"text": null}\n'), "there is no text in it"),
    "picture.png": (lambda file: file.write_bytes(b"x"), "nothing here can be read (picture.png)"),
    "table.parquet.gz": (lambda file: file.write_bytes(b"x"), "nothing here can be read"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_cannot_be_read_is_one_line_that_names_the_file(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write, message = DAMAGED[name]
    write(tmp_path / name)
    command = ["prepare", str(tmp_path / name), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert run(app, command, "rdlm data") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_error_names_the_option_that_named_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(_jsonl(list(DOCUMENTS)))
    (tmp_path / "b.jsonl").write_text("{\n")
    options = Preparation(
        str(tmp_path / "a.jsonl"), tmp_path / "out", valid=str(tmp_path / "b.jsonl"), vocab_size=300
    )
    with pytest.raises(UserError, match="^--valid=.*b.jsonl:1': is not JSON"):
        prepare(options, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--separator", ""], "--separator=''"),
        (["--separator", "x", "--text-files", "files"], "--separator='x': says what a document is"),
        (["--text-files", "files"], "--text-files pieces"),
        (["--out", "{tmp}/a.txt/below"], "--out="),
        (["--tokenizer", "nowhere", "--vocab-size", "4096"], "--tokenizer='nowhere'"),
    ],
)
def test_options_that_cannot_be_met_are_one_line(
    tmp_path: Path, arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i} words.\n\n" for i in range(9000)))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    command = [
        "prepare",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "300",
        *given,
    ]
    assert run(app, command, "rdlm data") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]


def test_a_pattern_names_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jsonl").write_bytes(_jsonl(list(DOCUMENTS)))
    assert list(Files(str(tmp_path / "**" / "**" / "*.jsonl"), Reading()).documents()) == DOCUMENTS
