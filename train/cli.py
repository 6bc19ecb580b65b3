"""``rdlm train``: checks the config, then hands over to the DeepSpeed launcher."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: rdlm train configs/debug.yaml schedule.steps=50 optimizer.lr=0.001 --num-procs 2")
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file; see configs/ and docs/training.md.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change fields of the config.")] = None,
    num_procs: Annotated[
        int | None, typer.Option(min=1, help="Processes; by default one per GPU, or 2 on CPU.", show_default=False)
    ] = None,
) -> int:
    """Train a model, or go on where an interrupted run of the same config stopped."""
    from train.launch import launch

    return launch(config, overrides or [], num_procs)
