"""``rdlm eval depth``: accuracy against K on generated tasks, for a checkpoint that was trained on them."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.options import Checkpoint, Device, Out, Plot, Seed, numbers, usable_device
from eval.output import write_json
from eval.wording import difference, with_interval
from rdlm.sampling_params import Order


def depth(
    checkpoint: Checkpoint,
    task: Annotated[
        str,
        typer.Option(
            help="s3, s5: running products; pointer16: hops over 16 nodes; latin5: blanks of 5 x 5 cells."
        ),
    ] = "s3",
    lengths: Annotated[
        str,
        typer.Option(help="Positions, hops or blanks with commas; more than in training is extrapolation."),
    ] = "16,24",
    steps: Annotated[
        str | None,
        typer.Option(
            help="Values of K with commas [1,2,4,8,16,32,64,128; a sampling checkpoint only goes to its own largest]."
        ),
    ] = None,
    order: Annotated[
        Order | None,
        typer.Option(help="Of masked checkpoints: which answers come into sight first [random]."),
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Held-out examples of each length.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Share of right answers to a generated task against K, with 95 % bootstrap intervals over examples."""
    import numpy as np
    from tqdm import tqdm

    from eval.convergence import evaluate_convergence
    from eval.depth import as_trained, check_task, choose_order, choose_steps, evaluate_depth
    from eval.plots import plot_depth
    from eval.provenance import origin
    from rdlm.checkpoints.folder import load
    from rdlm.data.synthetic import parse_task

    parsed = [parse_task(task, length) for length in numbers("--lengths", lengths, int)]
    loaded = load(checkpoint, device=usable_device(device))
    shown_first = choose_order(order, loaded)
    tasks = [as_trained(loaded, each) for each in parsed]
    for each in tasks:
        check_task(loaded, task, each)
    ks = choose_steps(None if steps is None else numbers("--steps", steps, int), loaded)
    results: list[dict[str, Any]] = []
    settling: dict[str, Any] = {}
    with tqdm(total=rows * len(tasks), unit="example", desc=f"K = {', '.join(map(str, ks))}") as bar:
        for each in tasks:
            results += evaluate_depth(
                loaded,
                each,
                ks,
                rows=rows,
                seed=seed,
                batch_size=batch_size,
                order=shown_first,
                progress=bar.update,
            )
            if ks[-1] > 1 and loaded.config.objective.k_meaning == "thinking":
                shown = each.rows(np.arange(min(rows, batch_size)), seed, "test")
                settling[str(each.size)] = evaluate_convergence(loaded, [shown], ks[-1], seed=seed)
    first = tasks[0]
    data = {
        "task": task,
        "unit": first.unit,
        "whole": first.whole,
        "split": "test",
        "rows": rows,
        "seed": seed,
    }
    report = {
        **origin("depth", checkpoint, loaded.config),
        "data": data,
        "order": shown_first,
        "chance": first.chance,
    }
    report |= {"results": results, "convergence": settling}
    _show(report)
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_depth(report, plot)


def _show(report: dict[str, Any]) -> None:
    checkpoint, data = report["checkpoint"], report["data"]
    order = "" if report["order"] is None else f"; answers come into sight in {report['order']} order"
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}): {data['task']}",
        caption=f"{data['rows']:,} held-out examples of each length; chance is {report['chance']:.3f}{order}",
    )
    smallest = report["results"][0]["K"]
    whole = {"last": "last position", "valid": "valid as a whole"}[data["whole"]]
    for name in (
        data["unit"],
        "K",
        "right [95 %]",
        f"against K = {smallest}",
        "against the K before",
        f"{whole} [95 %]",
    ):
        table.add_column(name, justify="right")
    for r in report["results"]:
        compared = [
            "" if r["K"] == smallest else difference(r[name], r[f"{name}_interval"])
            for name in ("delta", "change")
        ]
        cells = [with_interval(r[name], r[f"{name}_interval"]) for name in ("accuracy", data["whole"])]
        table.add_row(str(r["length"]), str(r["K"]), cells[0], *compared, cells[1])
    Console().print(table)
