"""Text to ids and back: a byte-level BPE (``tokenizer.json``) or a sentencepiece model
(``tokenizer.model``), one interface.

Decoding goes through a table of bytes per id, so that a whole text, a stream and a byte count can never
disagree. Special tokens (end of text, chat marks) are worth no bytes: they decode to nothing.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from rdlm.errors import UserError, reason

EOS = "<|endoftext|>"
"""End of document in the tokenizers trained here; it is their beginning of text too."""
CONFIG_FILE = "tokenizer_config.json"
ENDS = ("bos_token", "eos_token")
MOST_TOKENS = 1 << 24
"""Largest vocabulary that is trained here."""
Kind = Literal["bpe", "sentencepiece"]


class Tokenizer(Protocol):
    """What the rest of rdlm may ask of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    start: tuple[int, ...]
    """Ids before a text that begins a sequence: the beginning of text, unless ``add_bos_token`` of the
    tokenizer's config is false."""
    special_tokens: Mapping[str, int]
    chat_template: str | None
    """Jinja source, or None where the tokenizer knows no chat format."""
    fingerprint: str
    """sha256 of what decides the ids: equal fingerprints mean equal ids for every text."""

    def encode(self, text: str) -> list[int]:
        """The text of a special token becomes its single id. UserError if the text is not valid Unicode."""

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of ``encode``, and for each the characters [first, last + 1) of ``text`` that it stands
        for."""

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Corpus text, taken literally: text that looks like a special token is ordinary text. Nothing is
        added."""

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD; special tokens become nothing."""

    def token_bytes(self) -> Sequence[bytes]:
        """The bytes of every id [vocab_size]; b"" for special tokens."""

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into an existing or new folder, each one atomically."""


class IdsAlone:
    """In the place of a tokenizer that a model does not have: ids without texts."""

    bos_id: int | None = None
    eos_id: int | None = None
    chat_template: str | None = None
    start: tuple[int, ...] = ()
    special_tokens: Mapping[str, int] = {}
    fingerprint = ""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def _refuse(self, _: object) -> Any:
        raise UserError("text", "...", "the model has no tokenizer, so texts cannot be read", "give ids")

    encode: Any = _refuse
    encode_spans: Any = _refuse
    encode_documents: Any = _refuse
    save: Any = _refuse

    def decode(self, ids: Iterable[int]) -> str:
        return ""

    def token_bytes(self) -> Sequence[bytes]:
        return [b""] * self.vocab_size


