"""Classification of images by a ViT, against K and sampler.

Bootstrap intervals are paired over images.
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
from eval.options import (
    TEXT_SAMPLERS,
    Checkpoint,
    Device,
    Dtype,
    Out,
    Plot,
    Seed,
    check_steps,
    samplers,
    steps_given,
)
from eval.plots import Row, colour, heading, k_axis, new_figure, png, with_errors, write_png
from eval.provenance import origin
from eval.stats import difference, interval, mover, resamples, with_interval
from rdlm.checkpoints.folder import Loaded, load_config
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import VitConfig
from rdlm.data.images import ImageStore
from rdlm.errors import UserError
from rdlm.objectives.base import Draws
from rdlm.sampling_params import check_sampler, text_samplers

USUAL_STEPS = (1, 2, 4, 8)


def choose_steps(steps: Sequence[int] | None, loaded: Loaded) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range. None: 1 where K is one pass, else
    USUAL_STEPS and the default."""
    config = loaded.config
    if steps is None:
        steps = sorted({*(k for k in USUAL_STEPS if k <= config.max_steps), config.default_steps})
    return check_steps(steps, config)


def check_fit(config: CheckpointConfig, store: ImageStore, samplers: Sequence[str]) -> None:
    """UserError where checkpoint, images and samplers do not belong together."""
    config.check_family("rdlm eval accuracy", "vit")
    config.check_whole()
    model = cast(VitConfig, config.model)
    height, width = store.manifest.image_size
    if (height, width) != (model.image_size,) * 2 or len(store.manifest.classes) != model.num_classes:
        found = f"holds images of {width}x{height} in {len(store.manifest.classes)} classes"
        problem = (
            f"{found}, the model was built for {model.image_size}x{model.image_size} in {model.num_classes}"
        )
        raise UserError("--data", str(store.folder), problem, "give the data it was trained on")
    for sampler in samplers:
        check_sampler(sampler, config)


