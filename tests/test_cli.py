"""The root command: lazy, quick, and one line for the user's mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from rdlm import __version__, cli
from rdlm.command_line import checkpoint_first, new_console
from rdlm.errors import UserError


def rdlm(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rdlm", *args], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def with_command(monkeypatch: pytest.MonkeyPatch):
    """Registers a function as the command ``probe`` of a fresh root group."""

    def register(function) -> None:
        module = types.ModuleType("probe_module")
        module.app = typer.Typer()  # type: ignore[attr-defined]
        module.app.command()(function)
        monkeypatch.setitem(sys.modules, "probe_module", module)
        monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_module:app", "probe"))

    return register


def test_help_lists_every_command_without_importing_any() -> None:
    code = (
        "import sys; from rdlm import cli; status = cli.run(cli.app, ['--help'], 'rdlm');"
        "heavy = {'torch', 'deepspeed', 'litestar', 'train', 'serve', 'eval'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)
    assert "Example: rdlm" in done.stdout and "..." not in done.stdout.partition("Commands:")[2]


def test_version_and_module_entry() -> None:
    done = rdlm("--version")
    assert (done.returncode, done.stdout) == (0, f"rdlm {__version__}\n")


@pytest.mark.parametrize("args", [["trian"], ["--wrong"]])
def test_wrong_usage_is_one_line_and_status_2(args: list[str]) -> None:
    done = rdlm(*args)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert args[0] in done.stderr and "rdlm --help" in done.stderr


def test_user_error_is_one_line_and_status_2(with_command, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise UserError("--checkpoint", "runs/none", "no such folder", "train first")

    with_command(command)
    assert cli.run(cli.app, ["probe"], "rdlm") == 2
    assert capsys.readouterr().err == "rdlm: error: --checkpoint='runs/none': no such folder; train first\n"


@pytest.mark.parametrize("numbers", ["numpy", "torch"])
def test_a_memory_that_is_too_small_is_one_line_and_status_2(
    numbers: str, with_command, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than any machine has, from the libraries themselves."""
    module = pytest.importorskip(numbers)

    def command() -> None:
        module.zeros(1 << 55)

    with_command(command)
    assert cli.run(cli.app, ["probe"], "rdlm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "memory ran out" in error and "ask for less at once" in error


def test_bad_option_value_names_option_and_value(with_command, capsys: pytest.CaptureFixture[str]) -> None:
    def command(steps: int = 1) -> None:
        raise AssertionError("must not run")

    with_command(command)
    assert cli.run(cli.app, ["probe", "--steps", "many"], "rdlm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--steps" in error and "many" in error and "rdlm probe --help" in error
    assert cli.run(cli.app, ["probe", "--steps", "x" * 5000], "rdlm") == 2
    assert len(capsys.readouterr().err) < 500


def test_statuses_of_interrupt_exit_and_defect(with_command) -> None:
    def command(kind: str) -> None:
        raise {"interrupt": KeyboardInterrupt(), "exit": typer.Exit(7), "defect": ZeroDivisionError()}[kind]

    with_command(command)
    assert cli.run(cli.app, ["probe", "interrupt"], "rdlm") == 130
    assert cli.run(cli.app, ["probe", "exit"], "rdlm") == 7
    with pytest.raises(ZeroDivisionError):
        cli.run(cli.app, ["probe", "defect"], "rdlm")


def test_a_missing_dependency_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "probe", ("needs_more:app", "probe"))
    assert cli.run(cli.app, ["probe"], "rdlm") == 2
    assert "a_package_that_is_not_installed" in capsys.readouterr().err


def _commands(command: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Every command below one, with the words that call it and its context."""
    context = command.make_context(path, [], resilient_parsing=True)
    yield path, command, context
    for name in getattr(command, "commands", ()):
        if name != "lm-eval":  # whose help is that of lm_eval
            yield from _commands(command.resolve_command(context, [name])[1], f"{path} {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_every_text_as_it_is_written(name: str) -> None:
    for path, command, context in _commands(cli.load_command(name), f"rdlm {name}"):
        shown = "".join(command.get_help(context).split())
        for text in (
            command.help,
            *(p.help for p in command.params if p.name != "help" and not getattr(p, "hidden", False)),
        ):
            assert text and "".join(text.split()) in shown, path
        for name in getattr(command, "commands", ()):
            brief = command.commands[name].get_short_help_str(60)
            assert brief and not brief.endswith("..."), f"{path} {name} is cut off in the list of commands"
        assert "--install-completion" not in shown, "a part of a program has no completion of its own"


@pytest.mark.parametrize("name", cli.RENAMED)
def test_former_names_of_options_have_a_successor_and_no_second_meaning(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    below = list(_commands(cli.load_command(name), f"rdlm {name}"))
    options = {spelling for _, command, _ in below for p in command.params for spelling in p.opts}
    for old, new in cli.RENAMED[name].items():
        assert new in options and old not in options
        assert cli.new_names(name, ["-a", f"{old}=1", old, "2"]) == ["-a", f"{new}=1", new, "2"]
        assert f"{old} is called {new} now" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.SYNONYMS)
def test_names_that_vllm_has_for_options_are_taken(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.load_command(name)
    options = {spelling for p in command.params if p.param_type_name == "option" for spelling in p.opts}
    for other, ours in cli.SYNONYMS[name].items():
        assert ours in options and other not in options
        assert cli.new_names(name, [f"{other}=1", other, "2"]) == [f"{ours}=1", ours, "2"]
    assert cli.new_names(name, []) == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_a_first_word_is_the_checkpoint_wherever_there_is_one(name: str) -> None:
    """And the option goes on to work; where words have another meaning there is no such option."""
    for path, command, _ in _commands(cli.load_command(name), f"rdlm {name}"):
        options = {spelling for p in command.params for spelling in p.opts}
        words = [p.name for p in command.params if p.param_type_name == "argument"]
        if "--checkpoint" in options and not words:
            assert checkpoint_first(command, ["x", "--seed", "1"]) == ["--checkpoint", "x", "--seed", "1"], (
                path
            )
        given = [] if words else ["--checkpoint", "x"]
        assert checkpoint_first(command, given) == given, path


def test_eval_takes_the_checkpoint_as_its_metrics_first_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(cli.app, ["eval", "nll", "runs/none", "--data", "data/none"], "rdlm") == 2
    assert "data/none" in capsys.readouterr().err  # what it reads first: the words were understood
    from eval.metrics.lm_eval import with_checkpoint

    alone = ["--model_args", "checkpoint=runs/none", "--tasks", "arc"]
    assert with_checkpoint(["runs/none", "--tasks", "arc"]) == alone
    assert with_checkpoint(["runs/none", "--model_args", "num_steps=2"]) == [
        "--model_args", "checkpoint=runs/none,num_steps=2",
    ]  # fmt: skip
    assert with_checkpoint(["ls", "tasks"]) == ["ls", "tasks"] and with_checkpoint(alone) == alone


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_helps_with_an_example(name: str) -> None:
    done = rdlm(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "xample" in done.stdout and f"rdlm {name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", ""], "CHECKPOINT=''"),
        (["merge", "a", "", "--out", "o"], "RUNS=''"),
        (["export", "run", "a", ""], "OUT=''"),
        (["export", "--no-ema", "a", ""], "OUT=''"),
        (["data", "info", ""], "FOLDER=''"),
        (["data", "prepare", "embedded", "--out", ""], "--out=''"),
        (["data", "prepare", "", "--out", "o"], "SOURCE=''"),
        (["data", "images", "", "--out", "o"], "SOURCE=''"),
        (["data", "images", "a", "--valid", "", "--out", "o"], "--valid=''"),
        (["data", "prepare", "embedded", "--tokenizer", "", "--out", "o"], "--tokenizer=''"),
        (["import", "", "o"], "=''"),
        (["train", "a.yaml", ""], "=''"),
        (["generate", "a", "--prompt", "x", "--stop", ""], "--stop=''"),
        (["eval", "nll", "", "--data", "b"], "--checkpoint=''"),
        (["eval", "gen-ppl", "a", "--data", "b", "--judge", ""], "--judge=''"),
        (["inspect", "x" * 300], "cannot be read (File name too long)"),
        (["data", "prepare", "embedded", "--out", "x" * 300], "File name too long"),
    ],
)
def test_a_path_that_is_none_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(cli.app, arguments, "rdlm") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "error:" in error


def test_tables_in_a_pipe_keep_their_rows_whole(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rich.table import Table

    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("figure", *["an interval"] * 7)
    table.add_row("nll", *["3.224 [3.201, 3.246]"] * 7)
    new_console().print(table)
    assert capsys.readouterr().out.count("[3.201, 3.246]") == 7


def test_bars_in_a_file_move_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    code = (
        "import sys; from rdlm.command_line import calm_bars; calm_bars()\n"
        "from tqdm import tqdm\n"
        "for _ in tqdm(range(3), desc='bar'): __import__('time').sleep(0.2)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.count("bar:") == 2  # its first state and its last


def test_an_argument_that_is_not_utf8_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Later it would be a traceback where it is first written or printed."""
    assert cli.run(cli.app, ["inspect", os.fsdecode(b"runs/\xff")], "rdlm") == 2
    assert capsys.readouterr().err == (
        "rdlm: error: argument='runs/\\udcff': is not UTF-8; rename the file, or write the text in UTF-8\n"
    )
