"""Does the state settle? What one more core step changes: the latent state, and the most probable token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from eval.plots import heading, k_axis, new_figure, with_errors, write_png
from eval.stats import interval, resamples
from rdlm.checkpoints.folder import Loaded
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.next_token import NextToken

PICTURE_COLUMNS = 64
"""Positions are averaged into at most so many columns of a picture."""


def check_iterates(loaded: Loaded) -> None:
    """UserError for a checkpoint whose K steps are no iteration of one state."""
    if loaded.config.objective.k_meaning == "sampling" or not loaded.config.model.iterates:
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
    """What step k = 2 .. num_steps changes, means over the positions that count, with bootstrap 95 % intervals over rows.

    -> {"results": [{"K": k, "distance", "changed"}] with "..._interval", "picture": {"distance", "changed"}: [steps][columns]}.
    distance: |s_k - s_(k-1)| / |s_k| of the latent state. changed: share of positions whose most probable token is another one than
    a step before. All rows must be equally long.
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


def plot_convergence(report: dict[str, Any], file: Path) -> None:
    """Both curves against K, and the distance by position, as PNG."""
    figure, panels = new_figure(3)
    draw_convergence(panels[:2], report)
    draw_picture(panels[2], report)
    panels[0].set_title(heading(report))
    write_png(figure, file)


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
