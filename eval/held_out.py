"""Checkpoints that are measured, and held-out tokens in windows for them: what the metrics nll, ce-by-sigma
and convergence read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from eval.options import WindowOptions
from eval.provenance import origin
from rdlm.checkpoints.folder import Loaded, load
from rdlm.data.batch import Batch
from rdlm.data.packing import Packed
from rdlm.data.token_shards import TokenStore
from rdlm.data.tokenizer import Tokenizer
from rdlm.device import usable_device
from rdlm.errors import UserError


@dataclass(frozen=True)
class HeldOut:
    """A checkpoint, and the windows of a split in order, without overlap."""

    loaded: Loaded
    store: TokenStore
    options: WindowOptions
    length: int
    """Tokens of a window."""
    packed: Packed | None = None
    """Rows of whole documents, which do not see each other, in the place of windows."""

    @property
    def count(self) -> int:
        """Windows there are."""
        total = self.store.num_windows(self.length) if self.packed is None else len(self.packed)
        wanted = self.options.max_tokens
        return total if wanted is None else min(total, max(1, wanted // self.length))

    def batches(self) -> Iterator[Batch]:
        if self.packed is not None:
            return self.packed.windows(self.options.max_tokens, self.options.batch_size)
        return self.store.windows(self.length, self.options.max_tokens, self.options.batch_size)

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int], object]]:
        """A progress bar over windows; the callback takes how many are done since."""
        with tqdm(total=self.count, unit="window", desc=what) as bar:
            yield bar.update

    def origin(self, evaluation: str) -> dict[str, Any]:
        """The head of a report: what was measured, on what, and how."""
        manifest = self.store.manifest
        return {
            **origin(evaluation, self.options.checkpoint, self.loaded.config),
            "data": {
                "source": manifest.source,
                "split": self.store.split,
                "manifest_sha256": self.store.manifest_sha256,
                "tokenizer_fingerprint": manifest.tokenizer_fingerprint,
                "seq_len": self.length,
                "packing": "windows" if self.packed is None else "documents",
                "windows": "in order, without overlap: a token sees what precedes it in its window"
                if self.packed is None
                else "whole documents, several in a row: a token sees what precedes it in its document",
            },
            "seed": self.options.seed,
            "dtype": self.options.dtype,
        }


def open_checkpoint(folder: Path, device: str, dtype: str = "float32") -> Loaded:
    """What ``--checkpoint`` names, where ``--device`` and in the precision that ``--dtype`` says.
    UserError."""
    return load(folder, device=usable_device(device, "--device"), dtype=getattr(torch, dtype))


def open_windows(options: WindowOptions, packing: Literal["windows", "documents"] = "windows") -> HeldOut:
    """UserError where checkpoint, data, packing and window length do not fit each other."""
    store = TokenStore(options.data, options.split)
    loaded = open_checkpoint(options.checkpoint, options.device, options.dtype)
    check_tokenizer(options.checkpoint, loaded, store)
    limit = loaded.config.model.max_seq_len
    if options.seq_len is not None and options.seq_len > limit:
        raise UserError(
            "--seq-len", options.seq_len, f"the model was built for {limit} positions", f"use {limit} or less"
        )
    length = options.seq_len or min(limit, options.max_tokens or limit)
    if packing == "windows":
        return HeldOut(loaded, store, options, length)
    if not loaded.config.objective.separates_documents:
        problem = f"objective {loaded.config.objective.name!r} cannot keep the documents of a row apart"
        raise UserError("--packing", packing, problem, "use windows")
    return HeldOut(loaded, store, options, length, Packed(store, length))


def no_tokenizer(folder: Path) -> UserError:
    """What is wrong with a model of a generated task where text is needed."""
    problem = "it has no tokenizer, so its ids are not text"
    return UserError("--checkpoint", str(folder), problem, "give a model of text")


def check_tokenizer(folder: Path, loaded: Loaded, store: TokenStore) -> Tokenizer:
    """The checkpoint's tokenizer; UserError where it has none or the data was made with another one."""
    loaded.config.check_text("this measurement")
    if loaded.tokenizer is None:
        raise no_tokenizer(folder)
    if loaded.tokenizer.fingerprint != store.manifest.tokenizer_fingerprint:
        remedy = f"prepare it again with --tokenizer {folder / 'tokenizer'}"
        raise UserError(
            "--data", str(store.folder), "was not tokenised with the checkpoint's tokenizer", remedy
        )
    return loaded.tokenizer


def window_protocol(report: dict[str, Any]) -> dict[str, Any]:
    """What must agree between results on windows."""
    data = report["data"]
    packing = data.get("packing", "windows")  # results of earlier versions name none
    return {"data.seq_len": data["seq_len"], "data.packing": packing, "tokens": report["tokens"]}
