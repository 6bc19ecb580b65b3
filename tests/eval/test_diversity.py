"""Diversity figures against counts by hand, and the bootstrap they use."""

import math

import numpy as np
import pytest

from eval.stats import interval, mean_with_interval, resamples
from eval.texts.diversity import distinct, measure, repetition, unigram_entropy, words


def test_words_are_lower_case_with_apostrophes_and_marks() -> None:
    assert words("Don't stop, Émile: 12 -- o'er") == [
        "don't",
        "stop",
        ",",
        "émile",
        ":",
        "12",
        "-",
        "-",
        "o'er",
    ]


def test_distinct_counts_over_all_texts_but_not_across_their_borders() -> None:
    texts = ["a b a b".split(), "b a".split()]
    assert distinct(texts, 1) == 2 / 6
    assert distinct(texts, 2) == 2 / 4  # ab ba ab | ba
    assert distinct(texts, 3) == 2 / 2  # aba bab
    assert distinct(texts, 5) == 0.0
    assert distinct(["a b".split(), "c d".split()], 2) == 1.0  # "b c" is no bigram


def test_repetition_is_the_share_said_before() -> None:
    assert repetition("a b c d e f".split()) == 0.0
    assert repetition("a b c d a b c d".split()) == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition(["the"] * 20) == pytest.approx(1 - 1 / 17)
    assert repetition(["short"]) == 0.0


def test_entropy_in_bits() -> None:
    assert unigram_entropy(["a b c d".split(), "a b c d".split()]) == pytest.approx(2.0)
    assert unigram_entropy(["a a a b".split()]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert unigram_entropy([["the"] * 9]) == 0.0


def test_groups_have_one_size_whatever_the_number_of_texts() -> None:
    rng = np.random.default_rng(0)
    texts = [[" ".join(rng.choice([f"w{i}" for i in range(40)], 20)) for _ in range(3)] for _ in range(307)]
    few, many = measure(texts[:50]), measure(texts)
    assert few["group_texts"] == many["group_texts"] == 50
    assert few["texts"] == 150 and many["texts"] == 921 and many["texts_outside_groups"] == 21
    assert many["distinct_2"]["value"] == pytest.approx(few["distinct_2"]["value"], abs=0.01)
    low, high = many["distinct_2"]["interval"]
    assert low < many["distinct_2"]["value"] < high
    assert few["distinct_2"]["interval"] is None  # one block of prompts
    firsts = [words(choices[0]) for choices in texts[:50]]
    assert measure([c[:1] for c in texts[:50]])["distinct_2"]["value"] == pytest.approx(distinct(firsts, 2))


def test_a_model_that_always_says_the_same_is_exposed_by_distinct_and_one_that_loops_by_repetition() -> None:
    same = measure([["It was the best of times, it was the worst of times."]] * 60)
    loop = measure([[f"w{i} " + "the " * 40] for i in range(60)])
    assert same["repetition"]["value"] == 0.0 and same["distinct_3"]["value"] < 0.03
    assert loop["repetition"]["value"] > 0.9 and loop["entropy_bits"]["value"] < 1


def test_bootstrap_of_a_mean_agrees_with_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = interval(resamples(400, 0) @ values / 400)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.05)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.05)
    assert mean_with_interval(values, 0)["interval"] == [low, high]
    assert mean_with_interval(values[:4], 0)["interval"] is None
