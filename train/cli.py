"""``rdlm train``: checks the config, then hands over to the DeepSpeed launcher."""

from __future__ import annotations

from typing import Annotated

import typer

from rdlm.errors import UserError

app = typer.Typer(add_completion=False)


@app.command(
    epilog="Example: rdlm train configs/debug.yaml schedule.steps=50 optimizer.lr=0.001 --num-procs 2"
)
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="YAML file; see configs/ and docs/training.md.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change fields of the config.")
    ] = None,
    num_procs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes (of each block with --parallel); by default one per GPU, or 2 on CPU.",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs to use, for instance 2,3.", show_default=False)
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            min=0, help="Train this block alone, in OUTPUT/block_N; then see rdlm merge.", show_default=False
        ),
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Train every block in a launch of its own, then merge.")
    ] = False,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, help="--parallel: most launches at a time; by default what fits.", show_default=False
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="--parallel: restarts of a block from its last checkpoint.")
    ] = 3,
) -> int:
    """Train a model, or go on where an interrupted run of the same config stopped."""
    given = list(overrides or [])
    if parallel:
        if block is not None or devices is not None:
            name, value = ("--block", block) if block is not None else ("--devices", devices)
            raise UserError(
                name,
                value,
                "--parallel trains all blocks and shares out the GPUs itself",
                "use one of the two",
            )
        from train.parallel import launch_blocks

        return launch_blocks(config, given, num_procs, at_once, retries)
    from train.launch import launch

    chosen = given if block is None else [*given, f"block={block}"]
    return launch(config, chosen, num_procs, _parse_devices(devices))


def _parse_devices(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("--devices", text, "is not a list of numbers", "write for instance 2,3") from None
