"""Accuracy on tasks that need serial computation, against K.

The tasks are those of rdlm/data/synthetic.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import typer
from matplotlib.axes import Axes
from rich.console import Console
from tqdm import tqdm

from eval.held_out import open_checkpoint
from eval.metric import Json, Measurement, Picture, Run, Section, Table, pair, print_table
from eval.metrics.convergence import draw_convergence, evaluate_convergence
from eval.options import Checkpoint, Device, Out, Plot, Seed, check_steps, iterates, numbers, steps_given
from eval.plots import Row, colour, heading, k_axis, new_figure, png, with_errors, write_png
from eval.provenance import origin
from eval.stats import difference, interval, mover, resamples, with_interval
from rdlm.checkpoints.folder import Loaded
from rdlm.data.synthetic import FilledIn, Generated, Task, parse_task
from rdlm.errors import UserError
from rdlm.objectives.base import Draws
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.sampling_params import Order

USUAL_STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
"""The last two are far beyond the steps of training: whether the state stays where it is."""


WHOLE = {"last": "last position", "valid": "valid as a whole"}
"""What ``Task.whole`` is called in tables."""


def choose_steps(steps: Sequence[int] | None, loaded: Loaded) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range.

    None takes USUAL_STEPS: all of them where K iterates a state, else as far as the checkpoint goes.
    """
    config = loaded.config
    if steps is None:
        limit = USUAL_STEPS[-1] if iterates(config) else config.max_steps
        steps = [k for k in USUAL_STEPS if k <= limit]
    if not iterates(config) and max(steps) > config.max_steps:  # check_steps would take what a bound takes
        problem, remedy = "is out of range", f"this checkpoint takes 1 to {config.max_steps}"
        raise UserError("--num-steps", max(steps), problem, remedy)
    return check_steps(steps, config, beyond=True)


def choose_order(order: Order | None, loaded: Loaded) -> Order | None:
    """In which order a masked checkpoint's answers are unmasked, random by default; None for others, which
    have no choice (UserError)."""
    if not loaded.config.objective.left_to_right:
        return order or "random"
    if order is not None:
        raise UserError("--order", order, "this model gives all answers at once", "leave the option out")
    return None


def as_trained(loaded: Loaded, task: Generated) -> Task:
    """The task in the form that the checkpoint's objective is trained on (train/data/corpus.py)."""
    return task if loaded.config.objective.left_to_right else FilledIn(task)


