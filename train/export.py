"""The portable model ``model/``: written from a training checkpoint, read to start another run from, merged
from single blocks.

A training checkpoint is all that is needed: the files of every process are mapped and weights pass through
memory one at a time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.folder import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    Loaded,
    compare,
    load,
    load_config,
    save,
    write,
)
from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from rdlm.diffusion.partition import partition_of
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.objectives.depth import num_recurrences
from rdlm.registry import build
from train.checkpoints import (
    TAG,
    TOKENIZER,
    best,
    checkpoints_in,
    damage_of,
    manifest_of,
    newest,
)
from train.data import build_corpus
from train.ema import KEY as AVERAGE
from train.lora import Merged, add_adapters
from train.metrics import read
from train.optim import parameter_groups
from train.patterns import matches
from train.saved_state import WEIGHT, SavedState
from train.settings import TrainConfig

MOST_DRAWS = 10_000
"""Updates whose core steps are looked at for ``trained_steps``."""


def find_checkpoint(source: Path, which: str, warn: Callable[[str], None], field: str = "SOURCE") -> Path:
    """The training checkpoint that a run folder, its ``checkpoints`` or a ``step_<n>`` folder stands for;
    UserError if there is none.

    which: of a run, ``last``, ``best`` (needs checkpoint.keep_best) or the number of a step.
    """
    if (source / "manifest.json").is_file():
        damage = damage_of(source)
        if damage is not None:
            raise UserError(field, str(source), damage, "give another checkpoint")
        return source
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    if not checkpoints_in(folder):
        remedy = "give the output folder of `rdlm train` or one of its checkpoints"
        raise UserError(field, str(source), "holds no training checkpoint", remedy)
    if which == "last":
        found = newest(folder, warn)
    elif which == "best":
        found = best(folder)
    else:
        found = next((p for p in checkpoints_in(folder) if p.name == f"step_{int(which):06d}"), None)
    if found is None:
        there = ", ".join(str(int(path.name[5:])) for path in checkpoints_in(folder))
        remedy = "set checkpoint.keep_best in the run's config" if which == "best" else f"there are {there}"
        raise UserError("--which", which, "there is no such checkpoint", remedy)
    return found


def export(
    checkpoint: Path,
    out: Path,
    tokenizer: Tokenizer | None = None,
    averaged: bool | None = None,
    keep: bool = False,
) -> Path:
    """Write the fp32 model of a training checkpoint to ``out``, replacing what is there once it is complete.
    Returns ``out``.

    tokenizer: by default the one that the checkpoint holds, or that of its data. averaged: the moving averages
    of the weights; None: as the run's ``ema.export`` says. UserError if a weight is not finite, or there are no
    averages. keep: other files in ``out`` stay (rdlm.atomic.replacing).
    """
    manifest = manifest_of(checkpoint)
    config: TrainConfig = parse(TrainConfig, manifest["config"], str(checkpoint / "manifest.json"))
    model_config = config.checkpoint_config.model_copy(update={"step": int(manifest["step"])})
    if model_config.recurrence.trained_steps is None:
        recurrence = model_config.recurrence.model_copy(
            update={"trained_steps": _trained_steps(config, manifest)}
        )
        model_config = model_config.model_copy(update={"recurrence": recurrence})
    if averaged and config.ema is None:
        problem, remedy = "the run keeps no averages of its weights", "add a section ema to its config"
        raise UserError("--ema", True, problem, remedy)
    averaged = config.ema is not None and config.ema.export if averaged is None else averaged
    key = AVERAGE if averaged else WEIGHT
    entries = {
        prefix + name: tensors.Entry(
            "F32", shape, 4 * prod(shape), partial(_bytes, saved, key, name, checkpoint)
        )
        for prefix, saved in saved_parts(checkpoint, config)
        for name, shape in saved.shapes.items()
    }
    weights: dict[str, nn.Parameter] = dict(build(model_config, device="meta").named_parameters())
    compare(
        str(checkpoint),
        {name: entry.shape for name, entry in entries.items()},
        {name: weight.shape for name, weight in weights.items()},
        "use the version of rdlm that wrote it",
    )

    def fill(folder: Path) -> None:
        tensors.write(folder / WEIGHTS, entries, lambda size: None)
        ends = _generation_config(config)
        if ends is not None:
            shutil.copyfile(ends, folder / GENERATION)

    if tokenizer is None:
        tokenizer = _tokenizer_of(checkpoint, config)
    return write(out, model_config, tokenizer, weights, fill, _card(checkpoint, manifest, config), keep)


def export_run(output: Path) -> Path:
    """Write ``model/`` of a run from its newest checkpoint; files that somebody has put there stay."""
    return export(checkpoints_in(output / "checkpoints")[-1], output / "model", keep=True)


def saved_parts(checkpoint: Path, config: TrainConfig) -> Iterator[tuple[str, SavedState | Merged]]:
    """The weights that each engine saved, adapters merged, with the prefix of their names in the network."""
    joint = config.blocks is not None and config.blocks.num_blocks > 1 and config.block is None
    for block in range(config.blocks.num_blocks) if joint and config.blocks is not None else [None]:
        part = config if block is None else config.model_copy(update={"block": block})
        denoiser = build(part.checkpoint_config, device="meta")
        add_adapters(denoiser, config.lora, config.seed)
        names = {id(p): name for name, p in denoiser.named_parameters()}
        grouped = parameter_groups(denoiser, config.optimizer, config.lora)
        groups = [[names[id(p)] for p in group["params"]] for group in grouped]
        prefix, tag = ("", TAG) if block is None else (f"blocks.{block}.", f"{TAG}/block_{block}")
        saved = SavedState(checkpoint / tag, groups)
        yield prefix, saved if config.lora is None else Merged(saved, config.lora)


def _trained_steps(config: TrainConfig, manifest: Mapping[str, Any]) -> int | None:
    """Core steps that at most one of 100 updates exceeded; None where the run drew none."""
    updates = int(manifest["step"])
    if not updates or not config.objective.supports_exits:
        return None
    chosen = np.linspace(0, updates - 1, min(updates, MOST_DRAWS)).round().astype(int)
    drawn = sorted(num_recurrences(config.objective.depth_in_training, int(n), config.seed) for n in chosen)
    return drawn[math.ceil(0.99 * len(drawn)) - 1]


def _bytes(saved: SavedState | Merged, key: str, name: str, checkpoint: Path) -> Iterator[bytes]:
    weight = saved.tensor(key if key in saved.moments else WEIGHT, name)
    if not bool(weight.isfinite().all()):
        raise UserError(
            "checkpoint", str(checkpoint), f"weight {name} is not finite", "export an earlier one"
        )
    yield weight.numpy().tobytes()


def _generation_config(config: TrainConfig) -> Path | None:
    """What the checkpoint that the run started from says about ends of texts, if it is still there."""
    if config.init_from is None:
        return None
    files = (Path(config.init_from) / "model" / GENERATION, Path(config.init_from) / GENERATION)
    return next((file for file in files if file.is_file()), None)


def _tokenizer_of(checkpoint: Path, config: TrainConfig) -> Tokenizer | None:
    if (checkpoint / TOKENIZER).is_dir():
        return load_tokenizer(checkpoint / TOKENIZER)
    return build_corpus(config.data, config.fills_in).tokenizer


def initialize_from(
    denoiser: Objective, source: str, block: int | None, mapped: Mapping[str, str] | None = None
) -> list[str]:
    """Copy the weights of ``source`` (see ``weights_of``) into ``denoiser``; returns lines about the weights
    that it does not have.

    block: the block that ``denoiser`` is, of a checkpoint of the whole network. mapped: the section init_map.
    Raises UserError where a shape differs or the checkpoint has weights that the model lacks.
    """
    own = dict(denoiser.named_parameters())
    weights = _matching(own, weights_of(Path(source)), source, block, mapped or {})
    with torch.no_grad():
        for name, weight in weights.items():
            own[name][_region(weight)].copy_(weight)
    fresh = sorted(own.keys() - weights.keys())
    partly = sorted(name for name, weight in weights.items() if weight.shape != own[name].shape)
    lines = [f"weights of {source}: {len(weights)} of {len(own)} parameters"]
    lines += [f"initialized anew in part: {', '.join(partly)}"] if partly else []
    return lines + ([f"initialized anew: {', '.join(fresh)}"] if fresh else [])


def check_init_from(config: TrainConfig, source: str, tokenizer: Tokenizer | None) -> None:
    """UserError where ``initialize_from`` would raise one, or where the data was made with another tokenizer;
    reads no weight.

    tokenizer: that of the data.
    """
    own = dict(build(config.checkpoint_config, device="meta").named_parameters())
    _matching(own, weights_of(Path(source), shapes_only=True), source, config.block, config.init_map)
    folder = next((p for p in (Path(source) / "model", Path(source)) if (p / TOKENIZER).is_dir()), None)
    if folder is None or tokenizer is None or config.allow_changes:
        return
    if load_tokenizer(folder / TOKENIZER).fingerprint != tokenizer.fingerprint:
        problem = f"its ids are not those of the tokenizer of init_from ({source})"
        remedy = (
            f"prepare it with `rdlm data prepare ... --tokenizer {folder / TOKENIZER}`, or allow it with "
            f"--allow-changes"
        )
        raise UserError("data.path", config.data.folder, problem, remedy)


def _matching(
    own: Mapping[str, Tensor],
    weights: dict[str, Tensor],
    source: str,
    block: int | None,
    mapped: Mapping[str, str],
) -> dict[str, Tensor]:
    """The weights for ``own``, those that overlap cut to what both have; UserError for the first one that
    ``own`` lacks or has in another shape and that ``mapped`` does not explain."""
    if block is not None and any(name.startswith("blocks.") for name in weights):
        prefix = f"blocks.{block}."
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    remedy = "correct the section model, leave it out, or say in init_map where its weights go"
    found, used = {}, set()
    for name in own:
        pattern, taken = _taken(name, mapped)
        if taken is None or (taken == name and name not in weights and pattern is None):
            continue
        if taken not in weights:
            problem = f"init_from ({source}) has no weight {taken}"
            raise UserError(f"init_map.{pattern}", mapped[str(pattern)], problem, "name one that it has")
        weight = weights[taken]
        used.add(taken)
        if pattern is not None and mapped[pattern] == OVERLAP and weight.dim() == own[name].dim():
            shared = zip(weight.shape, own[name].shape, strict=True)
            weight = weight[tuple(slice(0, min(sizes)) for sizes in shared)]
        elif weight.shape != own[name].shape:
            problem = f"{taken} has shape {tuple(weight.shape)}, the model {tuple(own[name].shape)}"
            raise UserError("init_from", source, problem, remedy)
        found[name] = weight
    for name in sorted(weights.keys() - used):
        if _taken(name, mapped)[0] is None:
            problem = f"has the weight {name}, the model has no place for it"
            raise UserError("init_from", source, problem, remedy)
    for pattern in mapped:
        if not any(matches(name, pattern) for name in (*own, *weights)):
            problem = "matches no parameter of the model or of init_from"
            raise UserError(f"init_map.{pattern}", mapped[pattern], problem, "correct it")
    return found


SKIP, OVERLAP = "skip", "overlap"


def _taken(name: str, mapped: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(The pattern of ``init_map`` that decides about a name, the name in the checkpoint; None for none)."""
    pattern = next((pattern for pattern in reversed(list(mapped)) if matches(name, pattern)), None)
    if pattern is None or mapped[pattern] == OVERLAP:
        return pattern, name
    return pattern, None if mapped[pattern] == SKIP else mapped[pattern] + name.removeprefix(pattern)


