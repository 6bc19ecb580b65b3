"""``rdlm eval accuracy``: classification by a ViT against K and bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from eval.options import Checkpoint, Device, Dtype, Out, Plot, Seed, numbers, usable_device
from eval.output import write_json
from eval.wording import difference, with_interval
from rdlm.errors import UserError
from rdlm.sampling_params import Bridge


def accuracy(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="Folder made by `rdlm data images`.")],
    split: Annotated[str, typer.Option(help="Split to classify.")] = "test",
    steps: Annotated[
        str | None,
        typer.Option(
            help="Values of K with commas [1,2,4,8 and the checkpoint's; 1 where nothing is noised]."
        ),
    ] = None,
    bridge: Annotated[
        str,
        typer.Option(
            help="One or several of hard, euler and multistep with commas; of models that noise the class."
        ),
    ] = "hard",
    num_draws: Annotated[
        int, typer.Option(min=1, max=9, help="Draws of noise that accuracy is the mean of, where K > 1.")
    ] = 1,
    max_images: Annotated[int | None, typer.Option(min=2, help="Use the first so many images [all].")] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images of one forward pass; changes no noise.")
    ] = 128,
    per_image: Annotated[
        bool,
        typer.Option("--per-image", help="Add what was right to the JSON: reports then compare in pairs."),
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Share of images whose class is named, and the NLL of the class, with 95 % bootstrap intervals over images."""
    import torch
    from tqdm import tqdm

    from eval.accuracy import check_fit, choose_steps, evaluate_accuracy
    from eval.plots import plot_accuracy
    from eval.provenance import origin
    from rdlm.checkpoints.folder import load, load_config
    from rdlm.data.images import ImageStore

    bridges: list[Any] = list(dict.fromkeys(bridge.split(",")))
    for each in bridges:
        if each not in get_args(Bridge):
            raise UserError(
                "--bridge", each, "there is no such bridge", f"use some of {', '.join(get_args(Bridge))}"
            )
    store = ImageStore(data, split)
    check_fit(load_config(checkpoint), store, bridges)
    loaded = load(checkpoint, device=usable_device(device), dtype=getattr(torch, dtype))
    ks = choose_steps(None if steps is None else numbers("--steps", steps, int), loaded)
    total = len(store) if max_images is None else min(len(store), max_images)
    with tqdm(total=total, unit="image", desc=f"K = {', '.join(map(str, ks))}") as bar:
        measured = evaluate_accuracy(
            loaded, store, ks, bridges,
            num_draws=num_draws, max_images=max_images, seed=seed, batch_size=batch_size, progress=bar.update,
        )  # fmt: skip
    if not per_image:
        for row in measured["results"]:
            del row["right"]
    facts = {
        "source": store.manifest.source,
        "split": split,
        "manifest_sha256": store.manifest_sha256,
        "classes": store.manifest.classes,
    }
    report = {
        **origin("accuracy", checkpoint, loaded.config),
        "data": facts,
        "seed": seed,
        "dtype": dtype,
        **measured,
    }
    _show(report)
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_accuracy(report, plot)


def _show(report: dict[str, Any]) -> None:
    checkpoint, first = report["checkpoint"], report["results"][0]
    nll = with_interval(report["nll"], report["nll_interval"], ".4f")
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}): {report['images']:,} images of {report['data']['split']}",
        caption=f"NLL {nll} nats per image ({report['estimator']}); 95 % intervals over images",
    )
    several = len({r["bridge"] for r in report["results"]}) > 1
    headers = [
        "bridge",
        "K",
        "accuracy [95 %]",
        f"against K = {first['K']}",
        *([f"against {first['bridge']}"] * several),
        "draws",
        "sd of draws",
    ]
    for name in headers:
        table.add_column(name, justify="right")
    for r in report["results"]:
        compared = ["" if r["K"] == first["K"] else difference(r["delta"], r["delta_interval"])]
        if several:
            same = r["bridge"] == first["bridge"]
            compared.append(
                "" if same else difference(r["against_first_bridge"], r["against_first_bridge_interval"])
            )
        spread = "" if r["draw_sd"] is None else f"{r['draw_sd']:.4f}"
        cells = [with_interval(r["accuracy"], r["accuracy_interval"]), *compared]
        table.add_row(r["bridge"], str(r["K"]), *cells, str(r["draws"]), spread)
    Console().print(table)
