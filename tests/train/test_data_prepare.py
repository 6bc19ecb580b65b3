"""Preparing data: same bytes for same inputs, split by document, all or nothing, and one clear line for bad
input."""

import json
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rdlm.cli import run
from rdlm.data.token_shards import TokenStore, file_sha256, read_manifest
from rdlm.errors import UserError
from train.data.file_formats import Reading
from train.data.prepare import Preparation, prepare, split_of
from train.data.sources import PRESETS, open_source
from train.data_cli import app

DOCUMENTS = [
    f"Document {i}.\nIt says that {i * 37} foxes met {i % 5} dogs, é and {chr(0x4E00 + i)}.\n"
    for i in range(300)
]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    file = tmp_path / "in" / "docs.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"body": d, "n": i}) + "\n" for i, d in enumerate(DOCUMENTS)))
    return file


def _options(source: Path, out: Path, **changes: object) -> Preparation:
    return Preparation(
        **{"source": str(source), "out": out, "vocab_size": 300, "text_column": "body", **changes}
    )  # type: ignore[arg-type]


def _documents(out: Path, split: str) -> list[str]:
    """What a split holds, read back: the stream cut at the end-of-text token."""
    store = TokenStore(out, split)
    tokens, tokenizer = store.read(0, len(store)), store.tokenizer()
    ends = np.flatnonzero(tokens == tokenizer.eos_id)
    assert ends[-1] == len(tokens) - 1
    return [
        tokenizer.decode(part[part != tokenizer.eos_id].tolist()) for part in np.split(tokens, ends + 1)[:-1]
    ]


