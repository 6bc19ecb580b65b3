"""Safetensors files copied piece by piece: memory does not grow with the model.

``safetensors.torch.save_file`` wants every tensor at once. A file is 8 bytes of header length
(little-endian), a JSON header ``{name: {dtype, shape, data_offsets}}`` and the tensors' bytes in that order,
so names can change while bytes only pass through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rdlm.errors import UserError, reason

PIECE = 1 << 24
"""Bytes held at a time."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes weights may have, by their safetensors names."""
STORED = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}
"""The dtypes that weights are stored in: those of quantised ones too."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Progress = Callable[[int], object]


@dataclass(frozen=True)
class Entry:
    """A tensor that has not been read. ``read()`` yields its bytes in pieces; ``size`` is their sum."""

    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], Iterator[bytes]]


def entry_of(tensor: Tensor) -> Entry:
    """A tensor in memory, or mapped into it; its bytes are copied when they are read."""
    name = {dtype: name for name, dtype in STORED.items()}.get(tensor.dtype, str(tensor.dtype))
    size = tensor.numel() * tensor.element_size()
    return Entry(name, tuple(tensor.shape), size, lambda: iter([to_bytes(tensor)]))


def to_bytes(tensor: Tensor) -> bytes:
    """Its values as a file holds them."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def to_tensor(entry: Entry) -> Tensor:
    """The tensor itself, in memory."""
    data = bytearray(b"".join(entry.read()))
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)


def stored(file: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file. UserError if the file is missing or damaged."""
    try:
        with safe_open(file, framework="pt"):  # checks header, offsets and length
            pass
    except FileNotFoundError:
        raise UserError("weights", str(file), "is missing", "copy or download it again") from None
    except OSError as error:
        problem = f"cannot be read ({reason(error)})"
        raise UserError("weights", str(file), problem, "copy or download it again") from None
    except SafetensorError as error:
        raise UserError("weights", str(file), f"is damaged ({error})", "copy or download it again") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, about in header.items():
        begin, end = about["data_offsets"]
        read = partial(_pieces, file, 8 + length + begin, end - begin)
        found[name] = Entry(about["dtype"], tuple(about["shape"]), end - begin, read)
    return found


def stored_in(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder in Hugging Face layout: one file, or shards and their index. UserError if they
    do not fit."""
    if (folder / INDEX).is_file():
        return stored_shards(folder / INDEX, stored)
    if not (folder / SINGLE).is_file():
        problem = f"has neither {SINGLE} nor {INDEX}"
        raise UserError("weights", str(folder), problem, "give a folder of safetensors weights")
    return stored(folder / SINGLE)


def stored_shards(index: Path, read: Callable[[Path], Mapping[str, Entry]]) -> dict[str, Entry]:
    """Every tensor of the files that an index names, each file as ``read`` gives it. UserError if they do not fit."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        if not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("a shard is named by its file")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            "weights", str(index), "is not an index of shards", "copy or download it again"
        ) from None
    found: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        found |= {
            name: entry
            for name, entry in read(index.parent / Path(shard).name).items()
            if weight_map.get(name) == shard
        }
    for name in sorted(weight_map.keys() - found.keys()):
        raise UserError(
            f"{index}: weight", name, f"is not in {weight_map[name]}", "copy or download the shards again"
        )
    return found


def same(a: Entry, b: Entry) -> bool:
    """Equal dtype, shape and bytes."""
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    return alike and all(x == y for x, y in zip(a.read(), b.read(), strict=True))


def write(file: Path, entries: Mapping[str, Entry], progress: Progress) -> None:
    """Write a safetensors file; ``progress`` is told the bytes of each piece. Wide dtypes first, as the
    library orders them."""
    names = sorted(entries, key=lambda name: (-STORED[entries[name].dtype].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        entry = entries[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (offset, offset + entry.size),
        }
        offset += entry.size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for piece in entries[name].read():
                stream.write(piece)
                progress(len(piece))


def write_sharded(folder: Path, entries: Mapping[str, Entry], shard_bytes: int, progress: Progress) -> None:
    """One file if everything fits into ``shard_bytes``, else numbered shards with an index. A tensor is never
    split."""
    shards: list[dict[str, Entry]] = [{}]
    filled = 0
    for name, entry in entries.items():
        if shards[-1] and filled + entry.size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.size
    if len(shards) == 1:
        write(folder / SINGLE, entries, progress)
        return
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write(folder / file, shard, progress)
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    total = sum(entry.size for entry in entries.values())
    (folder / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n",
        encoding="utf-8",
    )


def _pieces(file: Path, start: int, size: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while size:
            piece = stream.read(min(PIECE, size))
            if not piece:
                raise OSError(f"{file} has become shorter while it was read")
            size -= len(piece)
            yield piece
