"""The section of a report, and the figure, on distances between sets of images."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from eval.bootstrap import mover
from eval.plots import colour, new_figure, png, write_png
from eval.report import Json, Picture, Run, Section, Table
from eval.wording import difference, with_interval

DIGITS = {"frechet": ".2f", "kernel": ".5f"}


def notes(report: Json) -> list[str]:
    """What a reader must know beside the figures."""
    name, kernel = report["figures"]["frechet"], report["figures"]["kernel"]
    out = [] if report["comparable_with_published"] else [f"{name} and {kernel} are not comparable with published FID and KID."]
    dimensions = report["features"]["dimensions"]
    if report["result"]["frechet"] is None:
        out.append(f"{name} needs more than {dimensions:,} images in each set, one per feature: rely on {kernel}.")
    elif report["floor"]["frechet"] is None:
        out.append(f"No floor of {name}: half of the reference is not more than {dimensions:,} images.")
    if not report["floor"]["same_n"]:
        out.append(f"The floor rests on fewer images than the figure: {name}'s lies too high, {kernel}'s is only less certain.")
    return out


def fid(runs: list[Run]) -> Section:
    """A row for each set of images, and the floor."""
    first = runs[0]
    cells = []
    for run in runs:
        row = [run.label, _counts(run.report["result"])]
        for name in DIGITS:
            row += [
                *_value(run.report["result"], name),
                _against(run, first.report["floor"], name),
                _against(run, first.report["result"], name),
            ]
        cells.append(row)
    floor = ["floor: parts of the reference", _counts(first.report["floor"])]
    for name in DIGITS:
        floor += [*_value(first.report["floor"], name), "", ""]
    headers = ["run", "images, reference"]
    for name in first.report["figures"].values():
        headers += [f"{name} [95 %]", "- floor", f"- {first.label}"]
    used, size = first.report["features"], first.report["reference"]["size"]
    about = (
        f"Reference {first.report['reference']['name']}, {size[1]}x{size[0]}; features of {used['name']} ({used['dimensions']:,}), "
        f"{used['resize']}. Intervals cover the drawing of images. " + " ".join(notes(first.report))
    )
    return Section(
        "Distance between sets of images",
        about,
        [Table(headers, [floor, *cells]), Picture(png(_figure(runs)), "Distances and floor")],
    )


def _counts(row: Json) -> str:
    return ", ".join(f"{n:,}" for n in row["n"])


def _value(row: Json, name: str) -> list[str]:
    return ["-" if row[name] is None else with_interval(row[name], row[f"{name}_interval"], DIGITS[name])]


def _against(run: Run, other: Json, name: str) -> str:
    mine = run.report["result"]
    if mine is other or mine[name] is None or other[name] is None:
        return ""
    return difference(*mover(*((each[name], each[f"{name}_interval"]) for each in (mine, other))), f"+{DIGITS[name]}")


def plot_images(report: Json, file: Path) -> None:
    """Both distances beside their floors, as PNG."""
    write_png(_figure([Run(file, "fid", report["images"]["name"], report)]), file)


def _figure(runs: list[Run]) -> Figure:
    figure, panels = new_figure(2)
    for axes, (name, title) in zip(panels, runs[0].report["figures"].items(), strict=True):
        sides = [("floor", runs[0].report["floor"]), *((run.label, run.report["result"]) for run in runs)]
        for i, (_, row) in enumerate(sides):
            if row[name] is not None:
                low, high = row[f"{name}_interval"]
                axes.errorbar(
                    [i],
                    [row[name]],
                    yerr=[[row[name] - low], [high - row[name]]],
                    fmt="o",
                    capsize=3,
                    color="grey" if i == 0 else colour(i - 1),
                )
        axes.set_xticks(range(len(sides)), [label for label, _ in sides], rotation=20, ha="right", fontsize=7)
        axes.set_xlim(-0.5, len(sides) - 0.5)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
    return figure
