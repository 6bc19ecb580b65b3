"""Huginn in Hugging Face layout (tomg-group-umd/huginn-0125) to a checkpoint of ours and back.

Weights pass through byte by byte: only names differ. The tied read-out is stored once here; ``freqs_cis``, the table of rotations
that the reference keeps as a buffer, follows from the config and is dropped and rebuilt.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert.huginn_config import READ, from_published, to_published
from rdlm.checkpoints.safetensors_io import DTYPES, Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import HuginnConfig
from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from rdlm.errors import UserError, reason
from rdlm.nn.attention import rotary_table
from rdlm.registry import build

TABLE, HEAD, ROTATIONS = "transformer.wte.weight", "lm_head.weight", "freqs_cis"
HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def import_huginn(
    source: str, out: Path, *, name: str | None = None, zero_state: bool = False, force: bool = False
) -> Path:
    """Write the checkpoint folder ``out`` from a Hugging Face folder or hub id. Returns ``out``.

    name: model name; None takes the source's. zero_state: start the recurrence from zero instead of the published random state.
    UserError where the source is no Huginn that this code computes exactly, or ``out`` exists and ``force`` is not given.
    """
    folder = _local(source)
    _check_out(out, folder, force)
    data = _read_json(folder / "config.json", required=True)
    called = name or re.sub(
        r"[^A-Za-z0-9._-]", "-", Path(source).resolve().name if Path(source).is_dir() else Path(source).name
    )
    config = from_published(data, called, str(folder / "config.json"))
    if name is not None:
        config = checkpoint.parse_config({**config.model_dump(), "name": name}, "--name")
    if zero_state:
        config = config.model_copy(update={"model": config.model.model_copy(update={"state_init": "zero"})})
    weights = _take(folder, config)
    tokenizer = _tokenizer(folder, config)
    _read_json(folder / checkpoint.GENERATION, required=False)

    def fill(temporary: Path) -> None:
        with _bar(weights, "import") as bar:
            tensors.write(temporary / checkpoint.WEIGHTS, weights, bar.update)
        if (folder / checkpoint.GENERATION).is_file():
            shutil.copyfile(folder / checkpoint.GENERATION, temporary / checkpoint.GENERATION)

    described = {
        key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for key, entry in weights.items()
    }
    return checkpoint.write(out, config, tokenizer, described, fill, _notes(source, data))


def export_huginn(folder: Path, out: Path, *, shard_bytes: int, force: bool = False) -> Path:
    """Write ``out`` in Hugging Face layout from a checkpoint folder, weights in shards of at most ``shard_bytes``. Returns ``out``.

    UserError where the published architecture cannot compute what the model computes.
    """
    config = checkpoint.load_config(folder)
    _check_out(out, folder, force)
    to_published(config, "")  # refuses what has no place there, before anything is read
    found = tensors.stored(folder / checkpoint.WEIGHTS)
    weights = {_theirs(key): entry for key, entry in found.items()}
    _check(str(folder / checkpoint.WEIGHTS), weights, config, "use the config and weights of one export")
    widest = max((DTYPES[entry.dtype] for entry in weights.values()), key=lambda dtype: dtype.itemsize)
    weights[ROTATIONS] = tensors.entry_of(_rotations(config))
    tokenizer = _tokenizer(folder / checkpoint.TOKENIZER, config)
    with checkpoint.replacing(out) as temporary:
        with _bar(weights, "export") as bar:
            tensors.write_sharded(temporary, weights, shard_bytes, bar.update)
        published = to_published(config, str(widest).removeprefix("torch."))
        (temporary / "config.json").write_text(json.dumps(published, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
        if (folder / checkpoint.GENERATION).is_file():
            shutil.copyfile(folder / checkpoint.GENERATION, temporary / checkpoint.GENERATION)
        elif tokenizer is not None:
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            (temporary / checkpoint.GENERATION).write_text(json.dumps(ends, indent=2) + "\n")
    return out


def _local(source: str) -> Path:
    """The folder itself, or where the hub's files were downloaded to; an interrupted download goes on."""
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source) or Path(source).exists():
        raise UserError(
            "SOURCE", source, "is no folder", "give a folder in Hugging Face layout, or a hub id OWNER/NAME"
        )
    from huggingface_hub import snapshot_download  # slow to import, and only an id of the hub needs it

    try:
        return Path(snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except (
        Exception
    ) as error:  # the library raises its own, the HTTP client's and the operating system's exceptions
        raise UserError(
            "SOURCE",
            source,
            f"is no folder here and cannot be downloaded ({reason(error)})",
            "check name and network, or run `hf download` for it where there is one and give that folder",
        ) from error


def _check_out(out: Path, source: Path, force: bool) -> None:
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise UserError("OUT", str(out), "it would replace the source", "name another folder")
    if out.exists() and not force:
        raise UserError("OUT", str(out), "exists already", "name another folder, or replace it with --force")


def _read_json(file: Path, required: bool) -> dict[str, Any]:
    if not required and not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text())
    except OSError:
        raise UserError(
            "SOURCE", str(file.parent), f"has no {file.name}", "give a folder in Hugging Face layout"
        ) from None
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise UserError("SOURCE", str(file), "is not a JSON object", "copy or download it again")
    return data


def _take(folder: Path, config: CheckpointConfig) -> dict[str, Entry]:
    """The model's weights under our names; everything else in the folder is refused or known to be redundant."""
    found = tensors.stored_in(folder)
    found.pop(ROTATIONS, None)
    assert isinstance(config.model, HuginnConfig)
    if config.model.tie_embeddings and HEAD in found:
        head = found.pop(HEAD)
        if not tensors.same(head, found.setdefault(TABLE, head)):
            problem = f"differs from {TABLE}, to which config.json ties it"
            raise UserError(
                f"{folder}: weight", HEAD, problem, "set tie_embeddings to false there if both are meant"
            )
    _check(str(folder), found, config, "give the config.json and weights of one model")
    return {_ours(key): entry for key, entry in found.items()}


def _check(where: str, found: Mapping[str, Entry], config: CheckpointConfig, remedy: str) -> None:
    expected = {_theirs(key): tuple(p.shape) for key, p in build(config, device="meta").named_parameters()}
    checkpoint.compare(where, {key: entry.shape for key, entry in found.items()}, expected, remedy)
    for key, entry in found.items():
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{where}: dtype of {key}",
                entry.dtype,
                f"only {', '.join(DTYPES)} are read",
                "convert the weights",
            )


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


def _tokenizer(folder: Path, config: CheckpointConfig) -> Tokenizer | None:
    """None where there is none: such a model can be scored on ids but not served."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.model.vocab_size:
        problem = f"has {tokenizer.vocab_size} tokens, the model {config.model.vocab_size}"
        raise UserError(
            "tokenizer", str(folder), problem, "put the tokenizer the model was trained with there"
        )
    return tokenizer


def _bar(weights: Mapping[str, Entry], what: str) -> Any:
    return tqdm(
        total=sum(entry.size for entry in weights.values()), unit="B", unit_scale=True, desc=what, leave=False
    )


def _notes(source: str, data: dict[str, Any]) -> str:
    unused = {key: value for key, value in data.items() if key not in READ}
    lines = [
        "## Origin",
        "",
        f"Imported with `rdlm import huginn` from `{Path(source).name}`; the weights are the source's, bit by bit.",
    ]
    if unused:
        lines += [
            "Fields of its config.json that rdlm does not use:",
            "",
            "```json",
            json.dumps(unused, indent=1),
            "```",
        ]
    return "\n".join(lines)
