"""What one more core step changes in state and top tokens.

The relative change of the latent state, and the share of positions whose most probable token changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from eval.held_out import open_windows, window_protocol
from eval.metric import Json, Measurement, Picture, Run, Section, Table, pair, print_table
from eval.options import WindowOptions, check_steps, iterates
from eval.plots import colour, heading, k_axis, new_figure, png, with_errors, write_png
from eval.stats import interval, resamples, with_interval
from rdlm.checkpoints.folder import Loaded
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.next_token import NextToken

PICTURE_COLUMNS = 64
"""Positions are averaged into at most so many columns of a picture."""


def check_iterates(loaded: Loaded) -> None:
    """UserError for a checkpoint whose K steps are no iteration of one state."""
    if not iterates(loaded.config):
        problem = "its core steps are not an iteration of one state"
        remedy = "give a recurrent checkpoint whose K means thinking (bptt, onestep, single_pass)"
        raise UserError("--checkpoint", loaded.config.name, problem, remedy)


@torch.no_grad()
def evaluate_convergence(
    loaded: Loaded,
    batches: Iterable[Batch],
    num_steps: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """What step k = 2 .. num_steps changes, means over the positions that count, with bootstrap 95 %
    intervals over rows.

    -> {"results": [{"K": k, "distance", "changed"}] with "..._interval", "picture": {"distance",
    "changed"}: [steps][columns]}. distance: |s_k - s_(k-1)| / |s_k| of the latent state. changed: share of
    positions whose most probable token is another one than a step before. All rows must be equally long.
    """
    device = next(loaded.denoiser.parameters()).device
    parts, masks = [], []
    for batch in batches:
        parts.append(_changes(loaded, batch.inputs.to(device), num_steps, seed))
        masks.append(batch.mask.numpy())
        if progress:
            progress(len(masks[-1]))
    return _summarise(np.concatenate(parts, axis=2), np.concatenate(masks), seed)


def _changes(loaded: Loaded, input_ids: Tensor, num_steps: int, seed: int) -> np.ndarray:
    """[2, num_steps - 1, rows, positions]: distance and changed."""
    denoiser, last, found = cast(NextToken, loaded.denoiser), dict[str, Tensor](), []

    def compare(k: int, state: Tensor, ctx: Any) -> None:
        top = denoiser.predict(denoiser.model.decode(state, ctx)).prior.argmax(-1)
        state = denoiser.model.latent(state)
        if k > 1:
            step = (state - last["state"]).float().norm(dim=-1) / state.float().norm(dim=-1).clamp(min=1e-12)
            found.append(torch.stack([step, (top != last["top"]).float()]).cpu())
        last.update(state=state, top=top)

    denoiser.iterate(input_ids, num_steps, seed, compare)
    return torch.stack(found, dim=1).numpy()


def _summarise(changes: np.ndarray, mask: np.ndarray, seed: int) -> dict[str, Any]:
    """changes [2, steps, rows, positions]."""
    draws = resamples(len(mask), seed)
    counts, kept = mask.sum(1), np.flatnonzero(mask.any(0))
    sums = (changes * mask).sum(3)  # [2, steps, rows]
    results = []
    for step in range(changes.shape[1]):
        row = dict[str, Any](K=step + 2)
        for name, values in zip(("distance", "changed"), sums[:, step], strict=True):
            row |= {
                name: float(values.sum() / counts.sum()),
                f"{name}_interval": interval(draws @ values / (draws @ counts)),
            }
        results.append(row)
    by_position = (changes * mask).sum(2)[..., kept] / mask.sum(0)[kept]
    columns = np.array_split(np.arange(len(kept)), min(PICTURE_COLUMNS, len(kept)))
    picture = np.stack([by_position[..., column].mean(-1) for column in columns], axis=-1).round(5)
    return {"results": results, "picture": {"distance": picture[0].tolist(), "changed": picture[1].tolist()}}


def draw_convergence(panels: list[Any], report: dict[str, Any], label: str = "", **style: Any) -> None:
    """Distance (logarithmic) and share of changed tokens against K, in two panels."""
    titles = {"distance": "relative change of the latent state", "changed": "share of top tokens that change"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        with_errors(
            axes, report["results"], "K", name, marker="o", markersize=3, label=label or None, **style
        )
        k_axis(axes, [r["K"] for r in report["results"] if (r["K"] & (r["K"] - 1)) == 0])
        axes.set_ylabel(title)
    if any(r["distance"] > 0 for r in report["results"]):
        panels[0].set_yscale("log")


def draw_picture(axes: Any, report: dict[str, Any]) -> None:
    """log10 of the distance, a row per step and a column per group of positions."""
    image = axes.imshow(
        np.log10(np.maximum(report["picture"]["distance"], 1e-8)), aspect="auto", origin="lower", cmap="magma",
        extent=(0, 1, 1.5, report["results"][-1]["K"] + 0.5),
    )  # fmt: skip
    axes.figure.colorbar(image, ax=axes, label="log10 of the relative change")
    axes.set_xlabel("position in the window (share)")
    axes.set_ylabel("core step K")


class Convergence(Measurement):
    """Relative change of the latent state and share of changed top tokens at each core step, on held-out
    text."""

    name = "convergence"
    place = 60
    example = "rdlm eval convergence --checkpoint runs/demo/model --data data/demo --plot c.png"

    @dataclass(frozen=True, kw_only=True)
    class Options(WindowOptions):
        num_steps: Annotated[int, typer.Option(min=2, help="Core steps to follow.")] = 32

    def measure(self, options: Options) -> Json:
        held_out = open_windows(options)
        loaded = held_out.loaded
        check_iterates(loaded)
        check_steps([options.num_steps], loaded.config, beyond=True)
        with held_out.progress(f"K = 1 to {options.num_steps}") as done:
            measured = evaluate_convergence(
                loaded, held_out.batches(), options.num_steps, seed=options.seed, progress=done
            )
        tokens = held_out.count * held_out.length
        return {**held_out.origin(self.name), "tokens": tokens, **measured}

    def show(self, report: Json, console: Console) -> None:
        title = f"{heading(report)}: what step K changes on {report['data']['split']}"
        print_table(console, title, ("K", "latent state, relative", "top tokens that change"), _rows(report))

    def plot(self, report: Json, file: Path) -> None:
        figure, panels = new_figure(3)
        draw_convergence(panels[:2], report)
        draw_picture(panels[2], report)
        panels[0].set_title(heading(report))
        write_png(figure, file)

    def protocol(self, report: Json) -> Json:
        return {**super().protocol(report), **window_protocol(report)}

    def section(self, runs: list[Run]) -> Section:
        figure, panels = new_figure(3)
        rows = []
        for i, run in enumerate(runs):
            draw_convergence(panels[:2], run.report, run.label, color=colour(i))
            rows += [[run.label, *row] for row in _rows(run.report)]
        panels[0].legend(fontsize=7)
        draw_picture(panels[2], runs[-1].report)
        panels[2].set_title(runs[-1].label, fontsize=9)
        headers = ["run", "K", "relative change of the latent state", "share of top tokens that change"]
        about = f"What core step K changes, over {runs[0].report['tokens']:,} held-out tokens."
        return Section(
            "Convergence",
            about,
            [Table(headers, rows), Picture(png(figure), "What one more core step changes")],
        )


def _rows(report: Json) -> list[list[str]]:
    """The powers of two and the last K."""
    last = report["results"][-1]["K"]
    return [
        [str(r["K"]), *(with_interval(*pair(r, name), ".4f") for name in ("distance", "changed"))]
        for r in report["results"]
        if r["K"] == last or r["K"] & (r["K"] - 1) == 0
    ]
