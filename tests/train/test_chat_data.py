"""Conversations to shards: the text is what the model's template writes, the targets are what the assistant
says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rdlm.cli import run
from rdlm.data.packing import Packed
from rdlm.data.token_shards import COUNTS, STARTS, TokenStore, check_sizes, num_targets, read_manifest
from rdlm.data.tokenizer import load_tokenizer, train_tokenizer
from rdlm.errors import UserError
from train.data.prepare import Preparation, prepare
from train.data_cli import app

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role') }}"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAYS_ANSWERS = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou help.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETS = (  # as Qwen3: thoughts of earlier turns are dropped
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if loop.last else message['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAYS = ("{% generation %}", "{% endgeneration %}")


def lists_tools(opens: str, closes: str) -> str:
    """A template with tools and calls of them, which marks answers by ``opens`` and ``closes``."""
    said = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
    return (
        "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
        + f"{opens}{said}{closes}{{% else %}}{said}{{% endif %}}"
        + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


WORDS = [
    "how many legs has a spider",
    "eight, as all of its kind",
    "und eine Spinne?",
    "acht Beine é ü 数",
    "42",
]


def turns(n: int) -> list[dict[str, Any]]:
    """A conversation of its own for every n: with and without a system turn, of two to six turns."""
    found = [{"role": "system", "content": "Be brief."}] if n % 3 == 0 else []
    for i in range(1 + n % 3):
        found.append({"role": "user", "content": f"{WORDS[(n + i) % 5]} {n}"})
        found.append({"role": "assistant", "content": f"{WORDS[(n + i + 1) % 5]}\n\n{n + i}."})
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer as a published model has it, in the place where a checkpoint has it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tokenizer"
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*WORDS, "system user assistant You help. Be brief."] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder.parent


def with_template(checkpoint: Path, out: Path, template: str) -> Path:
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    tokenizer.chat_template = template
    tokenizer.save(out / "tokenizer")
    return out


def options(source: Path, out: Path, tokenizer: Path, **more: Any) -> Preparation:
    given = {"rows": "chat", "valid_fraction": 0.1, "test_fraction": 0.0, **more}
    return Preparation(str(source), out, tokenizer=str(tokenizer), **given)


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(folder: Path, split: str) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Each document of a split: its ids, and which of them count."""
    store = TokenStore(folder, split)
    bounds = [*store.document_starts().tolist(), len(store)]
    pairs = zip(bounds, bounds[1:], strict=False)
    return [(tuple(store.read(a, b - a)), tuple(store.counts(a, b - a))) for a, b in pairs]


@pytest.mark.parametrize("template", [CHATML, SAYS_ANSWERS])
def test_ids_and_targets_are_those_of_transformers(checkpoint: Path, tmp_path: Path, template: str) -> None:
    """With the template that says its answers, and with one that does not: for ChatML both mean the same."""
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": turns(n)} for n in range(60)])
    prepare(
        options(source, tmp_path / "data", with_template(checkpoint, tmp_path / "model", template)),
        progress=False,
    )
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")
    expected = set()
    for n in range(60):
        found = reference.apply_chat_template(
            turns(n), chat_template=SAYS_ANSWERS, return_dict=True, return_assistant_tokens_mask=True
        )
        expected.add((tuple(found["input_ids"]), tuple(map(bool, found["assistant_masks"]))))
    got = [*documents(tmp_path / "data", "train"), *documents(tmp_path / "data", "valid")]
    assert len(got) == len(expected) == 60 and set(got) == expected
    split = read_manifest(tmp_path / "data").splits["train"]
    marked = sum(sum(marks) for _, marks in documents(tmp_path / "data", "train"))
    assert 0 < num_targets(tmp_path / "data", split) == marked < split.tokens


@pytest.mark.parametrize("says", [True, False])
def test_tools_their_calls_and_a_system_field_reach_the_template(
    checkpoint: Path, tmp_path: Path, says: bool
) -> None:
    """The reference is transformers' own mask; a template that does not mark its answers gives the same."""
    call = [{"type": "function", "function": {"name": "legs", "arguments": {"of": "spider"}}}]
    tools = [{"type": "function", "function": {"name": "legs", "parameters": {"type": "object"}}}]
    messages = [
        {"role": "user", "content": WORDS[0]},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "8"},
        {"role": "assistant", "content": WORDS[1]},
    ]
    row = {"messages": messages, "tools": tools, "system": "Be brief."}
    source = jsonl(tmp_path / "chat.jsonl", [row])
    marked = lists_tools(*SAYS)
    model = with_template(checkpoint, tmp_path / "model", marked if says else lists_tools("", ""))
    prepare(options(source, tmp_path / "data", model, valid_fraction=0.0), progress=False)
    reference = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")
    found = reference.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, *messages], tools=tools, chat_template=marked,
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    [(ids, counts)] = documents(tmp_path / "data", "train")
    assert ids == tuple(found["input_ids"]) and counts == tuple(map(bool, found["assistant_masks"]))
    text = load_tokenizer(checkpoint / "tokenizer").decode(i for i, c in zip(ids, counts, strict=True) if c)
    assert '"name": "legs"' in text and WORDS[1] in text and "Be brief" not in text and "8" not in text[-30:]


