"""A smaller vocabulary: the tokens that some prepared data uses, with their rows of the model's tables.

A read-out over 49,152 tokens is most of what a small model costs to train, and a corpus uses a part of them.
For texts of that corpus nothing changes: the ids are renumbered, the logits of the kept tokens are those of
the source, and the probability of the tokens that are left out goes to the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rdlm.checkpoints.safetensors_io import Entry, to_bytes, to_tensor
from rdlm.data.token_shards import TokenStore, read_manifest
from rdlm.data.tokenizer import CONFIG_FILE, BytePairTokenizer, load_tokenizer
from rdlm.errors import UserError

FIELD = "--keep-tokens"
READ_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Cut:
    """kept: the source's ids, rising; the new id of a token is its place there. document: the new
    tokenizer.json."""

    kept: list[int]
    document: dict[str, Any]

    def entry(self, stored: Entry) -> Entry:
        """The kept rows of a table [V, ...]."""
        shape = (len(self.kept), *stored.shape[1:])
        size = stored.size // stored.shape[0] * len(self.kept)
        index = torch.tensor(self.kept)
        return replace(
            stored, shape=shape, size=size, read=lambda: iter([to_bytes(to_tensor(stored)[index])])
        )

    def weights(self, stored: Mapping[str, Entry], vocab_size: int) -> dict[str, Entry]:
        """All weights, with every table of the vocabulary cut."""
        return {
            name: self.entry(entry) if _is_table(name) and entry.shape[0] == vocab_size else entry
            for name, entry in stored.items()
        }

    def ids(self, old: Sequence[int]) -> list[int]:
        """New ids of kept tokens; others are left out."""
        places = {i: place for place, i in enumerate(self.kept)}
        return [places[i] for i in old if i in places]

    def write_tokenizer(self, source: Path, out: Path) -> None:
        """The tokenizer folder of ``source`` with the new vocabulary."""
        out.mkdir(parents=True)
        for file in source.iterdir():
            if file.name in (CONFIG_FILE, "special_tokens_map.json"):
                (out / file.name).write_bytes(file.read_bytes())
        text = json.dumps(self.document, ensure_ascii=False)
        (out / BytePairTokenizer.file_name).write_text(text, encoding="utf-8")

    def generation(self, text: str) -> str:
        """A generation_config.json with the new ids."""
        document = json.loads(text)
        for key in [key for key in document if key.endswith("_token_id")]:
            given = document[key]
            found = self.ids(given if isinstance(given, list) else [given])
            document[key] = found if isinstance(given, list) else next(iter(found), None)
        return json.dumps(document) + "\n"


def cut_for(tokenizer: Path, folders: Sequence[Path]) -> Cut:
    """Keep what the prepared data in ``folders`` uses (all splits), every byte, every special token, and what
    merges build these from.

    UserError where the tokenizer is no byte-level BPE, or data was made with another one.
    """
    if not (tokenizer / BytePairTokenizer.file_name).is_file():
        remedy = "leave it out, or give a checkpoint with a tokenizer.json"
        raise UserError(FIELD, str(tokenizer), "only a byte-level BPE tokenizer can be cut", remedy)
    loaded = load_tokenizer(tokenizer)
    used: set[int] = set()
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest.tokenizer_fingerprint != loaded.fingerprint:
            remedy = f"prepare it with `rdlm data prepare ... --tokenizer {tokenizer}`"
            raise UserError(FIELD, str(folder), "was not made with the checkpoint's tokenizer", remedy)
        for split in manifest.splits:
            store = TokenStore(folder, split)
            for start in range(0, len(store), READ_AT_ONCE):
                used |= set(np.unique(store.read(start, min(READ_AT_ONCE, len(store) - start))).tolist())
    document = json.loads((tokenizer / BytePairTokenizer.file_name).read_text(encoding="utf-8"))
    return _cut(document, used)


def _cut(document: dict[str, Any], used: set[int]) -> Cut:
    model = document["model"]
    vocabulary: dict[str, int] = model["vocab"]
    text_of = {i: text for text, i in vocabulary.items()}
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    made_of: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        made_of.setdefault(left + right, []).append((left, right))
    added = {token["id"] for token in document.get("added_tokens", [])}
    whole = {text for text in vocabulary if len(text) == 1}  # bytes: any text stays encodable
    pending = [text_of[i] for i in used if i in text_of] + list(whole)
    keep: set[str] = set()
    # A text is built by the same merges as before if all that can build its tokens are there: at every step
    # the first of all merges that apply is among them.
    while pending:
        text = pending.pop()
        if text not in keep:
            keep.add(text)
            pending += [part for pair in made_of.get(text, []) for part in pair]
    kept = sorted({vocabulary[text] for text in keep} | added)
    places = {i: place for place, i in enumerate(kept)}
    cut = json.loads(json.dumps(document))
    cut["model"]["vocab"] = {text_of[i]: places[i] for i in kept if i in text_of}
    cut["model"]["merges"] = [
        given
        for given, (left, right) in zip(model["merges"], merges, strict=True)
        if {left, right, left + right} <= keep
    ]
    cut["added_tokens"] = [{**token, "id": places[token["id"]]} for token in document.get("added_tokens", [])]
    _renumber(cut.get("post_processor"), places)
    return Cut(kept, cut)


def _renumber(found: Any, places: Mapping[int, int]) -> None:
    """Ids in a post-processor: ``{"id": "<s>", "ids": [1]}`` of a template, ``["</s>", 2]`` of BERT's."""
    if isinstance(found, dict):
        for key, value in found.items():
            if key == "ids" and isinstance(value, list):
                found[key] = [places[i] for i in value if i in places]
            elif key in ("sep", "cls") and isinstance(value, list):
                found[key] = [value[0], places.get(value[1], 0)]
            else:
                _renumber(value, places)
    elif isinstance(found, list):
        for value in found:
            _renumber(value, places)


def _is_table(name: str) -> bool:
    return name in ("model.wte.weight", "model.lm_head.weight") or name.startswith("model.value_embeds.")
