"""Which published families can be imported: a class each, registered here."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from rdlm.checkpoints.convert import gguf_file
from rdlm.checkpoints.convert.base import (
    Importer,
    Published,
    check_out,
    import_from,
    local,
    published_in,
)
from rdlm.checkpoints.convert.decoder import PlainDecoder
from rdlm.checkpoints.convert.hf_export import ExportedHere
from rdlm.checkpoints.convert.hrm import HrmText
from rdlm.checkpoints.convert.huginn import Huginn
from rdlm.checkpoints.convert.looped_lm import LoopedLM
from rdlm.checkpoints.convert.loopformer import LoopFormer
from rdlm.checkpoints.convert.loopus import LoopUS
from rdlm.checkpoints.convert.ouro import Nanbeige, Ouro
from rdlm.checkpoints.convert.parcae import Parcae
from rdlm.checkpoints.convert.retrofit import Retrofit
from rdlm.errors import UserError

IMPORTERS: dict[str, Importer] = {
    importer.family: importer
    for importer in (
        Huginn(),
        Retrofit(),
        Ouro(),
        Parcae(),
        LoopedLM(),
        Nanbeige(),
        LoopUS(),
        HrmText(),
        LoopFormer(),
        PlainDecoder(),
        ExportedHere(),
    )
}
"""Family -> what reads it; the first one that recognises a folder does."""


def import_checkpoint(
    source: str,
    out: Path,
    *,
    family: str | None = None,
    name: str | None = None,
    zero_state: bool = False,
    force: bool = False,
) -> Path:
    """Write the checkpoint folder ``out`` from a folder in the family's layout, a GGUF file (or
    a folder that holds one), or a hub id. Returns ``out``.

    family: None finds it from the files. name: model name; None takes the source's. zero_state: start the
    recurrence from zero where the published model draws its state. UserError where the source is no model
    that this code computes exactly, or ``out`` exists and ``force`` is not given.
    """
    if family is not None and family not in IMPORTERS:
        raise UserError("FAMILY", family, "is not known", f"use {', '.join(IMPORTERS)}, or leave it out")

    def importer_of(data: Mapping[str, Any], names: Collection[str], where: str) -> Importer:
        if family is not None:
            return IMPORTERS[family]
        for importer in IMPORTERS.values():
            if importer.recognises(data, names):
                return importer
        known = "; ".join(importer.title for importer in IMPORTERS.values())
        problem = f"model_type {data.get('model_type')!r} is not a family that can be imported"
        raise UserError("SOURCE", where, problem, f"import one of these: {known}")

    gguf = gguf_file.find(source)
    path = gguf or local(source)
    check_out(out, path, force)
    # A download lies in a folder that is named after a commit.
    called = gguf.stem if gguf else (path.resolve() if Path(source).is_dir() else Path(source)).name
    published = _published_in_gguf(gguf) if gguf else published_in(path)
    return import_from(importer_of, published, out, called, name, zero_state)


def _published_in_gguf(path: Path) -> Published:
    file = gguf_file.GgufFile(path)
    return Published(path, file.data, file.entries, lambda *_: file.tokenizer(), file.generation, file.notes)
