"""Cross-entropy by noise level, and the best possible one.

The next token is predicted given its own noised copy z: how well a denoiser reads z, and at which
levels a token is decided. NOT a likelihood: z = y + sigma * eps is made from the target token.

With clean context the best possible denoiser has a closed form, p(x | context, z, sigma) proportional to
p(x | context) exp(<y_x, z> / sigma^2); with the model's own prediction at z = 0 for p(x | context) it is the
reference here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from eval.held_out import open_windows, window_protocol
from eval.metric import Block, Json, Measurement, Picture, Run, Section, Table, pair, print_table
from eval.options import WindowOptions, check_steps, numbers
from eval.plots import colour, heading, new_figure, png, with_errors, write_png
from eval.stats import difference, interval, resamples, with_interval
from rdlm.checkpoints.folder import Loaded
from rdlm.data.batch import Batch
from rdlm.diffusion.partition import Curve, equal_drops
from rdlm.errors import UserError
from rdlm.objectives.next_token import NextToken, renoise
from rdlm.random_streams import generator

LEVELS = "0.1,0.14,0.2,0.28,0.4,0.56,0.8,1.1,1.6,2.3,4,10,80"


@torch.no_grad()
def evaluate_noise_curve(
    loaded: Loaded,
    windows: Iterable[Batch],
    sigmas: Sequence[float],
    *,
    num_steps: int = 1,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Cross-entropy in nats per token at each level, with bootstrap 95 % intervals over windows.

    -> {"tokens", "windows", "prior_num_steps", "prior_ce", "results": [{"sigma", "reference", "ce",
    "gap"}]}, each figure with its "..._interval". The context is clean (z = 0) and the core runs once. gap
    = ce - reference, paired; ce and gap are None for a model that was not trained on noised targets: its
    reference alone says where a token is decided. num_steps: K of the prior. ``progress`` takes the number
    of windows done.
    """
    device = next(loaded.denoiser.parameters()).device
    sums: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    for number, batch in enumerate(windows):
        moved = batch.to(device)
        sums.append(_batch_sums(loaded, moved, sigmas, num_steps, seed, number))
        counts.append(batch.mask.sum(1).numpy())
        if progress:
            progress(len(batch.targets))
    return _summarise(np.concatenate(sums, axis=1), np.concatenate(counts), sigmas, num_steps, seed, loaded)


def _batch_sums(
    loaded: Loaded, batch: Batch, sigmas: Sequence[float], num_steps: int, seed: int, number: int
) -> np.ndarray:
    """Nats of each window, fp64 [1 + 2 * levels, rows]: of the prior, then of denoiser (zeros if none) and
    reference by level."""
    ids, targets = batch.inputs, batch.targets
    prior = _prior(loaded, ids, num_steps, seed)
    rows = [_nats(prior, batch)]
    for level, sigma in enumerate(sigmas):
        denoiser = cast(NextToken, loaded.denoiser.at(sigma))
        table = denoiser.unit_table()
        noise = torch.randn((*ids.shape, table.shape[1]), generator=generator(seed, number, level)).to(
            ids.device
        )
        levels = torch.full(ids.shape, sigma, device=ids.device)
        z = renoise(denoiser, targets, levels, noise)
        if loaded.config.objective.noise_conditioned:
            hidden = denoiser.two_stream_hidden(ids, z, levels, sees_own_clean=denoiser.sees_own_clean)
            rows.append(_nats(denoiser.predict(hidden, z, levels).logits(), batch))
        else:
            rows.append(torch.zeros(len(ids)))
        rows.append(_nats(prior + F.linear(z, table) / sigma**2, batch))
    return torch.stack(rows).double().numpy()


def _prior(loaded: Loaded, input_ids: Tensor, num_steps: int, seed: int) -> Tensor:
    """Logits of the next token without z, fp32 [B, T, V]."""
    denoiser = cast(NextToken, loaded.denoiser.at(None))
    if denoiser.two_streams:
        return denoiser.predict(denoiser.two_stream_hidden(input_ids, None, None)).prior
    found: list[Tensor] = []

    def read(k: int, state: Tensor, ctx: Any) -> None:
        if k == num_steps:
            found.append(denoiser.predict(denoiser.model.decode(state, ctx)).prior)

    denoiser.iterate(input_ids, num_steps, seed, read)
    return found[0]


