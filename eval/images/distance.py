"""Distances between two sets of images in a network's features: Frechet (Heusel et al. 2017, Eq. 6) and
kernel (Binkowski et al. 2018).

The Frechet distance of finite sets lies above that of their distributions, by more for fewer images, and
needs more images than features. The kernel distance has no bias. Both are reported with a floor: the same
distances between disjoint parts of the reference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.cache import Bar, cached
from eval.images.features import Extractor
from eval.stats import mover
from rdlm.data.image_files import ImageSet
from rdlm.errors import UserError

FEWEST = 20
"""Images of a set: below this a half says nothing about the spread."""
HALVES = 20
"""Random halves behind an interval of the Frechet distance: its width is then known to about a sixth."""
SUBSETS, SUBSET_SIZE = 100, 1000
"""Number and size of the subsets of the kernel distance (Binkowski et al. 2018, App.)."""
BLOCK = 2048
"""Rows of a kernel matrix that exist at once."""


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [n, D] -> mean [D], and a factor A with A^T A = covariance (unbiased): [min(n, D), D]."""
    centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    return x.mean(0), torch.linalg.qr(centred, mode="r").R if len(x) > x.shape[1] else centred


def frechet(x: Tensor, y: Tensor) -> float:
    """|mean difference|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)) of features fp64 [n, D] and [m, D].

    The last trace is the sum of the singular values of A_x A_y^T: no root of a matrix is taken, so none
    can fail to exist.
    """
    (mean_x, a), (mean_y, b) = _moments(x), _moments(y)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def frechet_with_interval(
    x: Tensor, y: Tensor, seed: int, progress: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """-> {"frechet", "frechet_interval"}: 1.96 standard deviations over random halves of both sets.

    Halves drawn without replacement vary as the whole does (delete-half jackknife, Shao and Wu 1989). It
    covers the drawing of images, not the bias. Both are None where a set has no more images than features:
    its covariance is then not known.
    """
    if min(len(x), len(y)) <= x.shape[1]:
        return {"frechet": None, "frechet_interval": None}
    rng, found = np.random.default_rng(seed), []
    for _ in range(HALVES):
        halves = [
            each[torch.from_numpy(rng.permutation(len(each))[: len(each) // 2]).to(each.device)]
            for each in (x, y)
        ]
        found.append(frechet(halves[0], halves[1]))
        if progress:
            progress(1)
    value, half = frechet(x, y), 1.96 * float(np.std(found, ddof=1))
    return {"frechet": value, "frechet_interval": [value - half, value + half]}


def kernel_distance(x: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    """Unbiased squared MMD of features fp64 [n, D] and [m, D] under (x.y / D + 1)^3 -> {"kernel",
    "kernel_interval", "kernel_subset_sd", "subset_size"}.

    subset_sd: over SUBSETS random subsets of both sets, as published. The interval is theirs, scaled to
    the whole sets (delete-d jackknife, Shao and Wu 1989): s of n images drawn without replacement vary n/s
    - 1 times as much as n images do.
    """
    rng, fewest = np.random.default_rng(seed), min(len(x), len(y))
    size = min(SUBSET_SIZE, fewest // 2)
    use_x, use_y = (_membership(rng, len(each), size).to(each) for each in (x, y))
    counts = use_x.sum(0), use_y.sum(0)
    own = [_sums(each, each, use, use) - _diagonal(each, use) for each, use in ((x, use_x), (y, use_y))]
    within = [total / (n * (n - 1)) for total, n in zip(own, counts, strict=True)]
    found = (within[0] + within[1] - 2 * _sums(x, y, use_x, use_y) / (counts[0] * counts[1])).cpu().numpy()
    value, sd = float(found[0]), float(np.std(found[1:], ddof=1))
    half = 1.96 * sd * math.sqrt(size / (fewest - size))
    return {
        "kernel": value,
        "kernel_interval": [value - half, value + half],
        "kernel_subset_sd": sd,
        "subset_size": size,
    }


def _membership(rng: np.random.Generator, count: int, size: int) -> Tensor:
    """fp64 [count, 1 + SUBSETS]: who belongs to the whole set (first column) and to each random subset."""
    use = np.zeros((count, 1 + SUBSETS))
    use[:, 0] = 1
    for column in range(1, 1 + SUBSETS):
        use[rng.permutation(count)[:size], column] = 1
    return torch.from_numpy(use)


def _sums(x: Tensor, y: Tensor, use_x: Tensor, use_y: Tensor) -> Tensor:
    """Sum of k(x_i, y_j) over the pairs of each subset: [1 + SUBSETS]."""
    total = torch.zeros_like(use_x[0])
    for first in range(0, len(x), BLOCK):
        rows = slice(first, first + BLOCK)
        total += (use_x[rows] * ((x[rows] @ y.T / x.shape[1] + 1) ** 3 @ use_y)).sum(0)
    return total


def _diagonal(x: Tensor, use: Tensor) -> Tensor:
    """Sum of k(x_i, x_i) over each subset."""
    return ((x.square().sum(1) / x.shape[1] + 1) ** 3) @ use


def distances(
    x: np.ndarray, y: np.ndarray, device: str, seed: int, progress: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Both distances of features [n, D] and [m, D] in fp64, and n and m."""
    a, b = (torch.from_numpy(each).to(device, torch.float64) for each in (x, y))
    return {
        "n": [len(x), len(y)],
        **frechet_with_interval(a, b, seed, progress),
        **kernel_distance(a, b, seed),
    }


def evaluate_images(
    sets: Iterable[ImageSet],
    reference: ImageSet,
    extractor: Extractor,
    cache: Path,
    bar: Bar,
    num_images: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Distances of each of ``sets``, which are equally large, from ``reference``, and the floor, with what
    names all and the features.

    num_images: draw so many of each set (seeded); None takes all. Figures do not depend on the order of
    images in a set that is used whole.
    """
    results: list[dict[str, Any]] = []
    size, count = None, 0
    features: list[np.ndarray] = []
    for images in sets:
        count = _wanted(images, num_images)
        chosen = np.random.default_rng(seed).permutation(images.count)[:count].tolist()
        size = size or images.read(int(chosen[0])).shape[:2]
        drawn = _digested(images, chosen, size, bar)
        features.append(_features(extractor, images, drawn, cache, bar))
        named = {
            "name": images.name,
            "count": count,
            "of": images.count,
            "sha256": _sha256([digest for digest, _ in drawn]),
        }
        results.append({"images": named})
    wanted = _wanted(reference, num_images)
    held = min(count, reference.count // 2)  # of the floor
    pool = min(reference.count, wanted + held)
    rng = np.random.default_rng((seed, 1))  # of the reference alone: sets of any size meet the same one
    drawn = _digested(reference, rng.permutation(reference.count)[:pool].tolist(), size, bar)
    mixed = rng.permutation(pool)
    theirs = _features(extractor, reference, drawn, cache, bar)[mixed]
    known = HALVES * (
        len(features) * (min(count, wanted) > extractor.dimensions)
        + (min(held, wanted, pool - held) > extractor.dimensions)
    )
    done = bar("Frechet distance", known)
    floor = distances(theirs[pool - held :], theirs[: min(wanted, pool - held)], extractor.device, seed, done)
    for row, mine in zip(results, features, strict=True):
        found = distances(mine, theirs[:wanted], extractor.device, seed, done)
        row |= {
            **found,
            **{f"{name}_against_floor": _against(found, floor, name) for name in ("frechet", "kernel")},
        }
    sha256 = _sha256(sorted(drawn[i][0] for i in mixed[:wanted]))
    return {
        "figures": {"frechet": extractor.figures[0], "kernel": extractor.figures[1]},
        "comparable_with_published": extractor.published,
        "features": {
            "name": extractor.name, "dimensions": extractor.dimensions, "resize": extractor.resize,
            "fingerprint": extractor.fingerprint,
        },
        "reference": {"name": reference.name, "count": wanted, "of": reference.count, "sha256": sha256,
        "size": list(size or ())},
        "data": {"source": reference.name, "manifest_sha256": sha256},
        "results": results,
        "floor": {**floor, "same_n": floor["n"] == [count, wanted]},
    }  # fmt: skip


def _wanted(images: ImageSet, num_images: int | None) -> int:
    count = images.count if num_images is None else num_images
    if count > images.count:
        raise UserError(
            "--num-images", count, f"{images.option} holds only {images.count:,} images", "ask for fewer"
        )
    if count < FEWEST:
        raise UserError(
            images.option,
            str(images.path),
            f"{count} images are too few for any distance",
            f"give at least {FEWEST}",
        )
    return count


def _digested(
    images: ImageSet, chosen: Sequence[int], size: tuple[int, ...] | None, bar: Bar
) -> list[tuple[str, int]]:
    """(hash of the pixels, number) of the images chosen, sorted: from here on the order of the files is
    gone."""
    found = _digests(images, chosen, size, bar(f"reading {images.option}", len(chosen)))
    return sorted(zip(found, chosen, strict=True))


def _against(result: dict[str, Any], floor: dict[str, Any], name: str) -> dict[str, Any] | None:
    if result[name] is None or floor[name] is None:
        return None
    difference, interval = mover(*((each[name], each[f"{name}_interval"]) for each in (result, floor)))
    return {
        "difference": difference,
        "interval": list(interval),
        "inside_noise": interval[0] <= 0 <= interval[1],
    }


def _digests(
    images: ImageSet,
    indices: Sequence[int],
    size: tuple[int, ...] | None,
    progress: Callable[[int], object] | None,
) -> list[str]:
    """sha256 of the pixels of each image; UserError where one has not ``size`` (H, W), or without it not
    that of the first."""
    out = []
    for index in indices:
        pixels = images.read(index)
        size = size or pixels.shape[:2]
        if pixels.shape[:2] != size:
            found, others = (f"{width}x{height}" for height, width in (pixels.shape[:2], size))
            problem = f"image {index} is {found}, others are {others}, and a resize would decide the distance"
            raise UserError(
                images.option, str(images.path), problem, "bring both sets to the size that is generated"
            )
        out.append(hashlib.sha256(pixels.tobytes()).hexdigest())
        if progress:
            progress(1)
    return out


def _features(
    extractor: Extractor, images: ImageSet, drawn: Sequence[tuple[str, int]], cache: Path, bar: Bar
) -> np.ndarray:
    """[images, D], kept under the hash of their pixels."""
    where = dict(drawn)
    key = ("image-features", extractor.fingerprint, extractor.resize)

    def compute(chunk: Sequence[str], progress: Callable[[int], object] | None) -> np.ndarray:
        return extractor.features(np.stack([images.read(where[digest]) for digest in chunk]), progress)

    return cached(
        cache, key, [digest for digest, _ in drawn], compute, bar(f"features of {images.option}", len(drawn))
    )


def _sha256(names: Sequence[str]) -> str:
    return hashlib.sha256("".join(names).encode()).hexdigest()
