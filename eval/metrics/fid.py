"""Distance between two sets of images in a network's features.

The sets are files, or samples of a checkpoint; the distances are those of eval/images/distance.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from eval.cache import Bar, bars
from eval.held_out import open_checkpoint
from eval.images.distance import FEWEST, evaluate_images
from eval.images.features import load_extractor
from eval.images.samples import Setting, drawn, settings
from eval.metric import Json, Measurement, Picture, Run, Section, Table, print_table
from eval.options import Device, Dtype, Out, Plot, Seed, numbers, samplers, steps_given
from eval.plots import colour, k_axis, new_figure, png, with_errors, write_png
from eval.provenance import checkpoint_facts, provenance
from eval.stats import difference, mover, with_interval
from rdlm.checkpoints.folder import load_config
from rdlm.data.image_files import ImageSet, open_images
from rdlm.device import usable_device
from rdlm.diffusion.samplers import SAMPLERS
from rdlm.errors import UserError

SET = (
    "a folder of PNG or JPEG files, an .npy or .npz array (uint8 [N, H, W, 3]), or a parquet file with an "
    "image column"
)
NUM_DRAWN = 2000
"""Images of a checkpoint by default: more than either network has features."""
DIGITS = {"frechet": ".2f", "kernel": ".5f"}


class Fid(Measurement):
    """Frechet and kernel distance between two sets of images, with the floor between parts of the
    reference.

    With --checkpoint at every combination of --num-steps, --guidance and --sampler, on images of all
    classes in turn.
    """

    name = "fid"
    place = 90
    example = (
        "rdlm eval fid --checkpoint runs/dit_cifar10/model --reference data/cifar10/test/images.npy "
        "--num-steps 10,50"
    )

    @dataclass(frozen=True, kw_only=True)
    class Options:
        reference: Annotated[Path, typer.Option(help=f"Images to compare with: {SET}.")]
        images: Annotated[
            Path | None, typer.Option(help="Images to measure, of the same kinds.", show_default=False)
        ] = None
        checkpoint: Annotated[
            Path | None,
            typer.Option(
                help="Instead of --images: a checkpoint of family dit that generates them.",
                show_default=False,
            ),
        ] = None
        num_steps: Annotated[
            str | None,
            typer.Option(
                help="With --checkpoint: values of K with commas [the checkpoint's].", show_default=False
            ),
        ] = None
        guidance: Annotated[
            str, typer.Option(help="With --checkpoint: one or several with commas; 1 is none.")
        ] = "1"
        sampler: Annotated[
            str,
            typer.Option(help=f"With --checkpoint: one or several of {', '.join(SAMPLERS)} with commas."),
        ] = "euler"
        features: Annotated[
            Literal["efficientnet-lite0", "inception"],
            typer.Option(
                help="Network whose features are compared; only inception gives what is published as FID."
            ),
        ] = "efficientnet-lite0"
        num_images: Annotated[
            int | None,
            typer.Option(
                min=FEWEST, help=f"Use this many of each set; by default all, of a checkpoint {NUM_DRAWN:,}."
            ),
        ] = None
        seed: Seed = 0
        cache: Annotated[
            Path, typer.Option(help="Where features and generated images are kept; a run resumes from it.")
        ] = Path("runs/eval")
        device: Device = "auto"
        dtype: Dtype = "float32"
        out: Out = None
        plot: Plot = None

    def measure(self, options: Options) -> Json:
        if (options.images is None) == (options.checkpoint is None):
            problem = "exactly one of --images and --checkpoint is needed"
            raise UserError("--images", str(options.images), problem, "give exactly one")
        if options.checkpoint is not None:
            load_config(options.checkpoint).check_family("rdlm eval fid", "dit")
        given = open_images(options.reference, "--reference")
        extractor = load_extractor(options.features, str(usable_device(options.device, "--device")))
        head: Json = {"evaluation": self.name, "provenance": provenance(), "seed": options.seed}
        with bars() as bar:
            if options.images is not None:
                if (options.num_steps, options.guidance, options.sampler) != (None, "1", "euler"):
                    problem = "--num-steps, --guidance and --sampler are of a checkpoint"
                    raise UserError("--images", str(options.images), problem, "leave them out")
                sets = [open_images(options.images, "--images")]
                count = options.num_images
                found = evaluate_images(sets, given, extractor, options.cache, bar, count, options.seed)
                return {**head, **found}
            count = min(options.num_images or NUM_DRAWN, given.count)
            drawing = Drawing(options)
            found = evaluate_images(
                drawing.sets(count, bar), given, extractor, options.cache, bar, count, options.seed
            )
        for row, setting in zip(found["results"], drawing.settings, strict=True):
            row["setting"] = vars(setting)
        return {**head, "checkpoint": drawing.facts, "dtype": options.dtype, **found}

    def show(self, report: Json, console: Console) -> None:
        used, size = report["features"], report["reference"]["size"]
        caption = (
            f"{size[1]}x{size[0]} images, features of {used['name']} ({used['dimensions']:,}), "
            f"{used['resize']}; "
            "95 % intervals over the drawing of images"
        )
        named = [(str(Setting(**r["setting"])) if "setting" in r else "images", r) for r in report["results"]]
        rows = []
        for label, row in (*named, ("floor", report["floor"])):
            cells = [cell for name in DIGITS for cell in _cells(row, name)]
            rows.append([label, *(f"{n:,}" for n in row["n"]), *cells])
        headers = ["", "n", "n reference"]
        for figure in report["figures"].values():
            headers += [figure, "- floor"]
        title = f"{self.label(report)} against {report['reference']['name']}"
        print_table(console, title, headers, rows, caption)
        for note in notes(report):
            console.print(note, highlight=False)

    def plot(self, report: Json, file: Path) -> None:
        plot_images({self.label(report): report}, file)

    def label(self, report: Json) -> str:
        """The checkpoint's name; of images that no checkpoint drew, their own."""
        return (
            super().label(report) if "checkpoint" in report else str(report["results"][0]["images"]["name"])
        )

    def protocol(self, report: Json) -> Json:
        return {
            "features": report["features"],
            "reference": report["reference"],
            "images, reference": report["results"][0]["n"],
        }

    def section(self, runs: list[Run]) -> Section:
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
            f"Reference {report['reference']['name']}, {size[1]}x{size[0]}; features of {used['name']} "
            f"({used['dimensions']:,}), "
            f"{used['resize']}. Intervals cover the drawing of images. " + " ".join(notes(report))
        )
        return Section(
            "Distance between sets of images",
            about,
            [Table(headers, [floor, *cells]), Picture(png(_figure(runs)), "Distances and floor")],
        )


