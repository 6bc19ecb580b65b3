"""The portable model: a folder with ``config.json``, ``model.safetensors``, ``tokenizer/`` and a
``README.md`` card.

Weights are stored by parameter name, tied ones once, in one dtype. Nothing in the folder is executed on
loading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rdlm.atomic import replacing
from rdlm.checkpoints.resident import ResidentBlocks, absent
from rdlm.config.base import parse
from rdlm.config.checkpoint import SCHEMA_VERSION, CheckpointConfig, WeightFormat
from rdlm.config.objective import DepthConfig
from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from rdlm.errors import UserError, reason
from rdlm.nn.quantization import DTYPES_OF, Quantized, formats, stored_shapes
from rdlm.objectives import Objective
from rdlm.objectives.blockwise import Blockwise
from rdlm.registry import build

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer", "README.md"
GENERATION = "generation_config.json"
"""Optional; imported checkpoints have one. Its ``eos_token_id`` lists every id that ends a text."""
FILES = (
    CONFIG, GENERATION, CARD, "*.safetensors", "*.safetensors.index.json", "modeling_rdlm.py", TOKENIZER,
    "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""Patterns of what lies in a folder with a model, ours or of a published layout: what --force may replace."""
SCALES = "_scale"
"""Behind the name of a quantised weight: its scales."""
CARD_NOTES = re.compile(r"\|\n\n(.*)\n\n## Run it\n", re.DOTALL)
FIELD = "checkpoint"
PUBLISHED = {"model_type", "architectures", "_class_name"}
"""Keys that only the ``config.json`` of other formats has."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to run: in eval mode, its tokenizer None where the ids are not text."""

    denoiser: Objective
    config: CheckpointConfig
    tokenizer: Tokenizer | None
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    """Weights by name in whose place the denoiser holds NaN, with ``keep_quantized``."""


def save(
    folder: str | Path,
    denoiser: Objective,
    config: CheckpointConfig,
    tokenizer: Tokenizer | None,
    card: str = "",
    keep: bool = False,
) -> Path:
    """Write the folder, replacing an earlier one only when the new one is complete. Returns its path.

    keep: other files of an earlier one stay, see ``rdlm.atomic.replacing``. card: Markdown about data and
    training, put below what the config itself says. Weights keep the dtype they have, also those of a network
    that was loaded from a quantised checkpoint.
    """
    config = config.model_copy(update={"quantization": None})
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in denoiser.named_parameters()}

    def fill(temporary: Path) -> None:
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})

    return write(folder, config, tokenizer, weights, fill, card, keep)


def write(
    folder: str | Path,
    config: CheckpointConfig,
    tokenizer: Tokenizer | None,
    weights: Mapping[str, Tensor],
    fill: Callable[[Path], None],
    card: str,
    keep: bool = False,
) -> Path:
    """``save`` for weights that are not in memory: ``fill(folder)`` writes ``model.safetensors``, ``weights``
    may be meta tensors."""
    with replacing(folder, keep=keep) as temporary:
        fill(temporary)
        if tokenizer is not None:
            tokenizer.save(temporary / TOKENIZER)
        (temporary / CARD).write_text(_card(config, weights, card), encoding="utf-8")
        (temporary / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    resident_blocks: int | None = None,
    keep_quantized: bool = False,
) -> Loaded:
    """Read a checkpoint folder. Raises UserError where a file, a weight or a shape is not what the config
    says, or where a newer version wrote it.

    resident_blocks: most blocks whose weights are in memory; the others are read again when they are used
    (rdlm/checkpoints/resident.py). On a CPU, in the dtype of the file, they are mapped and not copied.
    UserError where the network is not cut into so many blocks. keep_quantized: leave weights that are stored
    quantised as they are, for kernels that read them so; else they become ``dtype``, one at a time.
    """
    folder = Path(folder)
    config = load_config(folder)
    denoiser = build(config, device="meta")
    shapes = {name: parameter.shape for name, parameter in denoiser.named_parameters()}
    kept: dict[str, Quantized] = {}
    read = partial(
        _read_weights, folder / WEIGHTS, shapes, quantized_matrices(denoiser, config), torch.device(device), dtype,
        kept if keep_quantized else None,
    )  # fmt: skip
    if resident_blocks is None:
        denoiser.load_state_dict(_with_ties(denoiser, read(list(shapes))), strict=True, assign=True)
    else:
        _check_resident(resident_blocks, denoiser)
        outside = [name for name in shapes if ".model." not in name]
        empty = {
            name: absent(weight, torch.device(device), dtype) for name, weight in denoiser.named_parameters()
        }
        denoiser.load_state_dict(_with_ties(denoiser, {**empty, **read(outside)}), strict=True, assign=True)
        whole = cast(Blockwise, denoiser)
        whole.resident = ResidentBlocks(whole, resident_blocks, read)
    tokenizer = load_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).is_dir() else None
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}"
        raise UserError(
            FIELD, str(folder / TOKENIZER), problem, "put the tokenizer the model was trained with there"
        )
    return Loaded(denoiser.eval(), config, tokenizer, kept)


