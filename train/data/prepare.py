"""Text to shards: train or load a tokenizer, split by document, tokenise as a stream, write atomically.

The bytes written depend only on the documents, the tokenizer, the seed and the split settings.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from rdlm.atomic import check_out, contents, replacing
from rdlm.data.manifest import SPLITS
from rdlm.data.token_shards import SCHEMA_VERSION, Manifest, Split, check_sizes, read_manifest
from rdlm.data.tokenizer import Kind, Tokenizer, load_tokenizer, train_tokenizer
from rdlm.errors import UserError
from train.data.chat import ChatEncoder, LossOn, conversations
from train.data.file_formats import Reading, Rows, TextFiles
from train.data.sources import Source, open_source
from train.data.writer import PREPARED, Encoded, SplitWriter, check_same_request, write_manifest

D = TypeVar("D")
SHARD_TOKENS = 1 << 27
_BATCH_CHARS = 1 << 22


@dataclass(frozen=True)
class Preparation:
    """What to prepare; the options of ``rdlm data prepare``."""

    source: str
    out: Path
    tokenizer: str = "train"
    kind: Kind = "bpe"
    vocab_size: int = 4096
    tokenizer_sample_mb: int = 200
    valid: str | None = None
    test: str | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None
    seed: int = 0
    text_column: str = "text"
    rows: Rows = "documents"
    loss_on: LossOn = "answers"
    text_files: TextFiles | None = None
    separator: str | None = None
    shard_tokens: int = SHARD_TOKENS


def prepare(
    options: Preparation,
    *,
    force: bool = False,
    progress: bool = True,
    note: Callable[[str], object] = lambda line: None,
) -> tuple[Manifest, bool]:
    """Build ``options.out``; -> (manifest, whether it was built now). An identical finished preparation is
    reused.

    ``note`` is given lines about which files are read and which are not. UserError if the folder holds
    something else and ``force`` is false, or if options or source cannot be used.
    """
    sources, fractions = _sources(options)
    for source in sources.values():
        for line in source.notes:
            note(f"{source.reading.option}: {line}")
    loaded = None if options.tokenizer == "train" else _loaded(options.tokenizer)
    chat = _chat_encoder(options, loaded)
    request = _request(options, sources, fractions, loaded)
    out = options.out
    if contents(out, "--out") and not force:
        return _existing(out, request), False
    check_out(out, "--out", PREPARED, force)
    with replacing(out, "--out") as folder:
        tokenizer = loaded or _train(options, sources["train"], fractions, progress)
        if tokenizer.eos_id is None:
            raise UserError(
                "--tokenizer",
                options.tokenizer,
                "it names no end-of-text token to put between documents",
                "add eos_token to its tokenizer_config.json",
            )
        tokenizer.save(folder / "tokenizer")
        encode = partial(_texts, tokenizer) if chat is None else partial(_chats, chat)
        splits = _write_splits(folder, options, sources, fractions, tokenizer, encode, progress)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            source=options.source,
            request=request,
            dtype=_dtype(tokenizer),
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer_fingerprint=tokenizer.fingerprint,
            splits=splits,
            skipped=dict(sum((source.skipped for source in sources.values()), Counter())),
        )
        write_manifest(folder, manifest)
    return manifest, True


def _loaded(path: str) -> Tokenizer:
    """A tokenizer's own folder or file, or that of a checkpoint or a run."""
    inside = (Path(path, *parts, "tokenizer") for parts in ((), ("model",)))
    with naming({"tokenizer": "--tokenizer"}):
        return load_tokenizer(next((folder for folder in inside if folder.is_dir()), path))


def _chat_encoder(options: Preparation, loaded: Tokenizer | None) -> ChatEncoder | None:
    """None where documents are texts."""
    if options.rows != "chat":
        if options.loss_on != "answers":
            raise UserError(
                "--loss-on", options.loss_on, "texts have no answers", "add --rows chat, or drop it"
            )
        return None
    if loaded is None:
        problem, remedy = (
            "conversations need the tokenizer of a model with a chat template",
            "give its checkpoint",
        )
        raise UserError("--tokenizer", options.tokenizer, problem, remedy)
    return ChatEncoder(loaded, options.loss_on, options.tokenizer)


