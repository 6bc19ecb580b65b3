"""How every command of ``rdlm`` is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import typer

from rdlm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 200
"""Columns of what goes into a file or a pipe: rich's default of 80 breaks the rows of a table there."""
BAR_SECONDS = "10"
"""Between two states of a progress bar that goes into a file, where each takes a line's worth of text."""

MAY_BE_EMPTY = ("prompt", "system")
"""Parameters of commands that are texts for a model."""


def new_app(**settings: Any) -> typer.Typer:
    """A typer app. Its help shows texts as they are written: typer's default takes [brackets] for markup and
    drops them."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, **settings)


def checkpoint_first(command: Any, args: Sequence[str]) -> list[str]:
    """The arguments of a command; where it has an option --checkpoint and no arguments of its own, a first word
    alone is the checkpoint."""
    options = {name for parameter in command.params for name in parameter.opts}
    takes_words = any(parameter.param_type_name == "argument" for parameter in command.params)
    first = "--checkpoint" in options and not takes_words and bool(args) and not args[0].startswith("-")
    return ["--checkpoint", *args] if first else list(args)


def refuse_empty_texts(command: Any) -> None:
    """An empty string is what a shell makes of a variable that is not set: as a path it would be the current folder,
    as an option no option."""
    for each in getattr(command, "commands", {}).values():
        refuse_empty_texts(each)
    for parameter in command.params:
        if parameter.name not in MAY_BE_EMPTY and parameter.default != "":
            parameter.process_value = partial(_not_empty, parameter.process_value, parameter.opts[-1])


def _not_empty(process: Callable[[Any, Any], Any], name: str, ctx: Any, value: Any) -> Any:
    if value == "" or (isinstance(value, list | tuple) and "" in value):
        remedy = "give a value, or leave it out"
        raise UserError(name if name.startswith("-") else name.upper(), "", "is empty", remedy)
    return process(ctx, value)


def new_console() -> Console:
    """Where tables are printed: as wide as the terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
    return Console(width=width)


def calm_bars() -> None:
    """Let tqdm's bars, those of libraries too, move rarely where stderr is no terminal. To be called before tqdm
    is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", BAR_SECONDS)