def notes_of(folder: Path) -> str:
    """What the card of a checkpoint says below its table; empty where there is no card, or another one."""
    card = folder / CARD
    found = CARD_NOTES.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return found[1] if found else ""


def load_config(folder: str | Path) -> CheckpointConfig:
    """The ``config.json`` of a checkpoint folder; UserError if it is missing, unreadable or newer than this
    code."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = f"has no {CONFIG}" if gone else f"its {CONFIG} cannot be read ({error.strerror})"
        raise UserError(
            FIELD, str(folder), problem, "give a folder that `rdlm train` exported (OUTPUT/model)"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(FIELD, str(path), "is not JSON", "copy or export the checkpoint again") from None
    if isinstance(data, dict) and "schema_version" not in data and PUBLISHED & data.keys():
        problem = f"is a model in a published layout (model_type {data.get('model_type')!r})"
        raise UserError(FIELD, str(folder), problem, f"turn it into a checkpoint: `rdlm import {folder} OUT`")
    return parse_config(data, str(path))


def parse_config(data: Any, where: str) -> CheckpointConfig:
    """The config of a JSON document; UserError if a field is wrong or a newer version wrote it."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{where}: schema_version", version, f"this version reads up to {SCHEMA_VERSION}", "update rdlm"
        )
    return parse(CheckpointConfig, data, where)


def _check_resident(count: int, denoiser: Objective) -> None:
    if len(denoiser.parts) == 1:
        problem = "the checkpoint is not a network of several blocks, which could be in memory one by one"
        raise UserError("resident_blocks", count, problem, "leave it out")
    if not 1 <= count <= len(denoiser.parts):
        problem = f"the network has {len(denoiser.parts)} blocks"
        raise UserError("resident_blocks", count, problem, f"choose 1 to {len(denoiser.parts)}")


@dataclass(frozen=True)
class Matrix:
    """A weight [out, in] as the file of a quantised checkpoint holds it: values under its name, scales beside."""

    weights: WeightFormat
    group_size: int
    shape: tuple[int, ...]

    def stored(self, name: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of both tensors."""
        shapes = stored_shapes(self.shape, self.weights, self.group_size)
        return dict(zip((name, name + SCALES), shapes, strict=True))


def quantized_matrices(denoiser: Objective, config: CheckpointConfig) -> dict[str, Matrix]:
    """The weights by name that a checkpoint stores quantised."""
    if (about := config.quantization) is None:
        return {}
    shapes = {name: tuple(parameter.shape) for name, parameter in denoiser.named_parameters()}
    return {
        name: Matrix(weights, about.group_size, shapes[name])
        for name, weights in formats(denoiser, about.weights).items()
    }


def _read_weights(
    path: Path,
    shapes: dict[str, torch.Size],
    matrices: Mapping[str, Matrix],
    device: torch.device,
    dtype: torch.dtype,
    kept: dict[str, Quantized] | None,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """The weights ``names``; the file must hold exactly those of ``shapes``. kept: see ``load``."""
    expected: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in shapes.items()}
    for name, matrix in matrices.items():
        expected |= matrix.stored(name)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
            compare(str(path), found, expected, f"use the {CONFIG} and {WEIGHTS} of one export")
            weights: dict[str, Tensor] = {}
            for name in names:
                weight = file.get_tensor(name)
                if name not in matrices:
                    weights[name] = _finite(path, name, weight, dtype)
                    continue
                matrix = matrices[name]
                if weight.dtype != DTYPES_OF[matrix.weights]:
                    problem, remedy = f"config.json says {matrix.weights}", "copy the checkpoint again"
                    raise UserError(f"{path}: dtype of {name}", weight.dtype, problem, remedy)
                scales = file.get_tensor(name + SCALES)
                scales = _finite(path, name + SCALES, scales, scales.dtype)
                whole = Quantized(weight, scales, matrix.shape[1], matrix.group_size)
                if kept is None:
                    weights[name] = whole.dequantized(dtype)
                else:
                    kept[name], weights[name] = (
                        whole,
                        absent(torch.empty(matrix.shape, device="meta"), device, dtype),
                    )
            return weights
    except FileNotFoundError:
        raise UserError(FIELD, str(path), "is missing", "copy or export the checkpoint again") from None
    except OSError as error:
        remedy = "copy or export the checkpoint again"
        raise UserError(FIELD, str(path), f"cannot be read ({reason(error)})", remedy) from None
    except SafetensorError as error:
        raise UserError(
            FIELD, str(path), f"is damaged ({error})", "copy or export the checkpoint again"
        ) from None


def _finite(path: Path, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in ``dtype``. UserError where the file has no floats, or one is not finite: every logit would be
    NaN."""
    if not weight.is_floating_point():
        problem = "a weight that is not quantised has floats"
        raise UserError(f"{path}: dtype of {name}", weight.dtype, problem, "copy the checkpoint again")
    weight = weight.to(dtype)
    if weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
        remedy = "copy the checkpoint again, or take an earlier one"
        raise UserError(f"{path}: weight", name, f"it has numbers that are not finite in {dtype}", remedy)
    return weight


def compare(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], remedy: str
) -> None:
    """UserError for the first weight that only one side has or whose shape differs."""
    for name in sorted(found.keys() - expected.keys()):
        raise UserError(f"{where}: weight", name, "the model has no such weight", remedy)
    for name in sorted(expected.keys() - found.keys()):
        raise UserError(f"{where}: weight", name, "is missing", remedy)
    for name, shape in expected.items():
        if found[name] != tuple(shape):
            raise UserError(f"{where}: shape of {name}", found[name], f"the model has {tuple(shape)}", remedy)


