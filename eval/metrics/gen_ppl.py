"""Perplexity of generated texts under judge models; diversity.

A loop of words is predictable, so perplexity is never given without diversity. Model and author continue
the same prompts; intervals and comparisons resample prompts, paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from eval.cache import Bar, bars, cached
from eval.metric import Block, Json, Measurement, Picture, Run, Sample, Section, Table, print_table
from eval.options import SOURCES, TextOptions
from eval.plots import Row, against_k, heading, new_figure, png
from eval.stats import difference, interval, or_dash, resamples, with_interval
from eval.texts.diversity import blocks, measure
from eval.texts.frontier import (
    at_equal_diversity,
    draw_frontier,
    estimate,
    nats_at_equal_diversity,
    plot_frontier,
)
from eval.texts.judge_models import Judge, load_judge
from eval.texts.samples import Sampler, Shape, Texts, open_sampler, sample_all, settings_of
from eval.texts.sweep import CELLS, Setting, setting_of

EXAMPLES = 4
"""Prompts whose texts stand in the report."""


def evaluate_gen_ppl(
    prompts: Sequence[str], human: Texts, generated: Sequence[tuple[Setting, Texts]], judges: Sequence[Judge],
    cache: Path, bar: Bar,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """-> {"judges": [facts], "human": row, "results": [row per setting]}.

    row: {"perplexity": {judge: {"value", "interval", "tokens", "by_block"}}, "diversity":
    diversity.measure(...)}; by_block holds [nats, tokens] of each block of prompts that diversity is
    measured on. Rows of settings also hold the setting, and per judge "against_human" and
    "against_first" (the first setting): the ratio, its paired interval, and "inside_noise", true where the
    interval holds 1.
    """
    sides = [human, *(texts for _, texts in generated)]
    scores = {t.name: [_score(t, prompts, texts, cache, bar) for texts in sides] for t in judges}
    rows = [_row([scores[t.name][i] for t in judges], judges, texts, seed) for i, texts in enumerate(sides)]
    for i, (setting, _) in enumerate(generated, start=1):
        rows[i] = {**asdict(setting), **rows[i]}
        for judge in judges:
            mine, entry = scores[judge.name], rows[i]["perplexity"][judge.name]
            entry["against_human"] = compare(mine[i], mine[0], seed)
            if i > 1:
                entry["against_first"] = compare(mine[i], mine[1], seed)
    return {"judges": [t.described for t in judges], "human": rows[0], "results": rows[1:]}


def _score(judge: Judge, prompts: Sequence[str], texts: Texts, cache: Path, bar: Bar) -> np.ndarray:
    """-> [prompts, 2]: nats and judge tokens of all continuations of a prompt."""
    pairs = [[prompt, text] for prompt, choices in zip(prompts, texts, strict=True) for text in choices]
    scored = cached(
        cache,
        ("gen-ppl", *judge.identity),
        pairs,
        lambda chunk, progress: judge.score([p for p, _ in chunk], [c for _, c in chunk], progress),
        bar(f"{judge.name} scores", len(pairs)),
    )
    return scored.reshape(len(prompts), -1, 2).sum(1)


def _row(scores: Sequence[np.ndarray], judges: Sequence[Judge], texts: Texts, seed: int) -> dict[str, Any]:
    named = zip(judges, scores, strict=True)
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


class GenPpl(Measurement):
    """Perplexity of generated texts under other models, with their diversity, and the same figures of
    human text."""

    name = "gen-ppl"
    place = 20
    example = (
        "rdlm eval gen-ppl --checkpoint runs/demo/model --data data/demo --temperature 0.7,1.0 --plot f.png"
    )

    @dataclass(frozen=True, kw_only=True)
    class Options(TextOptions):
        judge: Annotated[
            list[str] | None, typer.Option(help=f"Repeatable: {SOURCES}; by default smollm2.")
        ] = None
        num_prompts: Annotated[int, typer.Option(min=2, help="Held-out passages to continue.")] = 200
        prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 50
        max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 50
        continuations: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1

    def measure(self, options: Options) -> Json:
        shape = Shape(
            options.prompt_tokens, options.max_tokens, options.continuations, options.across_documents
        )
        settings, dtype = settings_of(options), getattr(torch, options.judge_dtype)
        names = list(dict.fromkeys(options.judge or ["smollm2"]))
        with open_sampler(options, shape, options.num_prompts, settings) as (sampler, _), bars() as bar:
            judges = [load_judge(name, options.device, dtype, options.window) for name in names]
            generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
            measured = evaluate_gen_ppl(
                sampler.prompts, sampler.human, generated, judges, options.cache, bar, options.seed
            )
            report = {**sampler.origin(self.name), **measured, "examples": _examples(sampler, generated)}
        found = {name: at_equal_diversity(report, name, options.seed) for name in names}
        return {**report, "at_human_distinct_2": found}

    def show(self, report: Json, console: Console) -> None:
        names = [judge["name"] for judge in report["judges"]]
        samples, shape = report["samples"], report["samples"]["shape"]
        caption = (
            f"{samples['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, "
            f"{shape['continuations']} x "
            f"{shape['max_tokens']} tokens each; 95 % intervals over prompts; distinct-n and entropy over "
            "groups of "
            f"{report['human']['diversity']['group_texts']} texts"
        )
        judged = [f"{header} {name}" for name in names for header in ("ppl", "/ human")]
        headers = (*CELLS, *judged, "distinct-1", "-2", "-3", "repetition", "entropy", "words")
        rows = [
            [*_place(row, "human"), *_judged(row, names), *_varied(row["diversity"])]
            for row in [*report["results"], report["human"]]
        ]
        print_table(console, f"{heading(report)} on {report['data']['split']}", headers, rows, caption)
        for name, found in report["at_human_distinct_2"].items():
            for point in found:
                value = "not reached by these temperatures"
                if point["perplexity"] is not None:
                    value = with_interval(point["perplexity"], point["interval"], ".1f")
                place = _named(name, f"K = {point['num_steps']}", point["cut"])
                line = f"{place}: perplexity at the distinct-2 of human text: {value}"
                console.print(line, highlight=False)

    def plot(self, report: Json, file: Path) -> None:
        plot_frontier(report, file)

    def protocol(self, report: Json) -> Json:
        described_judges = [described(judge) for judge in report["judges"]]
        return {**super().protocol(report), **text_protocol(report), "judges": described_judges}

    def section(self, runs: list[Run]) -> Section:
        """Every setting, the frontier, and the runs at equal diversity."""
        first = runs[0]
        names = [judge["name"] for judge in first.report["judges"]]
        rows = [row for run in runs for row in _text_rows(run, names, [*run.report["results"]])]
        rows += _text_rows(Run(first.file, self.name, "human text", {}), names, [first.report["human"]])
        headers = ["run", *CELLS, *(h for n in names for h in (f"perplexity, {n} [95 %]", "/ human"))]
        headers += ["distinct-1", "distinct-2", "distinct-3", "repetition", "entropy (bits)", "words"]
        blocks: list[Block] = [Table(headers, rows)]
        figure, panels = new_figure(len(names), 4.8)
        for axes, name in zip(panels, names, strict=True):
            draw_frontier(axes, [(run.label, run.report) for run in runs], name)
        blocks.append(
            Picture(png(figure), "Quality against diversity: lines join temperatures, the star is human text")
        )
        blocks += [block for name in names for block in _equal_diversity(runs, name)]
        shape = first.report["samples"]["shape"]
        about = (
            f"{first.report['samples']['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, "
            f"{shape['continuations']} x "
            f"{shape['max_tokens']} tokens each. Perplexity alone rewards repetition: read it together "
            "with the diversity."
        )
        return Section("Generative perplexity and diversity", about, [*blocks, *_samples(runs)])


def text_protocol(report: Json) -> Json:
    """What must agree between results on generated texts."""
    samples = report["samples"]
    return {"prompts": samples["prompts"]["sha256"], "shape": samples["shape"]}


def described(judge: Json) -> str:
    """A judge, as protocols compare it."""
    return f"{judge['name']} {judge.get('fingerprint')} {judge.get('dtype')}, window {judge.get('window')}"


def _examples(sampler: Sampler, generated: Sequence[tuple[Setting, Texts]]) -> list[dict[str, Any]]:
    """The first prompts with what the author and each setting wrote."""
    shown = list(zip(sampler.prompts, sampler.human, strict=True))[:EXAMPLES]
    return [
        {"prompt": prompt, "human": human[0], "texts": [texts[i][0] for _, texts in generated]}
        for i, (prompt, human) in enumerate(shown)
    ]


def _text_rows(run: Run, names: list[str], results: list[Json]) -> list[list[str]]:
    return [[run.label, *_place(r), *_judged(r, names), *_varied(r["diversity"])] for r in results]


def _place(row: Json, human: str = "") -> list[str]:
    """Cells for CELLS; human text has no setting."""
    return setting_of(row).cells if "num_steps" in row else [human] + [""] * (len(CELLS) - 1)


def _judged(row: Json, names: list[str]) -> list[str]:
    """Perplexity and its ratio to human text under each judge."""
    cells = []
    for name in names:
        entry = row["perplexity"][name]
        against = entry.get("against_human")
        ratio = difference(against["ratio"], against["interval"], ".2f", none=1) if against else ""
        cells += [with_interval(entry["value"], entry["interval"], ".1f"), ratio]
    return cells


def _varied(diversity: dict[str, Any]) -> list[str]:
    digits = {
        "distinct_1": 3,
        "distinct_2": 3,
        "distinct_3": 3,
        "repetition": 3,
        "entropy_bits": 2,
        "mean_words": 1,
    }
    return [f"{diversity[name]['value']:.{n}f}" for name, n in digits.items()]


def _equal_diversity(runs: list[Run], judge: str) -> list[Table | Picture]:
    """Perplexity at the distinct-2 of human text; ratios are paired by blocks of prompts, which all runs
    share."""
    first = runs[0]
    nats = {run.label: nats_at_equal_diversity(run.report, judge) for run in runs}
    base, rows, curves = nats[first.label], [], dict[str, list[Row]]()
    (base_k, base_cut), start = next(iter(base.items()))
    for run in runs:
        own = {
            cut: (k, found) for (k, cut), found in reversed(nats[run.label].items())
        }  # the smallest K of each cut
        for (k, cut), found in nats[run.label].items():
            here = estimate(found)
            cells = [_ratio(found - start) if (run, k, cut) != (first, base_k, base_cut) else ""]
            cells.append("" if own[cut][0] == k else _ratio(found - own[cut][1]))
            value = (
                "-"
                if here["perplexity"] is None
                else with_interval(here["perplexity"], here["interval"], ".1f")
            )
            rows.append([run.label, str(k), cut, value, *cells])
            if here["interval"] is not None:
                row = {"K": k, "value": here["perplexity"], "value_interval": here["interval"]}
                curves.setdefault(_named(run.label, cut), []).append(row)
    size = first.report["human"]["diversity"]["group_texts"]
    note = (
        f"Perplexity under {judge} where the curve over temperatures has the distinct-2 of human text; a "
        "dash where it does not get "
        f"there. Intervals resample blocks of {size} prompts, paired in the ratios; few blocks make them "
        "too narrow."
    )
    against = "/ " + _named(f"{first.label} K = {base_k}", base_cut)
    headers = ["run", "K", "cut", "perplexity [95 %]", against, "/ own smallest K"]
    if not curves:
        return [Table(headers, rows, note)]
    figure = against_k(curves, f"perplexity under {judge}")
    return [
        Table(headers, rows, note),
        Picture(figure, f"Perplexity under {judge} at equal diversity against K"),
    ]


def _named(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _ratio(nats: np.ndarray) -> str:
    found = estimate(nats)
    if found["perplexity"] is None or found["interval"] is None:
        return or_dash(found["perplexity"], ".3f")
    return difference(found["perplexity"], found["interval"], ".3f", none=1)


def _samples(runs: list[Run]) -> list[Sample]:
    """The first prompts side by side; of each run and K the setting whose distinct-2 is nearest to that of
    human text."""
    human = runs[0].report["human"]["diversity"]["distinct_2"]["value"]
    chosen: list[tuple[Run, int]] = []
    for run in runs:
        results = run.report["results"]
        for k in dict.fromkeys(r["num_steps"] for r in results):
            same = [i for i, r in enumerate(results) if r["num_steps"] == k]
            chosen.append(
                (run, min(same, key=lambda i: abs(results[i]["diversity"]["distinct_2"]["value"] - human)))
            )
    out = []
    for n, example in enumerate(runs[0].report["examples"]):
        answers = [("the author", example["human"])]
        for run, i in chosen:
            who = _named(run.label, str(setting_of(run.report["results"][i])))
            answers.append((who, run.report["examples"][n]["texts"][i]))
        out.append(Sample(example["prompt"], answers))
    return out
