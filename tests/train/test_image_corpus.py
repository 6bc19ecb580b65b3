"""Batches of images: each image once an epoch, drawn and augmented by their place in the run alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rdlm.data.images import ImageStore
from rdlm.data.manifest import file_sha256
from rdlm.errors import UserError
from train.data import build_corpus
from train.data.corpus import PAD, ImageCorpus, augmented
from train.data.image_prepare import ImagePreparation, prepare_images
from train.settings import ImagesConfig

Image = pytest.importorskip("PIL.Image")


def _prepare(folder: Path, name: str, **changes: Any) -> Path:
    """60 images of three classes, prepared in ``folder/name``."""
    rows = []
    for pixels in np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"img": rows, "label": [i % 3 for i in range(60)]}), folder / "all.parquet")
    prepare_images(ImagePreparation(str(folder / "all.parquet"), folder / name, **changes), progress=False)
    return folder / name


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return _prepare(tmp_path, "out", valid_fraction=0.2)


def _content(out: Path, split: str) -> dict[bytes, int]:
    """Pixels -> label, in order."""
    store = ImageStore(out, split)
    pixels, labels = store.read(np.arange(len(store)))
    return {each.tobytes(): int(label) for each, label in zip(pixels, labels, strict=True)}


def _rows(
    corpus: ImageCorpus, step: int, world: int = 1, micro_size: int = 8, seed: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    place = [(rank, micro) for rank in range(world) for micro in range(8 // world // micro_size)]
    batches = [
        corpus.batch(
            step, seed=seed, global_batch=8, rank=rank, world=world, micro_index=micro, micro_size=micro_size
        )
        for rank, micro in place
    ]
    return torch.cat([batch.inputs for batch in batches]), torch.cat([batch.targets for batch in batches])


@pytest.mark.parametrize("augment", ["none", "flip", "flip_crop"])
def test_rows_do_not_depend_on_processes_or_micro_batches(out: Path, augment: Any) -> None:
    corpus = build_corpus(ImagesConfig(path=str(out), augment=augment))
    assert isinstance(corpus, ImageCorpus) and ImagesConfig(path=str(out)).augment == "flip"
    assert (corpus.vocab_size, corpus.seq_len, corpus.image_size, corpus.tokenizer) == (3, 1, (8, 8), None)
    assert corpus.identity == file_sha256(out / "manifest.json")
    for step in (0, 3, 1000):
        inputs, targets = _rows(corpus, step)
        assert inputs.shape == (8, 3, 8, 8) and targets.shape == (8, 1)
        for world, micro_size in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
            others = _rows(corpus, step, world, micro_size)
            assert torch.equal(others[0], inputs) and torch.equal(others[1], targets)
    assert not torch.equal(_rows(corpus, 0)[0], _rows(corpus, 0, seed=6)[0])


def test_each_image_comes_once_an_epoch_with_its_class_in_an_order_of_its_own(out: Path) -> None:
    corpus, expected = ImageCorpus(out, "none"), _content(out, "train")
    steps = [_rows(corpus, step) for step in range(12)]  # 96 rows: two epochs of 48
    inputs, targets = torch.cat([each[0] for each in steps]), torch.cat([each[1] for each in steps])
    pixels = ((inputs + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    seen = [each.tobytes() for each in pixels]
    for epoch in (seen[:48], seen[48:]):
        assert len(set(epoch)) == 48 and set(epoch) == set(expected)
    assert seen[:48] != seen[48:] and targets[:, 0].tolist() == [expected[each] for each in seen]


def test_held_out_images_come_in_order_as_they_are(out: Path, tmp_path: Path) -> None:
    corpus, expected = ImageCorpus(out, "flip_crop"), list(_content(out, "valid"))
    for limit, count in ((None, 12), (7, 7), (1, 1), (0, 1), (99, 12)):
        batches = list(corpus.windows(limit, 5))
        inputs = torch.cat([batch.inputs for batch in batches])
        pixels = ((inputs + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
        assert [each.tobytes() for each in pixels] == expected[:count] and len(batches[0].inputs) == min(
            5, count
        )
    _prepare(tmp_path, "whole", valid_fraction=0.0)
    with pytest.raises(UserError, match="split='valid'"):
        next(ImageCorpus(tmp_path / "whole").windows(None, 4))


def test_flips_are_exact_mirror_images_of_about_half() -> None:
    rows = np.arange(4000)
    pixels = np.random.default_rng(2).integers(0, 256, (4000, 2, 3, 3), dtype=np.uint8)
    found = augmented(pixels, rows, 7, "flip")
    mirrored, same = ((found == other).all((1, 2, 3)) for other in (pixels[:, :, ::-1], pixels))
    assert (mirrored | same).all() and 1870 < (mirrored & ~same).sum() < 2130  # four standard deviations
    assert (
        augmented(pixels[::-1], rows[::-1], 7, "flip") == found[::-1]
    ).all()  # the place in the batch is nothing
    assert (augmented(pixels, rows, 8, "flip") != found).any() and (
        augmented(pixels, rows + 4000, 7, "flip") != found
    ).any()


def test_crops_are_windows_of_the_reflected_image_and_all_of_them_occur() -> None:
    """Against numpy's own reflection: every result is one of 2 x 81 windows, and each of these is drawn."""
    image = np.random.default_rng(3).integers(0, 256, (6, 11, 3), dtype=np.uint8)
    windows = {}
    for flip in (0, 1):
        padded = np.pad(image[:, ::-1] if flip else image, ((PAD, PAD), (PAD, PAD), (0, 0)), mode="reflect")
        windows |= {
            padded[y : y + 6, x : x + 11].tobytes(): (flip, y, x)
            for y in range(2 * PAD + 1)
            for x in range(2 * PAD + 1)
        }
    assert len(windows) == 162
    found = augmented(np.broadcast_to(image, (20_000, *image.shape)), np.arange(20_000), 0, "flip_crop")
    counts = np.zeros((2, 9, 9))
    for each in found:
        counts[windows[each.tobytes()]] += 1
    assert counts.min() > 123 - 5 * 11.1 and counts.max() < 123 + 5 * 11.1


def test_images_too_small_to_reflect_are_refused(tmp_path: Path) -> None:
    small = _prepare(tmp_path, "small", size=PAD)
    with pytest.raises(UserError, match="data.augment='flip_crop': reflects 4 pixels.*use flip or none"):
        ImageCorpus(small, "flip_crop")
    ImageCorpus(small, "flip")