def _region(weight: Tensor) -> tuple[slice, ...]:
    """The first rows and columns, as many as ``weight`` has."""
    return tuple(slice(0, size) for size in weight.shape)


def weights_of(source: Path, shapes_only: bool = False) -> dict[str, Tensor]:
    """Weights by name of a portable model, of a training checkpoint, or of a run (its ``model``, else its
    newest checkpoint).

    shapes_only: meta tensors in their place.
    """
    folder = source / "model" if (source / "model" / CONFIG).is_file() else source
    if (folder / CONFIG).is_file():
        config = load_config(folder)
        config.check_exact("training")
        model = build(config, device="meta") if shapes_only else load(folder).denoiser
        return dict(model.named_parameters())
    checkpoint = find_checkpoint(source, "last", lambda text: None, "init_from")
    trained: TrainConfig = parse(TrainConfig, manifest_of(checkpoint)["config"], str(checkpoint))
    return {
        prefix + name: torch.empty(shape, device="meta")
        if shapes_only
        else saved.tensor(WEIGHT, name).view(shape)
        for prefix, saved in saved_parts(checkpoint, trained)
        for name, shape in saved.shapes.items()
    }


def _card(checkpoint: Path, manifest: dict[str, Any], config: TrainConfig) -> str:
    step, run = int(manifest["step"]), checkpoint.parent.parent
    log = [record for record in read(run / "metrics.jsonl") if record["step"] <= step]
    held_out = [record for record in read(run / "held_out.jsonl") if record["step"] <= step]
    data = ", ".join(f"{key} {value}" for key, value in config.data.model_dump().items())
    optimizer, schedule = config.optimizer, config.schedule
    unit = config.data.unit
    examples = "images" if unit == "image" else f"sequences of {config.seq_len} {unit}s"
    seen = step * config.batch.global_size * config.seq_len
    took = (
        f"; {log[-1]['seconds']:.0f} s, {log[-1]['cpu_seconds']:.0f} s of CPU time"
        if log and {"seconds", "cpu_seconds"} <= log[-1].keys()
        else ""
    )
    start = [] if config.init_from is None else [f"- Started from the weights of `{config.init_from}`."]
    if config.ema is not None:
        held = "in this folder" if config.ema.export else "not exported unless asked for"
        start.append(f"- Moving average of the weights, decay {config.ema.decay}: {held}.")
    if config.lora is not None:
        rank, alpha, moved = config.lora.rank, config.lora.alpha, list(config.lora.also_train)
        start.append(
            f"- LoRA of rank {rank}, alpha {alpha}, merged; trained as a whole: {moved or 'nothing'}."
        )
    patterns = {"frozen": list(optimizer.freeze), "learning-rate factors": dict(optimizer.lr_factors)}
    lines = [
        "## Data and training",
        "",
        f"- Data: {data} (identity {manifest['data'][:16]}).",
        f"- {step:,} updates of {config.batch.global_size} {examples}: {seen:,} {unit}s.",
        f"- {optimizer.name}, lr {optimizer.lr}, betas {optimizer.betas}, weight decay {optimizer.weight_decay} "
        f"(matrices of linear "
        f"layers), gradient norm clipped at {optimizer.grad_clip}; schedule {schedule.kind}, warm-up steps "
        f"{schedule.warmup_steps}.",
        *start,
        *(f"- {what[0].upper()}{what[1:]}: {given}." for what, given in patterns.items() if given),
        f"- {config.precision}, ZeRO stage {config.deepspeed.zero_stage}, processes {manifest['world']}, seed "
        f"{config.seed}{took}.",
    ]
    for change in manifest.get("history", []):
        what = ", ".join(f"{key}: {value}" for key, value in change.items() if key != "step")
        lines.append(f"- From update {change['step']:,} on: {what}.")
    if log and log[-1].get("loss") is not None:
        lines.append(f"- Last training loss {log[-1]['loss']:.4f} per {unit}.")
    if held_out and held_out[0]["step"] == 0 and step:
        values = ", ".join(f"{k}: {v:.4f}" for k, v in held_out[0].items() if k != "step" and v is not None)
        lines.append(f"- Held out before training: {values}.")
    if held_out:
        values = ", ".join(f"{k}: {v:.4f}" for k, v in held_out[-1].items() if k != "step" and v is not None)
        lines.append(f"- Held out, mean per {unit} of {config.evaluation.max_tokens:,} at most: {values}.")
    return "\n".join(lines)