def check_task(loaded: Loaded, name: str, task: Task) -> None:
    """UserError where the checkpoint cannot have been trained on the task, or has too few positions for
    it."""
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
    """Share of right answers on the first ``rows`` held-out examples at each K, with bootstrap 95 %
    intervals over examples.

    -> [{"length", "K", "accuracy", "delta", "change", NAME, "by_position"}], the first four figures with
    their "..._interval": over all positions that count, its differences from the smallest K and from the K
    before (both paired), and NAME = task.whole, the share of examples that are ``task.solved``.
    by_position: the share at each position that counts. task: ``as_trained``. order: of masked
    checkpoints, see ``choose_order``. seed: of the examples, of sampling checkpoints' noise and of the
    bootstrap. ``progress`` takes the number of examples done.
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
        draws = Draws(seed, first=start, order=order or "random")
        answers = loaded.denoiser.answer(inputs.to(device), steps, draws)
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


class Depth(Measurement):
    """Share of correct answers to a generated task against K, with 95 % bootstrap intervals over examples."""

    name = "depth"
    place = 50
    example = "rdlm eval depth --checkpoint runs/s3/model --task s3 --lengths 16,24 --plot depth.png"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        checkpoint: Checkpoint
        task: Annotated[
            str,
            typer.Option(
                help="s3, s5: running products; pointer16: hops over 16 nodes; latin5: blanks of 5 x 5 cells."
            ),
        ] = "s3"
        lengths: Annotated[
            str,
            typer.Option(
                help="Positions, hops or blanks with commas; beyond those of training it is extrapolation."
            ),
        ] = "16,24"
        num_steps: Annotated[
            str | None,
            typer.Option(
                help="Values of K with commas [1,2,4,8,16,32,64,128; a sampling checkpoint only goes to its "
                "own largest]."
            ),
        ] = None
        order: Annotated[
            Order | None,
            typer.Option(help="Masked models: which answers are unmasked first [random]."),
        ] = None
        num_examples: Annotated[int, typer.Option(min=2, help="Held-out examples of each length.")] = 2048
        batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 256
        seed: Seed = 0
        device: Device = "auto"
        out: Out = None
        plot: Plot = None

    def measure(self, options: Options) -> Json:
        parsed = [parse_task(options.task, length) for length in numbers("--lengths", options.lengths, int)]
        loaded = open_checkpoint(options.checkpoint, options.device)
        order = choose_order(options.order, loaded)
        tasks = [as_trained(loaded, each) for each in parsed]
        for each in tasks:
            check_task(loaded, options.task, each)
        ks = choose_steps(steps_given(options.num_steps), loaded)
        results: list[Json] = []
        settling: Json = {}
        with tqdm(
            total=options.num_examples * len(tasks), unit="example", desc=f"K = {', '.join(map(str, ks))}"
        ) as bar:
            for each in tasks:
                results += evaluate_depth(
                    loaded,
                    each,
                    ks,
                    rows=options.num_examples,
                    seed=options.seed,
                    batch_size=options.batch_size,
                    order=order,
                    progress=bar.update,
                )
                if ks[-1] > 1 and iterates(loaded.config):
                    shown = each.rows(
                        np.arange(min(options.num_examples, options.batch_size)), options.seed, "test"
                    )
                    settling[str(each.size)] = evaluate_convergence(
                        loaded, [shown], ks[-1], seed=options.seed
                    )
        first = tasks[0]
        data = {
            "task": options.task,
            "unit": first.unit,
            "whole": first.whole,
            "split": "test",
            "rows": options.num_examples,
            "seed": options.seed,
        }
        head = {**origin(self.name, options.checkpoint, loaded.config), "data": data, "order": order}
        return {**head, "chance": first.chance, "results": results, "convergence": settling}

    def show(self, report: Json, console: Console) -> None:
        data, smallest = report["data"], report["results"][0]["K"]
        order = "" if report["order"] is None else f"; answers are unmasked in {report['order']} order"
        against = (f"against K = {smallest}", "against the K before")
        headers = (data["unit"], "K", "right [95 %]", *against, f"{WHOLE[data['whole']]} [95 %]")
        rows = []
        for r in report["results"]:
            compared = [
                "" if r["K"] == smallest else difference(*pair(r, name)) for name in ("delta", "change")
            ]
            cells = [with_interval(*pair(r, name)) for name in ("accuracy", data["whole"])]
            rows.append([str(r["length"]), str(r["K"]), cells[0], *compared, cells[1]])
        caption = (
            f"{data['rows']:,} held-out examples of each length; chance is {report['chance']:.3f}{order}"
        )
        print_table(console, f"{heading(report)}: {data['task']}", headers, rows, caption)

    def plot(self, report: Json, file: Path) -> None:
        figure, (axes,) = new_figure()
        draw_depth(axes, report)
        axes.axhline(report["chance"], color="grey", linestyle=":", label="chance")
        k_axis(axes, [r["K"] for r in report["results"]], label="K")
        axes.set_title(f"{heading(report)}: {report['data']['task']}")
        axes.legend(fontsize=8)
        write_png(figure, file)

    def protocol(self, report: Json) -> Json:
        data = report["data"]
        lengths = sorted({row["length"] for row in report["results"]})
        return {**{name: data[name] for name in ("task", "rows", "seed")}, "lengths": lengths}

    def section(self, runs: list[Run]) -> Section:
        first, rows, whole = runs[0], [], runs[0].report["data"]["whole"]
        unit = first.report["data"]["unit"]
        for run in runs:
            order = run.report.get("order")  # of masked models
            name = run.label if order is None else f"{run.label}, {order} order"
            for r in run.report["results"]:
                same = next(
                    (o for o in first.report["results"] if (o["length"], o["K"]) == (r["length"], r["K"])),
                    None,
                )
                against = (
                    ""
                    if run is first or same is None
                    else difference(*mover(pair(r, "accuracy"), pair(same, "accuracy")))
                )
                figures = [with_interval(*pair(r, name)) for name in ("accuracy", whole)]
                rows.append([name, str(r["length"]), str(r["K"]), figures[0], against, figures[1]])
        figure, (left, right) = new_figure(2)
        for i, run in enumerate(runs):
            draw_depth(left, run.report, f"{run.label}, ", color=None if len(runs) == 1 else colour(i))
        left.axhline(first.report["chance"], color="grey", linestyle=":", label="chance")
        k_axis(left, [r["K"] for run in runs for r in run.report["results"]], "K")
        left.legend(fontsize=7)
        _by_position(right, runs[-1], unit)
        headers = [
            "run",
            unit,
            "K",
            "right [95 %]",
            f"against {first.label}",
            WHOLE[whole],
        ]
        data = first.report["data"]
        about = (
            f"Task {data['task']}: {data['rows']:,} held-out examples of each length, chance "
            f"{first.report['chance']:.3f}."
        )
        caption = f"Accuracy against K, and by position for {runs[-1].label}"
        pictures = [Picture(png(figure), caption), *_settling(runs)]
        return Section("Depth", about, [Table(headers, rows), *pictures])


def draw_depth(axes: Axes, report: Row, name: str = "", **style: Any) -> None:
    """Accuracy against K, a curve for each length."""
    for length in dict.fromkeys(r["length"] for r in report["results"]):
        chosen = [r for r in report["results"] if r["length"] == length]
        label = f"{name}{report['data']['unit']} {length}"
        with_errors(axes, chosen, "K", "accuracy", marker="o", label=label, **style)
    axes.set_ylabel("share of right answers")


def _by_position(axes: Axes, run: Run, unit: str) -> None:
    longest = max(r["length"] for r in run.report["results"])
    for r in run.report["results"]:
        if r["length"] == longest:
            axes.plot(range(1, len(r["by_position"]) + 1), r["by_position"], label=f"K = {r['K']}")
    axes.set_xlabel(f"position that counts ({unit} {longest})")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _settling(runs: list[Run]) -> list[Picture]:
    known = [(run.label, size, found) for run in runs for size, found in run.report["convergence"].items()]
    if not known:
        return []
    figure, panels = new_figure(2)
    for i, (label, size, found) in enumerate(known):
        draw_convergence(panels, found, f"{label}, {size}", color=colour(i))
    panels[0].legend(fontsize=7)
    return [Picture(png(figure), "What one more core step changes on the task")]
