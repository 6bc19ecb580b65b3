"""Checkpoints of a run: complete or not there. ``checkpoints/step_000100/`` holds DeepSpeed's state and
``manifest.json``.

A checkpoint is written under a temporary name; the manifest with the hash of every file comes last, then one
rename. A kill leaves either a temporary folder (removed at the next start) or a complete checkpoint.

Writing is DeepSpeed's. Reading is ours, and the same for every case: the files give whole tensors by
parameter name, whatever ZeRO stage and number of processes saved them, and each process cuts its share for
the stage and number it has now. Only where a number lies changes, so this is exact. DeepSpeed's universal
checkpoints do the same for ZeRO 1 to 3, but write a converted copy to disk first.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from pydantic import ValidationError
from torch import Tensor
from torch.optim import Optimizer

from rdlm.atomic import sync, write_file
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError, reason
from train.ema import KEY as AVERAGE
from train.optim import parameter_groups
from train.process import ProcessError
from train.settings import OptimizerConfig, TrainConfig

FORMAT = 1
TAG = "state"
MANIFEST = "manifest.json"
BEST = "best.json"
TOKENIZER = "tokenizer"
DAMAGED = "damaged-"
STEP = re.compile(r"step_\d{1,18}")
_NONE = torch.empty(0)
WEIGHT = "weight"
"""Key of the fp32 weights in ``SavedState``, which also has the names of the optimizer's moments."""
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
"""Those that change how the run goes on but neither the model nor the order of the data: allowed, and noted
in the manifest."""


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
"""In the messages of torch.save where a file cannot be written: it says neither OSError nor why."""


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


