"""``rdlm merge``: blocks that were trained alone, put together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: rdlm merge runs/ar/block_0 runs/ar/block_1 --out runs/ar/model")
def merge(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of `rdlm train --block N`, one per block."),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
) -> None:
    """Put blocks that were trained alone together into one checkpoint."""
    from train.merge import merge as merge_blocks

    typer.echo(f"wrote {merge_blocks(runs, out)}")
