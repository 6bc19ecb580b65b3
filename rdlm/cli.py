"""The ``rdlm`` command: the one composition root. Commands are named by string and imported only when they
run."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Abort, TyperException

from rdlm import __version__
from rdlm.command_line import calm_bars, checkpoint_first, new_app, refuse_empty_texts
from rdlm.errors import UserError, out_of_memory, quoted, reason

COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("train.data_cli:app", "Prepare text as token shards and images as arrays."),
    "plan": ("train.cli:plan_app", "Predict the memory of a config and suggest how to train it."),
    "train": ("train.cli:train_app", "Train a model from a config, under DeepSpeed."),
    "sweep": ("train.cli:sweep_app", "Train and measure many runs with equal budgets; one report."),
    "merge": ("train.cli:merge_app", "Merge blocks that were trained alone into one checkpoint."),
    "generate": ("serve.generate_cli:app", "Continue prompts with a checkpoint, without a server."),
    "chat": ("serve.chat_cli:app", "Chat with a checkpoint on the terminal, without a server."),
    "images": ("serve.images_cli:app", "Generate images with a checkpoint of family dit."),
    "serve": ("serve.cli:app", "Serve a checkpoint over an OpenAI-compatible HTTP interface."),
    "eval": ("eval.cli:app", "Measure a checkpoint: likelihood by K, texts, tasks, images."),
    "import": ("rdlm.checkpoints.cli:import_app", "Import a published checkpoint."),
    "convert": ("rdlm.checkpoints.cli:convert_app", "Make a plain transformer recurrent."),
    "quantize": ("rdlm.checkpoints.cli:quantize_app", "Store a checkpoint's weights as int8 or int4."),
    "logits": ("rdlm.checkpoints.cli:logits_app", "Compute the logits of given token ids at several K."),
    "inspect": (
        "rdlm.checkpoints.cli:inspect_app",
        "Describe a checkpoint and the commands that apply to it.",
    ),
    "export": (
        "train.cli:export_app",
        "Export a training checkpoint, or a model for other software.",
    ),
}
"""Command name -> (``module:typer app``, one line of help)."""

RENAMED: dict[str, dict[str, str]] = {
    "convert": {"--max-steps": "--max-num-steps"},
    "eval": {
        "--steps": "--num-steps", "--bridge": "--sampler", "--solver": "--sampler", "--teacher": "--judge",
        "--teacher-dtype": "--judge-dtype", "--rows": "--num-examples",
    },
    "generate": {"--bridge": "--sampler"},
    "images": {"--solver": "--sampler"},
    "plan": {"--devices": "--num-devices"},
    "serve": {"--default-steps": "--num-steps", "--max-steps": "--max-num-steps"},
}  # fmt: skip
"""Command -> former name of an option -> its name. The former ones still work."""

UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
    errno.ELOOP, errno.EIO, errno.ESTALE,
)  # fmt: skip
"""What an operating system says of paths and disks that a user can change."""

SYNONYMS: dict[str, dict[str, str]] = {
    "serve": {
        "--model": "--checkpoint", "--served-model-name": "--model-name", "--max-model-len": "--max-len",
        "--max-num-seqs": "--max-slots",
    },
    "generate": {"--model": "--checkpoint"},
    "chat": {"--model": "--checkpoint"},
}  # fmt: skip
"""Command -> name of an option in vLLM -> its name here."""

EXAMPLE = "Example: rdlm train configs/demo.yaml && rdlm serve --checkpoint runs/demo/model"


def load_command(name: str) -> Any:
    """The command of that name, imported now. Raises UserError if a package it needs is not installed."""
    module_name, _, attribute = COMMANDS[name][0].partition(":")
    try:
        app = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "rdlm", "train", "serve", "eval"):
            raise
        raise UserError(
            f"rdlm {name}", missing, "a package this command needs is not installed", "run `make install`"
        ) from error
    command = typer.main.get_command(app)
    command.name = name
    refuse_empty_texts(command)
    return command


def new_names(command: str, args: Sequence[str]) -> list[str]:
    """The arguments with today's names of options, and a line on stderr for every former one."""
    renamed, synonyms, found = RENAMED.get(command, {}), SYNONYMS.get(command, {}), []
    for arg in args:
        name, equals, value = arg.partition("=")
        name = synonyms.get(name, name)
        if name in renamed:
            print(
                f"rdlm {command}: {name} is called {renamed[name]} now; the old name will go", file=sys.stderr
            )
        found.append(renamed.get(name, name) + equals + value)
    return found


class LazyGroup(TyperGroup):
    """Lists every command from the table; imports the one that is run (or completed)."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands.update({name: TyperCommand(name, help=text) for name, (_, text) in COMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, stub, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, stub, rest
        command = load_command(name)
        return name, command, checkpoint_first(command, new_names(name, rest))


app = new_app(cls=LazyGroup, epilog=EXAMPLE, context_settings={"max_content_width": 110})


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rdlm {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Train recurrent-depth language models and serve them, with the number of core steps K chosen per
    request."""


def run(program: typer.Typer, args: Sequence[str], prog_name: str) -> int:
    """Run a typer app; returns the exit status: the user's mistake is one line on stderr and 2, Ctrl-C is
    130.

    Any other exception is a defect of ours and keeps its traceback. A command that returns an int sets the
    status with it.
    """
    try:
        for given in args:
            if any("\ud800" <= character <= "\udfff" for character in given):
                raise UserError(
                    "argument", given, "is not UTF-8", "rename the file, or write the text in UTF-8"
                )
        result = typer.main.get_command(program).main(
            args=list(args), prog_name=prog_name, standalone_mode=False
        )
    except UserError as error:
        return _fail(prog_name, str(error), 2)
    except TyperException as error:  # wrong usage: unknown option, missing argument, value of the wrong type
        return _wrong_usage(prog_name, error)
    except Abort:
        return _fail(prog_name, "aborted", 1)
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # a path that cannot be used, a disk that is full
        if error.errno not in UNUSABLE:
            raise
        where = f"{error.filename!r}: " if error.filename is not None else ""
        problem = f"{where}{os.strerror(error.errno)}; name another path, or make room"
        return _fail(prog_name, problem, 2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        problem = f"memory ran out ({reason(error)}); ask for less at once, as by a smaller --batch-size"
        return _fail(prog_name, problem, 2)
    return result if isinstance(result, int) else 0


def _wrong_usage(prog_name: str, error: TyperException) -> int:
    message = error.format_message().rstrip(".")
    if not message:  # typer has already shown the help, in answer to no arguments
        return error.exit_code
    if isinstance(error.__cause__, ValidationError):  # typer's own message leaves out the value
        message += f", got {quoted(error.__cause__.errors()[0]['input'])}"
    context = getattr(error, "ctx", None)
    return _fail(
        prog_name,
        f"{message}; see `{context.command_path if context else prog_name} --help`",
        error.exit_code,
    )


def _fail(prog_name: str, message: str, status: int) -> int:
    print(f"{prog_name}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def main() -> NoReturn:
    """Entry point of the console script; without arguments it shows the help."""
    calm_bars()
    sys.exit(run(app, sys.argv[1:] or ["--help"], "rdlm"))
