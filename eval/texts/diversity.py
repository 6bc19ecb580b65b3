"""How varied texts are, in words: what accompanies every generative perplexity, because a loop scores
better than English.

A word is a run of letters and digits (with inner apostrophes) or one punctuation mark, lower case: nothing
here depends on a tokenizer.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from eval.stats import mean_with_interval

GROUP_TEXTS = 50
"""Texts of a group. Distinct-n and entropy depend on how much text they see, so they are means over groups
of one size."""
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
    """Share of a text's n-grams that it has already said: 1 - distinct / all (seq-rep-n, Welleck et al.
    2020). 0 if there is none."""
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def unigram_entropy(texts: Sequence[Words]) -> float:
    """Entropy in bits of the word frequencies of all texts together; 0 without words."""
    counts = Counter(word for text in texts for word in text)
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def blocks(num_prompts: int, group_texts: int = GROUP_TEXTS) -> list[slice]:
    """The prompts in whole blocks of ``group_texts``, in order (one smaller block where there are fewer);
    a rest is left out."""
    size = min(group_texts, num_prompts)
    return [slice(start, start + size) for start in range(0, num_prompts - size + 1, size)]


def measure(texts: Sequence[Sequence[str]], seed: int = 0, group_texts: int = GROUP_TEXTS) -> dict[str, Any]:
    """texts[prompt][choice], equally many for each -> each figure as {"value", "interval"}.

    distinct_1..3 and entropy_bits: means over groups of ``group_texts`` texts, one for each prompt of a
    block (``blocks``), resampled by block; what fills no group is left out of these four and counted in
    "texts_outside_groups". "distinct_2" also holds "by_block". repetition and mean_words: means over
    texts, resampled by prompt.
    """
    split = [[words(text) for text in choices] for choices in texts]
    found = blocks(len(split), group_texts)
    groups = [list(zip(*split[block], strict=True)) for block in found]  # [block][choice][prompt]

    def by_block(of: Callable[[Sequence[Words]], float]) -> np.ndarray:
        return np.array([np.mean([of(group) for group in choices]) for choices in groups])

    orders = {f"distinct_{n}": by_block(partial(distinct, n=n)) for n in (1, 2, 3)}
    figures: dict[str, Any] = {name: mean_with_interval(values, seed) for name, values in orders.items()}
    figures["distinct_2"]["by_block"] = orders["distinct_2"].tolist()
    figures["entropy_bits"] = mean_with_interval(by_block(unigram_entropy), seed)
    for name, of in (("repetition", repetition), ("mean_words", len)):
        figures[name] = mean_with_interval(
            np.array([np.mean([of(text) for text in choices]) for choices in split]), seed
        )
    size, choices = found[0].stop, len(split[0])
    left_out = (len(split) - size * len(found)) * choices
    return {**figures, "texts": len(split) * choices, "group_texts": size, "texts_outside_groups": left_out}
