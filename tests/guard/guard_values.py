"""How the guard writes down what was computed, and how two records are compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Document = dict[str, Any]
SHOWN = 16
"""Most values of a tensor that are written out."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def numbers(found: Tensor | Sequence[float]) -> Document:
    """A tensor, or numbers, as they are recorded. Nine digits name an fp32 number exactly."""
    tensor = (
        (found if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64))
        .detach()
        .cpu()
        .contiguous()
    )
    flat = tensor.flatten()
    step = max(1, math.ceil(len(flat) / SHOWN))
    digits = 17 if tensor.dtype == torch.float64 else 9
    values = [float(f"{value:.{digits}g}") for value in flat[::step].tolist()]
    return {"sha": digest(tensor.numpy().tobytes()), "shape": list(tensor.shape), "values": values}


def weights_hash(weights: dict[str, Tensor]) -> Document:
    """Of names and values of all weights; what is written out is the sum of their sizes."""
    whole, names = hashlib.sha256(), sorted(weights)
    for name in names:
        whole.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    sums = [float(weights[name].detach().double().abs().sum()) for name in names]
    return {
        "sha": whole.hexdigest()[:16],
        "shape": [len(names), digest(" ".join(names).encode())],
        "values": [sum(sums)],
    }


def lists_as_numbers(tree: Any) -> Any:
    """Lists of floats in a tree of dictionaries and lists become recorded numbers."""
    if isinstance(tree, dict):
        return {key: lists_as_numbers(value) for key, value in tree.items()}
    if isinstance(tree, list) and tree and all(isinstance(value, float) for value in tree):
        return numbers(tree)
    return [lists_as_numbers(value) for value in tree] if isinstance(tree, list) else tree


def differences(old: Any, new: Any, tolerance: float, path: str = "") -> Iterator[tuple[str, str, bool]]:
    """(where, what, whether it is within the tolerance) of all that is not equal to the bit.

    The tolerance is relative to the largest of the values recorded together. Texts, tokens and whole numbers
    must be equal.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        if "values" in old and "sha" in old and "sha" in new:
            yield from _numbers_differ(old, new, tolerance, path)
            return
        for key in [*old, *(key for key in new if key not in old)]:
            inner = f"{path}/{key}" if path else key
            if key not in old or key not in new:
                yield inner, "is only in the new record" if key not in old else "is missing", False
            elif inner != "machine":
                yield from differences(old[key], new[key], tolerance, inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (mine, theirs) in enumerate(zip(old, new, strict=True)):
            yield from differences(mine, theirs, tolerance, f"{path}[{place}]")
    elif old != new:
        within = (
            isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=tolerance)
        )
        yield path, f"{_short(old)} -> {_short(new)}", within


def _numbers_differ(
    old: Document, new: Document, tolerance: float, path: str
) -> Iterator[tuple[str, str, bool]]:
    if {**old, "sha": ""} == {**new, "sha": ""} and old["sha"] == new["sha"]:
        return
    same_kind = {**old, "sha": "", "values": []} == {**new, "sha": "", "values": []} and len(
        old["values"]
    ) == len(new["values"])
    if not same_kind:
        yield path, f"shape {old['shape']} -> {new['shape']}", False
        return
    largest = max((abs(value) for value in old["values"]), default=0.0)
    gaps = [abs(a - b) for a, b in zip(old["values"], new["values"], strict=True)]
    gap = max(gaps, default=0.0)
    relative = gap / largest if largest else gap
    yield (
        path,
        f"differs by {relative:.2g} of the largest value shown ({_short(old['values'])})",
        relative <= tolerance,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 70 else text[:67] + "..."


def compare(old: Document, new: Document, tolerance: float) -> int:
    """Print what differs -> 1 where anything differs by a bit, else 0. Only sections that both records have
    are compared."""
    shared = [name for name in old if name in new and name != "machine"]
    found = list(
        differences({name: old[name] for name in shared}, {name: new[name] for name in shared}, tolerance)
    )
    for path, what, within in found:
        print(f"{'within tolerance' if within else 'DIFFERENT       '}  {path}: {what}")
    machines = (
        "the same machine"
        if old.get("machine") == new.get("machine")
        else f"{old.get('machine')} and {new.get('machine')}"
    )
    beyond = sum(not within for _, _, within in found)
    print(f"{len(shared)} sections ({', '.join(shared)}) of {machines}: ", end="")
    print(
        f"{len(found)} differ by bits, {beyond} of them beyond {tolerance:g}" if found else "equal to the bit"
    )
    return 1 if found else 0


def dump(found: Document) -> str:
    """JSON with a line for every case, so that a changed record is a readable diff."""
    lines = []
    for section, cases in found.items():
        inner = ",\n".join(
            f"  {json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}"
            for name, value in cases.items()
        )
        lines.append(f" {json.dumps(section)}: {{\n{inner}\n }}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