@contextmanager
def naming(options: dict[str, str]) -> Iterator[None]:
    """UserErrors about these fields name the option that they come from."""
    try:
        yield
    except UserError as error:
        name = options.get(error.field, error.field)
        raise UserError(name, error.value, error.problem, error.remedy) from error


def _sources(options: Preparation) -> tuple[dict[str, Source], dict[str, float]]:
    """Split -> source, and the fractions of ``train`` that go to the splits without a source."""
    if options.separator == "":
        raise UserError("--separator", "", "is empty", r"write for instance '\n\n' or '<|endoftext|>'")
    if options.separator is not None and options.text_files is not None:
        problem = "says what a document is, and so does --text-files"
        raise UserError("--separator", options.separator, problem, "give one of them")
    reading = Reading(options.text_column, options.rows, options.text_files, options.separator)
    sources = open_source(options.source, reading)
    for split, given in (("valid", options.valid), ("test", options.test)):
        if given is not None:
            sources[split] = open_source(given, replace(reading, option=f"--{split}"))["train"]
    _check_used(options, sources)
    default = 0.05 if set(sources) == {"train"} else 0.0
    given_fractions = {"valid": options.valid_fraction, "test": options.test_fraction}
    return sources, held_out_fractions(sources, given_fractions, {"valid": default, "test": default})


def _check_used(options: Preparation, sources: dict[str, Source]) -> None:
    """UserError for an option that would change nothing."""
    plain, fields = Preparation(options.source, options.out), any(s.has_fields for s in sources.values())
    texts = any(source.has_plain_text for source in sources.values())
    trained = options.tokenizer == plain.tokenizer
    chat = options.rows == "chat"
    for name, used, why in (
        ("separator", texts, "there are no plain text files"),
        ("text_files", texts, "there are no plain text files"),
        ("text_column", fields and not chat,
            "conversations have names of their own" if chat else "there are no fields"),
        ("kind", trained, "--tokenizer names one"),
        ("vocab_size", trained, "--tokenizer names one"),
        ("tokenizer_sample_mb", trained, "--tokenizer names one"),
    ):  # fmt: skip
        given = getattr(options, name)
        if not used and given != getattr(plain, name):
            raise UserError(f"--{name.replace('_', '-')}", given, f"it changes nothing: {why}", "drop it")


def held_out_fractions(
    own: Iterable[str], given: dict[str, float | None], default: dict[str, float]
) -> dict[str, float]:
    """Shares of ``train`` for the splits that have no source of their own; what is not given is
    ``default``."""
    own, fractions = set(own), {}
    for split, fraction in given.items():
        if split in own and fraction is not None:
            raise UserError(
                f"--{split}-fraction",
                fraction,
                f"the {split} split has a source of its own",
                "drop one of the two",
            )
        if split not in own and (fraction := default[split] if fraction is None else fraction):
            fractions[split] = fraction
    if min(fractions.values(), default=0) < 0 or not sum(fractions.values()) < 1:
        raise UserError(
            "--valid-fraction, --test-fraction",
            tuple(fractions.values()),
            "they must leave something to train on",
            "use for instance 0.05",
        )
    return fractions


def _request(
    options: Preparation, sources: dict[str, Source], fractions: dict[str, float], loaded: Tokenizer | None
) -> dict[str, Any]:
    tokenizer = (
        {"fingerprint": loaded.fingerprint}
        if loaded
        else {
            "kind": options.kind,
            "vocab_size": options.vocab_size,
            "sample_mb": options.tokenizer_sample_mb,
        }
    )
    request = {
        "inputs": {split: source.identity for split, source in sources.items()},
        "fractions": fractions,
        "seed": options.seed,
        "shard_tokens": options.shard_tokens,
        "tokenizer": tokenizer,
    }
    if options.rows == "chat" and loaded is not None:
        template = hashlib.sha256((loaded.chat_template or "").encode()).hexdigest()
        request["chat"] = {"template": template, "loss_on": options.loss_on}
    return request


