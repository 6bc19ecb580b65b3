"""Distances between sets of images against what is known: python -m benchmarks.known_distances --train FILE
--test FILE

Images of the test split lie as near to the training split as parts of it do to each other, and noise moves
them away, more noise further.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.common import provenance, write_json
from eval.images.distance import evaluate_images
from eval.images.features import load_extractor
from rdlm.data.image_files import ImageSet, open_images

NOISE = (0.0, 0.05, 0.1, 0.2)
"""Standard deviation of Gaussian noise on pixels, as a share of 255."""
SEED = 0


def noisy(images: ImageSet, noise: float, folder: Path, count: int) -> ImageSet:
    """``count`` of the images, the same for every level, with noise added and rounded to uint8."""
    chosen = np.random.default_rng(SEED).permutation(images.count)[:count]
    pixels = np.stack([images.read(int(i)) for i in chosen]).astype(np.float64)
    pixels += np.random.default_rng(SEED + 1).normal(0, 255 * noise, pixels.shape)
    np.save(folder / f"noise-{noise:g}.npy", np.clip(pixels.round(), 0, 255).astype(np.uint8))
    return open_images(folder / f"noise-{noise:g}.npy", "--test")


def _bar(what: str, total: int) -> Any:
    return tqdm(total=total, desc=what).update


def main(
    train: Annotated[
        Path, typer.Option(help="Parquet file of CIFAR-10's training split (or any set of images).")
    ],
    test: Annotated[Path, typer.Option(help="Its test split.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path(
        "docs/results/raw/fid_known_answers.json"
    ),
    features: Annotated[str, typer.Option(help="As in `rdlm eval fid`.")] = "efficientnet-lite0",
    num_images: Annotated[
        int, typer.Option(min=20, help="Images of each set; 2,000 and more give the Frechet distance too.")
    ] = 250,
) -> None:
    """Measure, write, and fail where an answer is not the known one."""
    reference, extractor = open_images(train, "--train"), load_extractor(features)
    with TemporaryDirectory() as work:
        sets = [noisy(open_images(test, "--test"), noise, Path(work), num_images) for noise in NOISE]
        measured = evaluate_images(sets, reference, extractor, Path(work) / "cache", _bar, num_images, SEED)
    rows = measured["results"]
    for row, noise in zip(rows, NOISE, strict=True):
        row["noise"] = noise
    origin = provenance()
    for path, name in ((train, "TRAIN"), (test, "TEST")):  # files of this machine
        origin["command"] = origin["command"].replace(str(path), name)
    write_json(out, {"provenance": origin, "seed": SEED, **measured})
    right = []
    for kind, name in measured["figures"].items():
        found = [row[kind] for row in rows]
        if None in found:
            continue
        print(
            f"{name}: "
            + ", ".join(
                f"noise {row['noise']:g}: {value:.5g}" for row, value in zip(rows, found, strict=True)
            )
        )
        print(f"  floor {measured['floor'][kind]:.5g}")
        apart = [not row[f"{kind}_against_floor"]["inside_noise"] for row in rows]
        right += [found == sorted(found), not apart[0], apart[-1]]
    if not all(right):
        print(f"not as known: {right}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
