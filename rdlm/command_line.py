"""How every command of ``rdlm`` is made."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

FILE_WIDTH = 200
"""Columns of what goes into a file or a pipe: rich's default of 80 breaks the rows of a table there."""
BAR_SECONDS = "10"
"""Between two states of a progress bar that goes into a file, where each takes a line's worth of text."""


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