class _ByteTable:
    """Everything that does not depend on the library behind a tokenizer."""

    file_name: str

    def __init__(
        self, source: bytes, table: list[bytes], special: dict[str, int], config: Mapping[str, Any]
    ) -> None:
        self.source, self._table = source, tuple(table)  # every text that is decoded shares the table
        self.vocab_size = len(table)
        self.special_tokens: Mapping[str, int] = special
        self.bos_id, self.eos_id = (self._named(config, key) for key in ENDS)
        self._adds_bos = config.get("add_bos_token")
        self.start: tuple[int, ...] = () if self.bos_id is None or self._adds_bos is False else (self.bos_id,)
        self.chat_template: str | None = config.get("chat_template")
        if not isinstance(self.chat_template, str | None):
            raise UserError(
                "chat_template", "...", "it must be one Jinja string", f"keep one template in {CONFIG_FILE}"
            )
        ends = f"{self.file_name}:{self.bos_id}:{self.eos_id}:".encode()
        self.fingerprint = hashlib.sha256(ends + source).hexdigest()

    def _named(self, config: Mapping[str, Any], key: str) -> int | None:
        name = _name(config, key)
        if name is not None and name not in self.special_tokens:
            raise UserError(
                key, name, "the vocabulary has no such special token", f"correct {key} in {CONFIG_FILE}"
            )
        return None if name is None else self.special_tokens[name]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._table[i] for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> Sequence[bytes]:
        return self._table

    def save(self, folder: Path) -> None:
        names = {i: text for text, i in self.special_tokens.items()}
        config: dict[str, Any] = (
            {"tokenizer_class": "PreTrainedTokenizerFast"} if self.file_name == "tokenizer.json" else {}
        )
        for key, number in zip(ENDS, (self.bos_id, self.eos_id), strict=True):
            config[key] = None if number is None else names[number]
        if self._adds_bos is not None:
            config["add_bos_token"] = self._adds_bos
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / self.file_name, self.source)
        _write(folder / CONFIG_FILE, (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode())


class BytePairTokenizer(_ByteTable):
    """BPE of the Hugging Face ``tokenizers`` library: byte-level (GPT-2, Pythia, SmolLM2, Huginn), or with
    bytes as a fallback (Llama 2, TinyLlama), whose texts decode with the space that is put before them."""

    file_name = "tokenizer.json"

    def __init__(self, source: bytes, config: Mapping[str, Any]) -> None:
        document = json.loads(source)
        decoder = json.dumps(document["decoder"])
        bytes_of = _bytes_of(decoder)
        config = _with_default_ends(config, document)
        _make_special(document, {name for key in ENDS if (name := _name(config, key)) is not None})
        self._prompts, self._documents = (
            tokenizers.Tokenizer.from_str(json.dumps(document)) for _ in range(2)
        )
        self._documents.encode_special_tokens = True  # read them as ordinary text
        for each in (self._prompts, self._documents):
            each.no_padding()
            each.no_truncation()
        added = self._prompts.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        vocabulary = self._prompts.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values()) + 1)
        for text, i in vocabulary.items():
            if i not in added:
                table[i] = bytes_of(text)
            elif not added[i].special:  # the library decodes such a token from its normalised text
                word = self._prompts.id_to_token(i) or text
                table[i] = bytes_of(word) if "ByteFallback" in decoder else word.encode()
        super().__init__(source, table, special, config)

    def encode(self, text: str) -> list[int]:
        """As the library encodes it, with the ``lstrip``, ``rstrip``, ``single_word`` and ``normalized``
        of special tokens."""
        return self._prompts.encode_batch_fast([_check_unicode(text)], add_special_tokens=False)[0].ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._prompts.encode(_check_unicode(text), add_special_tokens=False)
        return found.ids, found.offsets

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        checked = [_check_unicode(text) for text in texts]
        return [e.ids for e in self._documents.encode_batch_fast(checked, add_special_tokens=False)]


class SentencePieceTokenizer(_ByteTable):
    """A sentencepiece model. Those trained here keep every character; a loaded one applies its own
    normaliser.

    A model with a "dummy prefix" decodes with that leading space: a continuation of a prompt must keep it.
    """

    file_name = "tokenizer.model"
    _SPACE = "\u2581"  # stands for a space inside the model

    def __init__(self, source: bytes, config: Mapping[str, Any]) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=source)
        table: list[bytes] = []
        special: dict[str, int] = {}
        self._byte_ids: dict[int, int] = {}
        for i in range(self._model.get_piece_size()):
            piece = self._model.id_to_piece(i)
            if self._model.is_byte(i):
                self._byte_ids[int(piece[1:-1], 16)] = i
                table.append(bytes([int(piece[1:-1], 16)]))
            elif self._model.is_control(i) or self._model.is_unknown(i):
                special[piece] = i
                table.append(b"")
            else:
                table.append(piece.replace(self._SPACE, " ").encode())
        named = {
            key: self._model.id_to_piece(i)
            for key, i in (("bos_token", self._model.bos_id()), ("eos_token", self._model.eos_id()))
            if i >= 0
        }
        super().__init__(source, table, special, {**named, **config})
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if special else None

    def encode(self, text: str) -> list[int]:
        """The library knows control pieces by id only: their texts are looked for here."""
        ids: list[int] = []
        for part in self._split.split(text) if self._split else [text]:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
            elif part:
                ids.extend(self._encode_one(part))
        return ids

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Pieces are placed by the library, which knows what its normaliser did; ids of bytes share the
        place of their character."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        start = 0
        for part in self._split.split(text) if self._split else [text]:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                spans.append((start, start + len(part)))
            elif part:
                for i, (first, last) in self._placed(part):
                    ids.append(i)
                    spans.append((start + first, start + last))
            start += len(part)
        return ids, spans

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._encode_one(text) for text in texts]

    def _placed(self, text: str) -> Iterator[tuple[int, tuple[int, int]]]:
        """The ids of ``_encode_one`` with their characters."""
        start, literal = 0, self._SPACE in text and len(self._byte_ids) == 256
        for n, part in enumerate(
            _check_unicode(text).split(self._SPACE) if literal else [_check_unicode(text)]
        ):
            if n:
                yield from ((self._byte_ids[b], (start, start + 1)) for b in self._SPACE.encode())
                start += 1
            place = [0] * (len(part.encode()) + 1)  # byte -> characters before it
            end = 0
            for n_before, character in enumerate(part, 1):
                end += len(character.encode())
                place[end] = n_before
            for piece in self._model.encode(part, return_type="proto").pieces:
                yield piece.id, (start + place[piece.begin], start + place[piece.end])
            start += len(part)

    def _encode_one(self, text: str) -> list[int]:
        _check_unicode(text)
        if self._SPACE not in text or len(self._byte_ids) < 256:
            return self._model.encode(text)
        literal = [
            self._byte_ids[b] for b in self._SPACE.encode()
        ]  # the model would read the character as a space
        first, *rest = text.split(self._SPACE)
        ids = self._model.encode(first)
        for part in rest:
            ids += literal + self._model.encode(part)
        return ids


