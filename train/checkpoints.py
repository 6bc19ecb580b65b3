"""Checkpoints of a run: complete or not there. ``checkpoints/step_000100/`` holds DeepSpeed's state and ``manifest.json``.

A checkpoint is written under a temporary name; the manifest with the hash of every file comes last, then one rename. Whatever a
kill leaves behind is either a temporary folder (removed at the next start) or a complete checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist

from rdlm.errors import UserError
from train.repartition import load_repartitioned
from train.settings import TrainConfig

FORMAT = 1
TAG = "state"
FREE_FIELDS = ("output", "checkpoint", "evaluation", "log", "resident.rest")
"""Sections and fields that may change between the parts of one run: they do not touch what is computed."""


def save(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, config: TrainConfig, data: str) -> Path:
    """Write the checkpoint of ``step`` atomically and drop the oldest ones. Collective: every rank calls it.

    data: the corpus' identity, which a resumed run compares.
    """
    final, temporary = folder / f"step_{step:06d}", folder / f".tmp-step_{step:06d}"
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag=TAG, save_latest=False)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    parts: list[dict[str, str] | None] = [None] * world
    dist.all_gather_object(
        parts, {str(path.relative_to(temporary)): _seal(path) for path in files[rank::world]}
    )
    if rank == 0:
        hashes = {name: digest for part in parts for name, digest in (part or {}).items()}
        manifest = {
            "format": FORMAT, "step": step, "world": world, "data": data, "config": config.model_dump(mode="json"),
            "files": dict(sorted(hashes.items())),
        }  # fmt: skip
        _write(temporary / "manifest.json", json.dumps(manifest, indent=1))
        if final.exists():  # an earlier copy of this step that failed its check
            _remove(final)
        os.rename(temporary, final)
        _sync(folder)
        for old in _checkpoints(folder)[: -config.checkpoint.keep]:
            _remove(old)
    dist.barrier()
    return final


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; incomplete or damaged ones are reported through ``warn`` and passed over."""
    for path in reversed(_checkpoints(folder)):
        damage = _damage(path)
        if damage is None:
            return path
        warn(f"skipping checkpoint {path}: {damage}")
    return None


def clean(folder: Path) -> None:
    """Remove what an interrupted write or removal left behind."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def load(engine: deepspeed.DeepSpeedEngine, path: Path, config: TrainConfig, data: str) -> int:
    """Restore weights and optimizer; returns the number of updates they have seen. Collective.

    Any number of processes may load what any number saved. Raises UserError where the checkpoint belongs to another configuration.
    """
    manifest = json.loads((path / "manifest.json").read_text())
    _check_same(manifest["config"], config.model_dump(mode="json"), path)
    if manifest["data"] != data:
        problem = f"the data is not what {path} was trained on"
        raise UserError(
            "data", config.data.model_dump(), problem, "restore it, or start anew in another output folder"
        )
    if manifest["world"] == dist.get_world_size():
        loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
        assert loaded is not None, f"{path} passed its check but DeepSpeed found nothing in it"
    else:
        alone = isinstance(engine, deepspeed.DeepSpeedEngine)
        for one, tag in [(engine, TAG)] if alone else engine.parts(TAG):
            load_repartitioned(one, path, tag, manifest["world"])
    return int(manifest["step"])


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    before, after = _flatten(old), _flatten(new)
    for key in sorted(before.keys() | after.keys()):
        free = key.split(".")[0] in FREE_FIELDS or key in FREE_FIELDS
        if free or (key == "schedule.steps" and new["schedule"]["kind"] == "constant"):
            continue
        if before.get(key) != after.get(key):
            problem = f"the run in {path.parent.parent} was started with {before.get(key)!r}"
            raise UserError(key, after.get(key), problem, "restore it, or set another output folder")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step_*"), key=lambda path: int(path.name.removeprefix("step_")))


def _damage(path: Path) -> str | None:
    """Why a checkpoint cannot be used, naming the file; None if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            return f"manifest.json has format {manifest['format']}, this version reads {FORMAT}"
        for name, digest in manifest["files"].items():
            if _digest(path / name) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (json.JSONDecodeError, KeyError, TypeError):
        return "manifest.json is damaged"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path) -> str:
    """Force a file to disk; returns its hash."""
    _sync(path)
    return _digest(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave half a checkpoint under its proper name."""
    doomed = path.with_name(f".tmp-removed-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