class SavedState:
    """Weights and optimizer state of one engine as DeepSpeed's files hold them: whole tensors by parameter
    name, read one by one.

    ZeRO 1 and 2 cut the flat vector of each parameter group into equal parts, padded at its end; ZeRO 3 cuts
    every parameter (Rajbhandari et al. 2020). Names are those of the network: a wrapper's prefix is removed.
    Frozen parameters are saved beside the optimizer's, in the precision of the run.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]]) -> None:
        """groups: names of the parameters as the optimizer groups them, which files of stage 0 do not hold;
        frozen ones last."""
        saved = [_read(file) for file in _sorted_by_rank(folder.glob("*zero_pp_rank_*_optim_states.pt"))]
        models = _sorted_by_rank(folder.glob("*model_states.pt"))
        if not models:
            raise UserError("checkpoint", str(folder), "holds no weights", "use a complete checkpoint")
        model = _read(models[0])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.counts: dict[str, float] | None
        """What the optimizer keeps once for all parameters (``step``); None before its first update."""
        self._places: dict[str, tuple[int, int]] = {}
        """Name -> (group, first element in its flat vector)."""
        self._frozen: dict[str, list[Tensor]] = {}
        """Name -> its pieces, one a process where they are cut."""
        if not saved:
            self._read_whole(folder, model, groups)
            self._read_frozen([model], cut=False)
            return
        states = [part["optimizer_state_dict"] for part in saved]
        self._cut_each = "fp32_flat_groups" in states[0]
        weights, base = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self._cut_each
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        self._flat: dict[str, list[list[Tensor]]] = {WEIGHT: [state[weights] for state in states]}
        optimizers = [state[base]["state"] for state in states]
        for key in self._read_counts(folder, [s for state in optimizers for s in state.values()]):
            self._flat[key] = [[state[i].get(key, _NONE) for i in range(len(state))] for state in optimizers]
        for group, shapes in enumerate(model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                self.shapes[own_name(name)], self._places[own_name(name)] = tuple(shape), (group, start)
                start += -(-prod(shape) // len(saved)) if self._cut_each else prod(shape)
        self._read_frozen([_read(file) for file in models] if self._cut_each else [model], self._cut_each)

    def _read_frozen(self, models: Sequence[dict[str, Any]], cut: bool) -> None:
        """Parameters that no optimizer holds. cut: ZeRO 3, where each process has a piece of them."""
        if cut:
            for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
                self.shapes[own_name(name)] = tuple(shape)
                self._frozen[own_name(name)] = [m["frozen_param_fragments"][name].flatten() for m in models]
            return
        for name, weight in models[0]["module"].items():
            if own_name(name) not in self.shapes:
                self.shapes[own_name(name)] = tuple(weight.shape)
                self._frozen[own_name(name)] = [weight.flatten()]

    def _read_counts(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> list[str]:
        """Set ``counts`` from the optimizer's states -> the names of its elementwise tensors.

        Raises UserError for what is neither elementwise nor one number for all parameters: it cannot be cut
        anew.
        """
        first = states[0] if states else {}
        elementwise = list(
            dict.fromkeys(
                key
                for state in states
                for key, value in state.items()
                if torch.is_tensor(value) and value.dim()
            )
        )
        self.counts = {key: float(value) for key, value in first.items() if key not in elementwise} or None
        for state in states:
            kept = {key: float(state[key]) for key in self.counts or ()}
            if kept != (self.counts or {}) or len({state[k].numel() for k in elementwise if k in state}) > 1:
                problem = (
                    "its optimizer keeps more than tensors in the shape of the weights and common numbers"
                )
                raise UserError("checkpoint", str(folder), problem, "this state cannot be restored")
        return elementwise

    def _read_whole(self, folder: Path, model: dict[str, Any], groups: Sequence[Sequence[str]]) -> None:
        """Stage 0: nothing is cut. Moments, and in bf16 training the fp32 weights, are numbered through the
        groups."""
        self._cut_each = False
        optimizer = model["optimizer"]
        held = optimizer.get("optimizer_state_dict", optimizer)["param_groups"]
        names = [own_name(name) for group in groups for name in group][: sum(len(g["params"]) for g in held)]
        masters = [weight for group in optimizer.get("fp32_groups", []) for weight in group]
        found = {own_name(name): weight for name, weight in model["module"].items()}
        whole: dict[str, list[Tensor]] = {WEIGHT: masters or [found[name] for name in names]}
        state = optimizer.get("optimizer_state_dict", optimizer)["state"]
        for key in self._read_counts(folder, list(state.values())):
            whole[key] = [state[i].get(key, _NONE) for i in range(len(names))]
        self.shapes = {name: tuple(weight.shape) for name, weight in zip(names, whole[WEIGHT], strict=True)}
        self._places = {name: (number, 0) for number, name in enumerate(names)}
        self._flat = {
            key: [[tensor if tensor is _NONE else tensor.flatten() for tensor in tensors]]
            for key, tensors in whole.items()
        }

    def holds(self, key: str, name: str) -> bool:
        """Whether the optimizer keeps this of a parameter: another one may be none of its business."""
        place = self._places.get(name)
        return place is None or self._flat[key][0][place[0]] is not _NONE

    @property
    def moments(self) -> list[str]:
        """Names of the optimizer's tensors; none before its first update."""
        return [key for key in self._flat if key != WEIGHT]

    def tensor(self, key: str, name: str) -> Tensor:
        """A copy of the whole fp32 weight or moment of a parameter, flat. A parameter that was frozen has
        moments of zero."""
        if name in self._frozen:
            weight = torch.cat(self._frozen[name])[: prod(self.shapes[name])].float()
            return weight if key in (WEIGHT, AVERAGE) else torch.zeros_like(weight)
        group, start = self._places[name]
        pieces, count = [process[group].detach() for process in self._flat[key]], prod(self.shapes[name])
        if self._cut_each:
            size = -(-count // len(pieces))
            return torch.cat([piece[start : start + size] for piece in pieces])[:count].float()
        part = len(pieces[0])
        end = start + count
        touched = [
            piece[max(start - i * part, 0) : end - i * part]
            for i, piece in enumerate(pieces)
            if i * part < end and start < (i + 1) * part
        ]
        return torch.cat(touched).float()


def own_name(name: str) -> str:
    """A parameter's name in the network, without the name that a wrapper gave the network."""
    return name.removeprefix("module.").removeprefix("denoiser.")


def _sorted_by_rank(files: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(match[1]) if match else 0

    return sorted(files, key=rank)


def _read(path: Path) -> dict[str, Any]:
    # The manifest's checksums vouch for the file; it holds DeepSpeed's own classes besides tensors.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def restore(engine: DeepSpeedEngine, saved: SavedState) -> None:
    """Put saved weights and optimizer state into an engine, in this process' share. Collective."""
    names = {id(p): own_name(engine.param_names[p]) for p in engine.module.parameters()}
    _check_shapes(engine, names, saved)
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    rank, world = dist.get_rank(), dist.get_world_size()
    if stage == 0:
        low = engine.bfloat16_enabled()
        base = optimizer.optimizer if low else optimizer
        pairs = (
            zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            if low
            else ((group["params"], group["params"]) for group in optimizer.param_groups)
        )
        for lows, masters in pairs:
            for parameter, master in zip(lows, masters, strict=True):
                name = names[id(parameter)]
                _fill(base, master, saved, partial(_whole, saved, name, master.shape), name)
                parameter.data.copy_(master.data)
    elif stage < 3:
        bf16 = hasattr(optimizer, "bf16_groups")  # BF16_Optimizer, which DeepSpeed takes at stage 1 in bf16
        flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
        groups = optimizer.bf16_groups if bf16 else optimizer.round_robin_bit16_groups
        for flat, parameters in zip(flats, groups, strict=True):
            order = [names[id(parameter)] for parameter in parameters]
            first = rank * flat.numel()
            cut = partial(_window, saved, order, first, flat.numel())
            _fill(optimizer.optimizer, flat, saved, cut, order[0])
            for parameter, name in zip(parameters, order, strict=True):
                parameter.data.copy_(saved.tensor(WEIGHT, name).view(parameter.shape))
    else:
        optimizer.checkpoint_event_prologue()
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            order = [names[id(parameter)] for parameter in optimizer.fp16_groups[group]]
            _fill(optimizer.optimizer, flat, saved, partial(_shares, saved, order, rank, world), order[0])
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()
    for parameter in (p for p in engine.module.parameters() if not p.requires_grad):
        name = names[id(parameter)]
        if stage == 3:
            parameter.ds_tensor.data.copy_(_shares(saved, [name], rank, world, WEIGHT))
        else:
            parameter.data.copy_(saved.tensor(WEIGHT, name).view(parameter.shape))


def _check_shapes(engine: DeepSpeedEngine, names: Mapping[int, str], saved: SavedState) -> None:
    shapes = {names[id(p)]: tuple(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters()}
    for name in sorted(shapes.keys() | saved.shapes.keys()):
        if shapes.get(name) != saved.shapes.get(name):
            problem = f"the checkpoint has {saved.shapes.get(name)}"
            raise UserError(
                f"shape of {name}", shapes.get(name), problem, "restore the model's config, or use init_from"
            )


def _fill(
    base: Optimizer, target: Tensor, saved: SavedState, cut: Callable[[str], Tensor], name: str
) -> None:
    """Write the weights of ``target`` and the optimizer's state for it. cut: key -> this process' share, in
    the shape of ``target``. name: of a parameter in it."""
    target.data.copy_(cut(WEIGHT))
    if saved.counts is None:
        base.state.pop(target, None)
        return
    state = base.state[target]
    for key in saved.moments:
        if not saved.holds(key, name):
            continue
        if key in state:
            state[key].copy_(cut(key))
        else:
            state[key] = cut(key).to(target.device)
    of_torch = isinstance(base, torch.optim.Optimizer) and type(base).__module__.startswith("torch.")
    counts_in_tensors = getattr(base, "counts_in_tensors", of_torch)
    for key, value in saved.counts.items():
        state[key] = torch.tensor(value) if counts_in_tensors else int(value)


def _whole(saved: SavedState, name: str, shape: torch.Size, key: str) -> Tensor:
    """ZeRO 0: the parameter itself."""
    return saved.tensor(key, name).view(shape)


def _window(saved: SavedState, order: Sequence[str], first: int, size: int, key: str) -> Tensor:
    """ZeRO 1 and 2: elements [first, first + size) of the parameters in a row, zeros beyond their end."""
    pieces, start = [], 0
    for name in order:
        end = start + prod(saved.shapes[name])
        if start < first + size and first < end:
            pieces.append(saved.tensor(key, name)[max(first - start, 0) : first + size - start])
        start = end
    return _padded(torch.cat(pieces) if pieces else torch.zeros(0), size)


def _shares(saved: SavedState, order: Sequence[str], rank: int, world: int, key: str) -> Tensor:
    """ZeRO 3: a share of every parameter, the last one padded."""
    shares = []
    for name in order:
        size = -(-prod(saved.shapes[name]) // world)
        shares.append(_padded(saved.tensor(key, name)[rank * size : (rank + 1) * size], size))
    return torch.cat(shares)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - values.numel())])


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
