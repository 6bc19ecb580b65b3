"""A prepared folder that was damaged, by whatever means, is one line and exit code 2, or trains as before:
never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdlm.cli import run
from rdlm.data.manifest import file_sha256
from rdlm.data.token_shards import TokenStore, read_manifest
from rdlm.errors import UserError
from train.data import build_corpus
from train.data.image_prepare import ImagePreparation, prepare_images
from train.data.prepare import Preparation, prepare
from train.data_cli import app
from train.settings import DataConfig, ImagesConfig, TokensConfig

MUTATIONS = 100
ODD = (None, -1, 0, 1, 2**63, 1e300, "", "x", "../x", "/etc/hosts", "a\0b", [], {}, True, [[]], "9" * 5000)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small folder of each kind."""
    root = tmp_path_factory.mktemp("whole")
    lines = [json.dumps({"text": f"Line {i} tells of {i * i} foxes."}) + "\n" for i in range(200)]
    (root / "a.jsonl").write_text("".join(lines))
    options = Preparation(str(root / "a.jsonl"), root / "text", vocab_size=300, shard_tokens=900)
    prepare(options, progress=False)
    pil = pytest.importorskip("PIL.Image", reason="pillow is not installed")
    for i in range(12):
        file = root / "photos" / f"class{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pil.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)).save(file)
    prepare_images(
        ImagePreparation(str(root / "photos"), root / "images", valid_fraction=0.3), progress=False
    )
    return {"text": root / "text", "images": root / "images"}


def _mutate_json(file: Path, rng: random.Random) -> None:
    """A value somewhere in the document becomes odd, is removed, or gets a stranger beside it."""
    document: Any = json.loads(file.read_text())
    place, key = document, rng.choice(list(document))
    while isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
        place = place[key]
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    how = rng.randrange(3)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place["stranger"] = rng.choice(ODD)
    else:
        place[key] = rng.choice(ODD)
    file.write_text(json.dumps(document))


def _mutate_bytes(file: Path, rng: random.Random) -> None:
    """Shorter, longer, empty, gone, a folder, other bytes somewhere, or large numbers."""
    content = bytearray(file.read_bytes())
    how = rng.randrange(7)
    if how == 0:
        content = content[: rng.randrange(len(content))]
    elif how == 1:
        content += rng.randbytes(rng.randrange(1, 9))
    elif how == 2:
        content = bytearray()
    elif how in (3, 4):
        file.unlink()
        if how == 4:
            file.mkdir()
        return
    elif how == 5:
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
    else:
        start = rng.randrange(len(content))
        content[start : start + 40] = b"\xff" * len(content[start : start + 40])
    file.write_bytes(content)


def _use(kind: str, folder: Path) -> None:
    """What a training run reads first: batches of every row, and the held-out rows."""
    config: DataConfig = (
        TokensConfig(path=str(folder), seq_len=16)
        if kind == "text"
        else ImagesConfig(path=str(folder), augment="none")
    )
    corpus = build_corpus(config)
    for step in range(8):
        corpus.batch(step, seed=0, global_batch=16, rank=0, world=1, micro_index=0, micro_size=16)
    assert list(corpus.windows(None, 64))


@pytest.mark.parametrize("kind", ["text", "images"])
def test_damage_is_the_users_error(
    folders: dict[str, Path], kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng, found, refused = random.Random(7), tmp_path / "damaged", 0
    for _ in range(MUTATIONS):
        shutil.rmtree(found, ignore_errors=True)
        shutil.copytree(folders[kind], found)
        files = sorted(file for file in found.rglob("*") if file.is_file())
        file = rng.choice([*files, found / "manifest.json"])
        change: Callable[[Path, random.Random], None] = rng.choice(
            [_mutate_json, _mutate_json, _mutate_bytes] if file.suffix == ".json" else [_mutate_bytes]
        )
        change(file, rng)
        status = run(app, ["info", str(found)], "rdlm data")
        lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
        assert (status, len(lines)) in ((0, 0), (2, 1))
        try:
            _use(kind, found)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > MUTATIONS / 3


def test_ids_outside_the_vocabulary_are_refused_when_they_are_read(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["text"], tmp_path / "d")
    shard = tmp_path / "d" / read_manifest(tmp_path / "d").splits["train"].shards[1].file
    ids = np.fromfile(shard, dtype="<u2")
    ids[5] = 300
    ids.tofile(shard)
    store = TokenStore(tmp_path / "d", "train")
    assert store.read(0, 900).max() < 300
    with pytest.raises(UserError, match="holds the id 300, the vocabulary has 300; prepare the data again"):
        store.read(900, 10)


def test_zeros_that_nobody_wrote_are_no_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """Their hash would tell, but a training run does not read a terabyte to begin."""
    shutil.copytree(folders["text"], tmp_path / "d")
    shard = tmp_path / "d" / read_manifest(tmp_path / "d").splits["train"].shards[1].file
    ids = np.fromfile(shard, dtype="<u2")
    ids[100:300] = 0
    ids.tofile(shard)
    store = TokenStore(tmp_path / "d", "train")
    assert store.read(900, 100).any() and not store.read(1000, 32).any()  # too short to tell
    with pytest.raises(
        UserError, match="holds 128 tokens of id 0 in a row, and its hash is not the manifest's"
    ):
        store.read(1050, 128)
    manifest = tmp_path / "d" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["splits"]["train"]["shards"][1]["sha256"] = file_sha256(shard)
    manifest.write_text(json.dumps(document))
    assert not TokenStore(tmp_path / "d", "train").read(1050, 128).any()  # they were written so


def test_a_shard_outside_of_the_folder_is_never_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["text"], tmp_path / "d")
    manifest = tmp_path / "d" / "manifest.json"
    document = json.loads(manifest.read_text())
    shutil.copy(tmp_path / "d" / document["splits"]["train"]["shards"][0]["file"], tmp_path / "shard.bin")
    for name in (str(tmp_path / "shard.bin"), "../shard.bin", "train/../../shard.bin"):
        document["splits"]["train"]["shards"][0]["file"] = name
        manifest.write_text(json.dumps(document))
        with pytest.raises(UserError, match="lies in the folder of its manifest"):
            read_manifest(tmp_path / "d")
