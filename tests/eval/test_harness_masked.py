"""Masked models under lm-eval: bounds and exact likelihoods of continuations, answers filled in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rdlm.errors import UserError

pytest.importorskip("lm_eval", reason="the harness is not installed")

from lm_eval.api.instance import Instance

from eval.texts.lm_eval_adapter import RecurrentLM

MakeModel = Callable[..., RecurrentLM]


def _ask(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", 0, 1))  # type: ignore[arg-type]


def test_a_masked_model_bounds_continuations_alike_in_any_batch(make_model: MakeModel) -> None:
    """At K = 1 the bound is the log-probability of one pass in which the continuation is hidden; rows of
    other lengths change nothing."""
    pairs = [
        ("in the", " beginning was"),
        ("and it came to pass in those", " days"),
        ("", "the word"),
        ("with", " god was"),
    ]
    asked = [_ask("loglikelihood", *pair) for pair in pairs]
    model = make_model("masked", num_steps=1, batch_size=4)
    assert model.estimator == "bound" and "upper bound" in model.get_model_info()["estimator"]
    denoiser: Any = model.loaded.denoiser
    for (context, continuation), (logprob, _) in zip(
        pairs, model.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        before = model.text.encode(context) or [model.eot_token_id]
        after = model.text.encode(context + continuation)[len(model.text.encode(context)) :]
        row = torch.tensor([[*before, *[denoiser.mask_id] * len(after)]])
        with torch.no_grad():
            states = denoiser.hidden(row, torch.tensor([len(after) / row.shape[1]]))[0, len(before) :]
            table = denoiser.predict(states).logits().log_softmax(-1)
        assert logprob == pytest.approx(float(table[range(len(after)), after].sum()), abs=1e-4)
    many, alone = (
        make_model("masked", num_steps=8, batch_size=n).loglikelihood(asked, disable_tqdm=True)
        for n in (4, 1)
    )
    assert [each for each, _ in many] == pytest.approx([each for each, _ in alone], abs=1e-4)


def test_a_masked_model_has_an_exact_likelihood_from_left_to_right(make_model: MakeModel) -> None:
    """All answers of one token together have probability 1; rows of other lengths and K change nothing;
    greedy is exact."""
    model = make_model("masked", num_steps=4, batch_size=4, estimator="left_to_right")
    stated = model.get_model_info()
    assert (
        stated["estimator"] == "normalised: one token a step, from left to right"
        and stated["loglikelihood_num_steps"] == 1
    )
    pairs = [
        ("in the", " beginning was"),
        ("and it came to pass in those", " days"),
        ("", "the word"),
        ("with", " god was"),
    ]
    asked = [_ask("loglikelihood", *pair) for pair in pairs]
    found = model.loglikelihood(asked, disable_tqdm=True)
    alone = make_model("masked", num_steps=1, batch_size=1, estimator="left_to_right").loglikelihood(
        asked, disable_tqdm=True
    )
    assert [each for each, _ in found] == pytest.approx([each for each, _ in alone], abs=1e-4)
    context = model.text.encode("in the")
    every = model._loglikelihood_tokens(
        [(("", ""), context, [i]) for i in range(model.text.vocab_size)], disable_tqdm=True
    )
    mass = sum(math.exp(logprob) for logprob, _ in every)
    assert 0.5 < mass <= 1 + 1e-5 and (mass > 1 - 1e-4) == (
        model.text.vocab_size == model.loaded.config.model.vocab_size
    )
    assert sum(greedy for _, greedy in every) == 1 and max(every)[1]
    (whole,) = model.loglikelihood_rolling(
        [_ask("loglikelihood_rolling", "in the beginning")], disable_tqdm=True
    )
    assert math.isfinite(whole) and whole < 0


def test_a_masked_model_fills_texts_in_and_rolls(make_model: MakeModel) -> None:
    model = make_model("masked", num_steps=4, max_length=12)
    (whole,) = model.loglikelihood_rolling(
        [_ask("loglikelihood_rolling", " ".join(["word"] * 9))], disable_tqdm=True
    )
    assert math.isfinite(whole) and whole < 0
    with_all = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    prompts = ["in the", "and it", "god", "was", "days", "in the"]
    texts = model.generate_until(
        [_ask("generate_until", prompt, with_all) for prompt in prompts], disable_tqdm=True
    )
    assert texts[0] != texts[-1], "another choice"
    longest = max(range(5), key=lambda i: len(texts[i]))
    text, stop = texts[longest], texts[longest][2:4]
    again = [_ask("generate_until", prompts[longest], {**with_all, "until": until}) for until in ([], [stop])]
    assert model.generate_until(again[:1], disable_tqdm=True) == [text] and len(stop) == 2
    assert model.generate_until(again[1:], disable_tqdm=True) == [text[: text.index(stop)]]
    first, second = (
        model.generate_until(
            [_ask("generate_until", "in the", {**with_all, "order": order})], disable_tqdm=True
        )
        for order in ("confidence", "left_to_right")
    )
    assert first != second
    with pytest.raises(UserError, match="no such order"):
        model.generate_until(
            [_ask("generate_until", "a", {**with_all, "order": "backwards"})], disable_tqdm=True
        )
    with pytest.raises(UserError, match="no such setting"):
        model.generate_until(
            [_ask("generate_until", "a", {**with_all, "repetition_penalty": 1.2})], disable_tqdm=True
        )


@pytest.mark.parametrize(
    ("objective", "estimator"), [("masked", "normalised"), ("masked", "mixture"), ("onestep", "bound")]
)
def test_bounds_and_likelihoods_are_not_mixed_up(
    make_model: MakeModel, objective: str, estimator: str
) -> None:
    with pytest.raises(UserError, match="leave estimator out"):
        make_model(objective, estimator=estimator)
