"""Checkpoints of a run: complete or not there. ``checkpoints/step_000100/`` holds DeepSpeed's state and
``manifest.json``.

A checkpoint is written under a temporary name; the manifest with the hash of every file comes last, then one
rename. A kill leaves either a temporary folder (removed at the next start) or a complete checkpoint.

Writing is DeepSpeed's. Reading is ours, and the same for every case: see train/saved_state.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from pydantic import ValidationError

from rdlm.atomic import sync, write_file
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError, reason
from train.ema import KEY as AVERAGE
from train.optim import parameter_groups
from train.process import ProcessError
from train.saved_state import SavedState, restore
from train.settings import OptimizerConfig, TrainConfig

FORMAT = 1
TAG = "state"
MANIFEST = "manifest.json"
BEST = "best.json"
TOKENIZER = "tokenizer"
DAMAGED = "damaged-"
STEP = re.compile(r"step_\d{1,18}")
FREE_FIELDS = (
    "output", "checkpoint", "evaluation", "log", "samples", "nonfinite", "deterministic", "resident.rest",
    "data.path", "init_from", "init_map",
    "branch_from", "ema.export", "data.parts",
    "allow_changes", "profile",
)  # fmt: skip
"""Sections and fields that change nothing in what is computed. Data are compared by their identity, not by
their place."""
RECORDED_FIELDS = (
    "name", "optimizer.lr", "optimizer.betas", "optimizer.eps", "optimizer.weight_decay",
    "optimizer.grad_clip", "optimizer.freeze", "optimizer.lr_factors", "optimizer.layer_decay",
    "optimizer.momentum", "ema", "schedule", "recurrence", "precision", "deepspeed", "batch.micro_size",
    "activation_checkpointing", "compile", "noise_source",
)  # fmt: skip
"""Sections and fields that change how the run goes on but neither the model nor the order of the data:
allowed, and noted in the manifest."""


@dataclass
class RunState:
    """What a run knows of itself besides weights and optimizer."""

    step: int = 0
    """Updates made."""
    skipped: int = 0
    """Batches that were passed over after rollbacks: update ``step`` reads batch ``step + skipped``."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Changes of the config and rollbacks, oldest first: {"step": ..., what changed: [before, after]}."""


def parts(engines: Sequence[DeepSpeedEngine]) -> Iterator[tuple[DeepSpeedEngine, str]]:
    """Each engine with the subfolder of its files. To be used before the next one is taken: engines may be
    resident."""
    for block, engine in enumerate(engines):
        yield engine, TAG if len(engines) == 1 else f"{TAG}/block_{block}"