class StreamDecoder:
    """Text of a growing list of ids: the deltas of ``feed`` and the last one of ``flush`` join to
    ``decode`` of all ids.

    A character whose bytes are not complete yet is held back.
    """

    def __init__(self, tokenizer: Tokenizer, spelt: Collection[int] = ()) -> None:
        """spelt: special tokens that are written out, which ``decode`` leaves out."""
        self._table = tokenizer.token_bytes()
        names = tokenizer.special_tokens if spelt else {}
        self._spelt = {i: name.encode() for name, i in names.items() if i in spelt}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(self._spelt.get(i) or self._table[i] for i in ids))

    def flush(self) -> str:
        """Whatever is still held back, as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A folder with tokenizer.json or tokenizer.model, or one of these files; the names of special tokens
    are read from files next to it.

    Beginning and end of text are found as transformers finds them: in ``special_tokens_map.json`` (unless
    ``tokenizer_config.json`` lists its added tokens), else in ``tokenizer_config.json``; what they name is
    special, whatever tokenizer.json calls it. Where none names an end of text it is ``<|endoftext|>``, if
    that is an added token, or what a sentencepiece model says. UserError if nothing usable is there.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next(
            (path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()), path
        )
    if not file.is_file():
        problem = "there is no tokenizer.json or tokenizer.model"
        remedy = "give a folder or file that has one, or train one with rdlm data prepare"
        raise UserError("tokenizer", str(path), problem, remedy)
    kind = BytePairTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    try:
        return kind(file.read_bytes(), _read_config(file.parent))
    except UserError:
        raise
    except (
        Exception
    ) as error:  # both libraries raise bare Exception or RuntimeError on a file they cannot read
        remedy = "give a BPE tokenizer.json with bytes in it, or a sentencepiece model"
        raise UserError("tokenizer", str(file), f"cannot be read ({reason(error)})", remedy) from error


def train_tokenizer(kind: Kind, texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train on ``texts``; deterministic. The result is lossless and has ``vocab_size`` ids, one of them
    ``<|endoftext|>``.

    UserError if the texts cannot fill the vocabulary.
    """
    least = 257 if kind == "bpe" else 258
    if vocab_size < least:
        raise UserError(
            "vocab_size",
            vocab_size,
            "256 bytes and the special tokens do not fit",
            f"ask for {least} or more",
        )
    if vocab_size > MOST_TOKENS:
        raise UserError("vocab_size", vocab_size, f"is more than {MOST_TOKENS:,} tokens", "ask for fewer")
    ends = {"bos_token": EOS, "eos_token": EOS}
    if kind == "sentencepiece":
        return SentencePieceTokenizer(_train_sentencepiece(texts, vocab_size), ends)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(map(_check_unicode, texts), trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            "vocab_size",
            vocab_size,
            f"the text yields only {tokenizer.get_vocab_size()} tokens",
            f"ask for at most {tokenizer.get_vocab_size()}, or give more text",
        )
    return BytePairTokenizer(tokenizer.to_str().encode(), ends)


