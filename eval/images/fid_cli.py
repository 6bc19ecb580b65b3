"""``rdlm eval fid``: how far two sets of images lie apart, of files or of a checkpoint that draws them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from eval.options import Device, Dtype, Out, Plot, Seed, numbers, usable_device
from eval.output import write_json
from eval.wording import difference, with_interval
from rdlm.errors import UserError

if TYPE_CHECKING:
    from eval.texts.gen_ppl import Bar
    from rdlm.data.image_files import ImageSet

SET = "a folder of PNG or JPEG files, an .npy or .npz array (uint8 [N, H, W, 3]), or a parquet file with an image column"
NUM_DRAWN = 2000
"""Images of a checkpoint where no number is asked for: more than either network has features."""
KEPT = "Where features and drawn images are kept; a run resumes from it."


def fid(
    reference: Annotated[Path, typer.Option(help=f"What images should look like: {SET}.")],
    images: Annotated[
        Path | None, typer.Option(help="What is judged: the same kinds.", show_default=False)
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Or: a checkpoint of family dit draws them.", show_default=False)
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="With --checkpoint: values of K with commas [the checkpoint's].", show_default=False
        ),
    ] = None,
    guidance: Annotated[
        str, typer.Option(help="With --checkpoint: one or several with commas; 1 is none.")
    ] = "1",
    solver: Annotated[
        str, typer.Option(help="With --checkpoint: one or several of euler, heun and multistep with commas.")
    ] = "euler",
    features: Annotated[
        Literal["efficientnet-lite0", "inception"],
        typer.Option(
            help="Network whose features are compared; only inception gives what is published as FID."
        ),
    ] = "efficientnet-lite0",
    num_images: Annotated[
        int | None,
        typer.Option(min=1, help=f"Draw so many of each set; by default all, {NUM_DRAWN:,} of a checkpoint."),
    ] = None,
    seed: Seed = 0,
    cache: Annotated[Path, typer.Option(help=KEPT)] = Path("runs/eval"),
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Frechet and kernel distance between two sets of images, beside the floor between parts of the reference.

    With --checkpoint at every combination of --steps, --guidance and --solver, on images of all classes in turn.
    """
    from eval.images.distance import evaluate_images
    from eval.images.features import load_extractor
    from eval.provenance import provenance
    from eval.report.images import plot_images
    from eval.report.report import name_of
    from eval.texts.cli import bars
    from rdlm.data.image_files import open_images

    if (images is None) == (checkpoint is None):
        raise UserError(
            "--images",
            str(images),
            "one of --images and --checkpoint says what is judged",
            "give exactly one",
        )
    given = open_images(reference, "--reference")
    extractor = load_extractor(features, usable_device(device))
    head: dict[str, Any] = {"evaluation": "fid", "provenance": provenance(), "seed": seed}
    with bars() as bar:
        if checkpoint is None:
            assert images is not None
            if steps is not None or guidance != "1" or solver != "euler":
                raise UserError(
                    "--images",
                    str(images),
                    "--steps, --guidance and --solver are of a checkpoint",
                    "leave them out",
                )
            report = {
                **head,
                **evaluate_images(
                    [open_images(images, "--images")], given, extractor, cache, bar, num_images, seed
                ),
            }
        else:
            num_images = min(num_images or NUM_DRAWN, given.count)
            drawing = Drawing(checkpoint, device, dtype, steps, guidance, solver)
            measured = evaluate_images(
                drawing.sets(num_images, seed, cache, bar), given, extractor, cache, bar, num_images, seed
            )
            for row, setting in zip(measured["results"], drawing.settings, strict=True):
                row["setting"] = vars(setting)
            report = {**head, "checkpoint": drawing.facts, "dtype": dtype, **measured}
    _show(report, Console())
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_images({name_of(report): report}, plot)


class Drawing:
    """A checkpoint and the settings it draws at. UserError for what does not fit."""

    def __init__(
        self, folder: Path, device: str, dtype: str, steps: str | None, guidance: str, solver: str
    ) -> None:
        import torch

        from eval.images.samples import settings
        from eval.provenance import checkpoint_facts
        from rdlm.checkpoints.folder import load, load_config

        config = load_config(folder)
        config.check_family("--checkpoint of rdlm eval fid", "dit")
        config.check_whole()
        from rdlm.diffusion.samplers import SAMPLERS

        solvers: list[Any] = list(dict.fromkeys(solver.split(",")))
        for each in solvers:
            if each not in SAMPLERS:
                raise UserError(
                    "--solver", each, "there is no such solver", f"use some of {', '.join(SAMPLERS)}"
                )
        ks = [config.default_steps] if steps is None else numbers("--steps", steps, int)
        self.settings = settings(ks, numbers("--guidance", guidance, float), solvers, config.max_steps)
        self.facts, self.dtype = checkpoint_facts(folder, config), dtype
        self.loaded = load(folder, device=usable_device(device), dtype=getattr(torch, dtype))

    def sets(self, count: int, seed: int, cache: Path, bar: Bar) -> Iterator[ImageSet]:
        from eval.images.samples import drawn

        for setting in self.settings:
            yield drawn(self.loaded, self.facts, setting, count, seed, self.dtype, cache, bar)


def _show(report: dict[str, Any], console: Console) -> None:
    from eval.images.samples import Setting
    from eval.report.images import notes
    from eval.report.report import name_of

    used, size = report["features"], report["reference"]["size"]
    table = Table(
        title=f"{name_of(report)} against {report['reference']['name']}",
        caption=f"{size[1]}x{size[0]} images, features of {used['name']} ({used['dimensions']:,}), {used['resize']}; 95 % intervals "
        "over the drawing of images",
    )
    for header in (
        "",
        "n",
        "n reference",
        *(text for figure in report["figures"].values() for text in (figure, "- floor")),
    ):
        table.add_column(header, justify="right")
    rows = [
        (str(Setting(**row["setting"])) if "setting" in row else "images", row) for row in report["results"]
    ]
    for label, row in (*rows, ("floor", report["floor"])):
        cells = [cell for name in ("frechet", "kernel") for cell in _cells(row, name)]
        table.add_row(label, *(f"{n:,}" for n in row["n"]), *cells)
    console.print(table)
    for note in notes(report):
        console.print(note, highlight=False)


def _cells(row: dict[str, Any], name: str) -> tuple[str, str]:
    if row[name] is None:
        return "-", ""
    digits = {"frechet": ".2f", "kernel": ".5f"}[name]
    against = row.get(f"{name}_against_floor")
    compared = difference(against["difference"], against["interval"], f"+{digits}") if against else ""
    return with_interval(row[name], row[f"{name}_interval"], digits), compared
