"""Both tokenizers keep every byte, stream what they decode, and refuse what they cannot use in one line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers
from tokenizers import Tokenizer as LibraryTokenizer

from rdlm.data.tokenizer import (
    CONFIG_FILE,
    EOS,
    BytePairTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from rdlm.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n",
    "Café au lait, 3 €!\n\n\tA second  paragraph.\r\n",
    "foxes and dogs, dogs and foxes ",
] * 9
KINDS = ("bpe", "sentencepiece")
TOKENIZERS: dict[str, Tokenizer] = {kind: train_tokenizer(kind, iter(TEXTS), 300) for kind in KINDS}  # type: ignore[arg-type]
unicode_text = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\u2581 \n€foxd"), max_size=60
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=unicode_text)
def test_text_survives_and_its_bytes_are_counted(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode_documents([text])[0]
    assert tokenizer.decode(ids) == text
    table = tokenizer.token_bytes()
    assert sum(len(table[i]) for i in ids) == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=30), cut=st.integers(1, 4))
def test_stream_joins_to_decode_of_all_for_any_ids(kind: str, ids: list[int], cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    stream = StreamDecoder(tokenizer)
    deltas = [stream.feed(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    assert "".join([*deltas, stream.flush()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_stream_holds_back_half_a_character(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("日")
    assert len(ids) == 3
    stream = StreamDecoder(tokenizer)
    assert [stream.feed([i]) for i in ids] == ["", "", "日"]
    cut_short = StreamDecoder(tokenizer)
    assert cut_short.feed(ids[:2]) == "" and cut_short.flush() == "\ufffd"


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=30))
def test_bpe_decodes_as_the_library_does(ids: list[int]) -> None:
    tokenizer = TOKENIZERS["bpe"]
    library = LibraryTokenizer.from_str(tokenizer.source.decode())  # type: ignore[attr-defined]
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", KINDS)
def test_special_text_is_one_id_for_a_prompt_and_plain_text_in_a_corpus(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.encode(f"fox{EOS}dog") == [
        *tokenizer.encode("fox"),
        tokenizer.eos_id,
        *tokenizer.encode("dog"),
    ]
    literal = tokenizer.encode_documents([f"fox{EOS}dog"])[0]
    assert tokenizer.eos_id not in literal and tokenizer.decode(literal) == f"fox{EOS}dog"
    assert tokenizer.decode([tokenizer.eos_id]) == ""  # type: ignore[list-item]
    assert tokenizer.bos_id == tokenizer.eos_id


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "t")
    for path in (tmp_path / "t", tmp_path / "t" / tokenizer.file_name):  # type: ignore[attr-defined]
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXTS[1]) == tokenizer.encode(
            TEXTS[1]
        )
        assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (tokenizer.bos_id, tokenizer.eos_id, 300)
    again = train_tokenizer(kind, iter(TEXTS), 300)  # type: ignore[arg-type]
    other = train_tokenizer(kind, iter(TEXTS), 299)  # type: ignore[arg-type]
    assert again.fingerprint == tokenizer.fingerprint != other.fingerprint


def test_chat_template_is_read_and_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    TOKENIZERS["bpe"].save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    loaded = load_tokenizer(tmp_path)
    assert (
        loaded.chat_template == "{{ messages[0].content }}"
        and loaded.fingerprint == TOKENIZERS["bpe"].fingerprint
    )
    loaded.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").chat_template == loaded.chat_template


def test_added_tokens_of_a_foreign_tokenizer_keep_their_bytes(tmp_path: Path) -> None:
    library = LibraryTokenizer.from_str(TOKENIZERS["bpe"].source.decode())  # type: ignore[attr-defined]
    library.add_tokens(["  é  "])
    library.add_special_tokens(["<|user|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("fox  é  dog<|user|>")
    assert {300, 301} <= set(ids) and tokenizer.decode(ids) == "fox  é  dog"
    assert tokenizer.token_bytes()[300] == "  é  ".encode() and tokenizer.token_bytes()[301] == b""


def _user_error(match: str):  # type: ignore[no-untyped-def]
    return pytest.raises(UserError, match=match)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    with _user_error("no tokenizer.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"{}")
        with _user_error("cannot be read"):
            load_tokenizer(tmp_path / name)
    LibraryTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with _user_error("a tokenizer without bytes"):
        load_tokenizer(tmp_path)
    TOKENIZERS["bpe"].save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"eos_token": "</s>"}))
    with _user_error("eos_token='</s>'"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_the_text_cannot_fill_is_refused(kind: str) -> None:
    with _user_error("vocab_size=5000"):
        train_tokenizer(kind, iter(TEXTS), 5000)  # type: ignore[arg-type]
    with _user_error("vocab_size=256"):
        train_tokenizer(kind, iter(TEXTS), 256)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_the_users_error(kind: str) -> None:
    with _user_error("surrogate"):
        TOKENIZERS[kind].encode("fox \ud800")


MARKS = ("<|im_start|>", "[X]", "fox", " dog", "é")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def _foreign(flags: list[list[bool]], special: list[bool], lower: bool) -> LibraryTokenizer:
    """A tokenizer as others publish them: added tokens with every property that the library knows."""
    library = LibraryTokenizer.from_str(TOKENIZERS["bpe"].source.decode())  # type: ignore[attr-defined]
    if lower:
        library.normalizer = normalizers.Lowercase()
    for mark, chosen, is_special in zip(MARKS, flags, special, strict=True):
        token = AddedToken(mark, special=is_special, **dict(zip(FLAGS, chosen, strict=True)))
        (library.add_special_tokens if is_special else library.add_tokens)([token])
    return library


@settings(max_examples=300, deadline=None)
@given(
    flags=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=5, max_size=5),
    special=st.lists(st.booleans(), min_size=5, max_size=5),
    lower=st.booleans(),
    parts=st.lists(
        st.sampled_from([*MARKS, EOS, " ", "  ", "\n", "x", "FOX", "<|IM_START|>", "foxes", "日", "."]),
        max_size=12,
    ),
)
def test_ids_are_those_of_the_library_whatever_special_tokens_ask_for(
    flags: list[list[bool]], special: list[bool], lower: bool, parts: list[str]
) -> None:
    library, text = _foreign(flags, special, lower), "".join(parts)
    tokenizer = BytePairTokenizer(library.to_str().encode(), {})
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text) == library.encode_batch([text], add_special_tokens=False)[0].ids
    library.encode_special_tokens = True
    assert tokenizer.encode_documents([text]) == [library.encode(text, add_special_tokens=False).ids]


def test_white_space_around_a_mark_belongs_to_the_mark_that_takes_it() -> None:
    library = LibraryTokenizer.from_str(TOKENIZERS["bpe"].source.decode())  # type: ignore[attr-defined]
    library.add_special_tokens(
        [AddedToken("<mask>", lstrip=True, rstrip=True), AddedToken("word", single_word=True)]
    )
    tokenizer, (mask, word) = BytePairTokenizer(library.to_str().encode(), {}), (300, 301)
    fox, dog = tokenizer.encode("fox"), tokenizer.encode("dog")
    assert tokenizer.encode("fox  <mask> dog") == [*fox, mask, *dog]
    assert word in tokenizer.encode("a word.") and word not in tokenizer.encode("words")


def _published(folder: Path, files: dict[str, object], special: bool = True, added: bool = True) -> Path:
    """A tokenizer whose end of text </s> is special, ordinary but added, or a word of the vocabulary, as
    ``files`` name it."""
    document = json.loads(TOKENIZERS["bpe"].source)  # type: ignore[attr-defined]
    document["model"]["vocab"]["</s>"] = 300
    document["added_tokens"] = []
    if added:
        flags = dict.fromkeys((*FLAGS, "special"), False)
        document["added_tokens"] = [{"id": 300, "content": "</s>", **flags, "special": special}]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(document))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


END_FILES: dict[str, dict[str, object]] = {
    "config": {CONFIG_FILE: {"eos_token": "</s>"}},
    "config with properties": {
        CONFIG_FILE: {"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False}}
    },
    "map": {"special_tokens_map.json": {"eos_token": "</s>"}},
    "map beside a config without it": {
        CONFIG_FILE: {"tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {"eos_token": {"content": "</s>", "special": False}},
    },
    "map against config": {
        CONFIG_FILE: {"eos_token": None},
        "special_tokens_map.json": {"eos_token": "</s>"},
    },
    "config that lists its tokens against map": {
        CONFIG_FILE: {"eos_token": "</s>", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"eos_token": "x"},
    },
}


@pytest.mark.parametrize("how", ["special", "added", "word"])
@pytest.mark.parametrize("files", END_FILES.values(), ids=END_FILES.keys())
def test_the_end_of_text_is_found_where_it_is_named(
    tmp_path: Path, files: dict[str, object], how: str
) -> None:
    folder = _published(tmp_path / "t", files, special=how == "special", added=how != "word")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 300 and tokenizer.special_tokens == {"</s>": 300}
    assert tokenizer.encode("fox</s>dog") == [*tokenizer.encode("fox"), 300, *tokenizer.encode("dog")]
    assert 300 not in tokenizer.encode_documents(["fox</s>dog"])[0] and tokenizer.decode([300]) == ""
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.eos_id, copy.fingerprint) == (300, tokenizer.fingerprint)
    transformers = pytest.importorskip("transformers", reason="the extra eval is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert theirs.eos_token_id == 300 and theirs("fox</s>dog")["input_ids"] == tokenizer.encode("fox</s>dog")


def test_files_beside_a_tokenizer_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    TOKENIZERS["bpe"].save(tmp_path)
    for content, message in (
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ('{"eos_token": 7}', "eos_token=7"),
    ):
        (tmp_path / "special_tokens_map.json").write_text(content)
        with _user_error(message):
            load_tokenizer(tmp_path)