def _existing(out: Path, request: dict[str, Any]) -> Manifest:
    check_same_request(out, request)
    manifest = read_manifest(out)
    check_sizes(out, manifest)
    return manifest


def split_of(document: str, seed: int, fractions: dict[str, float]) -> str:
    """The split of a document by a seeded hash of its text: equal documents land in the same split, in any
    order."""
    if not fractions:
        return "train"
    digest = hashlib.blake2b(
        document.encode(errors="surrogatepass"), digest_size=8, key=str(seed).encode()
    ).digest()
    position = int.from_bytes(digest, "little") / 2**64
    for split, fraction in fractions.items():
        if position < fraction:
            return split
        position -= fraction
    return "train"


def _train(options: Preparation, source: Source, fractions: dict[str, float], progress: bool) -> Tokenizer:
    """Train on the first ``tokenizer_sample_mb`` of the training split."""
    limit = options.tokenizer_sample_mb * 1_000_000
    total = min(limit, source.total_bytes) if source.total_bytes else limit

    def sample() -> Generator[str, None, None]:
        read = 0
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="train tokenizer", disable=not progress
        ) as bar:
            for text in source.documents():
                if split_of(text, options.seed, fractions) == "train":
                    yield text
                    read += len(text)
                    bar.update(len(text))
                    if read >= limit:
                        return

    if next(sample(), None) is None:
        raise UserError("SOURCE", options.source, "there is no text in it", "give a file with text")
    with naming({"vocab_size": "--vocab-size", "text": "SOURCE"}):
        with closing(sample()) as texts:  # its bar ends before an error is shown
            return train_tokenizer(options.kind, texts, options.vocab_size)


def _write_splits(
    folder: Path,
    options: Preparation,
    sources: dict[str, Source],
    fractions: dict[str, float],
    tokenizer: Tokenizer,
    encode: Callable[[Source], Iterator[list[Encoded]]],
    progress: bool,
) -> dict[str, Split]:
    dtype, marked = _dtype(tokenizer), options.rows == "chat"
    writers = {
        split: SplitWriter(folder, split, dtype, options.shard_tokens, marked)
        for split in SPLITS
        if split in sources or split in fractions
    }
    for own, source in sources.items():
        with tqdm(
            total=source.total_bytes, unit="B", unit_scale=True, desc=f"tokenise {own}", disable=not progress
        ) as bar:
            for documents in encode(source):
                texts = [document.text for document in documents]
                names = [split_of(text, options.seed, fractions) if own == "train" else own for text in texts]
                for split in dict.fromkeys(names):
                    writers[split].add([d for d, name in zip(documents, names, strict=True) if name == split])
                bar.update(sum(map(len, texts)))
    splits = {split: writer.close() for split, writer in writers.items()}
    for split, info in splits.items():
        if not info.documents:
            leave = "" if split == "train" else f" (--{split}-fraction 0 leaves it out)"
            remedy = f"give more text or another fraction{leave}"
            if sources["train"].reading.text_files == "files":
                remedy += ", or cut text files with --text-files pieces or --separator"
            raise UserError("SOURCE", options.source, f"split {split!r} has no documents", remedy)
    return splits


def _texts(tokenizer: Tokenizer, source: Source) -> Iterator[list[Encoded]]:
    """Documents with the end-of-text token behind them."""
    assert tokenizer.eos_id is not None
    for texts in _batches(source.documents(), len):
        with naming({"text": source.reading.option}):
            found = tokenizer.encode_documents(texts)
        yield [
            Encoded(text, [*ids, tokenizer.eos_id], len(text.encode()))
            for text, ids in zip(texts, found, strict=True)
        ]


def _chats(encoder: ChatEncoder, source: Source) -> Iterator[list[Encoded]]:
    """Conversations as the template writes them."""
    option = source.reading.option
    chats = (encoder.encode(chat, option) for chat in conversations(source.records(), option))
    return _batches(chats, lambda chat: len(chat.text))


def _batches(texts: Iterable[D], length: Callable[[D], int]) -> Iterator[list[D]]:
    batch: list[D] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += length(text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> Any:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
