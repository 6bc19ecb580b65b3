"""``rdlm import`` and ``rdlm export``: checkpoints of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_IMPORT_EXAMPLE = "Example: rdlm import huginn tomg-group-umd/huginn-0125 runs/huginn-0125"
_EXPORT_EXAMPLE = "Example: rdlm export huginn runs/onestep/model exported/onestep"
import_app = typer.Typer(no_args_is_help=True, epilog=_IMPORT_EXAMPLE)
export_app = typer.Typer(no_args_is_help=True, epilog=_EXPORT_EXAMPLE)
Force = Annotated[bool, typer.Option("--force", help="Replace what OUT holds.")]


@import_app.callback()
def importing() -> None:
    """Turn a published checkpoint into one of rdlm."""


@export_app.callback()
def exporting() -> None:
    """Write a checkpoint in a published layout."""


@import_app.command("huginn", epilog=_IMPORT_EXAMPLE)
def huginn_in(
    source: Annotated[
        str, typer.Argument(help="Folder in the layout of tomg-group-umd/huginn-0125, or its id on the hub.")
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    name: Annotated[str | None, typer.Option(help="Model name on the server [the source's].")] = None,
    zero_state: Annotated[
        bool,
        typer.Option(
            "--zero-state", help="Start the recurrence from zero: greedy answers then depend on no seed."
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Read a Huginn of Hugging Face layout: weights bit by bit, tokenizer, and the config's meaning. Needs little memory."""
    from rdlm.checkpoints.convert.huginn import import_huginn

    import_huginn(source, out, name=name, zero_state=zero_state, force=force)
    typer.echo(f"{out}: imported. Try: rdlm serve --checkpoint {out}")


@export_app.command("huginn", epilog=_EXPORT_EXAMPLE)
def huginn_out(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder of a huginn without noise conditioning.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    shard_gb: Annotated[
        float, typer.Option(min=1e-6, help="Largest weights file in GB, unless one tensor is larger.")
    ] = 5.0,
    force: Force = False,
) -> None:
    """Write a Hugging Face folder that the published modelling code loads. Needs little memory."""
    from rdlm.checkpoints.convert.huginn import export_huginn

    export_huginn(checkpoint, out, shard_bytes=int(shard_gb * 1e9), force=force)
    typer.echo(f"{out}: exported")
