"""``rdlm plan``: what a config needs, and the least harmful way of training that fits into a memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from rdlm.errors import UserError

if TYPE_CHECKING:
    from train.memory_plan import Arm

app = typer.Typer(add_completion=False)
UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


@app.command(epilog="Example: rdlm plan configs/ar_lm1b.yaml --memory 24GiB --devices 4")
def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of `rdlm train`.")],
    memory: Annotated[str, typer.Option(help="What one device has, for instance 24GiB or 900MB.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Change fields of the config.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices, or processes on a CPU.")] = 1,
    gpu: Annotated[
        bool, typer.Option(help="Predict for GPUs: AdamW works on all weights at once there.")
    ] = True,
) -> int:
    """Predict memory per device by part; suggest blocks, micro-batch, recomputation, ZeRO stage and mode. Exit status 1: none fits."""
    budget = size(memory)
    from train.memory_plan import arms
    from train.settings import load

    rows: dict[tuple[int, bool, int], Arm] = {}
    chosen: Arm | None = None
    for arm in arms(load(config, overrides or []), devices, gpu):
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


def _show(rows: list[Arm], chosen: Arm | None, budget: int) -> None:
    table = Table(title="GiB of one device at the peak of an update")
    for column in (
        "B",
        "recompute",
        "ZeRO",
        "micro-batch",
        "mode",
        "weights",
        "optimizer",
        "gradients",
        "activations",
        "total",
        "",
    ):
        table.add_column(column, justify="right")
    for arm in rows:
        c, m = arm.config, arm.memory
        parts = [
            f"{part / 2**30:.2f}" for part in (m.parameters, m.optimizer, m.gradients, m.activations, m.total)
        ]
        verdict = "suggested" if arm == chosen else ("fits" if m.total <= budget else "")
        kind = [
            str(arm.num_blocks),
            "yes" if c.activation_checkpointing else "no",
            str(c.deepspeed.zero_stage),
        ]
        table.add_row(*kind, str(c.batch.micro_size), *parts, verdict)
    console = Console()
    console.print(table)
    console.print(
        "again: activations recomputed. Without the fixed cost of a process: 0.3 GiB on a CPU; on a GPU its CUDA context."
    )
    if chosen is None:
        console.print(
            "nothing fits: take more devices, shorter sequences, or offload (deepspeed.offload_optimizer=cpu)"
        )
    else:
        console.print(f"suggested, {chosen.mode}, {chosen.num_blocks} block(s):")
        console.print(
            f"rdlm train CONFIG {' '.join(chosen.settings)} --num-procs {chosen.processes}", soft_wrap=True
        )
