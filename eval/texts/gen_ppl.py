"""Generative perplexity: how predictable a model's texts are to a teacher, always beside how varied they are.

Both sides continue the same prompts, the model and the author; intervals and comparisons resample prompts, paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from eval.stats import interval, resamples
from eval.texts.diversity import blocks, measure
from eval.texts.judge_models import Progress, Teacher, cached
from eval.texts.samples import Sampler
from eval.texts.sweep import Setting

Texts = list[list[str]]
"""texts[prompt][choice]"""
Bar = Callable[[str, int], Progress]
"""Opens a progress bar: (what, how many) -> callback told the number done since."""


def sample_all(sampler: Sampler, settings: Sequence[Setting], bar: Bar) -> list[Texts]:
    """Texts of every setting, generated where no file holds them."""
    return [sampler.continuations(s, bar(f"texts at {s}", len(sampler.passages))) for s in settings]


def evaluate_gen_ppl(
    prompts: Sequence[str], human: Texts, generated: Sequence[tuple[Setting, Texts]], teachers: Sequence[Teacher], cache: Path, bar: Bar,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """-> {"teachers": [facts], "human": row, "results": [row per setting]}.

    row: {"perplexity": {teacher: {"value", "interval", "tokens", "by_block"}}, "diversity": diversity.measure(...)}; by_block holds
    [nats, tokens] of each block of prompts that diversity is measured on. Rows of settings also hold the setting, and per teacher
    "against_human" and "against_first" (the first setting): the ratio, its paired interval, and "inside_noise", true where the
    interval holds 1.
    """
    sides = [human, *(texts for _, texts in generated)]
    scores = {t.name: [_score(t, prompts, texts, cache, bar) for texts in sides] for t in teachers}
    rows = [
        _row([scores[t.name][i] for t in teachers], teachers, texts, seed) for i, texts in enumerate(sides)
    ]
    for i, (setting, _) in enumerate(generated, start=1):
        rows[i] = {**asdict(setting), **rows[i]}
        for teacher in teachers:
            mine, entry = scores[teacher.name], rows[i]["perplexity"][teacher.name]
            entry["against_human"] = compare(mine[i], mine[0], seed)
            if i > 1:
                entry["against_first"] = compare(mine[i], mine[1], seed)
    return {"teachers": [t.described for t in teachers], "human": rows[0], "results": rows[1:]}


def _score(teacher: Teacher, prompts: Sequence[str], texts: Texts, cache: Path, bar: Bar) -> np.ndarray:
    """-> [prompts, 2]: nats and teacher tokens of all continuations of a prompt."""
    pairs = [[prompt, text] for prompt, choices in zip(prompts, texts, strict=True) for text in choices]
    scored = cached(
        cache,
        ("gen-ppl", teacher.fingerprint, teacher.window),
        pairs,
        lambda chunk, progress: teacher.score([p for p, _ in chunk], [c for _, c in chunk], progress),
        bar(f"{teacher.name} scores", len(pairs)),
    )
    return scored.reshape(len(prompts), -1, 2).sum(1)


def _row(
    scores: Sequence[np.ndarray], teachers: Sequence[Teacher], texts: Texts, seed: int
) -> dict[str, Any]:
    named = zip(teachers, scores, strict=True)
    return {"perplexity": {t.name: perplexity(s, seed) for t, s in named}, "diversity": measure(texts, seed)}


def perplexity(scores: np.ndarray, seed: int) -> dict[str, Any]:
    """exp(nats / tokens) over all texts, with its interval over prompts. scores [prompts, 2]."""
    return {
        "value": float(np.exp(_rate(scores))),
        "interval": interval(np.exp(_resampled(scores, seed))),
        "tokens": int(scores[:, 1].sum()),
        "by_block": [scores[block].sum(0).tolist() for block in blocks(len(scores))],
    }


def compare(scores: np.ndarray, reference: np.ndarray, seed: int) -> dict[str, Any]:
    """Ratio of perplexities, resampling the prompts of both together."""
    ratio = interval(np.exp(_resampled(scores, seed) - _resampled(reference, seed)))
    value = math.exp(_rate(scores) - _rate(reference))
    return {"ratio": value, "interval": ratio, "inside_noise": ratio[0] <= 1 <= ratio[1]}


def _rate(scores: np.ndarray) -> float:
    nats, tokens = scores.sum(0)
    return float(nats / tokens)


def _resampled(scores: np.ndarray, seed: int) -> np.ndarray:
    totals = resamples(len(scores), seed) @ scores
    return totals[:, 0] / totals[:, 1]
