"""``rdlm eval``: measurements of a checkpoint, and a report over several of them."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from eval.registry import METRICS, load_metric
from eval.report.report import EXAMPLE, report
from rdlm.command_line import checkpoint_first, new_app, refuse_empty_texts


class Metrics(TyperGroup):
    """Lists every metric and imports the one that is run."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        listed = {name: TyperCommand(name, help=line) for name, line in METRICS.items()}
        self.commands = {**listed, **self.commands}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name in METRICS:
            command = typer.main.get_command(load_metric(name).command())
            command.name = name
            refuse_empty_texts(command)
        return name, command, rest if command is None else checkpoint_first(command, rest)


app = new_app(
    cls=Metrics,
    no_args_is_help=True,
    epilog="Example: rdlm eval nll runs/demo/model --data data/demo --num-steps 1,4,16",
)
app.command("report", epilog=EXAMPLE)(report)


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint."""
