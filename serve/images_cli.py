"""``rdlm images``: generate images with a checkpoint of family dit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rdlm.command_line import new_app
from rdlm.errors import UserError
from serve.cli import CheckpointOption, DeviceOption, DtypeOption

if TYPE_CHECKING:
    import numpy as np

app = new_app()


@app.command(epilog="Example: rdlm images --checkpoint runs/dit_cifar10/model --guidance 2 --out samples.png")
def images(
    checkpoint: CheckpointOption,
    out: Annotated[
        Path,
        typer.Option(
            help="A .png with all images, or an .npz array for `rdlm eval fid`.", show_default=False
        ),
    ],
    classes: Annotated[
        str | None,
        typer.Option(
            help="Class numbers with commas, used in turn; by default all classes.", show_default=False
        ),
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    num_steps: Annotated[
        int | None,
        typer.Option(help="K, steps from noise to image; by default the checkpoint's.", show_default=False),
    ] = None,
    guidance: Annotated[
        float,
        typer.Option(
            min=0, max=100, help="1 is none; larger values follow the class more closely and vary less."
        ),
    ] = 1.0,
    sampler: Annotated[
        str,
        typer.Option(
            help="How noise becomes an image: euler, dpmpp_2m, heun (two network calls a step) or renoise "
            "(new noise at every step)."
        ),
    ] = "euler",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images per network call; does not affect the images.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Generate images of the given classes, in K steps from noise to image."""
    if out.suffix not in (".png", ".npz"):
        raise UserError("--out", str(out), "is neither a picture nor an array", "name a .png or .npz file")

    import numpy as np
    import torch
    from tqdm import tqdm

    from rdlm.checkpoints.folder import load, load_config
    from rdlm.device import usable_device, usable_dtype
    from rdlm.diffusion.samplers import sampler_named
    from rdlm.objectives.edm import Edm, pixels

    config = load_config(checkpoint)
    config.check_family("rdlm images", "dit")
    config.check_whole()
    k, most = config.default_steps if num_steps is None else num_steps, config.max_steps
    if not 1 <= k <= most:
        raise UserError("--num-steps", num_steps, "is out of range", f"this model takes 1 to {most}")
    sampler_named(sampler, "--sampler")
    wanted = _classes(classes, config.model.vocab_size)
    chosen = usable_device(device, "--device")
    loaded = load(checkpoint, chosen, usable_dtype(dtype, chosen, "--dtype"))
    parts = []
    with tqdm(total=num_images, unit="image", desc=f"K = {k}") as bar:
        for first in range(0, num_images, batch_size):
            numbers = range(first, min(first + batch_size, num_images))
            asked = torch.tensor([wanted[i % len(wanted)] for i in numbers], device=chosen)
            drawn = cast(Edm, loaded.denoiser).sample_images(
                asked, k, first=first, guidance=guidance, sampler=sampler, seed=seed
            )
            parts.append(pixels(drawn).numpy())
            bar.update(len(asked))
    found = np.concatenate(parts)
    _write(out, found, [wanted[i % len(wanted)] for i in range(num_images)], len(wanted))
    typer.echo(f"{num_images} images in {out}")


def _classes(text: str | None, count: int) -> list[int]:
    try:
        wanted = list(range(count)) if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            "--classes", text, "is not a number or a list of numbers", f"write for instance 0,{count - 1}"
        ) from None
    for each in wanted:
        if not 0 <= each < count:
            raise UserError("--classes", each, "there is no such class", f"this model knows 0 to {count - 1}")
    return wanted


def _write(file: Path, found: np.ndarray, classes: list[int], columns: int) -> None:
    """One file, at once or not at all. A picture has a column a class where it fits."""
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    if file.suffix == ".npz":
        np.savez(partial, found, classes=np.array(classes))
    else:
        from matplotlib.image import imsave

        imsave(partial, tiled(found, columns if 4 <= columns <= 16 else 8))
    partial.replace(file)


def tiled(found: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, C] -> one picture, row by row, with a white line between images."""
    import numpy as np

    rows = -(-len(found) // columns)
    height, width, channels = found.shape[1:]
    picture = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, dtype=np.uint8)
    for i, image in enumerate(found):
        y, x = (i // columns) * (height + 1), (i % columns) * (width + 1)
        picture[y : y + height, x : x + width] = image
    return picture
