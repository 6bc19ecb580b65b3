"""The sections of a report on images: what is classified, and distances between sets of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.images.samples import Setting
from eval.plots import colour, draw_accuracy, k_axis, new_figure, png, with_errors, write_png
from eval.report.report import Json, Picture, Run, Section, Table
from eval.stats import interval, mover, resamples
from eval.wording import difference, with_interval

DIGITS = {"frechet": ".2f", "kernel": ".5f"}


def accuracy(runs: list[Run]) -> Section:
    """A row for each run, bridge and K, against the first row of all."""
    base, rows = runs[0].report["results"][0], []
    named = f"{runs[0].label}, K = {base['K']}"
    figure, (axes,) = new_figure()
    curves = 0
    for run in runs:
        nll = with_interval(run.report["nll"], run.report["nll_interval"], ".4f")
        for r in run.report["results"]:
            compared = "" if r is base else _accuracy_difference(r, base)
            figures = [with_interval(r["accuracy"], r["accuracy_interval"], ".4f"), compared]
            rows.append([run.label, r["bridge"], str(r["K"]), *figures, nll if r["K"] == 1 else ""])
        curves += draw_accuracy(axes, run.report, f"{run.label}, ", curves)
    k_axis(axes, [r["K"] for run in runs for r in run.report["results"]], "K")
    axes.legend(fontsize=7)
    data = runs[0].report["data"]
    about = f"{runs[0].report['images']:,} images of {data['source']}, split {data['split']}. The NLL is that of the class at K = 1."
    headers = ["run", "bridge", "K", "accuracy [95 %]", f"against {named}", "NLL, nats per image [95 %]"]
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


def notes(report: Json) -> list[str]:
    """What a reader must know beside the figures."""
    name, kernel = report["figures"]["frechet"], report["figures"]["kernel"]
    out = (
        []
        if report["comparable_with_published"]
        else [f"{name} and {kernel} are not comparable with published FID and KID."]
    )
    dimensions = report["features"]["dimensions"]
    if report["results"][0]["frechet"] is None:
        out.append(
            f"{name} needs more than {dimensions:,} images in each set, one per feature: rely on {kernel}."
        )
    elif report["floor"]["frechet"] is None:
        out.append(f"No floor of {name}: half of the reference is not more than {dimensions:,} images.")
    if not report["floor"]["same_n"]:
        out.append(
            f"The floor rests on fewer images than the figure: {name}'s lies too high, {kernel}'s is only less certain."
        )
    return out


def fid(runs: list[Run]) -> Section:
    """A row for each set of images, and the floor."""
    report, base = runs[0].report, runs[0].report["results"][0]
    first = _label(runs[0], base)
    cells = []
    for run in runs:
        for result in run.report["results"]:
            row = [_label(run, result), _counts(result)]
            for name in DIGITS:
                row += [
                    _value(result, name),
                    _against(result, report["floor"], name),
                    _against(result, base, name),
                ]
            cells.append(row)
    floor = ["floor: parts of the reference", _counts(report["floor"])]
    for name in DIGITS:
        floor += [_value(report["floor"], name), "", ""]
    headers = ["images", "images, reference"]
    for name in report["figures"].values():
        headers += [f"{name} [95 %]", "- floor", f"- {first}"]
    used, size = report["features"], report["reference"]["size"]
    about = (
        f"Reference {report['reference']['name']}, {size[1]}x{size[0]}; features of {used['name']} ({used['dimensions']:,}), "
        f"{used['resize']}. Intervals cover the drawing of images. " + " ".join(notes(report))
    )
    return Section(
        "Distance between sets of images",
        about,
        [Table(headers, [floor, *cells]), Picture(png(_figure(runs)), "Distances and floor")],
    )


def _label(run: Run, result: Json) -> str:
    """Images of a checkpoint are named by how they were drawn."""
    return f"{run.label}, {Setting(**result['setting'])}" if "setting" in result else run.label


def _counts(row: Json) -> str:
    return ", ".join(f"{n:,}" for n in row["n"])


def _value(row: Json, name: str) -> str:
    return "-" if row[name] is None else with_interval(row[name], row[f"{name}_interval"], DIGITS[name])


def _against(mine: Json, other: Json, name: str) -> str:
    if mine is other or mine[name] is None or other[name] is None:
        return ""
    return difference(
        *mover(*((each[name], each[f"{name}_interval"]) for each in (mine, other))), f"+{DIGITS[name]}"
    )


def plot_images(reports: Mapping[str, Json], file: Path) -> None:
    """Both distances of named reports beside their floors, as PNG; of checkpoints against K."""
    write_png(_figure([Run(file, "fid", name, report) for name, report in reports.items()]), file)


def _figure(runs: list[Run]) -> Figure:
    figure, panels = new_figure(2)
    drawn = [(run, [r for r in run.report["results"] if "setting" in r]) for run in runs]
    for axes, (name, title) in zip(panels, runs[0].report["figures"].items(), strict=True):
        if any(rows for _, rows in drawn):
            _against_k(axes, runs, name)
        else:
            _side_by_side(axes, runs, name)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    return figure


def _against_k(axes: Axes, runs: list[Run], name: str) -> None:
    """A line for each way of drawing, a level line for each set of images and for the floor."""
    curves: dict[str, list[Json]] = {}
    levels = [("floor", runs[0].report["floor"])]
    for run in runs:
        for r in run.report["results"]:
            if "setting" not in r:
                levels.append((run.label, r))
            elif r[name] is not None:
                setting = Setting(**r["setting"])
                curves.setdefault(f"{run.label}, {setting.rest}", []).append({**r, "K": setting.num_steps})
    for i, (label, rows) in enumerate(curves.items()):
        with_errors(
            axes,
            sorted(rows, key=lambda r: r["K"]),
            "K",
            name,
            marker="o",
            markersize=4,
            color=colour(i),
            label=label,
        )
    for label, row in levels:
        if row[name] is not None:
            axes.axhline(row[name], color="grey", linestyle=":", linewidth=1)
            axes.annotate(
                label, (1, row[name]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7
            )
    ks = [r["K"] for rows in curves.values() for r in rows]
    if ks:
        k_axis(axes, ks, "steps K")
        axes.legend(fontsize=7)


def _side_by_side(axes: Axes, runs: list[Run], name: str) -> None:
    sides = [("floor", runs[0].report["floor"]), *((run.label, run.report["results"][0]) for run in runs)]
    for i, (_, row) in enumerate(sides):
        if row[name] is not None:
            low, high = row[f"{name}_interval"]
            error = [[row[name] - low], [high - row[name]]]
            axes.errorbar(
                [i], [row[name]], yerr=error, fmt="o", capsize=3, color="grey" if i == 0 else colour(i - 1)
            )
    axes.set_xticks(range(len(sides)), [label for label, _ in sides], rotation=20, ha="right", fontsize=7)
    axes.set_xlim(-0.5, len(sides) - 0.5)
