"""Distance between the distributions of model and human texts.

MAUVE (Pillutla et al. 2021), in the features of a language model.

The only file that imports the package mauve (GPLv3, optional). Features come from
eval/texts/judge_models.py: the package's own featuriser knows local folders only by certain names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.console import Console

from eval.cache import Bar, bars, cached
from eval.metric import Json, Measurement, Picture, Run, Section, Table, print_table
from eval.metrics.gen_ppl import described, text_protocol
from eval.options import SOURCES, TextOptions
from eval.plots import Row, against_k, heading
from eval.provenance import write_bytes
from eval.stats import difference, mover, with_interval
from eval.texts.judge_models import Judge, load_judge
from eval.texts.samples import Shape, Texts, open_sampler, sample_all, settings_of, to_text
from eval.texts.sweep import CELLS, Setting, setting_of
from rdlm.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """What a score depends on besides the model. Scores of different protocols cannot be compared."""

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
        """The protocol with other values (None keeps one); its name then says which were changed."""
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
"""paper: DiffusionBlocks App. E, after SEDD (the length of its prompts is not stated; 50 here). Factor 5
is the package's default and spreads good scores, which factor 2 squeezes to .98-.99."""


RESAMPLES = 200
"""Bootstrap resamples of the bucket counts: enough for a standard deviation."""


def require_mauve() -> None:
    """UserError if the package is missing."""
    if find_spec("mauve") is None:
        remedy = "run `pip install mauve-text==0.4.0` (its licence is GPLv3)"
        raise UserError("rdlm eval mauve", "mauve-text", "the package is not installed", remedy)


