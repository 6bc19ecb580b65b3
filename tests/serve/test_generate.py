"""``rdlm generate``: several prompts at several K, from options and files, and options that mean nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from rdlm.checkpoints.folder import save
from rdlm.errors import UserError
from rdlm.sampling_params import NUMBERS
from serve.chat_cli import chat
from serve.engine.engine import Served
from serve.generate_cli import _parse_steps, _read_prompts, generate
from serve.options import REQUEST


@pytest.fixture(scope="module")
def checkpoint(make_served: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Path:
    served = make_served()
    folder = tmp_path_factory.mktemp("generate") / "tiny"
    save(folder, served.runner.denoiser, served.config, served.tokenizer)  # type: ignore[attr-defined]
    return folder


def test_several_prompts_are_continued_as_each_alone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["in the", "and it came to pass in those days", "word"]
    alone = []
    for prompt in prompts:
        generate(checkpoint, [prompt], num_steps="3", max_tokens=5, seed=1)
        alone.append(capsys.readouterr().out.split("\n", 1)[1].rsplit("\n[", 1)[0])
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts[1:]) + "\n\n")
    generate(checkpoint, prompts[:1], prompt_file=file, num_steps="1,3", max_tokens=5, seed=1)
    printed = capsys.readouterr().out
    at_three = printed[printed.index("K = 3\n") + 6 :]
    assert printed.startswith("K = 1\n") and at_three.startswith("".join(answer + "\n\n" for answer in alone))
    assert printed.count("[15 tokens") == 2


def test_a_wavefront_of_one_position_is_plain_decoding(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for more in ({}, {"wavefront": 1}, {"wavefront": 8, "inner_steps": 6}, {"wavefront": 8}):
        generate(checkpoint, ["in the"], num_steps="6", max_tokens=5, seed=1, **more)
        printed.append(capsys.readouterr().out.rsplit("\n[", 1)[0])
    assert printed[0] == printed[1] == printed[2] and len(printed[3]) > len("K = 6\nin the")


@pytest.mark.parametrize("run", [generate, chat])
def test_fields_of_requests_are_options(run: Callable[..., None]) -> None:
    """Numbers of SamplingParams without exception, with the type and the words of the schema."""
    options = inspect.signature(run).parameters
    for name, (kind, valid) in NUMBERS.items():
        assert get_args(options[name].annotation)[0] == kind | None
        assert valid.meaning in get_args(options[name].annotation)[1].help
    kinds = {name: get_args(options[name].annotation)[0] for name in REQUEST}
    assert kinds["stop"] == list[str] | None and kinds["stop_token_id"] == list[int] | None
    assert kinds["ignore_eos"] == bool | None and kinds["wavefront"] == int | None


def test_options_act_as_the_fields_that_they_set(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(**more: Any) -> str:
        generate(checkpoint, ["in the"], num_steps="3", max_tokens=12, seed=1, **more)
        return capsys.readouterr().out.split("\n", 1)[1].rsplit("\n[", 1)[0]

    plain, greedy = printed(), printed(temperature=0)
    assert printed(min_p=1) == printed(top_k=1) == greedy != plain
    answer = greedy.removeprefix("in the")
    assert printed(temperature=0, stop=[answer[2:4]]) == "in the" + answer[: answer.index(answer[2:4])]
    assert printed(temperature=0, exit="kl", exit_threshold=0) == greedy
    assert printed(temperature=0, repetition_penalty=5) != greedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_p": 2}, r"^--min-p=2: .*less than or equal to 1"),
        ({"stop": [""]}, r"^--stop=\[''\]: an empty string would end every text; remove it"),
        ({"wavefront": 65}, r"^--wavefront=65: "),
        ({"num_steps": "9"}, r"^--num-steps='9': K = 9 is out of range; this model takes 1 to 8"),
        ({"max_tokens": 1000}, r"^--max-tokens=1000: .*exceed the context"),
        ({"exit": "taste"}, r"^--exit='taste': there is no 'taste'; use one of"),
        ({"draft_steps": 2}, r"^--draft-steps=.*--kv-cache full"),
        ({"order": "confidence"}, r"^--order='confidence': this model decodes left to right"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(
    options: dict[str, Any], words: str, checkpoint: Path
) -> None:
    with pytest.raises(UserError, match=words):
        generate(checkpoint, ["in the"], **options)


def test_prompts_of_json_lines_may_have_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a\\nb"\n\n"c"\n')
    assert _read_prompts(file) == ["a\nb", "c"]
    file.write_text('"a"\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON string"):
        _read_prompts(file)


def test_lines_of_a_prompt_file_end_where_its_lines_do(tmp_path: Path) -> None:
    """A byte order mark is no text, and JSON may hold U+2028, which Python takes for the end of a line."""
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('\ufeff"a\u2028b"\r\n"c"'.encode())
    assert _read_prompts(file) == ["a\u2028b", "c"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa\x0cb\x85\r\nc\r\n".encode())
    assert _read_prompts(file) == ["a\x0cb\x85", "c"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_prompt_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"^--prompt-file=.*prompts.txt.*cannot be read"):
        _read_prompts(file)


def test_a_missing_prompt_is_one_line(checkpoint: Path) -> None:
    with pytest.raises(UserError, match="^--prompt=.*--prompt-file"):
        generate(checkpoint)


@pytest.mark.parametrize(
    "text", ["", "1,", ",1", "1_0", "+1", "-1", "1.5", "\u0661", "\u00b2", "9" * 5000, "1 2", "0x1"]
)
def test_numbers_are_ascii_digits(text: str) -> None:
    with pytest.raises(UserError, match="^--num-steps="):
        _parse_steps(text)


def test_lists_of_k() -> None:
    assert _parse_steps(None) == [] and _parse_steps("1, 4,16") == [1, 4, 16]
