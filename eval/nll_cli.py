"""``rdlm eval nll``: held-out likelihood against K."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.options import WindowOptions, numbers, with_options
from eval.output import write_json
from eval.wording import difference, with_interval


@with_options
def nll(
    options: WindowOptions,
    steps: Annotated[
        str | None, typer.Option(help="Values of K with commas [1,2,4,8,16,32 where they have a likelihood].")
    ] = None,
    num_draws: Annotated[int, typer.Option(min=1, help="Noise draws of a mixture estimate.")] = 8,
    per_window: Annotated[bool, typer.Option("--per-window", help="Add the nats of every window to the JSON.")] = False,
) -> None:
    """Held-out NLL per token, perplexity and bits per byte against K, with 95 % bootstrap intervals over windows."""
    from tqdm import tqdm

    from eval.nll import PER_WINDOW, check_steps, evaluate_nll
    from eval.plots import plot_nll
    from eval.windows import open_windows

    wanted = None if steps is None else numbers("--steps", steps, int)
    held_out = open_windows(options)
    loaded = held_out.loaded
    ks = check_steps(wanted, loaded.denoiser, loaded.config)
    with tqdm(total=held_out.count, unit="window", desc=f"K = {', '.join(map(str, ks))}") as bar:
        measured = evaluate_nll(loaded, held_out.batches(), ks, seed=options.seed, num_draws=num_draws, progress=bar.update)
    report = {**held_out.origin("nll"), "num_draws": num_draws, **measured}
    _show(report)
    if options.out is not None:
        kept = report if per_window else {key: value for key, value in report.items() if key not in PER_WINDOW}
        write_json(options.out, kept)
    if options.plot is not None:
        plot_nll(report, options.plot)


def _show(report: dict[str, Any]) -> None:
    checkpoint, data = report["checkpoint"], report["data"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}) on {data['split']}",
        caption=f"{report['tokens']:,} tokens in {report['windows']:,} windows of {data['seq_len']}; nats per token",
    )
    first = report["results"][0]
    for name in ("K", "NLL [95 %]", f"against K = {first['K']}", "perplexity", "bits/byte", "bits/character"):
        table.add_column(name, justify="right")
    for r in report["results"]:
        against = "" if r is first else difference(r["delta_nll"], r["delta_nll_interval"], "+.4f")
        bits = ["" if r[name] is None else f"{r[name]:.4f}" for name in ("bits_per_byte", "bits_per_character")]
        table.add_row(str(r["K"]), with_interval(r["nll"], r["nll_interval"], ".4f"), against, f"{r['perplexity']:.2f}", *bits)
    console = Console()
    console.print(table)
    for r in report["results"]:
        console.print(f"K = {r['K']}: {r['estimator']}", highlight=False, style="dim")
