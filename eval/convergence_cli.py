"""``rdlm eval convergence``: what one more core step changes."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.options import WindowOptions, with_options
from eval.output import write_json
from eval.wording import with_interval


@with_options
def convergence(
    options: WindowOptions,
    num_steps: Annotated[int, typer.Option(min=2, help="Core steps to follow.")] = 32,
) -> None:
    """Relative change of the latent state and share of changed top tokens at each core step, on held-out text."""
    from tqdm import tqdm

    from eval.convergence import check_iterates, evaluate_convergence, plot_convergence
    from eval.nll import check_steps
    from eval.windows import open_windows

    held_out = open_windows(options)
    loaded = held_out.loaded
    check_iterates(loaded)
    check_steps([num_steps], loaded.denoiser, loaded.config)
    with tqdm(total=held_out.count, unit="window") as bar:
        measured = evaluate_convergence(loaded, held_out.batches(), num_steps, seed=options.seed, progress=bar.update)
    report = {**held_out.origin("convergence"), "tokens": held_out.count * held_out.length, **measured}
    _show(report)
    if options.out is not None:
        write_json(options.out, report)
    if options.plot is not None:
        plot_convergence(report, options.plot)


def _show(report: dict[str, Any]) -> None:
    checkpoint = report["checkpoint"]
    table = Table(title=f"{checkpoint['name']} (step {checkpoint['step']:,}): what step K changes on {report['data']['split']}")
    for name in ("K", "latent state, relative", "top tokens that change"):
        table.add_column(name, justify="right")
    last = report["results"][-1]["K"]
    for r in report["results"]:
        if r["K"] == last or r["K"] & (r["K"] - 1) == 0:
            figures = [with_interval(r[name], r[f"{name}_interval"], ".4f") for name in ("distance", "changed")]
            table.add_row(str(r["K"]), *figures)
    Console().print(table)
