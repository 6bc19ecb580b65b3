"""MAUVE (Pillutla et al. 2021): how far the distribution of a model's texts lies from that of human ones, in a teacher's features.

The only file that imports the package mauve (GPLv3, optional). Features come from eval/texts/judge_models.py: the package's own featuriser
knows local folders only by certain names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats import mover
from eval.texts.gen_ppl import Bar, Texts
from eval.texts.judge_models import Teacher, cached
from eval.texts.sweep import Setting
from rdlm.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """What a score depends on beside the model. Scores of different protocols cannot be compared."""

    name: str
    prompts: int
    """Also the number of references: what the authors wrote after these prompts."""
    continuations: int
    prompt_tokens: int
    max_tokens: int
    scaling_factor: float
    seeds: int
    """Runs of k-means; the score is their mean."""

    def changed(self, **values: int | float | None) -> Protocol:
        """With other values (None keeps one); the name then says which were changed."""
        given = {
            key: value for key, value in values.items() if value is not None and value != getattr(self, key)
        }
        listed = ", ".join(f"{key} {value}" for key, value in given.items())
        return replace(self, **given, name=f"{self.name} with {listed}") if given else self  # type: ignore[arg-type]


PROTOCOLS = {
    "paper": Protocol("paper", 1000, 5, 50, 50, 2.0, 5),
    "standard": Protocol("standard", 1000, 1, 50, 50, 5.0, 5),
    "quick": Protocol("quick", 200, 1, 50, 50, 5.0, 3),
}
"""paper: DiffusionBlocks App. E, after SEDD (the length of its prompts is not stated; 50 here). Factor 5 is the package's default and
spreads good scores, which factor 2 squeezes to .98-.99."""


RESAMPLES = 200
"""Bootstrap resamples of the bucket counts: enough for a standard deviation."""


def require_mauve() -> None:
    """UserError if the package is missing."""
    if find_spec("mauve") is None:
        remedy = "run `pip install mauve-text==0.4.0` (its licence is GPLv3)"
        raise UserError("rdlm eval mauve", "mauve-text", "the package is not installed", remedy)


def mauve(p: np.ndarray, q: np.ndarray, scaling_factor: float, seeds: Sequence[int]) -> dict[str, Any]:
    """p, q: features [n, D] -> {"value": mean over k-means seeds, "interval", "sd", "text_sd", "per_seed", "num_buckets"}.

    Buckets, PCA and k-means are the package's defaults. sd: deviation of clustering (None with one seed). text_sd: of drawing other texts,
    by bootstrap of the bucket counts. interval: 1.96 times both together, because resampled counts lie too low on average to give
    the interval by their percentiles.
    """
    import faiss
    from mauve import compute_mauve

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums in another order would move points between clusters
    try:
        runs = [
            compute_mauve(p_features=p, q_features=q, mauve_scaling_factor=scaling_factor, seed=seed)
            for seed in seeds
        ]
    finally:
        faiss.omp_set_num_threads(threads)
    scores = [float(run.mauve) for run in runs]
    value, sd = float(np.mean(scores)), float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    counts = [(run.p_hist, len(p), run.q_hist, len(q)) for run in runs]
    text_sd = float(
        np.mean([_text_sd(*each, scaling_factor, seed) for each, seed in zip(counts, seeds, strict=True)])
    )
    half = 1.96 * math.hypot(text_sd, (sd or 0) / math.sqrt(len(scores)))
    return {
        "value": value, "interval": [max(0.0, value - half), min(1.0, value + half)], "sd": sd, "text_sd": text_sd,
        "per_seed": scores, "num_buckets": int(runs[0].num_buckets),
    }  # fmt: skip


def _text_sd(p: np.ndarray, num_p: int, q: np.ndarray, num_q: int, scaling_factor: float, seed: int) -> float:
    """Standard deviation of the score over resamples of the texts, each kept in its bucket. p, q: shares of the buckets."""
    rng = np.random.default_rng(seed)
    drawn_p, drawn_q = (rng.multinomial(n, shares, RESAMPLES) / n for n, shares in ((num_p, p), (num_q, q)))
    return float(np.std(scores_of_shares(drawn_p, drawn_q, scaling_factor), ddof=1))


def scores_of_shares(p: np.ndarray, q: np.ndarray, scaling_factor: float) -> np.ndarray:
    """The package's score of histograms p, q [rows, buckets] -> [rows]: the area under the divergence curve (Pillutla et al. 2021, Eq. 3),
    the mean of the areas seen from either axis."""
    weights = np.linspace(1e-6, 1 - 1e-6, 25)[:, None, None]
    mixed = weights * p + (1 - weights) * q

    def points(shares: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
        """exp(-scaling_factor KL(shares, mixed)) between the curve's ends, [27, rows]."""
        ratio = np.divide(shares, mixed, out=np.ones_like(mixed), where=(mixed > 0) & (shares > 0))
        inside = np.exp(-scaling_factor * (shares * np.log(ratio)).sum(-1))
        return np.concatenate([np.full((1, len(p)), ends[0]), inside, np.full((1, len(p)), ends[1])])

    x, y = points(q, (1.0, 0.0)), points(p, (0.0, 1.0))
    over_x = ((y[1:] + y[:-1]) / 2 * (x[:-1] - x[1:])).sum(0)
    over_y = ((x[1:] + x[:-1]) / 2 * (y[1:] - y[:-1])).sum(0)
    return (over_x + over_y) / 2


