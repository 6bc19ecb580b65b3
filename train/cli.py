"""``rdlm train``, ``plan``, ``merge`` and ``export``: what is done with training configs and runs."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from typer.core import TyperGroup

from rdlm.checkpoints.cli import export_app as published_layouts
from rdlm.command_line import new_app, new_console
from rdlm.errors import UserError
from train.process import tell

if TYPE_CHECKING:
    from train.memory_plan import Arm

train_app = new_app()
plan_app = new_app()
merge_app = new_app()
sweep_app = new_app()

Config = Annotated[
    str, typer.Argument(metavar="CONFIG", help="YAML file; see configs/ and docs/training.md.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Fields to change, as section.field=value in YAML."),
]


@train_app.command(
    epilog="Examples: rdlm train configs/debug.yaml  |  rdlm train configs/demo.yaml optimizer.lr=0.001 "
    "output=runs/lr1 --num-procs 2"
)
def train(
    config: Config,
    overrides: Overrides = None,
    num_procs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes (of each block with --parallel); by default one per GPU, or 2 on a CPU.",
            show_default=False,
        ),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="GPUs to use, for instance 2,3.", show_default=False)
    ] = None,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Resume although data, objective, seed or batch.global_size have changed; noted in the run's history.",
        ),
    ] = False,
    block: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Train this block alone, in OUTPUT/block_N; `rdlm merge` puts blocks together.",
            show_default=False,
        ),
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Train every block in processes of its own, then merge them.")
    ] = False,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --parallel: blocks that train at a time; by default as many as fit.",
            show_default=False,
        ),
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="With --parallel: restarts of a block from its last checkpoint.")
    ] = 3,
) -> int:
    """Train a model, or resume an interrupted run: the same command continues from the last checkpoint.

    A config has the sections model, objective, data, batch, optimizer and schedule, and some optional ones.
    Start from a file in configs/: debug.yaml (a minute), demo.yaml (text, four minutes on a CPU), ar_lm1b.yaml
    (the published autoregressive setting).

    OUTPUT then holds metrics.jsonl and loss.png (what happened), checkpoints/ (to resume from), model/ (to
    serve, evaluate and generate with) and logs/ (messages of libraries, one file per process).

    What to change first: output (a folder for each run), optimizer.lr, batch.global_size and batch.micro_size
    (memory), schedule.steps (updates). `rdlm plan CONFIG --memory 24GiB` says what fits. Ctrl-C saves and
    stops; `rdlm export OUTPUT OUT` turns any checkpoint into a model.
    """
    if sys.stderr.isatty():  # torch is imported next, which takes seconds; elsewhere a mistake stays one line
        tell(f"rdlm train: checking {config}")
    given = list(overrides or [])
    if allow_changes:
        given.append("allow_changes=true")
    if parallel:
        if block is not None or devices is not None:
            name, value = ("--block", block) if block is not None else ("--devices", devices)
            problem = "--parallel trains all blocks and shares out the GPUs itself"
            raise UserError(name, value, problem, "use one of the two")
        from train.launcher import launch_blocks

        return launch_blocks(config, given, num_procs, at_once, retries)
    from train.launcher import launch

    chosen = given if block is None else [*given, f"block={block}"]
    return launch(config, chosen, num_procs, _device_numbers(devices))


def _device_numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("--devices", text, "is not a list of numbers", "write for instance 2,3") from None


@sweep_app.command(epilog="Example: rdlm sweep configs/sweeps/debug.yaml --dry-run")
def sweep(
    config: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="YAML file; see configs/sweeps/ and docs/sweep.md.")
    ],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check every run and print how many updates it gets; train nothing."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write the report of the finished runs; train nothing.")
    ] = False,
) -> int:
    """Train and measure many runs with equal budgets, and put them into one report.

    Every run is `rdlm train` in processes of its own, every measurement a command of `rdlm eval`. Run again, the
    command continues where it was stopped: finished runs are kept, an interrupted one resumes. OUTPUT then holds
    plan.json, runs/, results.json and report/report.html. The exit status is 1 if a run failed; the others are
    reported.
    """
    from train.process import die_with_launcher, lock_output
    from train.sweep import Sweeper, read_sweep

    die_with_launcher()
    sweeper = Sweeper(*read_sweep(config, overrides or []), lambda line: typer.echo(line))
    if not report:
        lock = lock_output(sweeper.output, typer.echo)  # noqa: F841 - held until the command ends
        planned = sweeper.plan(dry=dry_run)
        if dry_run:
            return 0
        failed = sweeper.run(planned)
        if sweeper.commands.signal:
            typer.echo("stopped; run the same command again to continue", err=True)
            return 128 + sweeper.commands.signal
        for line in failed:
            typer.echo(f"rdlm sweep: {line}", err=True)
        typer.echo(sweeper.report())
        return 1 if failed else 0
    typer.echo(sweeper.report())
    return 0


@merge_app.command(epilog="Example: rdlm merge runs/ar/block_0 runs/ar/block_1 --out runs/ar/model")
def merge(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of `rdlm train --block N`, one per block."),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
) -> None:
    """Merge blocks that were trained alone into one checkpoint."""
    from rdlm.atomic import check_out
    from rdlm.checkpoints.folder import FILES
    from train.export import merge as merge_blocks

    check_out(out, "--out", FILES, force=True)
    typer.echo(f"wrote {merge_blocks(runs, out)}")


class ExportGroup(TyperGroup):
    """``rdlm export SOURCE OUT`` is ``rdlm export run SOURCE OUT``; a published layout is named first."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._named(ctx, args))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        return super().resolve_command(ctx, self._named(ctx, args))

    def _named(self, ctx: Any, args: list[str]) -> list[str]:
        """Options may come first: all but --help are those of ``run``."""
        named = not args or args[0] == "--help" or self.get_command(ctx, args[0]) is not None
        return args if named else ["run", *args]


