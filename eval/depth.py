"""Does K think? Accuracy against K on generated tasks whose answers need serial or joint computation (rdlm/data/synthetic.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch

from eval.nll import check_steps
from eval.stats import interval, resamples
from rdlm.checkpoints.folder import Loaded
from rdlm.data.synthetic import FilledIn, Generated, Task
from rdlm.errors import UserError
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.sampling_params import Order

USUAL_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The last two are far beyond the steps of training: whether the state stays where it is."""


def choose_steps(steps: Sequence[int] | None, loaded: Loaded) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range.

    None takes USUAL_STEPS: all of them where K means thinking, else as far as the checkpoint goes.
    """
    most, masked = loaded.config.max_steps, not loaded.config.objective.left_to_right
    if steps is None:
        thinking = loaded.config.objective.k_meaning == "thinking"
        limit = USUAL_STEPS[-1] if thinking and loaded.config.model.iterates else most
        steps = [k for k in USUAL_STEPS if k <= limit]
    if masked and max(steps) > most:  # check_steps would take what a bound takes
        raise UserError("--steps", max(steps), "is out of range", f"this checkpoint takes 1 to {most}")
    return check_steps(steps, loaded.config, beyond=True)


def choose_order(order: Order | None, loaded: Loaded) -> Order | None:
    """In which order a masked checkpoint's answers come into sight, random by default; None for others, UserError if asked for one."""
    if not loaded.config.objective.left_to_right:
        return order or "random"
    if order is not None:
        raise UserError("--order", order, "this model gives all answers at once", "leave the option out")
    return None


def as_trained(loaded: Loaded, task: Generated) -> Task:
    """The task in the form that the checkpoint's objective is trained on (train/corpora)."""
    return task if loaded.config.objective.left_to_right else FilledIn(task)


def check_task(loaded: Loaded, name: str, task: Task) -> None:
    """UserError where the checkpoint cannot have been trained on the task, or has too few positions for it."""
    loaded.config.check_text("a generated task")
    model = loaded.config.model
    if loaded.tokenizer is not None or model.vocab_size < task.vocab_size:
        has = (
            "is a model of text"
            if loaded.tokenizer is not None
            else f"has a vocabulary of {model.vocab_size}"
        )
        problem = f"{has}, the task has {task.vocab_size} symbols"
        raise UserError(
            "--task", name, problem, "give a checkpoint trained on it (see docs/data.md, generated tasks)"
        )
    if task.length > model.max_seq_len:
        problem = f"needs {task.length} positions, the model was built for {model.max_seq_len} positions"
        raise UserError("--lengths", task.size, problem, "use shorter ones")


@torch.no_grad()
def evaluate_depth(
    loaded: Loaded,
    task: Task,
    steps: Sequence[int],
    *,
    rows: int,
    seed: int = 0,
    batch_size: int = 256,
    order: Order | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """Share of right answers on the first ``rows`` held-out examples at each K, with bootstrap 95 % intervals over examples.

    -> [{"length", "K", "accuracy", "delta", "change", NAME, "by_position"}], the first four figures with "..._interval" beside them:
    over all positions that count, its differences from the smallest K and from the K before (both paired), and NAME = task.whole, the
    share of examples that are ``task.solved``. by_position: the share at each position that counts.
    task: ``as_trained``. order: of masked checkpoints, see ``choose_order``.
    seed: of the examples, of sampling checkpoints' noise and of the bootstrap. ``progress`` is told the examples done.
    """
    device = next(loaded.denoiser.parameters()).device
    hidden = (
        cast(MaskedDiffusion, loaded.denoiser.at(1.0)).mask_id
        if not loaded.config.objective.left_to_right
        else None
    )
    right: dict[int, list[np.ndarray]] = {k: [] for k in steps}
    solved: dict[int, list[np.ndarray]] = {k: [] for k in steps}
    masks = []
    for start in range(0, rows, batch_size):
        numbers = np.arange(start, min(rows, start + batch_size))
        batch = task.rows(numbers, seed, "test")
        inputs = batch.inputs if hidden is None else batch.inputs.masked_fill(batch.mask, hidden)
        answers = loaded.denoiser.answer(
            inputs.to(device), steps, seed=seed, order=order or "random", first=start
        )
        masks.append(batch.mask.numpy())
        for k in steps:
            given = answers[k].cpu()
            right[k].append(((given == batch.targets) & batch.mask).numpy())
            solved[k].append(task.solved(batch, given).numpy())
        if progress:
            progress(len(numbers))
    joined = {k: (np.concatenate(right[k]), np.concatenate(solved[k])) for k in steps}
    return _summarise(joined, np.concatenate(masks), task, seed)


def _summarise(
    found: dict[int, tuple[np.ndarray, np.ndarray]], mask: np.ndarray, task: Task, seed: int
) -> list[dict[str, Any]]:
    """found: {K: (bool [rows, length], bool [rows])}. The same resamples for every K."""
    rows = len(mask)
    draws = resamples(rows, seed) / rows
    shares = {k: hits.sum(1) / mask.sum(1) for k, (hits, _) in found.items()}
    base, counts = next(iter(shares.values())), mask.sum(0)
    before = base
    results = []
    for k, (hits, solved) in found.items():
        result = dict[str, Any](length=task.size, K=k)
        figures = {
            "accuracy": shares[k],
            "delta": shares[k] - base,
            "change": shares[k] - before,
            task.whole: solved.astype(float),
        }
        for name, values in figures.items():
            result |= {name: float(values.mean()), f"{name}_interval": interval(draws @ values)}
        before = shares[k]
        result["by_position"] = (hits.sum(0)[counts > 0] / counts[counts > 0]).round(4).tolist()
        results.append(result)
    return results
