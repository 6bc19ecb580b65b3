"""Held-out NLL, perplexity and bits per byte against K.

All K come from one pass to the largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from rich.console import Console

from eval.held_out import open_windows, window_protocol
from eval.metric import Json, Measurement, Picture, Run, Section, Table, print_table
from eval.options import WindowOptions, check_steps, steps_given
from eval.plots import Row, colour, heading, k_axis, new_figure, png, with_errors, write_png
from eval.stats import difference, interval, mover, or_dash, resamples, with_interval
from rdlm.checkpoints.folder import Loaded
from rdlm.data.batch import Batch

PER_WINDOW = ("window_nll", "window_tokens")
"""Entries of the result with a number for every window: what a paired comparison of two checkpoints needs.
"""


def evaluate_nll(
    loaded: Loaded,
    corpus_windows: Iterable[Batch],
    steps: Sequence[int],
    *,
    seed: int = 0,
    num_draws: int = 8,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """NLL (nats per token), perplexity, bits per byte and per character at each K, with bootstrap 95 %
    intervals over windows.

    corpus_windows: batches [B, T]; a row is one window, the unit that is resampled. ``progress`` takes the
    number of rows done.
    -> {"tokens", "windows", "bytes", "characters", "results": [{"K", "nll", "delta_nll", both with
    "..._interval", "perplexity", "bits_per_byte", "bits_per_character", "estimator"}], "window_nll": {K:
    [nats per window]}, "window_tokens"}. delta_nll is against the smallest K, its interval is paired. Bits
    per byte and character leave out special tokens.
    """
    num_bytes, num_characters = _text_tables(loaded)
    nats: dict[int, list[torch.Tensor]] = {k: [] for k in steps}
    text_nats = dict.fromkeys(steps, 0.0)
    tokens, bytes_, characters = [], 0, 0
    device = next(loaded.denoiser.parameters()).device
    for batch in corpus_windows:
        batch = batch.to(device)
        inputs, targets, mask = batch.inputs, batch.targets, batch.mask
        scores = loaded.denoiser.token_logprobs(
            inputs, targets, steps, seed=seed, num_draws=num_draws, documents=batch.documents
        )
        widths = num_bytes.to(device)[targets] * mask
        for k in steps:
            nll = -scores[k].double() * mask
            nats[k].append(nll.sum(1).cpu())
            text_nats[k] += float(nll[widths > 0].sum())
        tokens.append(mask.sum(1).cpu())
        bytes_ += int(widths.sum())
        characters += int((num_characters.to(device)[targets] * mask).sum())
        if progress:
            progress(len(targets))
    sums = {k: torch.cat(parts).numpy() for k, parts in nats.items()}
    counts = torch.cat(tokens).numpy()
    results = _summarise(sums, counts, seed)
    for result in results:
        k = result["K"]
        bits = text_nats[k] / math.log(2)
        result["bits_per_byte"] = bits / bytes_ if bytes_ else None
        result["bits_per_character"] = bits / characters if characters else None
        result["estimator"] = loaded.config.objective.estimator_at(k, num_draws)
    return {
        "tokens": int(counts.sum()),
        "windows": len(counts),
        "bytes": bytes_,
        "characters": characters,
        "results": results,
        "window_nll": {str(k): [round(x, 4) for x in sums[k].tolist()] for k in steps},
        "window_tokens": counts.tolist(),
    }


def _text_tables(loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """UTF-8 bytes of each id, and how many characters begin in it, int64 [V] each; zeros where the ids are
    not text."""
    tables = torch.zeros((2, loaded.config.model.vocab_size), dtype=torch.int64)
    if loaded.tokenizer is not None:
        for i, content in enumerate(loaded.tokenizer.token_bytes()):
            tables[0, i] = len(content)
            tables[1, i] = sum(byte & 0xC0 != 0x80 for byte in content)  # continuation bytes are 10xxxxxx
    return tables[0], tables[1]


def _summarise(sums: dict[int, np.ndarray], counts: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """sums: nats per window at each K; counts: tokens per window. The same resamples of windows for every
    K."""
    base = next(iter(sums))
    draws = resamples(len(counts), seed)
    resampled = {k: draws @ values / (draws @ counts) for k, values in sums.items()}
    results = []
    for k, values in sums.items():
        nll = float(values.sum() / counts.sum())
        results.append(
            {
                "K": k,
                "nll": nll,
                "nll_interval": interval(resampled[k]),
                "delta_nll": nll - float(sums[base].sum() / counts.sum()),
                "delta_nll_interval": interval(resampled[k] - resampled[base]),
                "perplexity": math.exp(min(nll, 700.0)),
            }
        )
    return results


class Nll(Measurement):
    """Held-out NLL per token (of masked models a bound), perplexity and bits per byte against K, with 95 %
    bootstrap intervals."""

    name = "nll"
    place = 10
    example = "rdlm eval nll --checkpoint runs/demo/model --data data/demo --num-steps 1,4,16 --plot nll.png"

    @dataclass(frozen=True, kw_only=True)
    class Options(WindowOptions):
        num_steps: Annotated[
            str | None,
            typer.Option(
                help="Values of K with commas [1,2,4,8,16,32 where they have a likelihood; bounds: 1,4,16,..,1024]."
            ),
        ] = None
        num_draws: Annotated[
            int, typer.Option(min=1, help="Noise samples of a mixture estimate; levels sampled for a bound.")
        ] = 8
        packing: Annotated[
            Literal["windows", "documents"],
            typer.Option(
                help="windows: rows go across the ends of documents. documents: as in training with "
                "data.packing=documents, where documents of a row do not see each other."
            ),
        ] = "windows"
        per_window: Annotated[
            bool, typer.Option("--per-window", help="Add the nats of every window to the JSON.")
        ] = False

    def measure(self, options: Options) -> Json:
        wanted = steps_given(options.num_steps)
        held_out = open_windows(options, options.packing)
        ks = check_steps(wanted, held_out.loaded.config)
        with held_out.progress(f"K = {', '.join(map(str, ks))}") as done:
            measured = evaluate_nll(
                held_out.loaded,
                held_out.batches(),
                ks,
                seed=options.seed,
                num_draws=options.num_draws,
                progress=done,
            )
        return {**held_out.origin(self.name), "num_draws": options.num_draws, **measured}

    def written(self, report: Json, options: Options) -> Json:
        return {name: value for name, value in report.items() if options.per_window or name not in PER_WINDOW}

    def show(self, report: Json, console: Console) -> None:
        first, rows = report["results"][0], []
        for r in report["results"]:
            against = "" if r is first else difference(r["delta_nll"], r["delta_nll_interval"], "+.4f")
            bits = [
                "" if r[name] is None else f"{r[name]:.4f}"
                for name in ("bits_per_byte", "bits_per_character")
            ]
            nll = with_interval(r["nll"], r["nll_interval"], ".4f")
            rows.append([str(r["K"]), nll, against, f"{r['perplexity']:.2f}", *bits])
        headers = (
            "K",
            "NLL [95 %]",
            f"against K = {first['K']}",
            "perplexity",
            "bits/byte",
            "bits/character",
        )
        caption = (
            f"{report['tokens']:,} tokens in {report['windows']:,} windows of {report['data']['seq_len']}; "
            "nats per token"
        )
        print_table(console, f"{heading(report)} on {report['data']['split']}", headers, rows, caption)
        for r in report["results"]:
            console.print(f"K = {r['K']}: {r['estimator']}", highlight=False, style="dim")

    def plot(self, report: Json, file: Path) -> None:
        figure, (axes,) = new_figure()
        draw_nll(axes, report)
        for r in report["results"]:
            place: dict[str, Any] = {
                "xytext": (0, 9),
                "textcoords": "offset points",
                "fontsize": 8,
                "ha": "center",
            }
            axes.annotate(f"{r['nll']:.3f}", (r["K"], r["nll"]), **place)
        k_axis(axes, [r["K"] for r in report["results"]])
        axes.margins(x=0.1, y=0.15)
        axes.set_title(f"{heading(report)}: {report['tokens']:,} tokens of {report['data']['split']}")
        axes.legend(fontsize=8)
        write_png(figure, file)

    def protocol(self, report: Json) -> Json:
        return {**super().protocol(report), **window_protocol(report)}

    def section(self, runs: list[Run]) -> Section:
        """Where both files hold the nats of every window (``--per-window``) the bootstrap of a difference
        is paired."""
        first, rows = runs[0], []
        for run in runs:
            for r in run.report["results"]:
                against = "" if run is first else _nll_difference(run, first, r["K"])
                bits = [or_dash(r[name], ".4f") for name in ("bits_per_byte", "bits_per_character")]
                figures = [with_interval(r["nll"], r["nll_interval"], ".4f"), against]
                rows.append(
                    [run.label, str(r["K"]), *figures, f"{r['perplexity']:.2f}", *bits, r["estimator"]]
                )
        headers = [
            "run",
            "K",
            "NLL, nats per token [95 %]",
            f"against {first.label}, same K",
            "perplexity",
            "bits/byte",
            "bits/character",
        ]
        figure, (axes,) = new_figure()
        for i, run in enumerate(runs):
            draw_nll(axes, run.report, color=colour(i), label=run.label)
        k_axis(axes, [r["K"] for run in runs for r in run.report["results"]])
        axes.legend(fontsize=7)
        data = first.report["data"]
        about = (
            f"{first.report['tokens']:,} tokens of {data['source']}, split {data['split']}, in windows of "
            f"{data['seq_len']}. "
            "Estimators that are mixtures over noise draws are no likelihoods and biased upward."
        )
        return Section(
            "Held-out likelihood",
            about,
            [Table([*headers, "estimator"], rows), Picture(png(figure), "NLL against K")],
        )


def _nll_difference(run: Run, first: Run, k: int) -> str:
    mine, other = (next((r for r in each.report["results"] if r["K"] == k), None) for each in (run, first))
    if mine is None or other is None:
        return ""
    if all("window_nll" in each.report for each in (run, first)):
        a, b = (np.array(each.report["window_nll"][str(k)]) for each in (run, first))
        counts = np.array(first.report["window_tokens"])
        draws = resamples(len(counts), 0)
        found = float((a - b).sum() / counts.sum()), interval(draws @ (a - b) / (draws @ counts))
        return difference(*found, "+.4f") + ", paired"
    return difference(
        *mover((mine["nll"], mine["nll_interval"]), (other["nll"], other["nll_interval"])), "+.4f"
    )


def draw_nll(axes: Axes, report: Row, **style: Any) -> None:
    """Held-out NLL against K. Mixture estimates and bounds are hollow: they are not the likelihood."""
    results = report["results"]
    style = {"color": "tab:blue", **style}
    axes.plot([r["K"] for r in results], [r["nll"] for r in results], color=style["color"], linewidth=1.5)
    name = style.pop("label", None)
    for normalised in (True, False):
        chosen = [r for r in results if r["estimator"].startswith("normalised") == normalised]
        if chosen:
            other = (
                "upper bound"
                if chosen[0]["estimator"].startswith("upper bound")
                else "mixture over noise draws (biased upward)"
            )
            kind = "normalised likelihood" if normalised else other
            face = style["color"] if normalised else "white"
            label = f"{name}: {kind}" if name else kind
            with_errors(axes, chosen, "K", "nll", fmt="o", markerfacecolor=face, label=label, **style)
    axes.set_ylabel("held-out NLL (nats per token)")
