"""What every importer is made of: the source's files, its config read field by field, and tensors that are
converted when written.

An importer is a class with a family name, a config and a renaming of tensors (``Importer``);
rdlm/checkpoints/convert/importers.py lists them. No tensor is read before the config was found to be one that
this code computes.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm

from rdlm import atomic
from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.safetensors_io import DTYPES, Entry
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer, load_tokenizer
from rdlm.errors import UserError, reason
from rdlm.registry import build

HUB_ID = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")
PICKLED = ("pytorch_model.bin", "model.pt", "combined_model.pt")
"""Files with all weights of a model; in parts they are named by an index."""
PICKLED_INDEX = "pytorch_model.bin.index.json"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "pytorch_model*.bin", *PICKLED[1:])
Shapes = Mapping[str, tuple[int, ...]]
WRAPPER = re.compile(r"^(module\.|_orig_mod\.)+")
"""What parallel and compiled modules put before their names."""
BUFFERS = re.compile(r"(^|\.)((original_)?inv_freq|freqs_cis|cos_cached|sin_cached)$")
"""Tables of rotations, which follow from the config."""


class Fields:
    """A published config that is read field by field; ``unread`` lists the fields that were not read."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self._read: set[str] = set()

    def get(self, field: str, default: Any = None) -> Any:
        self._read.add(field)
        value = self.data.get(field)
        return default if value is None else value

    def need(self, field: str) -> Any:
        """UserError where it is missing."""
        if self.get(field) is None:
            raise self.refused(
                field, "is missing", "give the config.json that was published with the weights"
            )
        return self.data[field]

    def number(self, field: str, default: float | None = None) -> Any:
        """An int or float; UserError where it is missing without a default, or something else."""
        value = self.need(field) if default is None else self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refused(field, "is not a number", "correct it there")
        return value

    def section(self, field: str) -> Fields:
        """The fields of an object; empty where it is missing."""
        value = self.get(field, {})
        if not isinstance(value, dict):
            raise self.refused(field, "is not an object", "correct it there")
        return Fields(value, f"{self.where}: {field}")

    def only(self, allowed: Mapping[str, Any]) -> None:
        """UserError for a field whose value is not the one that is built here; an absent field, or null, has
        that value."""
        for field, value in allowed.items():
            if self.get(field, value) != value:
                problem, remedy = f"only {value!r} is built here", "import a model of that variant"
                raise self.refused(field, problem, remedy)

    def defaults(self, values: Mapping[str, Any]) -> None:
        """What the published code takes for a field that is absent; one that is null stays null."""
        self.data = {**values, **self.data}
        self._read.update(values)

    def ignore(self, *fields: str) -> None:
        """Fields that change nothing that is computed at inference."""
        self._read.update(fields)

    def refused(self, field: str, problem: str, remedy: str = "import another model") -> UserError:
        return UserError(f"{self.where}: {field}", self.data.get(field), problem, remedy)

    def unread(self) -> dict[str, Any]:
        return {key: value for key, value in self.data.items() if key not in self._read}


