"""``rdlm images``: generate images with a checkpoint of family dit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from rdlm.atomic import check_out_file, replacing_file
from rdlm.command_line import new_app
from rdlm.errors import UserError
from serve.cli import CheckpointOption, DeviceOption, DtypeOption

if TYPE_CHECKING:
    import numpy as np

app = new_app()
MOST_BYTES = {".npz": 4 << 30, ".png": 1 << 28}
"""Of the pixels of one file. They are held in memory until it is written, those of a picture several times."""


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
        int, typer.Option(min=1, max=1 << 16, help="Images per network call; does not affect the images.")
    ] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Generate images of the given classes, in K steps from noise to image."""
    if out.suffix not in MOST_BYTES:
        raise UserError("--out", str(out), "is neither a picture nor an array", "name a .png or .npz file")
    check_out_file(out, "--out")

    import numpy as np
    import torch
    from tqdm import tqdm

    from rdlm.checkpoints.folder import load, load_config
    from rdlm.config.model import ImageConfig
    from rdlm.device import usable_device, usable_dtype
    from rdlm.diffusion.samplers import sampler_named
    from rdlm.objectives.edm import Edm, pixels

    config = load_config(checkpoint)
    config.check_family("rdlm images", "dit")
    config.check_whole()
    k = config.default_steps if num_steps is None else num_steps
    if not 1 <= k <= config.max_steps:
        remedy = f"this model takes 1 to {config.max_steps}"
        raise UserError("--num-steps", num_steps, "is out of range", remedy)
    sampler_named(sampler, "--sampler")
    shape = cast(ImageConfig, config.model)
    size = (shape.image_size, shape.image_size, shape.num_channels)
    most = MOST_BYTES[out.suffix] // math.prod(size)
    if num_images > most:
        problem = f"are too many for one {out.suffix} file, which holds {most:,} of this size"
        remedy = "write several with --seed 0, 1, .."
        raise UserError("--num-images", num_images, problem, remedy)
    wanted = _classes(classes, config.model.vocab_size)
    chosen = usable_device(device, "--device")
    loaded = load(checkpoint, chosen, usable_dtype(dtype, chosen, "--dtype"))
    found = np.empty((num_images, *size), dtype=np.uint8)
    with tqdm(total=num_images, unit="image", desc=f"K = {k}") as bar:
        for first in range(0, num_images, batch_size):
            numbers = range(first, min(first + batch_size, num_images))
            asked = torch.tensor([wanted[i % len(wanted)] for i in numbers], device=chosen)
            drawn = cast(Edm, loaded.denoiser).sample_images(
                asked, k, first=first, guidance=guidance, sampler=sampler, seed=seed
            )
            found[numbers.start : numbers.stop] = pixels(drawn).numpy()
            bar.update(len(asked))
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

    with replacing_file(file, "--out") as partial:
        if file.suffix == ".npz":
            np.savez(partial, found, classes=np.array(classes))
        else:
            from matplotlib.image import imsave

            imsave(partial, tiled(found, columns if 4 <= columns <= 16 else 8))


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
