"""Paired differences between the arms of language.json: python -m benchmarks.paired
docs/results/raw/language.json --steps 4

Both arms scored the same windows, so their difference per window is resampled: much narrower than the two
intervals suggest. It covers the choice of held-out text, not of seeds.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.common import read_json


def main(
    file: Path,
    steps: Annotated[int, typer.Option(help="K; arms without it are taken at K = 1.")] = 4,
    seed: int = 0,
) -> None:
    """Each arm against the next better one, nats per token, with bootstrap 95 % intervals over windows."""
    raw = read_json(file)
    nll = {
        f"{run['arm']} seed {run['seed']} lr {run['lr']:g}": np.array(
            run["window_nll"].get(str(steps)) or run["window_nll"]["1"]
        )
        / raw["seq_len"]
        for run in raw["runs"]
    }
    ordered = sorted(nll, key=lambda name: nll[name].mean())
    rng = np.random.default_rng(seed)
    for better, worse in pairwise(ordered):
        difference = nll[worse] - nll[better]
        means = difference[rng.integers(0, len(difference), (2000, len(difference)))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        print(f"{worse} - {better}: {difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")


if __name__ == "__main__":
    typer.run(main)