def mauve(p: np.ndarray, q: np.ndarray, scaling_factor: float, seeds: Sequence[int]) -> dict[str, Any]:
    """p, q: features [n, D] -> {"value": mean over k-means seeds, "interval", "sd", "text_sd", "per_seed",
    "num_buckets"}.

    Buckets, PCA and k-means are the package's defaults. sd: deviation of clustering (None with one seed).
    text_sd: of drawing other texts, by bootstrap of the bucket counts. interval: 1.96 times both together,
    because resampled counts lie too low on average to give the interval by their percentiles.
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
    """Standard deviation of the score over resamples of the texts, each kept in its bucket. p, q: shares
    of the buckets."""
    rng = np.random.default_rng(seed)
    drawn_p, drawn_q = (rng.multinomial(n, shares, RESAMPLES) / n for n, shares in ((num_p, p), (num_q, q)))
    return float(np.std(scores_of_shares(drawn_p, drawn_q, scaling_factor), ddof=1))


def scores_of_shares(p: np.ndarray, q: np.ndarray, scaling_factor: float) -> np.ndarray:
    """The package's score of histograms p, q [rows, buckets] -> [rows]: the area under the divergence
    curve (Pillutla et al. 2021, Eq. 3), the mean of the areas seen from either axis."""
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
    protocol: Protocol, human: Texts, others: Texts, generated: Sequence[tuple[Setting, Texts]],
    featuriser: Judge, cache: Path, bar: Bar,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Scores of every setting against ``human``; ceiling and floor are ``others`` (human texts after other
    prompts) and their words shuffled. -> {"protocol", "featuriser", "references", "ceiling", "floor",
    "results"}.

    Each score holds "texts", how many there were; "empty_texts" had nothing to featurise and were left
    out.
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
    """Difference of two scores; its interval takes them as independent, too wide for scores against the
    same references."""
    difference, (low, high) = mover(
        (score["value"], score["interval"]), (reference["value"], reference["interval"])
    )
    return {"difference": difference, "interval": [low, high], "inside_noise": low <= 0 <= high}


def _features(featuriser: Judge, texts: Texts, cache: Path, bar: Bar, what: str) -> tuple[np.ndarray, int]:
    """-> features [texts, D], number of empty texts."""
    flat = [text for choices in texts for text in choices]
    full = [text for text in flat if text.strip()]
    if not full:
        raise UserError(
            "texts", what, "all of them are empty", "look at the samples: the model generates nothing"
        )
    key = ("features", *featuriser.identity)
    found = cached(cache, key, full, featuriser.features, bar(f"features, {what}", len(full)))
    return found, len(flat) - len(full)


class Mauve(Measurement):
    """Distance of the distribution of generated texts from human ones, with a human ceiling and a shuffled
    floor."""

    name = "mauve"
    place = 30
    example = "rdlm eval mauve --checkpoint runs/demo/model --data data/demo --protocol quick --num-steps 1,4"

    @dataclass(frozen=True, kw_only=True)
    class Options(TextOptions):
        protocol: Annotated[
            Literal["paper", "standard", "quick"],
            typer.Option(help="Numbers of prompts, continuations and tokens (docs/evaluation.md)."),
        ] = "quick"
        featuriser: Annotated[
            str, typer.Option(help=f"Language model whose features are compared: {SOURCES}.")
        ] = "smollm2"
        num_prompts: Annotated[int | None, typer.Option(min=20, help="Instead of the protocol's number.")] = (
            None
        )
        continuations: Annotated[
            int | None, typer.Option(min=1, help="Instead of the protocol's number.")
        ] = None
        scaling_factor: Annotated[float | None, typer.Option(min=0.01, help="Instead of the protocol's.")] = (
            None
        )
        num_seeds: Annotated[
            int | None, typer.Option(min=1, help="Runs of k-means, instead of the protocol's.")
        ] = None

    def measure(self, options: Options) -> Json:
        settings, dtype = settings_of(options), getattr(torch, options.judge_dtype)
        require_mauve()
        chosen = PROTOCOLS[options.protocol].changed(
            prompts=options.num_prompts,
            continuations=options.continuations,
            scaling_factor=options.scaling_factor,
            seeds=options.num_seeds,
        )
        shape = Shape(chosen.prompt_tokens, chosen.max_tokens, chosen.continuations, options.across_documents)
        with open_sampler(options, shape, chosen.prompts, settings) as (sampler, rest), bars() as bar:
            model = load_judge(options.featuriser, options.device, dtype, options.window)
            others = list(islice(rest, chosen.prompts * chosen.continuations))
            if len(others) < chosen.prompts:
                problem = (
                    f"only {len(others)} passages are left for the human ceiling, which needs as many again"
                )
                remedy = "ask for fewer, or prepare more text"
                raise UserError("--num-prompts", chosen.prompts, problem, remedy)
            held = [[to_text(sampler.tokenizer, p.continuation)] for p in others]
            generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
            measured = evaluate_mauve(
                chosen, sampler.human, held, generated, model, options.cache, bar, options.seed
            )
            return {**sampler.origin(self.name), **measured}

    def show(self, report: Json, console: Console) -> None:
        protocol, rows = report["protocol"], []
        for label, what in (("ceiling", "human"), ("floor", "shuffled")):
            rows.append([what, "", "", *_compared(report[label])])
        rows += [[*setting_of(row).cells, *_compared(row)] for row in report["results"]]
        caption = (
            f"{report['references']:,} references, scaling factor {protocol['scaling_factor']:g}, features "
            "of "
            f"{report['featuriser']['name']}; 95 % intervals over texts and {protocol['seeds']} k-means seeds"
        )
        headers = (*CELLS, "MAUVE", "- ceiling", "- first", "texts", "empty")
        title = f"MAUVE of {heading(report)}, protocol {protocol['name']}"
        print_table(console, title, headers, rows, caption, styles={0: "dim", 1: "dim"})
        wanted, texts = protocol["prompts"] * protocol["continuations"], report["ceiling"]["texts"]
        if texts < wanted:
            console.print(
                f"The ceiling rests on {texts:,} texts instead of {wanted:,}: the split has no more."
            )

    def plot(self, report: Json, file: Path) -> None:
        write_bytes(file, _against_k([Run(file, self.name, self.label(report), report)]))

    def protocol(self, report: Json) -> Json:
        own = {"protocol": report["protocol"], "featuriser": described(report["featuriser"])}
        return {**super().protocol(report), **text_protocol(report), **own}

    def section(self, runs: list[Run]) -> Section:
        """Every setting between ceiling and floor, and against K."""
        first, rows = runs[0], []
        base = first.report["results"][0]
        for name, what in (
            ("ceiling", "human text after other prompts (ceiling)"),
            ("floor", "its words shuffled (floor)"),
        ):
            rows.append([what, "", "", "", *_scored(first.report[name]), "", "", ""])
        for run in runs:
            for r in run.report["results"]:
                others = (first.report["ceiling"], base, run.report["results"][0])
                compared = ["" if other is r else _against(r, other) for other in others]
                rows.append([run.label, *setting_of(r).cells, *_scored(r), *compared])
        protocol = first.report["protocol"]
        about = (
            f"Protocol {protocol['name']}: {first.report['references']:,} references, scaling factor "
            f"{protocol['scaling_factor']:g}, "
            f"features of {first.report['featuriser']['name']}. Intervals cover the drawing of texts and "
            f"of {protocol['seeds']} k-means seeds."
        )
        headers = ["run", *CELLS, "MAUVE [95 %]", "texts", "- ceiling", "- first row", "- own first row"]
        return Section("MAUVE", about, [Table(headers, rows), Picture(_against_k(runs), "MAUVE against K")])


def _against_k(runs: list[Run]) -> bytes:
    """PNG: a curve per run and setting, between ceiling and floor of the first run."""
    curves: dict[str, list[Row]] = {}
    for run in runs:
        for r in run.report["results"]:
            name = ", ".join(filter(None, (run.label, f"T {r['temperature']:g}", setting_of(r).rest)))
            row = {"K": r["num_steps"], "value": r["value"], "value_interval": r["interval"]}
            curves.setdefault(name, []).append(row)
    bands = {name: tuple(runs[0].report[name]["interval"]) for name in ("ceiling", "floor")}
    return against_k(curves, "MAUVE", bands)


def _scored(entry: Json) -> list[str]:
    return [with_interval(entry["value"], entry["interval"]), f"{entry['texts']:,}"]


def _against(entry: Json, other: Json) -> str:
    found = _compare(entry, other)
    return difference(found["difference"], found["interval"])


def _compared(entry: Json) -> list[str]:
    score, texts = _scored(entry)
    found = [entry.get(name) for name in ("against_ceiling", "against_first")]
    compared = ["" if each is None else difference(each["difference"], each["interval"]) for each in found]
    return [score, *compared, texts, str(entry["empty_texts"])]
