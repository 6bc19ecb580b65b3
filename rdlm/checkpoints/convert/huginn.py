"""Huginn in Hugging Face layout (tomg-group-umd/huginn-0125) to a checkpoint of ours and back.

Weights pass through byte by byte: only names differ. The tied read-out is stored once here; ``freqs_cis``,
the table of rotations that the reference keeps as a buffer, follows from the config and is dropped and
rebuilt.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert.base import (
    Fields,
    Importer,
    Shapes,
    Source,
    check_dtypes,
    check_out,
    tokenizer_of,
    widest_dtype,
    write_published,
)
from rdlm.checkpoints.convert.huginn_config import READ, from_published, to_published
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import HuginnConfig
from rdlm.errors import UserError
from rdlm.nn.attention import rotary_table
from rdlm.registry import build

TABLE, HEAD, ROTATIONS = "transformer.wte.weight", "lm_head.weight", "freqs_cis"


class Huginn(Importer):
    """Sandwich norms and biases on queries and keys; the other models of type ``huginn_raven`` are in
    retrofit.py."""

    family = "huginn"
    title = "Huginn, e.g. tomg-group-umd/huginn-0125"

    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        return data.get("model_type") == "huginn_raven" and any(".norm_3." in name for name in names)

    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        fields.ignore(*READ)
        return from_published(dict(fields.data), name, fields.where), []

    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        found = dict(source.entries)
        assert isinstance(config.model, HuginnConfig)
        if config.model.tie_embeddings and HEAD in found:
            head = found.pop(HEAD)
            if not tensors.same(head, found.setdefault(TABLE, head)):
                problem = f"differs from {TABLE}, to which config.json ties it"
                raise UserError(
                    f"{source.where}: weight",
                    HEAD,
                    problem,
                    "set tie_embeddings to false there if both are meant",
                )
        _check(source.where, found, config, "give the config.json and weights of one model")
        source.drop(*source.entries)
        return {_ours(key): entry for key, entry in found.items()}


def export_huginn(folder: Path, out: Path, *, shard_bytes: int, force: bool = False) -> Path:
    """Write ``out`` in Hugging Face layout from a checkpoint folder, weights in shards of at most
    ``shard_bytes``. Returns ``out``.

    UserError where the published architecture cannot compute what the model computes.
    """
    config = checkpoint.load_config(folder)
    config.check_exact("`rdlm export huginn`")
    check_out(out, folder, force)
    to_published(config, "")  # refuses what has no place there, before anything is read
    found = tensors.stored(folder / checkpoint.WEIGHTS)
    weights = {_theirs(key): entry for key, entry in found.items()}
    _check(str(folder / checkpoint.WEIGHTS), weights, config, "use the config and weights of one export")
    published = to_published(config, widest_dtype(weights))
    weights[ROTATIONS] = tensors.entry_of(_rotations(config))
    tokenizer = tokenizer_of(folder / checkpoint.TOKENIZER, config)
    write_published(out, folder, published, weights, tokenizer, shard_bytes)
    return out


def _check(where: str, found: Mapping[str, Entry], config: CheckpointConfig, remedy: str) -> None:
    expected = {_theirs(key): tuple(p.shape) for key, p in build(config, device="meta").named_parameters()}
    checkpoint.compare(where, {key: entry.shape for key, entry in found.items()}, expected, remedy)
    check_dtypes(where, found)


def _theirs(key: str) -> str:
    inner = key.removeprefix("model.")
    return inner if inner == HEAD else f"transformer.{inner}"


def _ours(key: str) -> str:
    return f"model.{key.removeprefix('transformer.')}"


def _rotations(config: CheckpointConfig) -> Tensor:
    """``freqs_cis`` [1, T, 1, head_dim / 2, 2] fp32, cosine and sine, as the published files hold it."""
    model = config.model
    assert isinstance(model, HuginnConfig)
    table = rotary_table(
        model.d_model // model.num_heads, model.rope_base, model.max_seq_len, torch.device("cpu")
    )
    return torch.view_as_real(table)[None, :, None]