def save(
    engines: Sequence[DeepSpeedEngine],
    folder: Path,
    state: RunState,
    config: TrainConfig,
    data: str,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write the checkpoint of ``state.step`` atomically and drop the oldest ones. Collective: every rank
    calls it.

    data: the corpus' identity, which a resumed run compares. Raises ProcessError where there is no room.
    """
    step = state.step
    final, temporary = folder / f"step_{step:06d}", folder / f".tmp-step_{step:06d}"
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if tokenizer is not None:
                tokenizer.save(temporary / TOKENIZER)
        dist.barrier()
        for engine, tag in parts(engines):
            engine.save_checkpoint(str(temporary), tag=tag, save_latest=False)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        hashes: list[dict[str, str] | None] = [None] * world
        dist.all_gather_object(
            hashes, {str(path.relative_to(temporary)): _seal(path) for path in files[rank::world]}
        )
        if rank == 0:
            found = {name: digest for part in hashes for name, digest in (part or {}).items()}
            manifest = {
                "format": FORMAT, "step": step, "world": world, "data": data, "skipped": state.skipped,
                "history": state.history,
                "config": config.model_dump(mode="json"), "files": dict(sorted(found.items())),
            }  # fmt: skip
            _write(temporary / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
            if final.exists():  # an earlier copy of this step that failed its check
                _remove(final)
            os.rename(temporary, final)
            sync(folder)
            prune(folder, step, config.checkpoint.keep)
        dist.barrier()
    except (OSError, RuntimeError) as error:
        if rank == 0:
            shutil.rmtree(
                temporary, ignore_errors=True
            )  # what is half written takes the room of the next one
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_WRITES):
            raise
        free = _free_bytes(folder)
        problem = (
            f"the checkpoint of update {step} could not be written ({reason(error)}); {free / 1e9:.1f} GB are "
            f"free"
        )
        raise ProcessError(
            "output", str(folder.parent), problem, "make room; the same command goes on"
        ) from error
    return final


TORCH_WRITES = ("PytorchStreamWriter", "inline_container", "iostream error")
"""Words of torch.save's messages where a file cannot be written: it says neither OSError nor why."""


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step`` and the best one. Later steps failed
    their check: they count for nothing."""
    kept_best = best(folder)
    ours = [path for path in checkpoints_in(folder) if step_of(path) <= step]
    for old in ours[:-keep]:
        if old != kept_best:
            _remove(old)


def mark_best(folder: Path, step: int, metric: str, value: float) -> None:
    """Keep the checkpoint of ``step`` until a better one is marked."""
    write_file(folder / BEST, json.dumps({"step": step, "metric": metric, "value": value}))


def best_record(folder: Path) -> dict[str, Any] | None:
    """What ``mark_best`` wrote last, None without one."""
    try:
        record = json.loads((folder / BEST).read_text(encoding="utf-8"))
        return {"step": int(record["step"]), "metric": str(record["metric"]), "value": float(record["value"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def best(folder: Path) -> Path | None:
    """The checkpoint with the best held-out figure, None where none is marked or it is gone."""
    record = best_record(folder)
    path = None if record is None else folder / f"step_{record['step']:06d}"
    return path if path is not None and path.is_dir() else None


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders named ``step_<number>``, oldest first."""
    found = [p for p in folder.glob("step_*") if STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def foreign_entries(folder: Path) -> list[Path]:
    """What lies among the checkpoints and is none."""
    if not folder.is_dir():
        return []
    known = {*checkpoints_in(folder), folder / BEST}
    return sorted(p for p in folder.iterdir() if p not in known and not p.name.startswith((".tmp-", DAMAGED)))


def newest(
    folder: Path, warn: Callable[[str], None], gather: Callable[[str | None], list[str | None]] | None = None
) -> Path | None:
    """The newest complete checkpoint; damaged ones are reported through ``warn`` and passed over.

    gather: collects what every process found in its share of the files; None: this process reads them all.
    Raises UserError where there are checkpoints but none is whole: starting over would delete them one by
    one.
    """
    found = checkpoints_in(folder)
    for path in reversed(found):
        if gather is None:
            damage = damage_of(path)
        else:
            seen = gather(damage_of(path, dist.get_rank(), dist.get_world_size()))
            damage = next((one for one in seen if one is not None), None)
        if damage is None:
            return path
        if gather is None and not path.exists():  # a run that goes on has removed it, and has written others
            return newest(folder, warn)
        warn(f"skipping checkpoint {path}: {damage}")
    if found:
        problem = f"none of its {len(found)} checkpoints is complete"
        raise UserError(
            "output", str(folder), problem, "restore one from a copy, or remove the folder to start over"
        )
    return None


def set_aside_damaged(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints after ``step``, which failed their check, so that they are not read again.
    Returns the new names."""
    moved = []
    for path in checkpoints_in(folder):
        if step_of(path) > step:
            target = path.with_name(DAMAGED + path.name)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)
            moved.append(target)
    return moved


def clean(folder: Path) -> None:
    """Remove what an interrupted write or removal left behind."""
    for path in folder.glob(".tmp-*"):
        _delete(path)


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that passed its check."""
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def damage_of(path: Path, rank: int = 0, world: int = 1) -> str | None:
    """Why a checkpoint cannot be used, naming the file; None if it is whole. Of ``world`` processes each
    hashes a share of the files."""
    try:
        manifest = manifest_of(path)
        missing = {"format", "step", "config", "data", "world", "files"} - manifest.keys()
        if missing:
            return f"{MANIFEST} lacks {min(missing)}, so it is not that of a training checkpoint"
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        if STEP.fullmatch(path.name) and manifest["step"] != step_of(path):  # a copy may have any name
            return f"{MANIFEST} is that of step {manifest['step']}"
        for name, digest in list(manifest["files"].items())[rank::world]:
            if _digest(path / name) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{os.path.relpath(error.filename, path)} is missing"
    except OSError as error:
        return reason(error)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"
    return None


def load(
    engines: Sequence[DeepSpeedEngine],
    path: Path,
    config: TrainConfig,
    data: str,
    note: Callable[[str], None] = lambda text: None,
) -> RunState:
    """Restore weights and optimizer from ``path``; returns what the run knows of itself. Collective.

    Any number of processes at any ZeRO stage may load what any others saved. Changed fields of
    RECORDED_FIELDS are reported through ``note``. Raises UserError where the checkpoint belongs to another
    run and ``config.allow_changes`` is off.
    """
    manifest = manifest_of(path)
    changes = _changes(manifest["config"], config)
    if manifest["data"] != data:
        changes["data"] = (manifest["data"], data)
    _check_allowed(changes, config, path)
    grouped_by = OptimizerConfig.model_validate(manifest["config"]["optimizer"])
    for engine, tag in parts(engines):
        groups = parameter_groups(engine.module, grouped_by, config.lora)
        names = [[engine.param_names[p] for p in group["params"]] for group in groups]
        restore(engine, SavedState(path / tag, names))
        if config.ema is None:  # an average that nobody moves any more would be saved as if it were one
            for kept in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
                kept.pop(AVERAGE, None)
    state = RunState(int(manifest["step"]), manifest.get("skipped", 0), manifest.get("history", []))
    recorded = {key: list(pair) for key, pair in changes.items() if not _in(key, FREE_FIELDS)}
    if recorded:
        state.history.append({"step": state.step, **recorded})
        note(", ".join(f"{key} {after!r} (before: {old!r})" for key, (old, after) in recorded.items()))
    return state


def _changes(old: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ: name -> (before, after). Fields that are newer than the checkpoint have
    their default in it."""
    try:
        old = TrainConfig.model_validate(old).model_dump(mode="json")
    except ValidationError:
        pass  # compared as it is: the fields that are no more are named
    before, after = _flatten(old), _flatten(config.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _check_allowed(changes: Mapping[str, tuple[Any, Any]], config: TrainConfig, path: Path) -> None:
    for key, (before, after) in changes.items():
        if config.allow_changes or _in(key, FREE_FIELDS) or _in(key, RECORDED_FIELDS):
            continue
        if key == "data":
            problem = f"the data is not what {path} was trained on"
            after = config.data.model_dump()
        else:
            problem = f"the run in {path.parent.parent} was started with {before!r}"
        remedy = "restore it, set another output folder, or change it on purpose with --allow-changes"
        raise UserError(key, after, problem, remedy)


def _in(key: str, fields: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in fields)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(path: Path) -> str:
    """Force a file to disk; returns its hash."""
    sync(path)
    return _digest(path)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave half a checkpoint under its proper name."""
    doomed = path.with_name(f".tmp-removed-{path.name}")
    _delete(doomed)
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """A folder or a file, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
