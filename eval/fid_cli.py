"""``rdlm eval fid``: how far two sets of images lie apart. It knows nothing of what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from eval.options import Device, Out, Plot, Seed, usable_device
from eval.output import write_json
from eval.wording import difference, with_interval

SET = "a folder of PNG or JPEG files, an .npy or .npz array (uint8 [N, H, W, 3]), or a parquet file with an image column"


def fid(
    images: Annotated[Path, typer.Option(help=f"What is judged: {SET}.")],
    reference: Annotated[Path, typer.Option(help="What it should look like: the same kinds.")],
    features: Annotated[
        Literal["efficientnet-lite0", "inception"],
        typer.Option(help="Network whose features are compared; only inception gives what is published as FID."),
    ] = "efficientnet-lite0",
    num_images: Annotated[int | None, typer.Option(min=1, help="Draw so many of each set; by default all.")] = None,
    seed: Seed = 0,
    cache: Annotated[Path, typer.Option(help="Where features are kept; a run resumes from it.")] = Path("runs/eval"),
    device: Device = "cpu",
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Frechet and kernel distance between two sets of images, beside the floor between parts of the reference."""
    from eval.image_distance import evaluate_images
    from eval.image_features import load_extractor
    from eval.provenance import provenance
    from eval.report_images import plot_images
    from eval.text_cli import bars
    from rdlm.images import open_images

    sets = open_images(images, "--images"), open_images(reference, "--reference")
    extractor = load_extractor(features, usable_device(device))
    with bars() as bar:
        measured = evaluate_images(*sets, extractor, cache, bar, num_images, seed)
    report = {"evaluation": "fid", "provenance": provenance(), "seed": seed, **measured}
    _show(report, Console())
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_images(report, plot)


def _show(report: dict[str, Any], console: Console) -> None:
    from eval.report_images import notes

    used, size = report["features"], report["reference"]["size"]
    table = Table(
        title=f"{report['images']['name']} against {report['reference']['name']}",
        caption=f"{size[1]}x{size[0]} images, features of {used['name']} ({used['dimensions']:,}), {used['resize']}; 95 % intervals "
        "over the drawing of images",
    )
    for header in ("", "n", "n reference", *(text for figure in report["figures"].values() for text in (figure, "- floor"))):
        table.add_column(header, justify="right")
    for label, row in (("images", report["result"]), ("floor", report["floor"])):
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
