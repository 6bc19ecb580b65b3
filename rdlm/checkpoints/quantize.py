"""A checkpoint whose matrices are stored as int8 or int4: ``rdlm quantize``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert.base import check, check_out, progress_bar
from rdlm.checkpoints.folder import Matrix
from rdlm.checkpoints.safetensors_io import DTYPES, Entry
from rdlm.config.checkpoint import CheckpointConfig, QuantizationConfig
from rdlm.errors import UserError
from rdlm.nn.quantization import quantized, scales_of
from rdlm.registry import build


def quantize(source: Path, out: Path, settings: QuantizationConfig, force: bool = False) -> tuple[int, int]:
    """Write the checkpoint folder ``out`` from ``source`` -> bytes of the weights of both.

    One tensor is in memory at a time. UserError where the source is quantised already, or a weight is no number.
    """
    config = checkpoint.load_config(source)
    config.check_exact("`rdlm quantize`")
    check_out(out, source, force)
    stored = tensors.stored(source / checkpoint.WEIGHTS)
    check(str(source), stored, config, f"use the {checkpoint.CONFIG} and {checkpoint.WEIGHTS} of one export")
    made = config.model_copy(update={"quantization": settings})
    matrices = checkpoint.quantized_matrices(build(config, device="meta"), made)
    weights = {name: entry for name, entry in stored.items() if name not in matrices}
    for name, matrix in matrices.items():
        weights |= _entries(name, stored[name], matrix)

    def fill(temporary: Path) -> None:
        with progress_bar(weights, "quantize") as bar:
            tensors.write(temporary / checkpoint.WEIGHTS, weights, bar.update)
        if (source / checkpoint.TOKENIZER).is_dir():
            shutil.copytree(source / checkpoint.TOKENIZER, temporary / checkpoint.TOKENIZER)
        if (source / checkpoint.GENERATION).is_file():
            shutil.copyfile(source / checkpoint.GENERATION, temporary / checkpoint.GENERATION)

    described = {
        name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for name, entry in stored.items()
    }
    before, after = (sum(entry.size for entry in of.values()) for of in (stored, weights))
    checkpoint.write(out, made, None, described, fill, _notes(source, config, before, after))
    return before, after


def _entries(name: str, entry: Entry, matrix: Matrix) -> dict[str, Entry]:
    """Values and scales of a matrix, computed from it when they are written."""
    scales: list[Tensor] = []  # written first, being wider; finding them takes the longest

    def read(values: bool) -> Iterator[bytes]:
        weight = tensors.to_tensor(entry)
        if not scales:
            if not bool(weight.isfinite().all()):
                problem = "holds values that are infinite or not a number"
                raise UserError("weight", name, problem, "give a checkpoint of finite weights")
            scales.append(scales_of(weight, matrix.weights, matrix.group_size))
        made = quantized(weight, matrix.weights, matrix.group_size, scales[0]).values if values else scales[0]
        yield tensors.to_bytes(made)

    shapes, kind = matrix.stored(name), {"int8": "I8", "int4": "U8"}[matrix.weights]
    return {
        key: Entry(
            dtype, shapes[key], prod(shapes[key]) * tensors.STORED[dtype].itemsize, partial(read, values)
        )
        for key, dtype, values in ((name, kind, True), (name + checkpoint.SCALES, "BF16", False))
    }


def _notes(source: Path, config: CheckpointConfig, before: int, after: int) -> str:
    return (
        f"## Quantisation\n\nMade with `rdlm quantize` from a checkpoint of {config.name}, without data or training: "
        f"its weights took {before:,} bytes and take {after:,}.\n\n{checkpoint.notes_of(source)}"
    )