def test_a_conversation_that_is_longer_than_a_row_loses_no_answer(checkpoint: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": turns(n)} for n in range(60)])
    prepare(options(source, tmp_path / "data", checkpoint), progress=False)
    longest = max(len(ids) for ids, _ in documents(tmp_path / "data", "train"))
    counted = sum(sum(marks[1:]) for _, marks in documents(tmp_path / "data", "train"))
    for seq_len in (longest // 3, longest):
        rows = Packed(TokenStore(tmp_path / "data", "train"), seq_len)
        batch = rows.rows(np.arange(len(rows)))
        assert int(batch.mask.sum()) == counted


def test_targets_of_windows_are_the_marked_tokens(checkpoint: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": turns(n)} for n in range(60)])
    prepare(options(source, tmp_path / "data", checkpoint, shard_tokens=500), progress=False)
    store, manifest = TokenStore(tmp_path / "data", "train"), read_manifest(tmp_path / "data")
    assert len(manifest.splits["train"].shards) > 2
    check_sizes(tmp_path / "data", manifest)
    batch = store.rows(np.arange(store.num_windows(16)), 16)
    marks = np.concatenate(
        [
            np.fromfile(tmp_path / "data" / shard.marks, dtype=np.uint8)
            for shard in manifest.splits["train"].shards
        ]
    )
    flat = batch.mask.flatten().numpy()
    assert np.array_equal(flat, (marks[1 : len(flat) + 1] & COUNTS).astype(bool)) and 0 < flat.mean() < 1
    assert (marks & STARTS).astype(bool).sum() == manifest.splits["train"].documents


@pytest.mark.parametrize(
    ("rows", "plain"),
    [
        ([{"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}], None),
        ([{"prompt": "a b", "response": "c"}], None),
        ([{"prompt": [{"role": "user", "content": "a b"}],
        "completion": [{"role": "assistant", "content": "c"}]}], None),
        ([{"question": "a b", "answer": "c"}], None),
        ([{"messages": [{"role": "user", "content": [{"type": "text", "text": "a b"}]},
        {"role": "assistant", "content": "c"}]}], None),
        ([{"instruction": "a", "input": "b", "output": "c"}], "a\n\nb"),
        ([{"instruction": "a b", "input": "", "output": "c", "id": 3}], None),
    ],
)  # fmt: skip
def test_every_layout_of_rows_gives_the_same_conversation(
    checkpoint: Path, tmp_path: Path, rows: list[Any], plain: str | None
) -> None:
    messages = [{"role": "user", "content": plain or "a b"}, {"role": "assistant", "content": "c"}]
    found = []
    for name, given in (("one", rows), ("two", [{"messages": messages}])):
        source = jsonl(tmp_path / f"{name}.jsonl", given)
        prepare(options(source, tmp_path / name, checkpoint, valid_fraction=0.0), progress=False)
        found.append(documents(tmp_path / name, "train"))
    assert found[0] == found[1]


def test_compressed_and_tabular_files_hold_conversations_too(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"messages": turns(n)} for n in range(40)]
    plain = jsonl(tmp_path / "chat.jsonl", rows)
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chat.parquet")
    found = []
    for file in ("chat.jsonl", "packed.jsonl.gz", "chat.parquet"):
        out = tmp_path / file.replace(".", "_")
        prepare(options(tmp_path / file, out, checkpoint), progress=False)
        found.append(documents(out, "train"))
    assert found[0] == found[1] == found[2]


def test_loss_on_says_which_tokens_count(checkpoint: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": turns(2)}])
    counted = {}
    for what in ("answers", "last_answer", "all"):
        given = options(source, tmp_path / what, checkpoint, valid_fraction=0.0, loss_on=what)
        prepare(given, progress=False)
        ((ids, counts),) = documents(tmp_path / what, "train")
        counted[what] = load_tokenizer(checkpoint / "tokenizer").decode(
            i for i, c in zip(ids, counts, strict=True) if c
        )
    answers = [turn["content"] for turn in turns(2) if turn["role"] == "assistant"]
    assert counted["answers"] == "".join(answers) and counted["last_answer"] == answers[-1]
    assert counted["all"].startswith("system\nYou help.\nuser\n")


def test_a_template_that_rewrites_earlier_turns_is_refused_or_takes_the_last_answer(
    checkpoint: Path, tmp_path: Path
) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "<think>e</think>f"},
    ]
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    model = with_template(checkpoint, tmp_path / "model", FORGETS)
    with pytest.raises(UserError, match=r"chat.jsonl:1.*turn 1.*--loss-on last_answer"):
        prepare(options(source, tmp_path / "data", model, valid_fraction=0.0), progress=False)
    given = options(source, tmp_path / "data", model, valid_fraction=0.0, loss_on="last_answer")
    prepare(given, progress=False)
    ((ids, counts),) = documents(tmp_path / "data", "train")
    text = load_tokenizer(model / "tokenizer").decode(i for i, c in zip(ids, counts, strict=True) if c)
    assert text == "<think>e</think>f"


GOOD = json.dumps({"messages": turns(1)})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": []}', "field 'messages' is not a list of messages"),
        ('{"messages": [{"role": "user"}]}', "field 'messages[0].content' is not text"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 3}]}',
        "messages[1].content"),
        ('{"messages": [{"content": "a"}]}', "field 'messages[0].role' is not text"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "has no turn of an assistant"),
        ('{"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]}', "unknown role"),
        ('{"prompt": "a", "response": null}', "holds no conversation: its fields are 'prompt', 'response'"),
        ('{"instruction": ["a"], "output": "b"}', "field 'instruction' is not text"),
        ('{"question": "a", "answer": 4}', "field 'answer' is not text"),
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
    ],
)  # fmt: skip
def test_a_bad_row_is_one_line_with_its_place(
    checkpoint: Path, tmp_path: Path, line: str, words: str
) -> None:
    source = tmp_path / "chat.jsonl"
    source.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(UserError) as error:
        prepare(options(source, tmp_path / "data", checkpoint), progress=False)
    assert f"{source}:2" in str(error.value) and words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "data").exists()


