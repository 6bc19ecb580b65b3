"""Pictures as people have them: what each becomes, and one line for what cannot be read."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rdlm.cli import run
from rdlm.data.image_files import open_images
from rdlm.data.images import ImageStore
from rdlm.errors import UserError
from train.data_cli import app

Image = pytest.importorskip("PIL.Image")
ORIENTATION = 0x112
RAMP = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def _bytes(picture: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


PNG = _bytes(Image.fromarray(RAMP))


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return _bytes(Image.fromarray(RAMP), exif=exif)


READ = {
    "grey of 16 bits": (_bytes(Image.fromarray(np.full((4, 6), 0x8001, np.uint16))), np.full((4, 6, 3), 0x80)),
    "one bit": (_bytes(Image.new("1", (6, 4), 1)), np.full((4, 6, 3), 255)),
    "transparent": (_bytes(Image.new("RGBA", (6, 4), (1, 2, 3, 0))), np.full((4, 6, 3), (1, 2, 3))),
    "printing colours": (_bytes(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "TIFF"), np.full((4, 6, 3), (255, 0, 0))),
    "turned by 90 degrees": (_turned(6), np.rot90(RAMP, -1)),
    "upside down": (_turned(3), np.rot90(RAMP, 2)),
    "mirrored": (_turned(2), RAMP[:, ::-1]),
    "an animation": (
        _bytes(Image.fromarray(RAMP), save_all=True, append_images=[Image.fromarray(255 - RAMP)]), RAMP
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_every_kind_of_picture_becomes_what_people_see(name: str, tmp_path: Path) -> None:
    content, expected = READ[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").write_bytes(content)
    pq.write_table(pa.table({"image": [content]}), tmp_path / "in.parquet")
    for path in (tmp_path / "in", tmp_path / "in.parquet"):
        np.testing.assert_array_equal(open_images(path, "SOURCE").read(0), expected)


def _header_of(width: int, height: int) -> bytes:
    """A PNG that says it is larger than it is."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + PNG[33:]


REFUSED = {
    "empty": (b"", "cannot identify"),
    "no picture": (b"\0\xff" * 99, "cannot identify"),
    "cut": (PNG[:50], "truncated"),
    "a bomb": (_header_of(30_000, 30_000), "decompression bomb"),
    "32 bits": (_bytes(Image.fromarray(np.full((4, 6), 0x8000, np.int32)), "TIFF"), "32 bits"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
}


def _prepare(
    capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str
) -> tuple[int, str, str]:
    status = run(
        app, ["images", str(source), "--out", str(out), "--valid-fraction", "0.3", *options], "rdlm data"
    )
    printed = capsys.readouterr()
    return status, printed.out, printed.err.split("\r")[-1].strip().split("\n")[-1]


def _folder(path: Path, count: int = 4) -> Path:
    for name in "ab":
        (path / name).mkdir(parents=True)
        for i in range(count):
            (path / name / f"{i}.png").write_bytes(PNG)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_one_line_names_the_picture_that_cannot_be_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a picture started {args}")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    content, problem = REFUSED[name]
    source = _folder(tmp_path / "in")
    for i in range(4):
        (source / "a" / f"{i}.png").write_bytes(content)
    status, _, error = _prepare(capsys, source, tmp_path / "out")
    assert status == 2 and problem in error and "/a/" in error and not (tmp_path / "out").exists()


def test_files_that_are_no_pictures_are_counted_and_links_are_not_followed_in_circles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _folder(tmp_path / "in")
    (source / "a" / "x.webp").write_bytes(_bytes(Image.fromarray(RAMP), "WEBP"))
    (source / "b" / "notes").write_text("x")
    (source / "a" / "round").symlink_to(source, target_is_directory=True)
    (source / "a" / "itself.png").symlink_to("itself.png")
    os.mkfifo(source / "b" / "pipe.png")
    status, out, _ = _prepare(capsys, source, tmp_path / "out")
    assert status == 0 and "left out: 2 files .png, 1 files .webp, 1 files without an ending" in out
    assert len(ImageStore(tmp_path / "out", "train")) + len(ImageStore(tmp_path / "out", "valid")) == 8


TABLES: dict[str, tuple[Callable[[], Any], str]] = {
    "labels without a bound": (
        lambda: {"label": [10**12, *[0] * 7]},
        "classes are numbered 0 to at most 65535",
    ),
    "labels beyond int64": (lambda: {"label": pa.array([2**64 - 1, *[0] * 7], pa.uint64())}, "not in range"),
    "texts for bytes": (lambda: {"image": [{"bytes": "x", "path": "x"}] * 8}, "0 image columns"),
    "lists for bytes": (lambda: {"image": [{"bytes": [1, 2], "path": "x"}] * 8}, "0 image columns"),
    "a row without a picture": (lambda: {"image": [None, *[{"bytes": PNG}] * 7]}, "row 0"),
}


@pytest.mark.parametrize("name", TABLES)
def test_wrong_tables_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns, problem = TABLES[name]
    table = {"image": [{"bytes": PNG}] * 8, "label": [0, 1] * 4, **columns()}
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    status, _, error = _prepare(capsys, tmp_path / "in.parquet", tmp_path / "out")
    assert status == 2 and problem in error


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "fixed", "dictionary"])
def test_every_column_of_bytes_is_read(kind: str, tmp_path: Path) -> None:
    types = {"fixed": pa.binary(len(PNG)), "dictionary": pa.dictionary(pa.int8(), pa.binary())}
    column = pa.array([PNG] * 3, types[kind] if kind in types else getattr(pa, kind)())
    labels = pa.array([5, 0, 5]).dictionary_encode()
    pq.write_table(pa.table({"image": column, "label": labels}), tmp_path / "in.parquet")
    found = open_images(tmp_path / "in.parquet", "SOURCE")
    np.testing.assert_array_equal(found.read(2), RAMP)
    assert found.labels is not None and found.labels.tolist() == [5, 0, 5]


def test_sizes_have_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _folder(tmp_path / "in")
    status, _, error = _prepare(capsys, source, tmp_path / "out", "--size", "4097")
    assert status == 2 and "4096" in error
    for i in range(4):
        (source / "a" / f"{i}.png").write_bytes(_bytes(Image.new("RGB", (60_000, 1))))
    status, _, error = _prepare(capsys, source, tmp_path / "out", "--size", "2048")
    assert status == 2 and "122880000x2048" in error


def test_a_class_that_is_not_utf8_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _folder(tmp_path / "in")
    odd = os.fsencode(source) + b"/\xff"
    os.mkdir(odd)
    (source / "a" / "0.png").rename(os.fsdecode(odd) + "/0.png")
    status, _, error = _prepare(capsys, source, tmp_path / "out")
    assert status == 2 and "not UTF-8" in error


def test_a_picture_whose_bytes_changed_in_a_table_is_refused(tmp_path: Path) -> None:
    """A bitmap has no checksum of its own: the table's is compared."""
    file = tmp_path / "a.parquet"
    pixels = _bytes(Image.fromarray(RAMP), "BMP")
    pq.write_table(pa.table({"image": [pixels]}), file, compression="none", write_page_checksum=True)
    content = bytearray(file.read_bytes())
    content[content.index(pixels) + len(pixels) - 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as parquet.*could not verify page integrity"):
        open_images(file, "SOURCE")