def _nats(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of each window, fp32 [B] on the CPU."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), batch.targets.flatten(), reduction="none").view(
        batch.targets.shape
    )
    return (losses * batch.mask).sum(1).cpu()


def _summarise(
    sums: np.ndarray, counts: np.ndarray, sigmas: Sequence[float], num_steps: int, seed: int, loaded: Loaded
) -> dict[str, Any]:
    draws = resamples(len(counts), seed)
    tokens = draws @ counts

    def figure(name: str, nats: np.ndarray) -> dict[str, Any]:
        return {name: float(nats.sum() / counts.sum()), f"{name}_interval": interval(draws @ nats / tokens)}

    results = []
    for level, sigma in enumerate(sigmas):
        ce, reference = sums[1 + 2 * level], sums[2 + 2 * level]
        row = {"sigma": sigma, **figure("reference", reference)}
        if loaded.config.objective.noise_conditioned:
            row |= figure("ce", ce) | figure("gap", ce - reference)
        else:
            row |= {name: None for name in ("ce", "ce_interval", "gap", "gap_interval")}
        results.append(row)
    totals = {"tokens": int(counts.sum()), "windows": len(counts), "prior_num_steps": num_steps}
    return {**totals, **figure("prior_ce", sums[0]), "results": results}


def equal_information_edges(curve: Curve, num_blocks: int) -> list[float]:
    """num_blocks + 1 levels, falling from the highest of the curve to its lowest, between which the
    cross-entropy drops equally.

    The same cut that a run with ``blocks.partition: equal_information`` makes; UserError as there.
    """
    points = sorted(curve)
    low, high = points[0][0], points[-1][0]
    return [high, *equal_drops(points, num_blocks, low, high), low]


def draw_noise_curve(axes: Any, report: dict[str, Any], name: str = "", color: str = "tab:blue") -> None:
    """The two curves and the level of the prior."""
    results = report["results"]
    if results[0]["ce"] is not None:
        with_errors(
            axes, results, "sigma", "ce", marker="o", markersize=4, color=color, label=f"{name}denoiser"
        )
    style = {"color": color, "linestyle": "--", "linewidth": 1}
    with_errors(axes, results, "sigma", "reference", label=f"{name}exact for its own prior", **style)
    axes.axhline(report["prior_ce"], color=color, linestyle=":", linewidth=0.8, label=f"{name}z = 0")
    axes.set_xscale("log")
    axes.set_xlabel("noise level sigma")
    axes.set_ylabel("cross-entropy with z from the truth\n(nats per token; not a likelihood)")
    axes.grid(alpha=0.3)


