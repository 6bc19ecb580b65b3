"""Continuations of held-out text by a checkpoint, through the engine that serves it, kept in files that
resume; and what the author wrote in their place.

A file is JSONL: a header with everything that decides the texts, then a line per prompt. Its name is a
hash of the header. Prompts are taken in one fixed order, so a run that asks for more of them goes on where
a smaller one ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.cache import Bar
from eval.held_out import check_tokenizer, no_tokenizer
from eval.options import TextOptions, check_steps, numbers, samplers, steps_given
from eval.provenance import checkpoint_facts, origin
from eval.texts.sweep import Setting, grid
from rdlm import __version__
from rdlm.checkpoints import folder as checkpoint
from rdlm.config.base import parse
from rdlm.data.token_shards import TokenStore
from rdlm.data.tokenizer import Tokenizer
from rdlm.device import usable_device, usable_dtype
from rdlm.errors import UserError
from rdlm.sampling_params import SamplingParams, check_masked, check_sampler, text_samplers
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served
from serve.settings import EngineSettings

Texts = list[list[str]]
"""texts[prompt][choice]"""
CHOICE_SEED = 0
"""Decides which passages of a split are taken. One for all runs, so that every report continues the same
prompts."""


@dataclass(frozen=True)
class Passage:
    """A window of held-out text: prompt ids, and the ids its author continued with."""

    window: int
    """Number of the window among windows of this length; part of the key of the random draws."""
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What is generated for each prompt: tokens of the prompt, tokens of a continuation, and how many of
    them.

    across_documents: prompts may contain an end of text and answers may produce one. Otherwise no passage
    does, and answers have it banned, so that both sides go on for exactly max_tokens.
    """

    prompt_tokens: int
    max_tokens: int
    continuations: int = 1
    across_documents: bool = False


def passages(store: TokenStore, shape: Shape) -> Iterator[Passage]:
    """Windows of prompt + continuation tokens that do not overlap, in a fixed random order; all that
    qualify."""
    length, end = shape.prompt_tokens + shape.max_tokens, store.manifest.eos_id
    for window in np.random.default_rng(CHOICE_SEED).permutation(store.num_windows(length)).tolist():
        ids = store.read(window * length, length).tolist()
        if shape.across_documents or end not in ids:
            yield Passage(window, tuple(ids[: shape.prompt_tokens]), tuple(ids[shape.prompt_tokens :]))


def take(found: Iterator[Passage], count: int, shape: Shape, least: int | None = None) -> list[Passage]:
    """The next ``count`` passages; UserError if there are fewer than ``least`` (by default ``count``) of
    them."""
    taken = [passage for _, passage in zip(range(count), found, strict=False)]
    if len(taken) < (count if least is None else least):
        whole = (
            ""
            if shape.across_documents
            else ", prepare more text, or let prompts span documents with --across-documents"
        )
        problem = (
            f"the split has only {len(taken)} passages of {shape.prompt_tokens} + {shape.max_tokens} tokens "
            "to give"
        )
        raise UserError("--num-prompts", count, problem, f"ask for fewer or shorter ones{whole}")
    return taken


def to_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids; an end of text becomes a blank line. Half a character at either end becomes U+FFFD."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == tokenizer.eos_id:
            parts.append([])
        else:
            parts[-1].append(token)
    return "\n\n".join(tokenizer.decode(part) for part in parts)


