"""``rdlm eval nll``, ``ce-by-sigma`` and ``convergence``: what is measured on held-out tokens in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from eval.options import WindowOptions, numbers, with_options
from eval.output import write_json
from eval.wording import difference, with_interval
from rdlm.errors import UserError

if TYPE_CHECKING:
    from eval.windows import HeldOut

LEVELS = "0.1,0.14,0.2,0.28,0.4,0.56,0.8,1.1,1.6,2.3,4,10,80"

Report = dict[str, Any]


@with_options
def nll(
    options: WindowOptions,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Values of K with commas [1,2,4,8,16,32 where they have a likelihood; bounds: 1,4,16,..,1024]."
        ),
    ] = None,
    num_draws: Annotated[
        int, typer.Option(min=1, help="Noise draws of a mixture estimate, levels drawn of a bound.")
    ] = 8,
    per_window: Annotated[
        bool, typer.Option("--per-window", help="Add the nats of every window to the JSON.")
    ] = False,
) -> None:
    """Held-out NLL per token (of masked models a bound), perplexity and bits per byte against K, with 95 % bootstrap intervals."""
    from eval.nll import PER_WINDOW, check_steps, evaluate_nll
    from eval.plots import plot_nll
    from eval.windows import open_windows

    wanted = None if steps is None else numbers("--steps", steps, int)
    held_out = open_windows(options)
    loaded = held_out.loaded
    ks = check_steps(wanted, loaded.config)
    with _bar(held_out, f"K = {', '.join(map(str, ks))}") as done:
        measured = evaluate_nll(
            loaded, held_out.batches(), ks, seed=options.seed, num_draws=num_draws, progress=done
        )
    report = {**held_out.origin("nll"), "num_draws": num_draws, **measured}
    _show_nll(report)
    _write(options, report, plot_nll, () if per_window else PER_WINDOW)


@with_options
def ce_by_sigma(
    options: WindowOptions,
    sigmas: Annotated[str, typer.Option(help="Noise levels with commas.")] = LEVELS,
    num_steps: Annotated[
        int, typer.Option(min=1, help="K of the prior, that is of the prediction at z = 0.")
    ] = 1,
    blocks: Annotated[
        int, typer.Option(min=1, help="Blocks of equal information whose edges are printed.")
    ] = 3,
) -> None:
    """Cross-entropy of the next token with z noised from the truth, against sigma, beside the best possible. Not a likelihood."""
    from eval.nll import check_steps
    from eval.noise_curve import equal_information_edges, evaluate_noise_curve, plot_noise_curve
    from eval.windows import open_windows

    levels = sorted(numbers("--sigmas", sigmas, float))
    if levels[0] <= 0 or levels[-1] == float("inf"):
        raise UserError(
            "--sigmas",
            sigmas,
            "holds a level that is not positive and finite",
            "write for instance 0.2,0.5,1,2,80",
        )
    if len(levels) < 2:
        raise UserError(
            "--sigmas", sigmas, "a curve needs at least two levels", "write for instance 0.2,0.5,1,2,80"
        )
    held_out = open_windows(options)
    loaded = held_out.loaded
    loaded.config.check_next_token("the cross-entropy by sigma")
    if loaded.config.objective.k_meaning == "sampling" and num_steps > 1:
        raise UserError(
            "--num-steps",
            num_steps,
            "the prior of a sampling checkpoint is that of K = 1",
            "leave the option out",
        )
    check_steps([num_steps], loaded.config)
    with _bar(held_out, f"{len(levels)} levels") as done:
        measured = evaluate_noise_curve(
            loaded, held_out.batches(), levels, num_steps=num_steps, seed=options.seed, progress=done
        )
    curves = {name: [(r["sigma"], r[name]) for r in measured["results"]] for name in ("ce", "reference")}
    known = {name: curve for name, curve in curves.items() if curve[0][1] is not None}
    rising = {name: curve for name, curve in known.items() if max(nats for _, nats in curve) > curve[0][1]}
    edges = {
        name: equal_information_edges(curve, blocks) for name, curve in rising.items()
    }  # an untrained model's is flat or falls
    report = {**held_out.origin("ce-by-sigma"), **measured, "equal_information_edges": edges}
    _show_noise_curve(report)
    _write(options, report, plot_noise_curve)


@with_options
def convergence(
    options: WindowOptions,
    num_steps: Annotated[int, typer.Option(min=2, help="Core steps to follow.")] = 32,
) -> None:
    """Relative change of the latent state and share of changed top tokens at each core step, on held-out text."""
    from eval.convergence import check_iterates, evaluate_convergence, plot_convergence
    from eval.nll import check_steps
    from eval.windows import open_windows

    held_out = open_windows(options)
    loaded = held_out.loaded
    check_iterates(loaded)
    check_steps([num_steps], loaded.config, beyond=True)
    with _bar(held_out, f"K = 1 to {num_steps}") as done:
        measured = evaluate_convergence(
            loaded, held_out.batches(), num_steps, seed=options.seed, progress=done
        )
    report = {**held_out.origin("convergence"), "tokens": held_out.count * held_out.length, **measured}
    _show_convergence(report)
    _write(options, report, plot_convergence)


@contextmanager
def _bar(held_out: HeldOut, what: str) -> Iterator[Callable[[int], object]]:
    """A progress bar over windows; the callback is told how many are done."""
    from tqdm import tqdm

    with tqdm(total=held_out.count, unit="window", desc=what) as bar:
        yield bar.update


def _write(
    options: WindowOptions, report: Report, plot: Callable[[Report, Path], None], left_out: Sequence[str] = ()
) -> None:
    if options.out is not None:
        write_json(options.out, {key: value for key, value in report.items() if key not in left_out})
    if options.plot is not None:
        plot(report, options.plot)


def _print(
    report: Report, headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", what: str = ""
) -> Console:
    """The table; -> the console, for lines below it."""
    checkpoint, split = report["checkpoint"], report["data"]["split"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}){what} on {split}", caption=caption
    )
    for name in headers:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    return console


def _show_nll(report: Report) -> None:
    first, rows = report["results"][0], []
    for r in report["results"]:
        against = "" if r is first else difference(r["delta_nll"], r["delta_nll_interval"], "+.4f")
        bits = [
            "" if r[name] is None else f"{r[name]:.4f}" for name in ("bits_per_byte", "bits_per_character")
        ]
        rows.append(
            [
                str(r["K"]),
                with_interval(r["nll"], r["nll_interval"], ".4f"),
                against,
                f"{r['perplexity']:.2f}",
                *bits,
            ]
        )
    headers = ("K", "NLL [95 %]", f"against K = {first['K']}", "perplexity", "bits/byte", "bits/character")
    caption = f"{report['tokens']:,} tokens in {report['windows']:,} windows of {report['data']['seq_len']}; nats per token"
    console = _print(report, headers, rows, caption)
    for r in report["results"]:
        console.print(f"K = {r['K']}: {r['estimator']}", highlight=False, style="dim")


def _show_noise_curve(report: Report) -> None:
    rows = []
    for r in report["results"]:
        reference = with_interval(r["reference"], r["reference_interval"])
        own = (
            ("", "")
            if r["ce"] is None
            else (with_interval(r["ce"], r["ce_interval"]), difference(r["gap"], r["gap_interval"]))
        )
        rows.append([f"{r['sigma']:g}", own[0], reference, own[1]])
    prior = with_interval(report["prior_ce"], report["prior_ce_interval"])
    caption = (
        f"{report['tokens']:,} tokens; nats per token, NOT a likelihood: z is made from the token that is asked for. "
        f"Without z: {prior} (K = {report['prior_num_steps']})"
    )
    console = _print(
        report, ("sigma", "denoiser [95 %]", "exact for its own prior", "difference"), rows, caption
    )
    for name, edges in report["equal_information_edges"].items():
        of = {"ce": "denoiser", "reference": "exact"}[name]
        console.print(
            f"edges of equal information ({of}): {', '.join(f'{edge:.4g}' for edge in edges)}",
            highlight=False,
        )


def _show_convergence(report: Report) -> None:
    last = report["results"][-1]["K"]
    rows = [
        [
            str(r["K"]),
            *(with_interval(r[name], r[f"{name}_interval"], ".4f") for name in ("distance", "changed")),
        ]
        for r in report["results"]
        if r["K"] == last or r["K"] & (r["K"] - 1) == 0
    ]
    _print(
        report, ("K", "latent state, relative", "top tokens that change"), rows, what=": what step K changes"
    )