class NoiseCurve(Measurement):
    """Cross-entropy of the next token with z noised from the truth, against sigma, compared with the best
    possible. Not a likelihood."""

    name = "ce-by-sigma"
    place = 70
    example = "rdlm eval ce-by-sigma --checkpoint runs/demo/model --data data/demo --plot ce.png"

    @dataclass(frozen=True, kw_only=True)
    class Options(WindowOptions):
        sigmas: Annotated[str, typer.Option(help="Noise levels with commas.")] = LEVELS
        num_steps: Annotated[int, typer.Option(min=1, help="K of the prediction at z = 0.")] = 1
        blocks: Annotated[
            int, typer.Option(min=1, help="Blocks of equal information whose edges are printed.")
        ] = 3

    def measure(self, options: Options) -> Json:
        levels = sorted(numbers("--sigmas", options.sigmas, float))
        remedy = "write for instance 0.2,0.5,1,2,80"
        if not all(0 < level < math.inf for level in levels):
            problem = "holds a level that is not positive and finite"
            raise UserError("--sigmas", options.sigmas, problem, remedy)
        if len(levels) < 2:
            raise UserError("--sigmas", options.sigmas, "a curve needs at least two levels", remedy)
        held_out = open_windows(options)
        config = held_out.loaded.config
        config.check_next_token("the cross-entropy by sigma")
        usual = config.objective.default_steps_in_evaluation
        if usual is not None and options.num_steps not in usual:
            problem = "a sampling checkpoint predicts at z = 0 with K = 1 only"
            raise UserError("--num-steps", options.num_steps, problem, "leave the option out")
        check_steps([options.num_steps], config)
        with held_out.progress(f"{len(levels)} levels") as done:
            measured = evaluate_noise_curve(
                held_out.loaded,
                held_out.batches(),
                levels,
                num_steps=options.num_steps,
                seed=options.seed,
                progress=done,
            )
        edges = _edges(measured["results"], options.blocks)
        return {**held_out.origin(self.name), **measured, "equal_information_edges": edges}

    def show(self, report: Json, console: Console) -> None:
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
            f"{report['tokens']:,} tokens; nats per token, NOT a likelihood: z is made from the target "
            "token. "
            f"Without z: {prior} (K = {report['prior_num_steps']})"
        )
        headers = ("sigma", "denoiser [95 %]", "exact for its own prior", "difference")
        print_table(console, f"{heading(report)} on {report['data']['split']}", headers, rows, caption)
        for name, edges in report["equal_information_edges"].items():
            of = {"ce": "denoiser", "reference": "exact"}[name]
            console.print(
                f"edges of equal information ({of}): {', '.join(f'{edge:.4g}' for edge in edges)}",
                highlight=False,
            )

    def plot(self, report: Json, file: Path) -> None:
        figure, (axes,) = new_figure()
        draw_noise_curve(axes, report)
        axes.set_title(
            f"{heading(report)}: {report['tokens']:,} tokens of {report['data']['split']}", fontsize=10
        )
        axes.legend(fontsize=8)
        write_png(figure, file)

    def protocol(self, report: Json) -> Json:
        levels = {
            "sigmas": [row["sigma"] for row in report["results"]],
            "prior_num_steps": report["prior_num_steps"],
        }
        return {**super().protocol(report), **window_protocol(report), **levels}

    def section(self, runs: list[Run]) -> Section:
        rows = []
        figure, (axes,) = new_figure()
        for i, run in enumerate(runs):
            draw_noise_curve(axes, run.report, f"{run.label}: ", colour(i))
            for r in run.report["results"]:
                own = (
                    ["-", "-"]
                    if r["ce"] is None
                    else [with_interval(*pair(r, "ce")), difference(*pair(r, "gap"))]
                )
                rows.append(
                    [run.label, f"{r['sigma']:g}", own[0], with_interval(*pair(r, "reference")), own[1]]
                )
        axes.legend(fontsize=7)
        edges = [
            [run.label, name, ", ".join(f"{edge:.4g}" for edge in found)]
            for run in runs
            for name, found in run.report["equal_information_edges"].items()
        ]
        about = (
            f"{runs[0].report['tokens']:,} tokens. NOT a likelihood: z is made from the target token. The "
            "exact denoiser is "
            "p(x | context) exp(<y_x, z> / sigma^2) with the model's own prediction at z = 0 as p(x | "
            "context)."
        )
        table = Table(["run", "sigma", "denoiser [95 %]", "exact for its own prior", "difference"], rows)
        blocks: list[Block] = [
            table,
            Picture(png(figure), "Cross-entropy against sigma"),
            Table(["run", "curve", "edges of equal information"], edges),
        ]
        return Section("Cross-entropy by noise level", about, blocks)


def _edges(results: list[Json], num_blocks: int) -> Json:
    """Edges of equal information for each curve that there is and that rises: an untrained model's is flat
    or falls."""
    out = {}
    for name in ("ce", "reference"):
        curve = [(r["sigma"], r[name]) for r in results]
        if curve[0][1] is not None and max(nats for _, nats in curve) > curve[0][1]:
            out[name] = equal_information_edges(curve, num_blocks)
    return out
