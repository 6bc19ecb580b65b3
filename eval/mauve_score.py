"""MAUVE (Pillutla et al. 2021): how far the distribution of a model's texts lies from that of human ones, in a teacher's features.

The only file that imports the package mauve (GPLv3, optional). Features come from eval/teachers.py: the package's own featuriser
knows local folders only by certain names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from eval.gen_ppl import Bar, Texts
from eval.samples import Setting
from eval.teachers import Teacher, cached
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
        given = {key: value for key, value in values.items() if value is not None and value != getattr(self, key)}
        listed = ", ".join(f"{key} {value}" for key, value in given.items())
        return replace(self, **given, name=f"{self.name} with {listed}") if given else self  # type: ignore[arg-type]


PROTOCOLS = {
    "paper": Protocol("paper", 1000, 5, 50, 50, 2.0, 5),
    "standard": Protocol("standard", 1000, 1, 50, 50, 5.0, 5),
    "quick": Protocol("quick", 200, 1, 50, 50, 5.0, 3),
}
"""paper: DiffusionBlocks App. E, after SEDD (the length of its prompts is not stated; 50 here). Factor 5 is the package's default and
spreads good scores, which factor 2 squeezes to .98-.99."""


def require_mauve() -> None:
    """UserError if the package is missing."""
    if find_spec("mauve") is None:
        remedy = "run `pip install mauve-text==0.4.0` (its licence is GPLv3)"
        raise UserError("rdlm eval mauve", "mauve-text", "the package is not installed", remedy)


def mauve(p: np.ndarray, q: np.ndarray, scaling_factor: float, seeds: Sequence[int]) -> dict[str, Any]:
    """p, q: features [n, D] -> {"value": mean over k-means seeds, "sd": None with one seed, "per_seed", "num_buckets"}.

    Buckets, PCA and k-means are the package's defaults. The standard deviation is that of clustering, not of drawing other texts.
    """
    import faiss
    from mauve import compute_mauve

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # sums in another order would move points between clusters
    try:
        runs = [compute_mauve(p_features=p, q_features=q, mauve_scaling_factor=scaling_factor, seed=seed) for seed in seeds]
    finally:
        faiss.omp_set_num_threads(threads)
    scores = [float(run.mauve) for run in runs]
    sd = float(np.std(scores, ddof=1)) if len(scores) > 1 else None
    return {"value": float(np.mean(scores)), "sd": sd, "per_seed": scores, "num_buckets": int(runs[0].num_buckets)}


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
        return {**mauve(found[0], references, protocol.scaling_factor, seeds), "texts": len(found[0]), "empty_texts": found[1]}

    bounds = {name: scored(found) for name, found in features.items()}
    results = [
        {**asdict(setting), **scored(_features(featuriser, texts, cache, bar, str(setting)))} for setting, texts in generated
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
    """Difference of two scores. Inside the noise: within two standard deviations of clustering; unknown with one seed."""
    difference = score["value"] - reference["value"]
    if score["sd"] is None:
        return {"difference": difference, "inside_noise": None}
    return {"difference": difference, "inside_noise": abs(difference) <= 2 * float(np.hypot(score["sd"], reference["sd"]))}


def _features(featuriser: Teacher, texts: Texts, cache: Path, bar: Bar, what: str) -> tuple[np.ndarray, int]:
    """-> features [texts, D], number of empty texts."""
    flat = [text for choices in texts for text in choices]
    full = [text for text in flat if text.strip()]
    if not full:
        raise UserError("texts", what, "all of them are empty", "look at the samples: the model writes nothing")
    key = ("features", featuriser.fingerprint, featuriser.window)
    found = cached(cache, key, full, featuriser.features, bar(f"features, {what}", len(full)))
    return found, len(flat) - len(full)
