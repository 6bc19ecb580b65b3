"""How every command of ``rdlm`` is made."""

from __future__ import annotations

from typing import Any

import typer


def new_app(**settings: Any) -> typer.Typer:
    """A typer app. Its help shows texts as they are written: typer's default takes [brackets] for markup and
    drops them."""
    return typer.Typer(add_completion=False, rich_markup_mode=None, **settings)