def _train_sentencepiece(texts: Iterator[str], vocab_size: int) -> bytes:
    lines = (line for text in texts for line in _check_unicode(text).splitlines() if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            num_threads=1,
            unk_id=0,
            eos_id=1,
            eos_piece=EOS,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            "vocab_size",
            vocab_size,
            f"sentencepiece cannot train it ({str(error).split('] ')[-1].strip()})",
            "ask for another size, or give more text",
        ) from error
    return model.getvalue()


def _read_config(folder: Path) -> dict[str, Any]:
    """What the files next to a vocabulary say; {} without any."""
    config: dict[str, Any] = _read_object(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config |= _read_object(folder / "special_tokens_map.json")
    template = folder / "chat_template.jinja"
    return {**config, "chat_template": template.read_text(encoding="utf-8")} if template.is_file() else config


def _read_object(file: Path) -> dict[str, Any]:
    """{} where there is no such file; UserError where it is no JSON object."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError("tokenizer", str(file), f"is not JSON ({reason(error)})", "copy it again") from None
    if not isinstance(found, dict):
        raise UserError("tokenizer", str(file), "is not a JSON object", "copy it again")
    return found


def _name(config: Mapping[str, Any], key: str) -> str | None:
    """The text of a token that a config names, alone or with its properties."""
    name = config.get(key)
    name = name.get("content") if isinstance(name, dict) else name
    if not isinstance(name, str | None):
        raise UserError(key, name, "a token is named by its text", f"correct {key} in {CONFIG_FILE}")
    return name


def _with_default_ends(config: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    """``<|endoftext|>`` for an end of text that is not named, and without any config for the beginning
    too."""
    if not any(token["content"] == EOS for token in document.get("added_tokens") or ()):
        return dict(config)
    default = {"eos_token": EOS} if config.keys() & {*ENDS, "tokenizer_class"} else dict.fromkeys(ENDS, EOS)
    return {**default, **config}


def _make_special(document: dict[str, Any], names: set[str]) -> None:
    """Mark the tokens of these names as special in a tokenizer.json, also where they are ordinary words of
    the vocabulary."""
    added = {token["content"]: token for token in document.get("added_tokens") or ()}
    words = found if isinstance(found := document["model"].get("vocab"), dict) else {}
    for name in sorted(names):
        if name in added:
            added[name]["special"] = True
        elif name in words:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added[name] = {"id": words[name], "content": name, **flags, "special": True}
    document["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])


HALF_PAIR = "it holds half of a surrogate pair, which is not valid Unicode"


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_unicode(text: str) -> str:
    if not is_unicode(text):
        raise UserError("text", text[:100], HALF_PAIR, "remove or replace it")
    return text


def _bytes_of(decoder: str) -> Callable[[str], bytes]:
    """What a word of the vocabulary stands for, by the JSON of the decoder."""
    if "ByteLevel" in decoder:
        alphabet = _byte_alphabet()
        return lambda word: bytes(alphabet[c] for c in word)
    if "ByteFallback" not in decoder:
        raise ValueError("it is a tokenizer without bytes")

    def fallback(word: str) -> bytes:
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", word)
        return word.replace("\u2581", " ").encode() if byte is None else bytes([int(byte[1], 16)])

    return fallback


def _byte_alphabet() -> dict[str, int]:
    """Printable stand-in -> byte, as in GPT-2 (Radford et al. 2019): printable Latin-1 is itself, the rest
    is 256, 257, ..."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in kept]
    return {chr(b): b for b in kept} | {chr(256 + n): b for n, b in enumerate(moved)}


def _write(file: Path, data: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)
