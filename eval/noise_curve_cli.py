"""``rdlm eval ce-by-sigma``: what a denoiser reads out of z at each noise level."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.options import WindowOptions, numbers, with_options
from eval.output import write_json
from eval.wording import difference, with_interval
from rdlm.errors import UserError

LEVELS = "0.1,0.14,0.2,0.28,0.4,0.56,0.8,1.1,1.6,2.3,4,10,80"


@with_options
def ce_by_sigma(
    options: WindowOptions,
    sigmas: Annotated[str, typer.Option(help="Noise levels with commas.")] = LEVELS,
    num_steps: Annotated[int, typer.Option(min=1, help="K of the prior, that is of the prediction at z = 0.")] = 1,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of equal information whose edges are printed.")] = 3,
) -> None:
    """Cross-entropy of the next token with z noised from the truth, against sigma, beside the best possible. Not a likelihood."""
    from tqdm import tqdm

    from eval.nll import check_steps
    from eval.noise_curve import equal_information_edges, evaluate_noise_curve, plot_noise_curve
    from eval.windows import open_windows

    levels = sorted(numbers("--sigmas", sigmas, float))
    if levels[0] <= 0 or levels[-1] == float("inf"):
        raise UserError("--sigmas", sigmas, "holds a level that is not positive and finite", "write for instance 0.2,0.5,1,2,80")
    held_out = open_windows(options)
    loaded = held_out.loaded
    if loaded.config.objective.k_meaning == "sampling" and num_steps > 1:
        raise UserError("--num-steps", num_steps, "the prior of a sampling checkpoint is that of K = 1", "leave the option out")
    check_steps([num_steps], loaded.denoiser, loaded.config)
    with tqdm(total=held_out.count, unit="window", desc=f"{len(levels)} levels") as bar:
        measured = evaluate_noise_curve(
            loaded, held_out.batches(), levels, num_steps=num_steps, seed=options.seed, progress=bar.update
        )
    curves = {name: [(r["sigma"], r[name]) for r in measured["results"]] for name in ("ce", "reference")}
    known = {name: curve for name, curve in curves.items() if curve[0][1] is not None}
    edges = {name: equal_information_edges(curve, blocks) for name, curve in known.items()}
    report = {**held_out.origin("ce-by-sigma"), **measured, "equal_information_edges": edges}
    _show(report)
    if options.out is not None:
        write_json(options.out, report)
    if options.plot is not None:
        plot_noise_curve(report, options.plot)


def _show(report: dict[str, Any]) -> None:
    checkpoint = report["checkpoint"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}) on {report['data']['split']}",
        caption=f"{report['tokens']:,} tokens; nats per token, NOT a likelihood: z is made from the token that is asked for. "
        f"Without z: {with_interval(report['prior_ce'], report['prior_ce_interval'])} (K = {report['prior_num_steps']})",
    )
    for name in ("sigma", "denoiser [95 %]", "exact for its own prior", "difference"):
        table.add_column(name, justify="right")
    for r in report["results"]:
        cells = (
            ("", "") if r["ce"] is None else (with_interval(r["ce"], r["ce_interval"]), difference(r["gap"], r["gap_interval"]))
        )
        table.add_row(f"{r['sigma']:g}", cells[0], with_interval(r["reference"], r["reference_interval"]), cells[1])
    console = Console()
    console.print(table)
    for name, edges in report["equal_information_edges"].items():
        of = {"ce": "denoiser", "reference": "exact"}[name]
        console.print(f"edges of equal information ({of}): {', '.join(f'{edge:.4g}' for edge in edges)}", highlight=False)
