"""``rdlm eval``: measurements of a checkpoint, and a report over several of them."""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from eval.registry import METRICS, load_metric
from eval.report.report import EXAMPLE, report


class Metrics(TyperGroup):
    """Lists every metric from the registry and imports the one that is run."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        listed = {name: TyperCommand(name, help=line) for name, (_, line) in METRICS.items()}
        self.commands = {**listed, **self.commands}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in METRICS:
            command, rest = typer.main.get_command(load_metric(name).command()), _renamed(rest)
            command.name = name
        return name, command, rest


def _renamed(args: list[str]) -> list[str]:
    """``--steps``, the former name of ``--num-steps``, still works."""
    if any(arg == "--steps" or arg.startswith("--steps=") for arg in args):
        print("rdlm eval: --steps is called --num-steps now; the old name will go", file=sys.stderr)
    return [
        "--num-steps" + arg.removeprefix("--steps") if arg == "--steps" or arg.startswith("--steps=") else arg
        for arg in args
    ]


app = typer.Typer(
    cls=Metrics,
    no_args_is_help=True,
    epilog="Example: rdlm eval nll --checkpoint runs/demo/model --data data/demo --num-steps 1,4,16",
)
app.command("report", epilog=EXAMPLE)(report)


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint."""
