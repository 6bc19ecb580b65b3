"""What a server finds wrong with a checkpoint before it listens to anybody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rdlm.checkpoints.folder import save
from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError
from serve.engine.engine import Served
from serve.process import _load
from serve.settings import EngineSettings


def write(served: Served, folder: Path) -> Path:
    save(folder / "tiny", served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    return folder / "tiny"


def test_ids_that_no_text_has_are_said_at_start_up(
    make_served: Callable[..., Served],
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _load(write(make_served(vocab_size=tokenizer.vocab_size + 100), tmp_path / "padded"), EngineSettings())
    assert capsys.readouterr().err.splitlines() == [
        "rdlm: the tokenizer has 300 ids and the model 400: ids from 300 on are never drawn"
    ]
    _load(write(make_served(), tmp_path / "equal"), EngineSettings())
    assert capsys.readouterr().err == ""


def test_a_chat_template_that_does_not_compile_ends_the_command(
    make_served: Callable[..., Served], tmp_path: Path
) -> None:
    folder = write(make_served(), tmp_path)
    (folder / "tokenizer" / "chat_template.jinja").write_text("{% for m in messages %}\n{% endif %}")
    with pytest.raises(UserError, match=r"chat_template.*endif.*line 2") as caught:
        _load(folder, EngineSettings())
    assert len(str(caught.value).splitlines()) == 1