class Drawing:
    """A checkpoint and the settings it draws at. UserError for what does not fit."""

    def __init__(self, options: Fid.Options) -> None:
        assert options.checkpoint is not None
        config = load_config(options.checkpoint)
        config.check_family("--checkpoint of rdlm eval fid", "dit")
        config.check_whole()
        ks = steps_given(options.num_steps) or [config.default_steps]
        guidance = numbers("--guidance", options.guidance, float)
        self.settings = settings(ks, guidance, samplers(options.sampler), config.max_steps)
        self.facts, self.options = checkpoint_facts(options.checkpoint, config), options
        self.loaded = open_checkpoint(options.checkpoint, options.device, options.dtype)

    def sets(self, count: int, bar: Bar) -> Iterator[ImageSet]:
        """The images of each setting in turn."""
        given = self.options
        for setting in self.settings:
            yield drawn(self.loaded, self.facts, setting, count, given.seed, given.dtype, given.cache, bar)


def _cells(row: dict[str, Any], name: str) -> tuple[str, str]:
    if row[name] is None:
        return "-", ""
    digits = DIGITS[name]
    against = row.get(f"{name}_against_floor")
    compared = difference(against["difference"], against["interval"], f"+{digits}") if against else ""
    return with_interval(row[name], row[f"{name}_interval"], digits), compared


def notes(report: Json) -> list[str]:
    """What a reader must know besides the figures."""
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
            f"The floor rests on fewer images than the figure: {name}'s lies too high, {kernel}'s is only "
            "less certain."
        )
    return out


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
    """Both distances of named reports and their floors, as PNG; of checkpoints against K."""
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