def shuffled_words(texts: Sequence[str], seed: int) -> list[str]:
    """All words of all texts in random order, dealt out so that each text keeps its number of words."""
    pool = np.array([word for text in texts for word in text.split()], dtype=object)
    np.random.default_rng(seed).shuffle(pool)
    ends = np.cumsum([len(text.split()) for text in texts])
    return [" ".join(part) for part in np.split(pool, ends[:-1])]


def evaluate_mauve(
    protocol: Protocol, human: Texts, others: Texts, generated: Sequence[tuple[Setting, Texts]], featuriser: Teacher, cache: Path, bar: Bar,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Scores of every setting against ``human``; ceiling and floor are ``others`` (human texts after other prompts) and their words
    shuffled. -> {"protocol", "featuriser", "references", "ceiling", "floor", "results"}.

    Each score holds "texts", how many there were; "empty_texts" had nothing to featurise and were left out.
    """
    flat = [text for choices in others for text in choices]
    sides = {"references": human, "ceiling": others, "floor": [[text] for text in shuffled_words(flat, seed)]}
    features = {name: _features(featuriser, texts, cache, bar, name) for name, texts in sides.items()}
    references, _ = features.pop("references")

    def scored(found: tuple[np.ndarray, int]) -> dict[str, Any]:
        seeds = range(seed, seed + protocol.seeds)
        return {
            **mauve(found[0], references, protocol.scaling_factor, seeds),
            "texts": len(found[0]),
            "empty_texts": found[1],
        }

    bounds = {name: scored(found) for name, found in features.items()}
    results = [
        {**asdict(setting), **scored(_features(featuriser, texts, cache, bar, str(setting)))}
        for setting, texts in generated
    ]
    for i, row in enumerate(results):
        row["against_ceiling"] = _compare(row, bounds["ceiling"])
        if i:
            row["against_first"] = _compare(row, results[0])
    return {
        "protocol": asdict(protocol),
        "featuriser": featuriser.described,
        "references": len(references),
        **bounds,
        "results": results,
    }


def _compare(score: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Difference of two scores; its interval takes them as independent, too wide for scores against the same references."""
    difference, (low, high) = mover(
        (score["value"], score["interval"]), (reference["value"], reference["interval"])
    )
    return {"difference": difference, "interval": [low, high], "inside_noise": low <= 0 <= high}


def _features(featuriser: Teacher, texts: Texts, cache: Path, bar: Bar, what: str) -> tuple[np.ndarray, int]:
    """-> features [texts, D], number of empty texts."""
    flat = [text for choices in texts for text in choices]
    full = [text for text in flat if text.strip()]
    if not full:
        raise UserError(
            "texts", what, "all of them are empty", "look at the samples: the model writes nothing"
        )
    key = ("features", featuriser.fingerprint, featuriser.window)
    found = cached(cache, key, full, featuriser.features, bar(f"features, {what}", len(full)))
    return found, len(flat) - len(full)
