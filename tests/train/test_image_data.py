"""Labelled images: the same pixels and labels from every kind of source, the same bytes, and one clear line
for bad input."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rdlm.cli import run
from rdlm.data.image_files import open_images
from rdlm.data.images import ImageStore
from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError
from train.data.image_prepare import ImagePreparation, prepare_images
from train.data.image_sources import PRESETS
from train.data_cli import app

Image = pytest.importorskip("PIL.Image")
COUNT, NAMES = 60, ["ant", "bee", "train"]  # a class may be called as a split is
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 3), dtype=np.uint8)
LABELS = np.random.default_rng(1).permutation(np.arange(COUNT) % 3)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _folder(path: Path, indices: Any = range(COUNT), names: list[str] = NAMES) -> Path:
    for i in indices:
        file = path / names[LABELS[i]] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(_png(PIXELS[i]))
    return path


def _parquet(
    path: Path,
    indices: Any = range(COUNT),
    names: list[str] | None = NAMES,
    labels: Any = LABELS,
    column: str = "label",
) -> Path:
    rows = [{"bytes": _png(PIXELS[i]), "path": None} for i in indices]
    table = pa.table({"img": rows, column: [labels[i] for i in indices]})
    if names is not None:
        features = {"img": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=16)
    return path


def _prepare(source: Path | str, out: Path, **changes: Any) -> Any:
    return prepare_images(ImagePreparation(str(source), out, **changes), progress=False)


def _content(out: Path, split: str) -> dict[bytes, str]:
    """Pixels -> class name."""
    store = ImageStore(out, split)
    pixels, labels = store.read(np.arange(len(store)))
    return {each.tobytes(): store.manifest.classes[label] for each, label in zip(pixels, labels, strict=True)}


def _expected(indices: Any = range(COUNT)) -> dict[bytes, str]:
    return {PIXELS[i].tobytes(): NAMES[LABELS[i]] for i in indices}


def _files(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def test_every_kind_of_source_gives_the_same_images_under_the_same_names(tmp_path: Path) -> None:
    sources = {
        "folder": _folder(tmp_path / "in"),
        "parquet": _parquet(tmp_path / "in.parquet"),
        "numbers": _parquet(tmp_path / "numbers.parquet", names=None),
    }
    for name, source in sources.items():
        manifest, built = _prepare(source, tmp_path / name, valid_fraction=0.1, test_fraction=0.2)
        assert built and {split: info.count for split, info in manifest.splits.items()} == {
            "train": 42,
            "valid": 6,
            "test": 12,
        }
        parts = [_content(tmp_path / name, split) for split in manifest.splits]
        assert sum(len(part) for part in parts) == COUNT  # nothing in two splits
        found = parts[0] | parts[1] | parts[2]
        assert manifest.classes == (("0", "1", "2") if name == "numbers" else tuple(NAMES))
        if name == "numbers":
            found = {pixels: NAMES[int(number)] for pixels, number in found.items()}
        assert found == _expected()


def test_order_within_a_split_is_that_of_the_source_and_the_seed_decides_the_cut(tmp_path: Path) -> None:
    source, place = _parquet(tmp_path / "in.parquet"), {each.tobytes(): i for i, each in enumerate(PIXELS)}
    held: list[list[int]] = []
    for seed in (0, 1):
        _prepare(source, tmp_path / str(seed), seed=seed, valid_fraction=0.3)
        held.append([place[pixels] for pixels in _content(tmp_path / str(seed), "valid")])
        train = [place[pixels] for pixels in _content(tmp_path / str(seed), "train")]
        assert held[-1] == sorted(held[-1]) and train == sorted(set(range(COUNT)) - set(held[-1]))
    assert held[0] != held[1]
    assert _prepare(source, tmp_path / "default")[0].splits["valid"].count == round(0.05 * COUNT)


def test_same_inputs_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    for name in ("one", "two"):
        manifest, _ = _prepare(_folder(tmp_path / name / "in"), tmp_path / name / "out")
        assert manifest.source == str(tmp_path / name / "in")
    one, two = (_files(tmp_path / name / "out") for name in ("one", "two"))
    assert one.pop("manifest.json") != two.pop("manifest.json")  # which names the source
    assert one == two and len(one) == 4
    _prepare(tmp_path / "one" / "in", tmp_path / "other", seed=1)
    assert _files(tmp_path / "other")["train/images.npy"] != one["train/images.npy"]


def test_a_folder_with_splits_in_folders_or_files(tmp_path: Path) -> None:
    parts = {"train": range(30), "val": range(30, 45), "test": range(45, 60)}
    for split, indices in parts.items():
        _folder(tmp_path / "folders" / split, indices)
        _parquet(tmp_path / "files" / f"{split}.parquet", indices)
    for name in ("folders", "files"):
        manifest, _ = _prepare(tmp_path / name, tmp_path / f"{name}-out")
        assert list(manifest.splits) == ["train", "valid", "test"]
        for split, theirs in (("train", "train"), ("valid", "val"), ("test", "test")):
            assert _content(tmp_path / f"{name}-out", split) == _expected(parts[theirs])
    manifest, _ = _prepare(tmp_path / "files", tmp_path / "mixed", test=str(tmp_path / "folders" / "val"))
    assert _content(tmp_path / "mixed", "test") == _expected(parts["val"])
    _folder(tmp_path / "folders" / "valid", parts["val"])
    with pytest.raises(UserError, match="more than one valid split: valid, val"):
        _prepare(tmp_path / "folders", tmp_path / "twice")


def test_names_decide_the_label_not_numbers(tmp_path: Path) -> None:
    _parquet(tmp_path / "train.parquet", range(30))
    turned = _parquet(tmp_path / "turned" / "test.parquet", range(30, 60), NAMES[::-1], 2 - LABELS)
    fewer = _folder(tmp_path / "fewer", [i for i in range(COUNT) if LABELS[i] == 2])
    for test, indices in ((turned, range(30, 60)), (fewer, [i for i in range(COUNT) if LABELS[i] == 2])):
        _prepare(tmp_path / "train.parquet", tmp_path / test.stem / "out", test=str(test))
        assert _content(tmp_path / test.stem / "out", "test") == _expected(indices)


def test_finished_work_is_reused_and_other_work_is_never_overwritten_unasked(tmp_path: Path) -> None:
    source, out = _folder(tmp_path / "in"), tmp_path / "out"
    _prepare(source, out)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    assert _prepare(source, out)[1] is False and {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before
    with pytest.raises(UserError, match="other seed, size"):
        _prepare(source, out, seed=9, size=4)
    (source / "ant" / "more.png").write_bytes(_png(PIXELS[0]))
    with pytest.raises(UserError, match="other inputs"):
        _prepare(source, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a finished preparation"):
        _prepare(source, tmp_path / "mine")
    options, kept = ImagePreparation(str(source), out), _files(out)
    (source / "bee" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"broken\.png.*cannot be decoded"):
        prepare_images(options, force=True, progress=False)
    assert _files(out) == kept and sorted(f.name for f in tmp_path.iterdir()) == ["in", "mine", "out"]
    (source / "bee" / "broken.png").unlink()
    assert prepare_images(options, force=True, progress=False)[1] is True
    (out / "train" / "images.npy").unlink()
    with pytest.raises(UserError, match="is missing"):
        _prepare(source, out)


def test_size_scales_the_shorter_side_and_keeps_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (200, 100, 50)
    tall, checks = wide.transpose(1, 0, 2), np.indices((8, 8)).sum(0)[..., None] % 2 * np.full(3, 255)
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name, pixels in (("0", PIXELS[0]), ("1", wide), ("2", tall), ("3", checks.astype(np.uint8))):
        (tmp_path / "in" / "a" / f"{name}.png").write_bytes(_png(pixels))
    with pytest.raises(
        UserError, match="image 1 is 24x8, the first of train is 8x8; add for instance --size 8"
    ):
        _prepare(tmp_path / "in", tmp_path / "out", valid_fraction=0.0)
    manifest, _ = _prepare(tmp_path / "in", tmp_path / "out", valid_fraction=0.0, size=8)
    found, _ = ImageStore(tmp_path / "out", "train").read(np.arange(4))
    assert manifest.image_size == (8, 8) and (found[0] == PIXELS[0]).all()  # of this size already: untouched
    assert (found[1:3] == (200, 100, 50)).all()
    _prepare(tmp_path / "in", tmp_path / "small", valid_fraction=0.0, size=4)
    small, _ = ImageStore(tmp_path / "small", "train").read(np.arange(4))
    assert (
        np.abs(small[1:3, 1:3, 1:3].astype(int) - (200, 100, 50)).max() <= 12
    )  # bicubic rings at the black beside it
    plain = torch.from_numpy(np.stack([PIXELS[0], checks.astype(np.uint8)])).permute(0, 3, 1, 2).float()
    theirs = (
        torch.nn.functional.interpolate(plain, (4, 4), mode="bicubic", antialias=True)
        .clamp(0, 255)
        .permute(0, 2, 3, 1)
    )
    assert np.abs(small[[0, 3]] - theirs.numpy()).max() < 1.5  # two libraries' rounding


def test_hub_data_sets_through_their_library_and_what_to_do_without_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets", reason="extra hub is not installed")
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str) -> Any:
        calls.append((path, name, split))
        image, label = next(
            ((p.image, p.label) for p in PRESETS.values() if p.path == path), ("picture", "label")
        )
        features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
        rows = {image: [{"bytes": _png(each), "path": None} for each in PIXELS], label: LABELS.tolist()}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for given in (*PRESETS, "hub:someone/pictures:small"):
        manifest, _ = _prepare(given, tmp_path / "out" / given.replace("/", "-"))
        held_out = "test" if given.startswith("cifar") else "valid"
        assert manifest.classes == tuple(NAMES) and held_out in manifest.splits
        found = [_content(tmp_path / "out" / given.replace("/", "-"), split) for split in ("train", "valid")]
        assert found[0] | found[1] == _expected()
    assert ("uoft-cs/cifar100", None, "test") in calls and calls[-1] == ("someone/pictures", "small", "train")
    before = len(calls)
    assert (
        _prepare("cifar10", tmp_path / "out" / "cifar10")[1] is False and len(calls) == before
    )  # reuse needs no network
    with pytest.raises(UserError, match="--label-column='kind'.*columns.*picture"):
        _prepare("hub:someone/pictures", tmp_path / "o", label_column="kind")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match="no route.*download the images elsewhere and give its files"):
        _prepare("tiny-imagenet", tmp_path / "o")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets, or download the images"):
        _prepare("cifar100", tmp_path / "o")


def test_without_pillow_or_pyarrow_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, parquet = (
        open_images(_folder(tmp_path / "in", range(3)), "SOURCE"),
        _parquet(tmp_path / "in.parquet"),
    )
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match="pip install 'pillow>=12'"):
        images.read(0)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install 'pyarrow>=26'"):
        open_images(parquet, "SOURCE")


def _mixed(root: Path) -> None:
    (_folder(root / "mixed", range(4)) / "alone.png").write_bytes(_png(PIXELS[0]))


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (
            None,
            ["nowhere"],
            "SOURCE='nowhere': no such file or folder; give a folder with one subfolder a class",
        ),
        (None, ["in", "--valid", "nowhere"], "--valid='nowhere'"),
        (_mixed, ["mixed"], "does not say what its images show"),
        (lambda root: (root / "empty").mkdir(), ["empty"], "holds no images"),
        (lambda root: np.save(root / "a.npy", PIXELS), ["a.npy"], "does not say what its images show"),
        (
            lambda root: _parquet(root / "a.parquet", column="kind"),
            ["a.parquet"],
            "no integer column 'label'",
        ),
        (
            lambda root: _parquet(root / "a.parquet", labels=[None, *LABELS[1:]]),
            ["a.parquet"],
            "without gaps; name the column",
        ),
        (
            lambda root: _parquet(root / "a.parquet", labels=LABELS - 1),
            ["a.parquet"],
            "has label -1 where labels are 0 to 2",
        ),
        (
            lambda root: _parquet(root / "a.parquet", labels=LABELS + 1),
            ["a.parquet"],
            "has label 3 where labels are 0 to 2",
        ),
        (
            lambda root: _parquet(root / "a.parquet", names=["a", "a", "b"]),
            ["a.parquet"],
            "names two classes alike",
        ),
        (lambda root: (root / "a.parquet").write_bytes(b"no"), ["a.parquet"], "cannot be read as parquet"),
        (
            lambda root: _folder(root / "b", names=["ant", "bee", "cow"]),
            ["in", "--test", "b"],
            "has the class 'cow', which train lacks",
        ),
        (
            None,
            ["in", "--valid-fraction", "0.7", "--test-fraction", "0.3"],
            "they must leave something to train on",
        ),
        (None, ["in", "--valid-fraction", "nan"], "they must leave something to train on"),
        (None, ["in", "--valid", "in", "--valid-fraction", "0.1"], "the valid split has a source of its own"),
        (None, ["in", "--valid-fraction", "1e-9"], "split 'valid' has no images"),
        (None, ["in", "--size", "0"], "--size"),
        (None, ["in", "--label-column", "kind"], "--label-column='kind': it changes nothing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    make: Callable[[Path], object] | None,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _folder(tmp_path / "in", range(20))
    if make is not None:
        make(tmp_path)
    assert run(app, ["images", *arguments, "--out", "o"], "rdlm data") == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1 and message in lines[0]
    assert not Path("o").exists() and not Path(".tmp-o").exists()


def test_commands_show_the_counts_and_info_finds_a_changed_byte(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = _parquet(tmp_path / "in.parquet", column="kind"), tmp_path / "out"
    assert run(app, ["images", str(source), "--out", str(out), "--label-column", "kind"], "rdlm data") == 0
    shown = capfd.readouterr().out
    assert "written" in shown and "57" in shown and "3 classes" in shown
    assert run(app, ["info", str(out)], "rdlm data") == 0 and "all hashes match" in capfd.readouterr().out
    data = bytearray((out / "train" / "images.npy").read_bytes())
    data[-1] ^= 1
    (out / "train" / "images.npy").write_bytes(data)
    assert (
        run(app, ["info", str(out)], "rdlm data") == 2 and "does not match its hash" in capfd.readouterr().err
    )


@pytest.mark.slow
def test_cifar10_as_another_library_decodes_it(shared_data: Path, tmp_path: Path) -> None:
    manifest, _ = _prepare(shared_data / "cifar10", tmp_path / "out")
    assert {split: info.count for split, info in manifest.splits.items()} == {
        "train": 47_500,
        "valid": 2_500,
        "test": 10_000,
    }
    assert manifest.classes == (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    assert manifest.image_size == (32, 32)
    labels = [
        ImageStore(tmp_path / "out", split).read(np.arange(info.count))[1]
        for split, info in manifest.splits.items()
    ]
    assert (
        np.bincount(np.concatenate(labels[:2])).tolist() == [5_000] * 10
        and np.bincount(labels[2]).tolist() == [1_000] * 10
    )
    datasets = pytest.importorskip("datasets")
    theirs = datasets.Dataset.from_parquet(
        str(shared_data / "cifar10" / "test.parquet"), cache_dir=str(tmp_path / "cache")
    )
    store = ImageStore(tmp_path / "out", "test")
    for i in range(0, 10_000, 97):
        pixels, label = store.read(np.array([i]))
        assert (np.asarray(theirs[i]["img"]) == pixels[0]).all() and theirs[i]["label"] == label[0]
