"""Prepared images as they are read: exact pixels, what a batch holds, and one clear line for folders that are
not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdlm.data.images import ImageManifest, ImageSplit, ImageStore, read_image_manifest
from rdlm.data.manifest import file_sha256
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 1, 0, 2, 2], dtype=np.int64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Written by hand: what the format is, not what the writer makes of it."""
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "images.npy", PIXELS)
    np.save(tmp_path / "train" / "labels.npy", LABELS)
    hashes = [file_sha256(tmp_path / "train" / f"{name}.npy") for name in ("images", "labels")]
    split = ImageSplit(count=7, images_sha256=hashes[0], labels_sha256=hashes[1])
    manifest = ImageManifest(
        schema_version=1,
        source="s",
        request={},
        image_size=(4, 6),
        classes=("a", "b", "c"),
        splits={"train": split},
    )
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.model_dump()))
    return tmp_path


def test_images_come_back_as_they_were_and_a_batch_scales_them(folder: Path) -> None:
    store, order = ImageStore(folder, "train"), np.array([6, 0, 0, 3])
    pixels, labels = store.read(order)
    assert (
        len(store) == 7 and store.manifest.image_size == (4, 6) and store.manifest.classes == ("a", "b", "c")
    )
    assert pixels.dtype == np.uint8 and (pixels == PIXELS[order]).all() and labels.tolist() == [2, 0, 0, 1]
    batch = store.rows(order)
    assert (
        batch.inputs.shape == (4, 3, 4, 6)
        and batch.inputs.dtype == torch.float32
        and batch.inputs.is_contiguous()
    )
    assert batch.targets.tolist() == [[2], [0], [0], [1]] and batch.targets.dtype == torch.int64
    assert batch.mask.shape == (4, 1) and batch.mask.dtype == torch.bool and bool(batch.mask.all())
    for row, channel, y, x in ((0, 2, 3, 5), (3, 1, 0, 4)):
        expected = float(PIXELS[order[row], y, x, channel]) / 127.5 - 1
        assert float(batch.inputs[row, channel, y, x]) == pytest.approx(expected, abs=1e-6)
    back = ((batch.inputs + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (back == PIXELS[order]).all()
    assert store.manifest_sha256 == file_sha256(folder / "manifest.json")


def _manifest(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _shorten(folder: Path) -> None:
    file = folder / "train" / "images.npy"
    file.write_bytes(file.read_bytes()[:-5])


def _save(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "train" / f"{name}.npy", array)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "prepare it with rdlm data images"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is not a manifest"),
        (
            _manifest(schema_version=2),
            "schema_version=2: this version reads 1; use the version that wrote it",
        ),
        (_manifest(classes=[]), "classes"),
        (_manifest(image_size=[4, 4]), r"holds uint8 \[7, 4, 6, 3\], the manifest says uint8 \[7, 4, 4, 3\]"),
        (_manifest(classes=["a", "b"]), "labels from 0 to 2, the manifest has 2 classes"),
        (_manifest(kind="sounds"), "holds sounds, but images are needed; give a folder of rdlm data images"),
        (
            lambda folder: (folder / "train" / "labels.npy").unlink(),
            "labels.npy.*is missing; prepare the data again",
        ),
        (
            lambda folder: (folder / "train" / "images.npy").write_bytes(b"no array"),
            "cannot be read as an array",
        ),
        (_shorten, "cannot be read as an array.*prepare the data again"),
        (_save("labels", LABELS - 1), "labels from -1 to 1"),
        (_save("labels", LABELS.astype(np.int32)), "holds int32"),
        (_save("images", PIXELS[:6]), r"holds uint8 \[6, 4, 6, 3\]"),
    ],
)
def test_a_damaged_folder_is_one_line(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=said):
        ImageStore(folder, "train")


def test_a_split_that_is_not_there_and_folders_of_the_other_kind_name_the_remedy(folder: Path) -> None:
    with pytest.raises(UserError, match="split='valid': the data has only train"):
        ImageStore(folder, "valid")
    with pytest.raises(
        UserError,
        match="holds images, but tokens are needed; give a folder of rdlm data prepare.*data.kind=images",
    ):
        TokenStore(folder, "train")
    (folder / "manifest.json").write_text(
        json.dumps({"schema_version": 1, "dtype": "uint16"})
    )  # as text was always written
    with pytest.raises(
        UserError,
        match="holds tokens, but images are needed; give a folder of rdlm data images.*data.kind=tokens",
    ):
        read_image_manifest(folder)