@torch.no_grad()
def evaluate_accuracy(
    loaded: Loaded,
    store: ImageStore,
    steps: Sequence[int],
    samplers: Sequence[str] = ("renoise",),
    *,
    num_draws: int = 1,
    max_images: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """-> {"images", "nll", "nll_interval", "estimator", "results": [{"sampler", "K", "accuracy", "delta",
    "against_first_sampler", each with "..._interval", "draws", "draw_sd", "by_class", "right"}]}.

    delta is against the smallest K over the same sampler, ``against_first_sampler`` at the same K; both are
    paired by image. ``nll``: nats per image at K = 1, where the likelihood is normalised. Noise of an
    image depends on (seed, draw, its number) alone. K = 1 reads z = 0, so there is one draw of it.
    by_class: accuracy of each class. right: of each image in how many draws, a digit each.
    """
    count = len(store) if max_images is None else min(len(store), max_images)
    device = next(loaded.denoiser.parameters()).device
    hits = {
        (b, k): np.zeros((1 if k == 1 else num_draws, count), dtype=bool) for b in samplers for k in steps
    }
    nats, labels = np.zeros(count), np.zeros(count, dtype=np.int64)
    for first in range(0, count, batch_size):
        rows = slice(first, min(first + batch_size, count))
        batch = store.rows(np.arange(rows.start, rows.stop)).to(device)
        inputs = batch.inputs.to(next(loaded.denoiser.parameters()).dtype)
        nats[rows] = (
            -loaded.denoiser.score(inputs, batch.targets, (1,))[1].logprobs[:, 0].double().cpu().numpy()
        )
        labels[rows] = batch.targets[:, 0].cpu().numpy()
        for sampler in samplers:
            for draw in range(num_draws):
                ks = [k for k in steps if draw < len(hits[sampler, k])]
                if not ks:
                    continue
                answers = loaded.denoiser.answer(inputs, ks, Draws(seed, draw, first, sampler))
                for k in ks:
                    hits[sampler, k][draw, rows] = (answers[k] == batch.targets)[:, 0].cpu().numpy()
        if progress:
            progress(rows.stop - rows.start)
    draws = resamples(count, seed) / count
    known = {
        "images": count, "nll": float(nats.mean()), "nll_interval": interval(draws @ nats),
        "estimator": loaded.config.objective.estimator_at(1),
    }  # fmt: skip
    return {**known, "results": _summarise(hits, labels, draws)}


def _summarise(
    hits: dict[tuple[str, int], np.ndarray], labels: np.ndarray, draws: np.ndarray
) -> list[dict[str, Any]]:
    """hits: {(sampler, K): bool [draws, images]}; draws: weights [resamples, images], the same for all."""
    shares = {key: found.mean(0) for key, found in hits.items()}
    sampler_0, k_0 = next(iter(shares))
    results = []
    for (sampler, k), values in shares.items():
        found = hits[sampler, k]
        figures = {
            "accuracy": values,
            "delta": values - shares[sampler, k_0],
            "against_first_sampler": values - shares[sampler_0, k],
        }
        row = dict[str, Any](sampler=sampler, K=k)
        for name, each in figures.items():
            row |= {name: float(each.mean()), f"{name}_interval": interval(draws @ each)}
        row["draws"] = len(found)
        row["draw_sd"] = float(found.mean(1).std(ddof=1)) if len(found) > 1 else None
        row["by_class"] = [
            round(float(values[labels == c].mean()), 4) if (labels == c).any() else None
            for c in range(labels.max() + 1)
        ]
        row["right"] = "".join(map(str, found.sum(0)))
        results.append(row)
    return results


class Accuracy(Measurement):
    """Share of images that are classified correctly, and the NLL of the class, with 95 % bootstrap intervals over
    images."""

    name = "accuracy"
    place = 80
    example = "rdlm eval accuracy --checkpoint runs/vit_cifar10/model --data data/cifar10 --num-steps 1,4 --plot a.png"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        checkpoint: Checkpoint
        data: Annotated[Path, typer.Option(help="Folder made by `rdlm data images`.")]
        split: Annotated[str, typer.Option(help="Split to classify.")] = "test"
        num_steps: Annotated[
            str | None,
            typer.Option(
                help="Values of K with commas [1,2,4,8 and the checkpoint's; 1 where nothing is noised]."
            ),
        ] = None
        sampler: Annotated[
            str, typer.Option(help=f"Models that noise the class: one or several of {TEXT_SAMPLERS}.")
        ] = "renoise"
        num_draws: Annotated[
            int, typer.Option(min=1, max=9, help="Noise samples that accuracy is averaged over, where K > 1.")
        ] = 1
        max_images: Annotated[
            int | None, typer.Option(min=2, help="Use this many images from the start [all].")
        ] = None
        batch_size: Annotated[
            int, typer.Option(min=1, help="Images per forward pass; does not affect the noise.")
        ] = 128
        per_image: Annotated[
            bool,
            typer.Option(
                "--per-image",
                help="Add the outcome of each image to the JSON, so that reports compare in pairs.",
            ),
        ] = False
        seed: Seed = 0
        device: Device = "auto"
        dtype: Dtype = "float32"
        out: Out = None
        plot: Plot = None

    def measure(self, options: Options) -> Json:
        chosen = samplers(options.sampler, text_samplers())
        store = ImageStore(options.data, options.split)
        check_fit(load_config(options.checkpoint), store, chosen)
        loaded = open_checkpoint(options.checkpoint, options.device, options.dtype)
        ks = choose_steps(steps_given(options.num_steps), loaded)
        total = len(store) if options.max_images is None else min(len(store), options.max_images)
        with tqdm(total=total, unit="image", desc=f"K = {', '.join(map(str, ks))}") as bar:
            measured = evaluate_accuracy(
                loaded,
                store,
                ks,
                chosen,
                num_draws=options.num_draws,
                max_images=options.max_images,
                seed=options.seed,
                batch_size=options.batch_size,
                progress=bar.update,
            )
        data = {
            "source": store.manifest.source,
            "split": options.split,
            "manifest_sha256": store.manifest_sha256,
            "classes": store.manifest.classes,
        }
        head = {**origin(self.name, options.checkpoint, loaded.config), "data": data}
        return {**head, "seed": options.seed, "dtype": options.dtype, **measured}

    def written(self, report: Json, options: Options) -> Json:
        if options.per_image:
            return report
        rows = [{name: value for name, value in row.items() if name != "right"} for row in report["results"]]
        return {**report, "results": rows}

    def show(self, report: Json, console: Console) -> None:
        first = report["results"][0]
        several = len({r["sampler"] for r in report["results"]}) > 1
        against = [f"against K = {first['K']}", *([f"against {first['sampler']}"] * several)]
        rows = []
        for r in report["results"]:
            compared = ["" if r["K"] == first["K"] else difference(*pair(r, "delta"))]
            if several:
                same = r["sampler"] == first["sampler"]
                compared.append("" if same else difference(*pair(r, "against_first_sampler")))
            spread = "" if r["draw_sd"] is None else f"{r['draw_sd']:.4f}"
            cells = [with_interval(*pair(r, "accuracy")), *compared, str(r["draws"]), spread]
            rows.append([r["sampler"], str(r["K"]), *cells])
        nll = with_interval(report["nll"], report["nll_interval"], ".4f")
        title = f"{heading(report)}: {report['images']:,} images of {report['data']['split']}"
        caption = f"NLL {nll} nats per image ({report['estimator']}); 95 % intervals over images"
        headers = ("sampler", "K", "accuracy [95 %]", *against, "draws", "sd of draws")
        print_table(console, title, headers, rows, caption)

    def plot(self, report: Json, file: Path) -> None:
        figure, (axes,) = new_figure()
        draw_accuracy(axes, report)
        k_axis(axes, [r["K"] for r in report["results"]], "K")
        axes.set_title(f"{heading(report)}: {report['images']:,} images of {report['data']['split']}")
        axes.legend(fontsize=8)
        write_png(figure, file)

    def protocol(self, report: Json) -> Json:
        return {**super().protocol(report), "images": report["images"]}

    def section(self, runs: list[Run]) -> Section:
        """A row for each run, sampler and K, against the first row of all."""
        base, rows = runs[0].report["results"][0], []
        named = f"{runs[0].label}, K = {base['K']}"
        figure, (axes,) = new_figure()
        curves = 0
        for run in runs:
            nll = with_interval(run.report["nll"], run.report["nll_interval"], ".4f")
            for r in run.report["results"]:
                compared = "" if r is base else _accuracy_difference(r, base)
                figures = [with_interval(r["accuracy"], r["accuracy_interval"], ".4f"), compared]
                rows.append([run.label, r["sampler"], str(r["K"]), *figures, nll if r["K"] == 1 else ""])
            curves += draw_accuracy(axes, run.report, f"{run.label}, ", curves)
        k_axis(axes, [r["K"] for run in runs for r in run.report["results"]], "K")
        axes.legend(fontsize=7)
        data = runs[0].report["data"]
        about = (
            f"{runs[0].report['images']:,} images of {data['source']}, split {data['split']}. The NLL is "
            "that of the class at K = 1."
        )
        headers = ["run", "sampler", "K", "accuracy [95 %]", f"against {named}", "NLL, nats per image [95 %]"]
        return Section(
            "Classification", about, [Table(headers, rows), Picture(png(figure), "Accuracy against K")]
        )


def _accuracy_difference(mine: Json, base: Json) -> str:
    if "right" not in mine or "right" not in base:
        return difference(
            *mover(*((each["accuracy"], each["accuracy_interval"]) for each in (mine, base))), "+.4f"
        )
    a, b = (np.array(list(each["right"]), dtype=float) / each["draws"] for each in (mine, base))
    return (
        difference(float((a - b).mean()), interval(resamples(len(a), 0) @ (a - b) / len(a)), "+.4f")
        + ", paired"
    )


def draw_accuracy(axes: Axes, report: Row, name: str = "", first_colour: int = 0) -> int:
    """Accuracy against K, a curve for each sampler; -> how many."""
    samplers = list(dict.fromkeys(r["sampler"] for r in report["results"]))
    for i, sampler in enumerate(samplers):
        chosen = [r for r in report["results"] if r["sampler"] == sampler]
        with_errors(
            axes,
            chosen,
            "K",
            "accuracy",
            marker="o",
            markersize=4,
            color=colour(first_colour + i),
            label=f"{name}{sampler}",
        )
    axes.set_ylabel("accuracy")
    return len(samplers)