def _with_ties(denoiser: Objective, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``state_dict`` names every use of a tied weight; the file holds it under its first name."""
    first: dict[int, str] = {id(parameter): name for name, parameter in denoiser.named_parameters()}
    every: dict[str, Any] = dict(denoiser.named_parameters(remove_duplicate=False))
    return {name: weights[first[id(parameter)]] for name, parameter in every.items()}


def _depth(depth: DepthConfig) -> str:
    """How often the core ran in training, for the card."""
    drawn = f"{depth.distribution}, mean {depth.mean}, drawn per {depth.per}"
    if depth.curriculum is not None:
        rise = depth.curriculum
        drawn += f" ({rise.kind} from {rise.start} over {rise.updates:,} updates)"
    window = "all" if depth.grad_steps == "all" else f"the last {depth.grad_steps}"
    return f"{drawn}; {window} with gradient"


def stored_as(config: CheckpointConfig) -> dict[str, str]:
    """How a quantised checkpoint stores its matrices, for the card and `rdlm inspect`; else empty."""
    if (about := config.quantization) is None:
        return {}
    others = "" if about.weights == "int8" else "; token tables, injection and conditioning int8"
    return {
        "weights": f"{about.weights} in groups of {about.group_size}{others}; norms and biases as they were"
    }


def family_of(config: CheckpointConfig) -> str:
    """For the card and `rdlm inspect`."""
    origin = getattr(config.model, "origin", None)
    return f"{config.model.family}, imported from {origin}" if origin else config.model.family


def _card(config: CheckpointConfig, weights: Mapping[str, Tensor], notes: str) -> str:
    model, objective, depth = config.model, config.objective, config.objective.depth_in_training
    count = sum(weight.numel() for weight in weights.values())
    dtypes = ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()}))
    trained = {
        "objective": f"`{objective.name}`, read-out {objective.readout}",
        "core steps in training": _depth(depth),
        "noised in training": objective.noised_in_training,
        "updates": f"{config.step:,}",
    }
    origin = getattr(model, "origin", None)
    rows = {
        "family": f"{family_of(config)}, d_model {model.d_model}, {model.shape_description}",
        "parameters": f"{count:,} ({dtypes})",
        **stored_as(config),
        **(trained if origin is None or config.step else {}),
        "K": f"{config.k_description}. Default {config.default_steps}, at most {config.max_steps}",
        **({} if config.trained_steps is None else {"trained at K": f"up to {config.trained_steps}"}),
        "normalised likelihood": objective.estimator,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    commands = "\n".join(model.commands)
    return f"# {config.name}\n\n| | |\n|---|---|\n{table}\n\n{notes.strip()}\n\n## Run it\n\n```\n{commands}\n```\n"
