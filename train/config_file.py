"""From a YAML file and ``key.sub=value`` overrides to a config that has been checked, before anything starts.
No torch here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from rdlm.config.base import parse
from rdlm.errors import UserError, reason
from train.settings import FolderPath, ResidentConfig, TrainConfig


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML 1.2 file holds; raises UserError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        remedy = "give the path of a YAML file, see configs/"
        raise UserError("CONFIG", str(path), error.strerror or "cannot be read", remedy) from None
    except UnicodeDecodeError as error:
        raise UserError("CONFIG", str(path), f"is not YAML: {error}", "save it as UTF-8 text") from None
    data = _parsed(text, "CONFIG", str(path))
    if not isinstance(data, dict):
        raise UserError("CONFIG", str(path), "holds no mapping", "see configs/ for examples")
    return data


def changed(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The same mapping after ``key.sub=value`` overrides (values are YAML); raises UserError."""
    for override in overrides:
        _apply(data, override)
    return data


def load(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML 1.2 file, apply ``key.sub=value`` overrides, check the whole; raises UserError."""
    data = read_yaml(path)
    for override in overrides:
        if override.startswith("init_from="):  # before the others, which may change the model that it brings
            _apply(data, override)
    given = data.get("model", {})
    if isinstance(data.get("init_from"), str) and isinstance(given, dict) and "family" not in given:
        data["model"] = _merged(_model_of(parse(FolderPath, data["init_from"], "init_from")), given)
    changed(data, overrides)
    if data.get("precision") == "auto":
        data["precision"] = native_precision()
    config: TrainConfig = parse(TrainConfig, data, f"{path} or in an override" if overrides else str(path))
    _check(config)
    config = _within_depth(config)
    return (
        config
        if config.block is None
        else config.model_copy(update={"output": str(block_folder(config, config.block))})
    )


_STEPS = (("evaluation", "steps"), ("samples", "num_steps"))
"""Section and field that list values of K."""


def _steps_given(config: TrainConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The values of K that the user wrote and that will be used, with the name of the field."""
    for section, field in _STEPS:
        settings = getattr(config, section)
        if settings.interval_steps and field in settings.model_fields_set:
            yield f"{section}.{field}", getattr(settings, field)


def _within_depth(config: TrainConfig) -> TrainConfig:
    """The config without those default values of K that the run cannot take."""
    most = 1 if config.resident is not None else config.checkpoint_config.max_steps
    kept: dict[str, Any] = {}
    for section, field in _STEPS:
        settings = getattr(config, section)
        if field not in settings.model_fields_set:
            steps = tuple(k for k in getattr(settings, field) if k <= most)
            kept[section] = settings.model_copy(update={field: steps})
    return config.model_copy(update=kept)


def native_precision() -> str:
    """bf16 where the GPU, or without one the CPU, computes in it; else fp32. CPUs without it emulate bf16, many
    times slower."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "fp32"


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of ``below`` with the fields of ``above`` put in."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _model_of(source: str) -> dict[str, Any]:
    """The section model of a checkpoint folder, a run or a training checkpoint, without what follows from the
    objective."""
    for file in ("model/config.json", "config.json", "train_config.json", "manifest.json"):
        try:
            found = json.loads((Path(source) / file).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, RecursionError) as error:
            problem = f"its {file} cannot be read ({reason(error)})"
            raise UserError("init_from", source, problem, "give a complete checkpoint folder") from None
        found = found.get("config", found) if isinstance(found, dict) else {}
        if isinstance(found, dict) and isinstance(found.get("model"), dict):
            return {key: value for key, value in found["model"].items() if key != "noise_conditioning"}
        problem = f"its {file} is not that of a checkpoint of rdlm"
        raise UserError("init_from", source, problem, f"turn it into one: `rdlm import {source} OUT`")
    raise UserError("init_from", source, "is not a checkpoint folder", "give one, or write the section model")


def _parsed(text: str, field: str, value: str) -> Any:
    """The value of a YAML document. UserError where it has none, with the line and what is wrong there."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError:
        raise UserError(field, value, "is not YAML: nested too deeply", "correct it") from None
    except (
        Exception
    ) as error:  # the parser raises more than its own errors: ValueError, TypeError, AttributeError
        problem = str(error)
        if isinstance(error, MarkedYAMLError):
            line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
            problem = f"{line}{error.problem or error.context}"
        raise UserError(field, value, f"is not YAML: {' '.join(problem.split())}", "correct it") from None


@contextmanager
def written_checked(config: TrainConfig) -> Iterator[Path]:
    """A JSON file in the output folder that holds a checked config for the processes of its run."""
    path = Path(config.output) / f".config-{os.getpid()}.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def read_checked(path: Path) -> TrainConfig:
    """The config of ``written_checked``: nothing is checked again."""
    return TrainConfig.model_validate_json(path.read_text(encoding="utf-8"))


def block_folder(config: TrainConfig, block: int) -> Path:
    """Where the run of one block lies in the output folder of the whole."""
    return Path(config.output) / f"block_{block}"


def _check(config: TrainConfig) -> None:
    """What no section can see alone."""
    conditioned, objective = config.model.noise_conditioning, config.objective
    if conditioned != objective.noise_conditioned:
        problem = (
            f"objective {objective.name!r} {'noises' if objective.noise_conditioned else 'does not noise'} its "
            f"targets"
        )
        raise UserError(
            "model.noise_conditioning", conditioned, problem, "drop the field: it follows the objective"
        )
    if config.data.separates_documents and not objective.separates_documents:
        problem = f"objective {objective.name!r} cannot keep the documents of a row apart"
        raise UserError("data.packing", "documents", problem, "set data.packing=windows")
    of_images = config.model.is_image
    if of_images != config.data.of_images:
        problem = f"family {config.model.family!r} learns from {'images' if of_images else 'rows of ids'}"
        raise UserError(
            "data.kind",
            config.data.kind,
            problem,
            "use images" if of_images else "use tokens or a generated task",
        )
    depth = objective.depth_in_training
    window = 1 if depth.grad_steps == "all" else depth.grad_steps
    most = {"fixed": depth.mean, "uniform": 2 * depth.mean - 1}.get(depth.distribution, depth.max_steps)
    if depth.mean > depth.max_steps:
        problem = f"exceeds objective.depth.max_steps ({depth.max_steps}), where r is clipped"
        raise UserError("objective.depth.mean", depth.mean, problem, "lower it or raise max_steps")
    if window > most:
        problem = f"r is never above {most}"
        raise UserError("objective.depth.grad_steps", window, problem, f"use at most {most}, or all")
    if config.seq_len > config.model.max_seq_len:
        problem = f"longer than model.max_seq_len ({config.model.max_seq_len})"
        raise UserError(
            "data.seq_len", config.seq_len, problem, "shorten the sequences or raise model.max_seq_len"
        )
    for field, asked in _steps_given(config):
        beyond = [k for k in asked if k > config.checkpoint_config.max_steps]
        if not beyond:
            continue
        problem, remedy = (
            f"exceeds recurrence.max_steps ({config.recurrence.max_steps})",
            "use smaller K or raise recurrence.max_steps",
        )
        if objective.supports_exits and not config.model.iterates:
            problem, remedy = (
                f"with objective {objective.name!r} this model runs its layers once",
                f"set {field}=[1]",
            )
        raise UserError(field, beyond[0], problem, remedy)
    if config.branch_from is not None and config.init_from is not None:
        problem = "branch_from brings the weights, and their optimizer"
        raise UserError("init_from", config.init_from, problem, "drop one of the two")
    if config.init_map and config.init_from is None:
        problem, remedy = "says where weights of init_from go", "set init_from, or drop init_map"
        raise UserError("init_map", next(iter(config.init_map)), problem, remedy)
    if config.lora is not None and config.init_from is None and config.branch_from is None:
        problem, remedy = "adapters change a trained network", "set init_from, or drop the section lora"
        raise UserError("lora", config.lora.rank, problem, remedy)
    if config.resident is not None:
        _check_resident(config, config.resident)


def _check_resident(config: TrainConfig, resident: ResidentConfig) -> None:
    count = 1 if config.blocks is None else config.blocks.num_blocks
    if count == 1:
        given = None if config.blocks is None else config.blocks.num_blocks
        raise UserError(
            "blocks.num_blocks",
            given,
            "resident training needs several blocks",
            "raise it, or drop the section resident",
        )
    if config.block is not None:
        raise UserError(
            "block",
            config.block,
            "a block that is trained alone is always on the device",
            "drop the section resident",
        )
    if resident.visit_steps * count > config.schedule.steps:
        problem = f"with {count} blocks some would not be visited in {config.schedule.steps} steps"
        remedy = f"use at most {config.schedule.steps // count}"
        raise UserError("resident.visit_steps", resident.visit_steps, problem, remedy)
    for field, asked in _steps_given(config):
        several = [k for k in asked if k > 1]
        if several:
            problem = "K > 1 runs several blocks for every token, and one block is on the device"
            remedy = f"set {field}=[1]; rdlm eval and rdlm generate take any K afterwards"
            raise UserError(field, several[0], problem, remedy)


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UserError("override", override, "is not key.sub=value", "write for example optimizer.lr=0.001")
    value = _parsed(text, key, text)
    *parents, last = key.split(".")
    for parent in parents:
        below = data.setdefault(parent, {})
        if parent == "objective" and isinstance(below, str):  # short for its name
            below = data[parent] = {"name": below}
        data = below
        if not isinstance(data, dict):
            raise UserError(key, text, f"{parent} holds a value, not a section", "correct the key")
    data[last] = value
