"""What every folder of prepared data has: a ``manifest.json`` that says its kind and version, and files
named by their hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rdlm.errors import UserError, reason

MANIFEST = "manifest.json"
SPLITS = ("train", "valid", "test")
AGAIN = "prepare the data again with --force"
Kind = Literal["tokens", "images"]
COMMANDS: dict[str, str] = {"tokens": "rdlm data prepare", "images": "rdlm data images"}


def read_document(folder: Path, command: str = " or ".join(COMMANDS.values())) -> dict[str, Any]:
    """The manifest as it stands; UserError if there is none (``command`` would write one) or it is not
    ours."""
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError("data", str(folder), f"there is no {MANIFEST}", f"prepare it with {command}")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("data", str(file), f"is not a manifest ({reason(error)})", AGAIN) from None
    return document


def kind_of(document: dict[str, Any]) -> str:
    """Manifests of text do not say their kind: they are older than images."""
    return str(document.get("kind", "tokens"))


def read_kind(folder: Path, kind: Kind, version: int) -> dict[str, Any]:
    """The manifest of a folder that holds ``kind`` in ``version``; UserError if it holds another kind or
    is newer than this code."""
    document = read_document(folder, COMMANDS[kind])
    if (found := kind_of(document)) != kind:
        remedy = f"give a folder of {COMMANDS[kind]}" + (
            f", or train with data.kind={found}" if found in COMMANDS else ""
        )
        raise UserError("data", str(folder), f"holds {found}, but {kind} are needed", remedy)
    if document.get("schema_version") != version:
        raise UserError(
            "schema_version",
            document.get("schema_version"),
            f"this version reads {version}",
            "use the version that wrote it, or prepare the data again",
        )
    return document


def file_sha256(file: Path, progress: Callable[[int], object] | None = None) -> str:
    """Hex digest; ``progress`` takes the number of bytes of each piece read."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
            if progress:
                progress(len(piece))
    return digest.hexdigest()


def check_hashes(
    folder: Path, hashes: dict[str, str], progress: Callable[[int], object] | None = None
) -> None:
    """UserError for the first file (path below ``folder`` -> sha256) whose bytes have changed."""
    for name, expected in hashes.items():
        if file_sha256(folder / name, progress) != expected:
            raise UserError("data", str(folder / name), "does not match its hash in the manifest", AGAIN)


def no_split(split: str, found: object) -> UserError:
    return UserError("split", split, f"the data has only {found}", "choose one of these")
