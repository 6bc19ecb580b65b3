"""Share of images whose class a ViT names, against K and bridge, with paired bootstrap intervals over images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from eval.nll import check_steps
from eval.stats import interval, resamples
from rdlm.checkpoints.folder import Loaded
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import VitConfig
from rdlm.data.images import ImageStore
from rdlm.errors import UserError
from rdlm.sampling_params import Bridge, check_bridge

USUAL_STEPS = (1, 2, 4, 8)


def choose_steps(steps: Sequence[int] | None, loaded: Loaded) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range. None: 1 where K is one pass, else USUAL_STEPS and the default."""
    config = loaded.config
    if steps is None:
        steps = sorted({*(k for k in USUAL_STEPS if k <= config.max_steps), config.default_steps})
    return check_steps(steps, config)


def check_fit(config: CheckpointConfig, store: ImageStore, bridges: Sequence[Bridge]) -> None:
    """UserError where checkpoint, images and bridges do not belong together."""
    config.check_family("rdlm eval accuracy", "vit")
    config.check_whole()
    model = config.model
    assert isinstance(model, VitConfig)
    height, width = store.manifest.image_size
    if (height, width) != (model.image_size,) * 2 or len(store.manifest.classes) != model.num_classes:
        found = f"holds images of {width}x{height} in {len(store.manifest.classes)} classes"
        problem = (
            f"{found}, the model was built for {model.image_size}x{model.image_size} in {model.num_classes}"
        )
        raise UserError("--data", str(store.folder), problem, "give the data it was trained on")
    for bridge in bridges:
        check_bridge(bridge, config)


@torch.no_grad()
def evaluate_accuracy(
    loaded: Loaded,
    store: ImageStore,
    steps: Sequence[int],
    bridges: Sequence[Bridge] = ("hard",),
    *,
    num_draws: int = 1,
    max_images: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """-> {"images", "nll", "nll_interval", "estimator", "results": [{"bridge", "K", "accuracy", "delta", "against_first_bridge", each with
    "..._interval", "draws", "draw_sd", "by_class", "right"}]}.

    delta is against the smallest K over the same bridge, ``against_first_bridge`` at the same K; both are paired by image. ``nll``: nats
    per image at K = 1, where the likelihood is normalised. Noise of an image depends on (seed, draw, its number) alone. K = 1 reads
    z = 0, so there is one draw of it. by_class: accuracy of each class. right: of each image in how many draws, a digit each.
    """
    count = len(store) if max_images is None else min(len(store), max_images)
    device = next(loaded.denoiser.parameters()).device
    hits = {(b, k): np.zeros((1 if k == 1 else num_draws, count), dtype=bool) for b in bridges for k in steps}
    nats, labels = np.zeros(count), np.zeros(count, dtype=np.int64)
    for first in range(0, count, batch_size):
        rows = slice(first, min(first + batch_size, count))
        batch = store.rows(np.arange(rows.start, rows.stop)).to(device)
        inputs = batch.inputs.to(next(loaded.denoiser.parameters()).dtype)
        nats[rows] = (
            -loaded.denoiser.score(inputs, batch.targets, (1,))[1].logprobs[:, 0].double().cpu().numpy()
        )
        labels[rows] = batch.targets[:, 0].cpu().numpy()
        for bridge in bridges:
            for draw in range(num_draws):
                ks = [k for k in steps if draw < len(hits[bridge, k])]
                if not ks:
                    continue
                answers = loaded.denoiser.answer(inputs, ks, seed, sampler=bridge, first=first, draw=draw)
                for k in ks:
                    hits[bridge, k][draw, rows] = (answers[k] == batch.targets)[:, 0].cpu().numpy()
        if progress:
            progress(rows.stop - rows.start)
    draws = resamples(count, seed) / count
    known = {
        "images": count, "nll": float(nats.mean()), "nll_interval": interval(draws @ nats),
        "estimator": loaded.config.objective.estimator_at(1),
    }  # fmt: skip
    return {**known, "results": _summarise(hits, labels, draws)}


def _summarise(
    hits: dict[tuple[Bridge, int], np.ndarray], labels: np.ndarray, draws: np.ndarray
) -> list[dict[str, Any]]:
    """hits: {(bridge, K): bool [draws, images]}; draws: weights [resamples, images], the same for all."""
    shares = {key: found.mean(0) for key, found in hits.items()}
    bridge_0, k_0 = next(iter(shares))
    results = []
    for (bridge, k), values in shares.items():
        found = hits[bridge, k]
        figures = {
            "accuracy": values,
            "delta": values - shares[bridge, k_0],
            "against_first_bridge": values - shares[bridge_0, k],
        }
        row = dict[str, Any](bridge=bridge, K=k)
        for name, each in figures.items():
            row |= {name: float(each.mean()), f"{name}_interval": interval(draws @ each)}
        row["draws"] = len(found)
        row["draw_sd"] = float(found.mean(1).std(ddof=1)) if len(found) > 1 else None
        row["by_class"] = [
            round(float(values[labels == c].mean()), 4) if (labels == c).any() else None
            for c in range(labels.max() + 1)
        ]
        row["right"] = "".join(map(str, found.sum(0)))
        results.append(row)
    return results