def _files(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_documents_come_back_whole_each_in_one_split(jsonl: Path, tmp_path: Path, kind: str) -> None:
    manifest, built = prepare(
        _options(jsonl, tmp_path / "out", kind=kind, vocab_size=600, valid_fraction=0.2, test_fraction=0.1),
        progress=False,
    )
    found = {split: _documents(tmp_path / "out", split) for split in ("train", "valid", "test")}
    assert built and sorted(sum(found.values(), [])) == sorted(DOCUMENTS)
    assert found["train"] == [d for d in DOCUMENTS if split_of(d, 0, {"valid": 0.2, "test": 0.1}) == "train"]
    assert 30 < len(found["valid"]) < 90 and 10 < len(found["test"]) < 60
    for split, info in manifest.splits.items():
        assert info.documents == len(found[split]) and info.bytes == sum(
            len(d.encode()) for d in found[split]
        )


def test_same_inputs_give_the_same_bytes_wherever_they_lie(jsonl: Path, tmp_path: Path) -> None:
    prepare(_options(jsonl, tmp_path / "one"), progress=False)
    prepare(_options(jsonl, tmp_path / "two"), progress=False)
    prepare(_options(jsonl, tmp_path / "three", seed=1), progress=False)
    assert _files(tmp_path / "one") == _files(tmp_path / "two") != _files(tmp_path / "three")


def test_one_document_keeps_its_split_when_others_change() -> None:
    fractions = {"valid": 0.3, "test": 0.3}
    before = {d: split_of(d, 4, fractions) for d in DOCUMENTS}
    assert all(split_of(d, 4, fractions) == before[d] for d in reversed(DOCUMENTS))
    assert {d: split_of(d, 5, fractions) for d in DOCUMENTS} != before
    grown = {d: split_of(d, 4, {"valid": 0.4, "test": 0.3}) for d in DOCUMENTS}
    assert all(grown[d] == "valid" for d in DOCUMENTS if before[d] == "valid")


def test_finished_work_is_reused_and_other_work_is_never_overwritten_unasked(
    jsonl: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(_options(jsonl, out), progress=False)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    assert prepare(_options(jsonl, out), progress=False)[1] is False
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before
    with pytest.raises(UserError, match="other seed"):
        prepare(_options(jsonl, out, seed=9), progress=False)
    assert prepare(_options(jsonl, out, seed=9), force=True, progress=False)[1] is True
    jsonl.write_text(jsonl.read_text() + json.dumps({"body": "one more"}) + "\n")
    with pytest.raises(UserError, match="other inputs"):
        prepare(_options(jsonl, out, seed=9), progress=False)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a finished preparation"):
        prepare(_options(jsonl, tmp_path / "mine"), progress=False)


def test_a_failure_leaves_the_old_preparation_and_nothing_else(jsonl: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(_options(jsonl, out), progress=False)
    before = _files(out)
    jsonl.write_text(jsonl.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"docs.jsonl:301.*not JSON"):
        prepare(_options(jsonl, out), force=True, progress=False)
    assert _files(out) == before and sorted(f.name for f in tmp_path.iterdir()) == ["in", "out"]


KILLED_WHILE_WRITING = """
import os, signal, sys
from rdlm.cli import app, run
from train.data.writer import SplitWriter

def add(self, *arguments, whole=SplitWriter.add):
    whole(self, *arguments)
    os.kill(os.getpid(), signal.SIGKILL)

SplitWriter.add = add
run(app, sys.argv[1:], "rdlm")
"""


def test_killed_in_the_middle_then_run_again(jsonl: Path, tmp_path: Path, repo: Path) -> None:
    out = tmp_path / "out"
    given = ["data", "prepare", str(jsonl), "--out", str(out), "--text-column", "body", "--vocab-size", "300"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, *given], cwd=repo, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    assert list(tmp_path.glob(".tmp-out/*/*.bin"))
    prepare(_options(jsonl, out), progress=False)
    prepare(_options(jsonl, tmp_path / "undisturbed"), progress=False)
    assert _files(out) == _files(tmp_path / "undisturbed") and not (tmp_path / ".tmp-out").exists()


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    table = pyarrow.table({"n": list(range(300)), "text": DOCUMENTS})
    pyarrow.parquet.write_table(table, tmp_path / "a" / "docs.parquet", row_group_size=64)
    large = table.set_column(1, "text", table["text"].cast(pyarrow.large_string()))
    pyarrow.parquet.write_table(large, tmp_path / "large.parquet")
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    for given in (
        tmp_path / "a" / "docs.parquet",
        tmp_path / "large.parquet",
        tmp_path / "a",
        tmp_path / "*" / "*.parquet",
        tmp_path / "docs.jsonl",
    ):
        assert list(open_source(str(given), Reading())["train"].documents()) == DOCUMENTS


def test_a_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * (i % 400) + "\n\n" for i in range(300)]
    (tmp_path / "prose.txt").write_text("".join(paragraphs))
    documents = list(open_source(str(tmp_path / "prose.txt"), Reading())["train"].documents())
    assert "".join(documents) == "".join(paragraphs) and len(documents) > 20
    assert all(d.endswith("\n\n") and len(d) < 4 * 8192 for d in documents)
    (tmp_path / "prose.txt").write_text("one line without an end " * 20_000)  # as text8 is
    documents = list(open_source(str(tmp_path / "prose.txt"), Reading())["train"].documents())
    assert "".join(documents) == "one line without an end " * 20_000 and max(map(len, documents)) <= 4 * 8192


def test_wikitext_rows_become_articles(shared_data: Path) -> None:
    file = shared_data / "wikitext2" / "valid.parquet"
    articles = list(open_source(str(file), Reading(rows="wikitext"))["train"].documents())
    rows = list(open_source(str(file), Reading())["train"].documents())
    assert "".join(articles) == "".join(rows) and len(articles) == 60
    assert all(a.lstrip().startswith("= ") for a in articles)


def test_explicit_held_out_sources(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text(json.dumps({"body": "only this"}) + "\n")
    manifest, _ = prepare(
        _options(jsonl, tmp_path / "out", valid=str(tmp_path / "valid.jsonl")), progress=False
    )
    assert set(manifest.splits) == {"train", "valid"} and _documents(tmp_path / "out", "valid") == [
        "only this"
    ]
    assert manifest.splits["train"].documents == 300
    with pytest.raises(UserError, match="--valid-fraction"):
        prepare(
            _options(jsonl, tmp_path / "o", valid=str(tmp_path / "valid.jsonl"), valid_fraction=0.1),
            progress=False,
        )


def test_a_loaded_tokenizer_is_kept_as_it_is(jsonl: Path, tmp_path: Path) -> None:
    first, _ = prepare(
        _options(jsonl, tmp_path / "one", kind="sentencepiece", vocab_size=600), progress=False
    )
    loaded = Preparation(
        str(jsonl), tmp_path / "two", tokenizer=str(tmp_path / "one" / "tokenizer"), text_column="body"
    )
    second, _ = prepare(loaded, progress=False)
    assert second.tokenizer_fingerprint == first.tokenizer_fingerprint and second.splits == first.splits


def test_embedded_text_is_one_document_a_chapter() -> None:
    chapters = list(open_source("embedded", Reading())["train"].documents())
    assert len(chapters) == 1189 and chapters[0].startswith(
        "Genesis 1\n\nIn the beginning God created the heaven and the earth.\n"
    )
    assert sum(c.count("\n") - 2 for c in chapters) == 31_103  # this edition counts a 15th verse in 3 John


def test_presets_stream_from_the_hub_and_say_what_to_do_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((path, name, split, streaming))
        return [{"text": d} for d in (DOCUMENTS if split == "train" else DOCUMENTS[:3])]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    manifest, _ = prepare(Preparation("text8", tmp_path / "out", vocab_size=300), progress=False)
    assert {s: i.documents for s, i in manifest.splits.items()} == {"train": 300, "valid": 3, "test": 3}
    assert {c[2] for c in calls} == {"train", "validation", "test"} and all(c[3] for c in calls)

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(UserError, match="no route.*give its files"):
        prepare(Preparation("hub:someone/texts:en", tmp_path / "hub"), progress=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for preset in PRESETS:
        with pytest.raises(UserError, match="pip install datasets"):
            prepare(Preparation(preset, tmp_path / preset), progress=False)


def test_a_data_set_of_the_library_streams(tmp_path: Path) -> None:
    """The real library on a folder, which it opens as it opens a data set of the hub."""
    pytest.importorskip("datasets", reason="the package datasets is not installed")
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"body": document}) + "\n" for document in DOCUMENTS]
    (tmp_path / "set" / "train.jsonl").write_text("".join(rows))
    given = Preparation(
        f"hub:{tmp_path / 'set'}", tmp_path / "out", vocab_size=300, text_column="body", test_fraction=0.0
    )
    manifest, _ = prepare(given, progress=False)
    assert sum(split.documents for split in manifest.splits.values()) == len(DOCUMENTS)


def test_info_finds_a_changed_byte_and_a_missing_shard(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(_options(jsonl, out), progress=False)
    assert run(app, ["info", str(out)], "rdlm data") == 0 and "all hashes match" in capsys.readouterr().out
    shard = out / read_manifest(out).splits["valid"].shards[0].file
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert (
        run(app, ["info", str(out)], "rdlm data") == 2
        and "does not match its hash" in capsys.readouterr().err
    )
    shard.unlink()
    assert run(app, ["info", str(out)], "rdlm data") == 2 and "is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.txt", "--out", "o"], "SOURCE='nowhere.txt'"),
        (["in", "--out", "o", "--text-column", "body", "--valid", "nowhere"], "--valid='nowhere'"),
        (["in", "--out", "o"], "--text-column='text'"),
        (["in", "--out", "o", "--text-column", "body", "--vocab-size", "90000"], "--vocab-size=90000"),
        (["in", "--out", "o", "--text-column", "body", "--tokenizer", "nope"], "tokenizer='nope'"),
        (
            [
                "in",
                "--out",
                "o",
                "--text-column",
                "body",
                "--valid-fraction",
                "0.7",
                "--test-fraction",
                "0.7",
            ],
            "fraction",
        ),
        (
            ["in", "--out", "o", "--text-column", "body", "--vocab-size", "300", "--valid-fraction", "1e-9"],
            "no documents",
        ),
        (["in", "--out", "o", "--kind", "wordpiece"], "--kind"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    jsonl: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(jsonl.parent.parent)
    assert run(app, ["prepare", *arguments], "rdlm data") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not Path("o").exists() and not Path(".tmp-o").exists()