def merge(folders: Sequence[Path], out: Path) -> Path:
    """Write the merged checkpoint to ``out``, where other files stay, and return it. folders: runs (with
    ``model/``) or model folders, in any order.

    Raises UserError where they are not the blocks of one network, each exactly once.
    """
    parts = {folder: load(folder / "model" if (folder / "model").is_dir() else folder) for folder in folders}
    for part in parts.values():
        part.config.check_exact("`rdlm merge`")
    ordered = _in_order(parts)
    config = ordered[0].config.model_copy(
        update={"block": None, "step": sum(part.config.step for part in ordered)}
    )
    whole = build(config, device="meta")
    weights = {
        f"blocks.{b}.{n}": w for b, part in enumerate(ordered) for n, w in part.denoiser.state_dict().items()
    }
    whole.load_state_dict(weights, strict=True, assign=True)
    return save(out, whole, config, ordered[0].tokenizer, _merged_card(config, ordered), keep=True)


def _in_order(parts: dict[Path, Loaded]) -> list[Loaded]:
    """Block 0 first."""
    found: dict[int, Path] = {}
    first = next(iter(parts))
    for folder, part in parts.items():
        block = part.config.block
        if block is None:
            raise UserError(
                "RUN", str(folder), "holds no single block", "give runs of `rdlm train --block N`"
            )
        if block in found:
            raise UserError(
                "RUN", str(folder), f"is block {block}, as {found[block]} is", "give each block once"
            )
        found[block] = folder
        differing = _difference(parts[first].config, part.config)
        if differing is not None:
            raise UserError(
                "RUN", str(folder), f"has another {differing} than {first}", "give blocks of one network"
            )
        if _fingerprint(part) != _fingerprint(parts[first]):
            raise UserError(
                "RUN",
                str(folder),
                f"has another tokenizer than {first}",
                "give blocks trained on the same data",
            )
    count = partition_of(parts[first].config).num_blocks
    missing = sorted(set(range(count)) - found.keys())
    if missing:
        raise UserError(
            "RUN",
            len(found),
            f"of {count} blocks, {missing} are missing",
            "train them with `rdlm train --block N`",
        )
    return [parts[found[b]] for b in range(count)]


def _difference(one: CheckpointConfig, other: CheckpointConfig) -> str | None:
    """The first field in which two blocks of one network must not differ."""
    ours, theirs = one.model_dump(), other.model_dump()
    return next((name for name in ours if name not in ("block", "step") and ours[name] != theirs[name]), None)


def _fingerprint(part: Loaded) -> str | None:
    return None if part.tokenizer is None else part.tokenizer.fingerprint


def _merged_card(config: CheckpointConfig, parts: Sequence[Loaded]) -> str:
    cut, masked = partition_of(config), not config.objective.left_to_right
    noised = "tokens are masked" if masked else f"targets {config.blocks.targets if config.blocks else ''}"
    lines = ["## Blocks", "", f"Trained alone and merged; {noised}.", ""]
    for b, part in enumerate(parts):
        layers = cut.layers[b]
        owned = f"{'t' if masked else 'sigma'} in ({cut.edges[b + 1]:.4g}, {cut.edges[b]:.4g}]"
        lines.append(
            f"- Block {b}: {owned}, layers {layers[0]} to {layers[-1]}, {part.config.step:,} updates."
        )
    return "\n".join(lines)