def test_what_has_no_conversations_or_no_template_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "chat.jsonl", [{"messages": turns(n)} for n in range(3)])
    plain = tmp_path / "plain"
    train_tokenizer("bpe", iter(["some text"]), 257).save(plain)
    (tmp_path / "text.txt").write_text("text")
    for given, words in (
        ([str(source), "--tokenizer", str(plain), "--rows", "chat"], "has no chat template"),
        ([str(source), "--rows", "chat"], "need the tokenizer of a model with a chat template"),
        ([str(tmp_path / "text.txt"), "--tokenizer", str(checkpoint), "--rows", "chat"], "has no fields"),
        (["embedded", "--tokenizer", str(checkpoint), "--rows", "chat"], "holds no conversations"),
        ([str(source), "--tokenizer", str(checkpoint), "--loss-on", "all"], "texts have no answers"),
        ([str(source)], "add --rows chat"),
    ):
        status = run(app, ["prepare", *given, "--out", str(tmp_path / "data")], "rdlm data")
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert status == 2 and words in message, message


def test_a_checkpoints_tokenizer_serves_for_texts(checkpoint: Path, tmp_path: Path) -> None:
    source = jsonl(tmp_path / "text.jsonl", [{"text": f"{WORDS[n % 5]} {n}"} for n in range(30)])
    for n, folder in enumerate(
        (checkpoint, checkpoint / "tokenizer", checkpoint / "tokenizer" / "tokenizer.json")
    ):
        prepare(options(source, tmp_path / str(n), folder, rows="documents"), progress=False)
        found = read_manifest(tmp_path / str(n)).tokenizer_fingerprint
        assert found == load_tokenizer(checkpoint / "tokenizer").fingerprint


def test_spans_of_sentencepiece_cover_the_text() -> None:
    tokenizer = train_tokenizer("sentencepiece", iter([*WORDS, "acht Beine hat eine Spinne"] * 3), 300)
    for text in (*WORDS, "a <|endoftext|> b", "with \u2581 itself \u6570"):
        ids, spans = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        covered = {i for start, end in spans for i in range(start, end)}
        assert covered == set(range(len(text)))