class Source:
    """The tensors of a folder. Each is taken once; ``finish`` refuses those that were not taken."""

    def __init__(self, where: str, entries: Mapping[str, Entry]) -> None:
        self.where, self.entries = where, dict(entries)
        self._left = set(entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def take(self, name: str) -> Entry:
        if name not in self.entries:
            remedy = "give the config.json and weights of one model"
            raise UserError(f"{self.where}: weight", name, "is missing", remedy)
        self._left.discard(name)
        return self.entries[name]

    def drop(self, *names: str) -> None:
        """Tensors that follow from others."""
        self._left.difference_update(names)

    def finish(self) -> None:
        for name in sorted(self._left):
            remedy = "give the config.json and weights of one model"
            raise UserError(f"{self.where}: weight", name, "the model has no such weight", remedy)


class Importer(ABC):
    """One published family."""

    family: ClassVar[str]
    title: ClassVar[str]
    """How the family is called in messages, with an example of a model."""

    @abstractmethod
    def recognises(self, data: Mapping[str, Any], names: Collection[str]) -> bool:
        """Whether a folder is of this family, by its config and the names of its tensors."""

    def tensor_name(self, name: str) -> str:
        """The name of a tensor as the other methods know it, where files differ in prefixes."""
        return WRAPPER.sub("", name)

    @abstractmethod
    def config(self, fields: Fields, name: str, shapes: Shapes) -> tuple[CheckpointConfig, list[str]]:
        """Our config, and lines for the card about what is lost. UserError where this code computes something
        else."""

    @abstractmethod
    def weights(self, source: Source, config: CheckpointConfig) -> dict[str, Entry]:
        """Our tensors by name."""

    def tokenizer_folder(self, folder: Path) -> Path:
        return folder


@dataclass(frozen=True)
class Published:
    """What is to be imported, before an importer is chosen. path: a folder or file, for messages."""

    path: Path
    data: Mapping[str, Any]
    """Its config.json."""
    entries: Mapping[str, Entry]
    tokenizer: Callable[[Importer, CheckpointConfig], Tokenizer | None]
    generation: Mapping[str, Any]
    """Its generation_config.json; {} where there is none."""
    notes: Sequence[str] = ()
    """Sentences for the model card."""

    @property
    def config_file(self) -> str:
        return str(self.path / "config.json" if self.path.is_dir() else self.path)


def published_in(folder: Path) -> Published:
    """A folder in Hugging Face layout. UserError where it has no config, or its files are damaged."""
    data = read_json(folder / "config.json", required=True)
    if "schema_version" in data and "model_type" not in data:
        problem, remedy = "is a checkpoint of rdlm already", f"use it as it is: `rdlm inspect {folder}`"
        raise UserError("SOURCE", str(folder), problem, remedy)

    def tokenizer(importer: Importer, config: CheckpointConfig) -> Tokenizer | None:
        return tokenizer_of(importer.tokenizer_folder(folder), config)

    generation = read_json(folder / checkpoint.GENERATION, required=False)
    return Published(folder, data, stored(folder), tokenizer, generation)


def import_from(
    importer_of: Callable[[Mapping[str, Any], Collection[str], str], Importer],
    published: Published,
    out: Path,
    called: str,
    name: str | None,
    zero_state: bool,
) -> Path:
    """Write the checkpoint folder ``out``; called: what the source is called. See
    rdlm.checkpoints.convert.importers.import_checkpoint."""
    where, entries = str(published.path), published.entries
    importer = importer_of(published.data, entries, where)
    entries = {importer.tensor_name(key): entry for key, entry in entries.items() if not BUFFERS.search(key)}
    shapes = {key: entry.shape for key, entry in entries.items()}
    fields = Fields(published.data, published.config_file)
    try:
        config, lost = importer.config(fields, name or re.sub(r"[^A-Za-z0-9._-]", "-", called), shapes)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        problem = f"a field has a value of another kind than those of this family ({reason(error)})"
        remedy = "give the config.json that was published with the weights"
        raise UserError("SOURCE", published.config_file, problem, remedy) from error
    if name is not None:
        config = checkpoint.parse_config({**config.model_dump(), "name": name}, "--name")
    if zero_state:
        config = with_zero_state(config)
    taken = Source(where, entries)
    weights = importer.weights(taken, config)
    taken.finish()
    check(where, weights, config, "give the config.json and weights of one model")
    tokenizer = published.tokenizer(importer, config)

    def fill(temporary: Path) -> None:
        with progress_bar(weights, "import") as bar:
            tensors.write(temporary / checkpoint.WEIGHTS, weights, bar.update)
        if published.generation:
            text = json.dumps(published.generation, indent=2) + "\n"
            (temporary / checkpoint.GENERATION).write_text(text, encoding="utf-8")

    described = {
        key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for key, entry in weights.items()
    }
    notes = _notes(called, importer, fields.unread(), [*lost, *published.notes])
    return checkpoint.write(out, config, tokenizer, described, fill, notes)


def with_zero_state(config: CheckpointConfig) -> CheckpointConfig:
    """The same model whose recurrence starts from zero. UserError where the state is not drawn."""
    model = config.model
    if hasattr(model, "state_init"):
        return config.model_copy(update={"model": model.model_copy(update={"state_init": "zero"})})
    loop = getattr(model, "loop", None)
    if loop is None or loop.state == "embedding" or loop.injection == "replace":
        problem = "this model has no random initial state: it starts from the tokens"
        raise UserError("--zero-state", config.name, problem, "leave it out")
    zero = loop.model_copy(
        update={"state": "zero", "state_std": None, "state_scale": 1.0, "state_hash": False}
    )
    return config.model_copy(update={"model": model.model_copy(update={"loop": zero})})


def stored(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder: safetensors, else pickled state dicts that hold nothing but tensors."""
    single = next((folder / name for name in PICKLED if (folder / name).is_file()), None)
    if (folder / tensors.SINGLE).is_file() or (folder / tensors.INDEX).is_file():
        return tensors.stored_in(folder)
    if single is not None:
        return pickled(single)
    index = folder / PICKLED_INDEX
    return tensors.stored_shards(index, pickled) if index.is_file() else tensors.stored_in(folder)


def pickled(file: Path) -> dict[str, Entry]:
    """Every tensor of a pickled state dict, mapped into memory. UserError where it is none."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for key in ("model", "state_dict", "model_state_dict"):  # as trainers wrap them
            state = state[key] if isinstance(state.get(key), dict) else state
        return {name: tensors.entry_of(value) for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as error:  # pickle, zip and operating system each raise their own, a list has no names
        problem = f"is not a file of tensors alone ({reason(error)})"
        raise UserError("weights", str(file), problem, "convert it to safetensors") from None


def converted(
    entry: Entry, shape: Sequence[int], make: Callable[[Tensor], Tensor], dtype: str | None = None
) -> Entry:
    """An entry that is computed from another when it is written: one tensor is in memory at a time."""
    kept = dtype or entry.dtype
    size = DTYPES[kept].itemsize if kept in DTYPES else 1
    for n in shape:
        size *= n
    return Entry(kept, tuple(shape), size, lambda: iter([tensors.to_bytes(make(tensors.to_tensor(entry)))]))


def stacked(where: str, entries: Sequence[tuple[str, Entry]]) -> Entry:
    """Rows of several matrices (or vectors) one below the other."""
    first = entries[0][1]
    for name, entry in entries[1:]:
        if entry.shape[1:] != first.shape[1:] or entry.dtype != first.dtype:
            problem = (
                f"{entry.dtype} {entry.shape} does not go with {first.dtype} {first.shape} of {entries[0][0]}"
            )
            raise UserError(f"{where}: weight", name, problem, "give weights of one model")
    shape = (sum(entry.shape[0] for _, entry in entries), *first.shape[1:])
    parts = [entry for _, entry in entries]
    return Entry(
        first.dtype, shape, sum(e.size for e in parts), lambda: (piece for e in parts for piece in e.read())
    )


def rows(entry: Entry, start: int, stop: int) -> Entry:
    """Some rows of a matrix."""
    return converted(entry, (stop - start, *entry.shape[1:]), lambda whole: whole[start:stop])


def adjacent_pairs(
    entry: Entry, head_dim: int, num_dims: int | None = None, num_heads: int | None = None
) -> Entry:
    """Rows of queries or keys, reordered within each head from split-half rotation (i with i + n/2) to
    adjacent pairs.

    num_dims: leading dimensions of a head that are rotated; num_heads: leading heads that are; None for all.
    """
    order = torch.arange(head_dim)
    rotated = head_dim if num_dims is None else num_dims
    order[:rotated] = torch.arange(rotated).view(2, -1).T.flatten()
    return _reordered(entry, order, num_heads)


def split_halves(entry: Entry, head_dim: int, num_heads: int | None = None) -> Entry:
    """The inverse of ``adjacent_pairs`` where all dimensions of a head are rotated."""
    return _reordered(entry, torch.arange(head_dim).view(-1, 2).T.flatten(), num_heads)


def _reordered(entry: Entry, order: Tensor, num_heads: int | None) -> Entry:
    head_dim = len(order)

    def reorder(whole: Tensor) -> Tensor:
        heads = whole.unflatten(0, (-1, head_dim))
        count = len(heads) if num_heads is None else num_heads
        return torch.cat([heads[:count, order], heads[count:]]).flatten(0, 1)

    if entry.shape[0] % head_dim:
        return entry  # a wrong shape, which the comparison with the model names
    return converted(entry, entry.shape, reorder)


def recurrent(
    name: str,
    model: Mapping[str, Any],
    default_steps: int,
    where: str,
    exit_thresholds: Mapping[str, Any] | None = None,
) -> CheckpointConfig:
    """``imported`` of the general family. exit_thresholds: those of the source, None where it has none."""
    own = {name: value for name, value in (exit_thresholds or {}).items() if value is not None}
    return imported(name, {"family": "recurrent", **model}, default_steps, where, own)


def imported(
    name: str,
    model: Mapping[str, Any],
    default_steps: int,
    where: str,
    exit_thresholds: Mapping[str, Any] | None = None,
) -> CheckpointConfig:
    """Config of an imported next-token model whose K is the number of core steps; at least 64 of them may be
    asked for. default_steps: the published depth, which training covered."""
    if isinstance(default_steps, bool) or not isinstance(default_steps, int) or default_steps < 1:
        problem, remedy = "is not a positive whole number", "correct it there"
        raise UserError(f"{where}: default number of loops", default_steps, problem, remedy)
    document = {
        "name": name,
        "model": model,
        "objective": {"name": "next_token"},
        "recurrence": {
            "default_steps": default_steps,
            "max_steps": max(64, 4 * default_steps),
            "trained_steps": default_steps,
            "exit_thresholds": dict(exit_thresholds or {}),
        },
    }
    return checkpoint.parse_config(document, where)


def check(where: str, found: Mapping[str, Entry], config: CheckpointConfig, remedy: str) -> None:
    """UserError where the tensors are not those of the model, or of a dtype that is not read."""
    expected = {key: tuple(p.shape) for key, p in build(config, device="meta").named_parameters()}
    checkpoint.compare(where, {key: entry.shape for key, entry in found.items()}, expected, remedy)
    check_dtypes(where, found)


def own_config(
    fields: Fields, published: Callable[[CheckpointConfig], Mapping[str, Any]]
) -> CheckpointConfig:
    """The config in the field ``rdlm`` of one of our exports; UserError where the published
    fields beside it say otherwise."""
    config = checkpoint.parse_config(fields.need("rdlm"), f"{fields.where}: rdlm")
    for field, value in json.loads(json.dumps(published(config))).items():
        if fields.get(field) != value:
            problem = f"the rdlm field of the same file says {value!r}"
            raise fields.refused(field, problem, "undo the change, or remove the rdlm field")
    fields.ignore(*fields.data)
    return config


def write_published(
    out: Path,
    source: Path,
    published: Mapping[str, Any],
    weights: Mapping[str, Entry],
    tokenizer: Tokenizer | None,
    shard_bytes: int,
    files: Mapping[str, str] | None = None,
) -> None:
    """A folder in Hugging Face layout: config, weights in shards, tokenizer, generation_config.json, and
    ``files`` (name -> text)."""
    with checkpoint.replacing(out) as temporary:
        with progress_bar(weights, "export") as bar:
            tensors.write_sharded(temporary, weights, shard_bytes, bar.update)
        (temporary / "config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(temporary)
        if (source / checkpoint.GENERATION).is_file():
            shutil.copyfile(source / checkpoint.GENERATION, temporary / checkpoint.GENERATION)
        elif tokenizer is not None:
            ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            (temporary / checkpoint.GENERATION).write_text(
                json.dumps(ends, indent=2) + "\n", encoding="utf-8"
            )
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")


def widest_dtype(weights: Mapping[str, Entry]) -> str:
    """Name of the dtype in a config.json: bfloat16, float16 or float32."""
    widest = max((DTYPES[entry.dtype] for entry in weights.values()), key=lambda dtype: dtype.itemsize)
    return str(widest).removeprefix("torch.")


def check_dtypes(where: str, found: Mapping[str, Entry]) -> None:
    for key, entry in found.items():
        if entry.dtype not in DTYPES:
            problem, remedy = f"only {', '.join(DTYPES)} are read", "convert the weights"
            raise UserError(f"{where}: dtype of {key}", entry.dtype, problem, remedy)


def local(source: str) -> Path:
    """The folder itself, or where the hub's files were downloaded to; an interrupted download goes on."""
    if Path(source).is_dir():
        return Path(source)
    if not HUB_ID.fullmatch(source) or Path(source).exists():
        raise UserError(
            "SOURCE",
            source,
            "is not a folder",
            "give a folder in Hugging Face layout, a GGUF file, or a hub id OWNER/NAME",
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
            f"is not a folder here and cannot be downloaded ({reason(error)})",
            "check name and network, or run `hf download` for it where there is one and give that folder",
        ) from error


def check_out(out: Path, source: Path, force: bool) -> None:
    """UserError unless ``out`` may become a folder with a model, and is not where the source lies."""
    check_source(out, source)
    atomic.check_out(out, "OUT", checkpoint.FILES, force)


def check_source(out: Path, source: Path) -> None:
    """UserError where ``out`` is the source, or a folder that holds it."""
    target, origin = out.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise UserError("OUT", str(out), "it would replace the source", "name another folder")


def read_json(file: Path, required: bool) -> dict[str, Any]:
    if not required and not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = f"has no {file.name}" if gone else f"its {file.name} cannot be read ({error.strerror})"
        raise UserError("SOURCE", str(file.parent), problem, "give a folder in Hugging Face layout") from None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise UserError("SOURCE", str(file), "is not a JSON object", "copy or download it again")
    return data


def tokenizer_of(folder: Path, config: CheckpointConfig) -> Tokenizer | None:
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


def progress_bar(weights: Mapping[str, Entry], what: str) -> Any:
    return tqdm(
        total=sum(entry.size for entry in weights.values()), unit="B", unit_scale=True, desc=what, leave=False
    )


def _notes(called: str, importer: Importer, unused: Mapping[str, Any], lost: Sequence[str]) -> str:
    lines = [
        "## Origin",
        "",
        f"Imported with `rdlm import` from `{called}` ({importer.title}). The weights are the source's.",
        *(f"- {line}" for line in lost),
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