class Sampler:
    """Continuations of the same passages at any setting. The engine starts at the first text that no file
    holds; leaving the ``with`` block stops it."""

    def __init__(
        self,
        folder: Path,
        store: TokenStore,
        found: Sequence[Passage],
        shape: Shape,
        engine: EngineSettings,
        cache: Path,
        seed: int = 0,
    ) -> None:
        """folder: the checkpoint. cache: where the files lie. Raises UserError where checkpoint, data and
        lengths do not fit."""
        device = usable_device(engine.device)
        self._loaded = checkpoint.load(folder, device=device, dtype=usable_dtype(engine.dtype, device))
        limit = self._loaded.config.model.max_seq_len
        if shape.prompt_tokens + shape.max_tokens > limit:
            problem = f"with prompts of {shape.prompt_tokens} tokens it exceeds the model's {limit} positions"
            raise UserError("--max-tokens", shape.max_tokens, problem, "shorten prompts or continuations")
        self.tokenizer = check_tokenizer(folder, self._loaded, store)
        self.passages, self.shape, self.seed, self._cache = list(found), shape, seed, cache
        self._engine_settings = engine.model_copy(update={"max_len": shape.prompt_tokens + shape.max_tokens})
        self._folder = folder
        self._facts = {"checkpoint": checkpoint_facts(folder, self._loaded.config), **self._described(store)}
        self._engine: Engine | None = None
        self._exit = ExitStack()

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def _described(self, store: TokenStore) -> dict[str, Any]:
        """What all settings share besides the checkpoint; together with a setting it decides every token."""
        engine = self._engine_settings
        return {
            "data": {
                "source": store.manifest.source,
                "split": store.split,
                "manifest_sha256": store.manifest_sha256,
            },
            "samples": {
                "prompts": {
                    "count": len(self.passages),
                    "sha256": _digest([(p.window, p.prompt) for p in self.passages]),
                },
                "shape": asdict(self.shape),
                "engine": {
                    "device": engine.device,
                    "dtype": engine.dtype,
                    "kv_cache": engine.kv_cache,
                    "chunk": engine.chunk,
                },
                "seed": self.seed,
                "rdlm": __version__,
            },
        }

    def origin(self, evaluation: str) -> dict[str, Any]:
        """The head of a report about these texts."""
        return {**origin(evaluation, self._folder, self._loaded.config), **self._facts}

    @property
    def prompts(self) -> list[str]:
        return [to_text(self.tokenizer, p.prompt) for p in self.passages]

    @property
    def human(self) -> list[list[str]]:
        """What the authors wrote, one continuation a prompt."""
        return [[to_text(self.tokenizer, p.continuation)] for p in self.passages]

    def check(self, settings: Sequence[Setting]) -> None:
        """UserError for a K or a decoding setting that cannot be used."""
        check_steps([s.num_steps for s in settings], self._loaded.config)
        for s in settings:
            check_sampler(_params(s).sampler, self._loaded.config)
            check_masked(_params(s), None if s.order == "random" else s.order, self._loaded.config)

    def file(self, setting: Setting) -> Path:
        """Where the texts of a setting lie."""
        return self._cache / f"samples-{_digest(self._header(setting))[:20]}.jsonl"

    def _header(self, setting: Setting) -> dict[str, Any]:
        """What decides every text. The number of prompts does not: they are the first ones of a fixed
        order (``passages``)."""
        samples = {key: value for key, value in self._facts["samples"].items() if key != "prompts"}
        chosen = asdict(setting)
        for name, usual in (("sampler", "renoise"), ("order", "random")):  # as without a choice
            if chosen[name] == usual:
                del chosen[name]
        return {**self._facts, "samples": samples, "setting": chosen}

    def continuations(
        self, setting: Setting, progress: Callable[[int], object] | None = None
    ) -> list[list[str]]:
        """texts[prompt][choice], from the file as far as it goes. ``progress`` takes the number of prompts
        done, those found included."""
        file = self.file(setting)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # another run at the same texts waits here, then finds them
            rows = _read(file, self._header(setting))[: len(self.passages)]
            if [row["window"] for row in rows] != [passage.window for passage in self.passages[: len(rows)]]:
                raise UserError("--cache", str(file), "holds texts of other passages", "delete the file")
            if progress:
                progress(len(rows))
            for batch in self._batches(len(rows)):
                rows += self._generate(setting, batch)
                stream.writelines(json.dumps(row) + "\n" for row in rows[-len(batch) :])
                stream.flush()
                if progress:
                    progress(len(batch))
        return [row["texts"] for row in rows]

    def _batches(self, start: int) -> Iterator[list[Passage]]:
        """As many prompts at a time as the engine has slots for: all answers are equally long, so no slot
        idles."""
        size = max(1, self._engine_settings.max_slots // self.shape.continuations)
        for first in range(start, len(self.passages), size):
            yield self.passages[first : first + size]

    def _generate(self, setting: Setting, batch: Sequence[Passage]) -> list[dict[str, Any]]:
        answers = self._continued(setting, batch)
        n = self.shape.continuations
        return [
            {
                "window": passage.window,
                "prompt": to_text(self.tokenizer, passage.prompt),
                "texts": [to_text(self.tokenizer, answer) for answer in answers[i * n : (i + 1) * n]],
                "ids": answers[i * n : (i + 1) * n],
            }
            for i, passage in enumerate(batch)
        ]

    @property
    def _banned(self) -> frozenset[int]:
        """The end of text, where no passage holds one."""
        end = self.tokenizer.eos_id
        return frozenset() if end is None or self.shape.across_documents else frozenset({end})

    def _continued(self, setting: Setting, batch: Sequence[Passage]) -> list[list[int]]:
        """Ids of all continuations."""
        params, banned = _params(setting), self._banned
        requests = [
            Request(
                passage.prompt,
                StepBudget(setting.num_steps),
                self.shape.max_tokens,
                params,
                seed=_stream(self.seed, passage.window),
                choice=choice,
                stop_ids=banned,
                min_tokens=self.shape.max_tokens if banned else 0,
                order=setting.order,
            )
            for passage in batch
            for choice in range(self.shape.continuations)
        ]
        answers = self._started().generate(requests)
        lost = next((a[-1].finish for a in answers if a[-1].finish != "length"), None)
        if lost is not None:
            raise RuntimeError(f"generation ended with {lost!r}")
        return [[event.token for event in answer if event.token is not None] for answer in answers]

    def _started(self) -> Engine:
        if self._engine is None:
            loaded, settings, tokenizer = self._loaded, self._engine_settings, self.tokenizer
            self._engine = self._exit.enter_context(
                Engine(
                    lambda: build_served(loaded.denoiser, loaded.config, tokenizer, settings),
                    self.shape.continuations,
                )
            )
        return self._engine


@contextmanager
def open_sampler(
    options: TextOptions, shape: Shape, count: int, settings: Sequence[Setting]
) -> Iterator[tuple[Sampler, Iterator[Passage]]]:
    """-> the sampler, and the passages that are left."""
    engine = {
        "device": str(usable_device(options.device, "--device")), "dtype": options.dtype,
        "kv_cache": options.kv_cache, "max_slots": options.batch_size,
    }  # fmt: skip
    store = TokenStore(options.data, options.split)
    found = passages(store, shape)
    parsed: EngineSettings = parse(EngineSettings, engine, "the options of rdlm eval")
    chosen = take(found, count, shape)
    with Sampler(options.checkpoint, store, chosen, shape, parsed, options.cache, options.seed) as sampler:
        sampler.check(settings)
        yield sampler, found


def settings_of(options: TextOptions) -> list[Setting]:
    """Every combination, in the order given. UserError for a model that writes no text."""
    config = checkpoint.load_config(options.checkpoint)
    config.check_text("generating text")
    if not (options.checkpoint / checkpoint.TOKENIZER).is_dir():
        raise no_tokenizer(options.checkpoint)
    default = config.default_steps
    ks = steps_given(options.num_steps) or [default]
    return grid(
        {
            "num_steps": ks,
            "temperature": numbers("--temperature", options.temperature, float),
            "top_p": numbers("--top-p", options.top_p, float),
            "top_k": numbers("--top-k", options.top_k, int),
            "min_p": numbers("--min-p", options.min_p, float),
            "sampler": samplers(options.sampler, text_samplers()),
            "order": options.order.split(","),
        }
    )


def sample_all(sampler: Sampler, settings: Sequence[Setting], bar: Bar) -> list[Texts]:
    """Texts of every setting, generated where no file holds them."""
    return [sampler.continuations(s, bar(f"texts at {s}", len(sampler.passages))) for s in settings]


def _params(setting: Setting) -> SamplingParams:
    """UserError for a value out of range."""
    return SamplingParams(
        setting.temperature, setting.top_k, setting.top_p, setting.min_p, sampler=setting.sampler
    )


def _stream(seed: int, window: int) -> int:
    """A seed for one prompt: with one for all, every prompt would draw the same numbers at the same place.
    63 bits."""
    return int(hashlib.sha256(f"{seed}:{window}".encode()).hexdigest()[:16], 16) >> 1


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(file: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of complete lines. Cuts off a line that an interruption left half written; starts an empty file
    with its header."""
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        file.write_text(json.dumps(header, sort_keys=True) + "\n", encoding="utf-8")
        return []
    if len(whole) < len(content):
        with file.open("r+b") as stream:
            stream.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()[1:]]
