"""How varied texts are, in words: what stands beside every generative perplexity, because a loop scores better than English.

A word is a run of letters and digits (with inner apostrophes) or one punctuation mark, lower case: nothing here depends on a tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.bootstrap import mean_with_interval

GROUP_TEXTS = 50
"""Texts of a group. Distinct-n and entropy depend on how much text they see, so they are means over groups of one size."""
REPETITION_ORDER = 4
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

Words = list[str]


def words(text: str) -> Words:
    """Lower-case words and punctuation marks, in order."""
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All n-grams of one text, none across texts."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(texts: Sequence[Words], n: int) -> float:
    """Different n-grams / n-grams over all texts together (Li et al. 2016); 0 where there is no n-gram."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: Words, n: int = REPETITION_ORDER) -> float:
    """Share of a text's n-grams that it has already said: 1 - distinct / all (seq-rep-n, Welleck et al. 2020). 0 if there is none."""
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def unigram_entropy(texts: Sequence[Words]) -> float:
    """Entropy in bits of the word frequencies of all texts together; 0 without words."""
    counts = Counter(word for text in texts for word in text)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def measure(texts: Sequence[Sequence[str]], seed: int = 0, group_texts: int = GROUP_TEXTS) -> dict[str, Any]:
    """texts[prompt][choice] -> each figure as {"value", "interval"}.

    distinct_1..3 and entropy_bits: means over groups of ``group_texts`` texts of different prompts (all prompts' first choices, then
    their second ones), resampled by group; what fills no group is left out of these four and counted in "texts_outside_groups".
    repetition and mean_words: means over texts, resampled by prompt.
    """
    split = [[words(text) for text in choices] for choices in texts]
    flat = [choices[c] for c in range(max(map(len, split))) for choices in split if c < len(choices)]
    size = min(group_texts, len(split))
    groups = [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]
    figures: dict[str, Any] = {
        f"distinct_{n}": mean_with_interval(np.array([distinct(group, n) for group in groups]), seed) for n in (1, 2, 3)
    }
    figures["entropy_bits"] = mean_with_interval(np.array([unigram_entropy(group) for group in groups]), seed)
    for name, of in (("repetition", repetition), ("mean_words", len)):
        figures[name] = mean_with_interval(np.array([np.mean([of(text) for text in choices]) for choices in split]), seed)
    return {**figures, "texts": len(flat), "group_texts": size, "texts_outside_groups": len(flat) - size * len(groups)}
