"""``rdlm chat``: messages from a pipe, K in between, and what cannot be answered."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import rdlm
from rdlm.checkpoints.folder import save
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from serve.api.chat_template import ChatTemplate
from serve.chat_cli import chat
from serve.engine.engine import Served


@pytest.fixture(scope="module")
def checkpoint(make_served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = make_served()
    folder = tmp_path_factory.mktemp("chat") / "tiny"
    save(folder, served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def say(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def pipe(*lines: str, **options: object) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        chat(checkpoint, temperature=0, max_tokens=4, **options)  # type: ignore[arg-type]
        return capsys.readouterr().out

    return pipe


def test_answers_are_those_of_the_rendered_conversation(
    say: Callable[..., str], checkpoint: Path, tokenizer: Tokenizer
) -> None:
    model, template = rdlm.load(str(checkpoint)), ChatTemplate.of(tokenizer)
    assert template is not None
    messages, expected = [{"role": "system", "content": "be brief"}], ""
    for text, k in (("in the", 3), ("word", 2)):
        messages.append({"role": "user", "content": text})
        ids = tokenizer.encode(template.render(messages, {}))
        [answer] = model.generate([ids], num_steps=k, max_tokens=4, temperature=0)
        messages.append({"role": "assistant", "content": answer.text})
        expected += answer.text + "\n"
    assert say("in the", "", "/k 2", "word", system="be brief", num_steps=3) == expected


def test_a_new_conversation_knows_nothing_of_the_last(say: Callable[..., str]) -> None:
    again = say("in the", "/new", "in the", "/exit", "word").splitlines()
    assert len(again) == 2 and again[0] == again[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/k 99", "--num-steps=99: is out of range; this model takes 1 to 8"),
        ("/help", "there is no such command; /k N"),
        ("word " * 500, "fill the context"),
        ("/k " + "9" * 5000, "there is no such command"),
        ("/k \u0663", "there is no such command"),
        ("in \udcff", "message=.*not UTF-8"),
    ],
)
def test_what_cannot_be_answered_is_one_line(say: Callable[..., str], line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        say(line)


def test_a_checkpoint_without_a_template_is_named(
    make_served: Callable[..., Served], tmp_path: Path, checkpoint: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "plain")
    for file in (tmp_path / "plain" / "tokenizer").glob("chat_template*"):
        file.unlink()
    config = tmp_path / "plain" / "tokenizer" / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields.pop("chat_template", None)
    config.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"^--checkpoint=.*no chat template.*rdlm generate"):
        chat(tmp_path / "plain")


def test_bytes_that_are_not_utf8_are_a_wrong_message(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a pipe in a UTF-8 locale, where reading them would raise."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"in the\n\xff\nword\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="not UTF-8"):
        chat(checkpoint, temperature=0, max_tokens=4)
    assert len(capsys.readouterr().out.splitlines()) >= 1, "what came before is answered"
