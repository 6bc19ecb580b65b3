"""``rdlm eval depth``: accuracy against K on generated tasks, for a checkpoint that was trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from eval.output import write_json
from rdlm.errors import UserError


def depth(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    group: Annotated[Literal["s3", "s5"], typer.Option(help="Group whose running products are asked for.")] = "s3",
    lengths: Annotated[str, typer.Option(help="Positions with commas; longer than in training is extrapolation.")] = "16,24",
    steps: Annotated[
        str | None, typer.Option(help="Values of K with commas [1,2,4,8,16,32,64 as far as the checkpoint goes].")
    ] = None,
    rows: Annotated[int, typer.Option(min=2, help="Held-out examples of each length.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of one forward pass.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of examples, noise and bootstrap.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the results with their provenance as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a figure of accuracy against K as PNG.")] = None,
) -> None:
    """Share of right running products against K, with 95 % bootstrap intervals over examples."""
    import torch
    from tqdm import tqdm

    from eval.depth import check_task, choose_steps, evaluate_depth, plot_depth
    from rdlm.checkpoint import load
    from rdlm.tasks import GroupProduct

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", device, "torch sees no GPU", "use --device cpu")
    tasks = [GroupProduct(group, length) for length in _numbers("--lengths", lengths)]
    loaded = load(checkpoint, device=device)
    for task in tasks:
        check_task(loaded, task)
    ks = choose_steps(None if steps is None else _numbers("--steps", steps), loaded)
    results: list[dict[str, Any]] = []
    with tqdm(total=rows * len(tasks), unit="example", desc=f"K = {', '.join(map(str, ks))}") as bar:
        for task in tasks:
            results += evaluate_depth(loaded, task, ks, rows=rows, seed=seed, batch_size=batch_size, progress=bar.update)
    report = {**_origin(checkpoint, loaded, group, rows, seed), "chance": 1 / tasks[0].vocab_size, "results": results}
    _show(report)
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_depth(report, plot)


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(name, text, "is not a list of whole numbers", "write for instance 16,24") from None


def _origin(checkpoint: Path, loaded: Any, group: str, rows: int, seed: int) -> dict[str, Any]:
    from eval.provenance import provenance
    from rdlm.checkpoint import WEIGHTS
    from rdlm.shards import file_sha256

    config = loaded.config
    return {
        "provenance": provenance(),
        "checkpoint": {
            "name": config.name,
            "objective": config.objective.name,
            "step": config.step,
            "k_meaning": config.objective.k_meaning,
            "weights_sha256": file_sha256(checkpoint / WEIGHTS),
        },
        "data": {"task": "group_product", "group": group, "split": "test", "rows": rows, "seed": seed},
    }


def _show(report: dict[str, Any]) -> None:
    checkpoint, data = report["checkpoint"], report["data"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}): running products in {data['group']}",
        caption=f"{data['rows']:,} held-out examples of each length; chance is {report['chance']:.3f}; "
        "an interval of the difference that holds 0 is no difference",
    )
    smallest = report["results"][0]["K"]
    for name in ("positions", "K", "right [95 %]", f"against K = {smallest}", "last position"):
        table.add_column(name, justify="right")
    for r in report["results"]:
        low, high = r["accuracy_interval"]
        d_low, d_high = r["delta_interval"]
        delta = "" if r["K"] == smallest else f"{r['delta']:+.3f} [{d_low:+.3f}, {d_high:+.3f}]"
        table.add_row(str(r["length"]), str(r["K"]), f"{r['accuracy']:.3f} [{low:.3f}, {high:.3f}]", delta, f"{r['last']:.3f}")
    Console().print(table)
