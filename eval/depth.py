"""Does K think? Accuracy against K on generated tasks whose answers need serial computation (rdlm/tasks.py)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from eval.bootstrap import interval, resamples
from eval.nll import check_steps
from rdlm.answers import greedy_answers
from rdlm.checkpoint import Loaded
from rdlm.errors import UserError
from rdlm.tasks import GroupProduct

USUAL_STEPS = (1, 2, 4, 8, 16, 32, 64)


def choose_steps(steps: Sequence[int] | None, loaded: Loaded) -> tuple[int, ...]:
    """The K to evaluate, ascending; None takes USUAL_STEPS as far as the checkpoint goes. UserError for one out of range."""
    if steps is None:
        recurrent = loaded.denoiser.model.is_recurrent or loaded.config.objective.k_meaning == "sampling"
        steps = [k for k in USUAL_STEPS if k <= (loaded.config.recurrence.max_steps if recurrent else 1)]
    return check_steps(steps, loaded.denoiser, loaded.config)


def check_task(loaded: Loaded, task: GroupProduct) -> None:
    """UserError where the checkpoint cannot have been trained on the task, or has too few positions for it."""
    model = loaded.config.model
    if loaded.tokenizer is not None or model.vocab_size != task.vocab_size:
        has = "is a model of text" if loaded.tokenizer is not None else f"has a vocabulary of {model.vocab_size}"
        problem = f"{has}, the task has {task.vocab_size} elements"
        raise UserError("--group", task.group, problem, "give a checkpoint trained with data.kind group_product and this group")
    if task.length > model.max_seq_len:
        raise UserError("--lengths", task.length, f"the model was built for {model.max_seq_len} positions", "use shorter ones")


@torch.no_grad()
def evaluate_depth(
    loaded: Loaded,
    task: GroupProduct,
    steps: Sequence[int],
    *,
    rows: int,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Share of right answers on the first ``rows`` held-out examples at each K, with bootstrap 95 % intervals over examples.

    -> [{"length", "K", "accuracy", "accuracy_interval", "delta", "delta_interval", "last", "last_interval"}]: over all positions, its
    difference from the smallest K (paired), and at the last position alone, which needs the longest computation.
    seed: of the examples, of sampling checkpoints' noise and of the bootstrap. ``progress`` is told the examples done.
    """
    device = next(loaded.denoiser.parameters()).device
    right: dict[int, list[np.ndarray]] = {k: [] for k in steps}
    for start in range(0, rows, batch_size):
        numbers = np.arange(start, min(rows, start + batch_size))
        batch = task.rows(numbers, seed, "test")
        answers = greedy_answers(loaded.denoiser, loaded.config, batch.input_ids.to(device), steps, seed=seed + start)
        for k in steps:
            right[k].append((answers[k].cpu() == batch.targets).numpy())
        if progress:
            progress(len(numbers))
    return _summarise({k: np.concatenate(parts) for k, parts in right.items()}, task.length, seed)


def _summarise(right: dict[int, np.ndarray], length: int, seed: int) -> list[dict[str, Any]]:
    """right: {K: bool [rows, length]}. The same resamples for every K."""
    rows = len(next(iter(right.values())))
    draws = resamples(rows, seed) / rows
    base = next(iter(right.values())).mean(1)
    results = []
    for k, hits in right.items():
        share, result = hits.mean(1), dict[str, Any](length=length, K=k)
        for name, values in (("accuracy", share), ("delta", share - base), ("last", hits[:, -1].astype(float))):
            result |= {name: float(values.mean()), f"{name}_interval": interval(draws @ values)}
        results.append(result)
    return results


def plot_depth(report: dict[str, Any], file: Path) -> None:
    """Accuracy against K with its 95 % intervals, a curve for each length, as PNG."""
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ks = sorted({r["K"] for r in report["results"]})
    for length in dict.fromkeys(r["length"] for r in report["results"]):
        chosen = [r for r in report["results"] if r["length"] == length]
        values = [r["accuracy"] for r in chosen]
        errors = [[abs(r["accuracy"] - r["accuracy_interval"][side]) for r in chosen] for side in (0, 1)]
        axes.errorbar([r["K"] for r in chosen], values, yerr=errors, marker="o", capsize=3, label=f"{length} positions")
    axes.axhline(report["chance"], color="grey", linestyle=":", label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.set_xlabel("K")
    axes.set_ylabel("right answers, over positions")
    axes.set_title(
        f"{report['checkpoint']['name']}, step {report['checkpoint']['step']:,}: products in {report['data']['group']}"
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    FigureCanvasAgg(figure).print_png(partial)
    os.replace(partial, file)