_EXPORT_EXAMPLES = (
    "Examples: rdlm export runs/demo exported/demo  |  rdlm export huginn runs/debug/model exported/huginn"
)
export_app = new_app(cls=ExportGroup, no_args_is_help=True, epilog=_EXPORT_EXAMPLES)


@export_app.callback()
def exporting() -> None:
    """Turn a training checkpoint into a model (`rdlm export RUN OUT`), or a model into a published layout
    (`rdlm export huginn MODEL OUT`)."""


@export_app.command("run", epilog="Example: rdlm export runs/demo exported/demo --which best")
def export_run(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="Output folder of `rdlm train`, or one of its checkpoints/step_N."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Checkpoint folder to create.")],
    which: Annotated[
        str,
        typer.Option(
            help="Checkpoint of a run: last, best (needs checkpoint.keep_best) or the number of a step."
        ),
    ] = "last",
    ema: Annotated[
        bool | None,
        typer.Option(
            help="Export the moving averages of the weights, or not [as ema.export says].", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what OUT holds.")] = False,
    weights: Annotated[Literal["last", "ema"] | None, typer.Option(hidden=True)] = None,
) -> None:
    """Export a checkpoint of a run, finished or not. The model can be served, evaluated and used to generate.
    Needs little memory."""
    if weights is not None:
        typer.echo("rdlm export: --weights is called --ema or --no-ema now; the old name will go", err=True)
        ema = weights == "ema"
    if which not in ("last", "best") and not which.isdecimal():
        raise UserError("--which", which, "is neither last, best nor a number", "write for instance 2000")
    from rdlm.atomic import check_out
    from rdlm.checkpoints.folder import FILES
    from train.export import export, find_checkpoint

    check_out(out, "OUT", FILES, force)

    def warn(text: str) -> None:
        typer.echo(f"warning: {text}", err=True)

    while True:
        checkpoint = find_checkpoint(source, which, warn)
        try:
            export(checkpoint, out, averaged=ema)
            break
        except FileNotFoundError:
            if checkpoint.exists():
                raise  # else a run that goes on has removed it, and has written others
    typer.echo(f"{out}: exported from {checkpoint}. Try: rdlm serve --checkpoint {out}")


export_app.registered_commands += published_layouts.registered_commands

UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@plan_app.command(epilog="Example: rdlm plan configs/ar_lm1b.yaml --memory 24GiB --num-devices 4")
def plan(
    config: Config,
    memory: Annotated[str, typer.Option(help="Memory of one device, for instance 24GiB or 900MB.")],
    overrides: Overrides = None,
    num_devices: Annotated[int, typer.Option(min=1, help="Number of devices, or of processes on a CPU.")] = 1,
    gpu: Annotated[
        bool, typer.Option(help="Predict for GPUs, where AdamW updates all weights at once.")
    ] = True,
) -> int:
    """Predict memory per device by part; suggest blocks, micro-batch, recomputation, ZeRO stage and mode.
    The exit status is 1 if nothing fits."""
    budget = size(memory)
    from train.config_file import load
    from train.memory_plan import arms
    from train.pretrain import count_parameters

    settings = load(config, overrides or [])
    settings.batch.accumulation(num_devices)
    count_parameters(settings)
    rows: dict[tuple[int, bool, int], Arm] = {}
    chosen: Arm | None = None
    for arm in arms(settings, num_devices, gpu):
        if chosen is not None and arm.num_blocks > chosen.num_blocks:
            break
        fits = arm.memory.total <= budget
        kind = (arm.num_blocks, arm.config.activation_checkpointing, arm.config.deepspeed.zero_stage)
        if kind not in rows and (
            fits or arm.config.batch.micro_size == 1
        ):  # the largest micro-batch that fits, or the least there is
            rows[kind] = arm
        if fits and chosen is None:
            chosen = arm
    _show(list(rows.values()), chosen, budget)
    return 0 if chosen is not None else 1


def size(text: str) -> int:
    """Bytes of ``24GiB``; raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(MiB|GiB|MB|GB)", text)
    if match is None:
        raise UserError("--memory", text, "is not a size", "write for example 24GiB, 80GB or 900MiB")
    return int(float(match[1]) * UNITS[match[2]])


COLUMNS = ("B", "recom.", "ZeRO", "micro", "weights", "optim.", "grads", "activ.", "total", "")
"""Columns of the table of ``rdlm plan``; together they fit into 80 characters."""


def plan_row(arm: Arm, verdict: str) -> Sequence[str]:
    """The cells of one way to train, in the order of COLUMNS."""
    c, m = arm.config, arm.memory
    parts = (m.parameters, m.optimizer, m.gradients, m.activations, m.total)
    return (
        str(arm.num_blocks),
        "yes" if c.activation_checkpointing else "no",
        str(c.deepspeed.zero_stage),
        str(c.batch.micro_size),
        *(f"{part / 2**30:.2f}" for part in parts),
        verdict,
    )


def _show(rows: list[Arm], chosen: Arm | None, budget: int) -> None:
    table = Table(title="GiB of one device at the peak of an update", padding=(0, 0, 0, 1))
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for arm in rows:
        verdict = "suggested" if arm == chosen else ("fits" if arm.memory.total <= budget else "")
        table.add_row(*plan_row(arm, verdict))
    console = new_console()
    console.print(table)
    console.print(
        "B: blocks. recom.: activations recomputed in the backward pass. micro: sequences of a forward pass.\n"
        "Not included: the fixed cost of a process, 0.3 GiB on a CPU, the CUDA context on a GPU."
    )
    if chosen is None:
        console.print(
            "nothing fits: take more devices, shorter sequences, or offload (deepspeed.offload_optimizer=cpu)"
        )
    else:
        console.print(f"suggested, {chosen.mode}, {chosen.num_blocks} block(s):")
        mode = " --parallel" if chosen.mode == "parallel" else ""
        console.print(
            f"rdlm train CONFIG {' '.join(chosen.settings)} --num-procs {chosen.processes}{mode}",
            soft_wrap=True,
        )
