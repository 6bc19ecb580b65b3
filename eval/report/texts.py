"""The sections of a report that judge generated texts: perplexity under teachers at equal diversity, and MAUVE."""

from __future__ import annotations

from typing import Any

import numpy as np

from eval.plots import Row, against_k, new_figure, png
from eval.report.report import Json, Picture, Run, Sample, Section, Table
from eval.stats import mover
from eval.texts.frontier import draw_frontier, estimate, nats_at_equal_diversity
from eval.texts.sweep import CELLS, setting_of
from eval.wording import difference, or_dash, with_interval


def gen_ppl(runs: list[Run]) -> Section:
    """Every setting, the frontier, and the runs at equal diversity."""
    first = runs[0]
    names = [teacher["name"] for teacher in first.report["teachers"]]
    rows = [row for run in runs for row in _text_rows(run, names, [*run.report["results"]])]
    rows += _text_rows(Run(first.file, "gen-ppl", "human text", {}), names, [first.report["human"]])
    headers = ["run", *CELLS, *(h for n in names for h in (f"perplexity, {n} [95 %]", "/ human"))]
    headers += ["distinct-1", "distinct-2", "distinct-3", "repetition", "entropy (bits)", "words"]
    blocks: list[Table | Picture | Sample] = [Table(headers, rows)]
    figure, panels = new_figure(len(names), 4.8)
    for axes, name in zip(panels, names, strict=True):
        draw_frontier(axes, [(run.label, run.report) for run in runs], name)
    blocks.append(
        Picture(png(figure), "Quality against diversity: lines join temperatures, the star is human text")
    )
    blocks += [block for name in names for block in _equal_diversity(runs, name)]
    shape = first.report["samples"]["shape"]
    about = (
        f"{first.report['samples']['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, {shape['continuations']} x "
        f"{shape['max_tokens']} tokens each. Perplexity alone rewards repetition: read it beside the diversity."
    )
    return Section("Generative perplexity and diversity", about, [*blocks, *_samples(runs)])


def _text_rows(run: Run, names: list[str], results: list[Json]) -> list[list[str]]:
    rows = []
    for r in results:
        judged: list[str] = []
        for name in names:
            entry = r["perplexity"][name]
            against = entry.get("against_human")
            ratio = difference(against["ratio"], against["interval"], ".2f", none=1) if against else ""
            judged += [with_interval(entry["value"], entry["interval"], ".1f"), ratio]
        kinds = {
            "distinct_1": 3,
            "distinct_2": 3,
            "distinct_3": 3,
            "repetition": 3,
            "entropy_bits": 2,
            "mean_words": 1,
        }
        rows.append(
            [
                run.label,
                *_place(r),
                *judged,
                *(f"{r['diversity'][name]['value']:.{n}f}" for name, n in kinds.items()),
            ]
        )
    return rows


def _place(row: Json) -> list[str]:
    return setting_of(row).cells if "num_steps" in row else [""] * len(CELLS)


def _equal_diversity(runs: list[Run], teacher: str) -> list[Table | Picture]:
    """Perplexity at the distinct-2 of human text; ratios are paired by blocks of prompts, which all runs share."""
    first = runs[0]
    nats = {run.label: nats_at_equal_diversity(run.report, teacher) for run in runs}
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
        f"Perplexity under {teacher} where the curve over temperatures has the distinct-2 of human text; a dash where it does not get "
        f"there. Intervals resample blocks of {size} prompts, paired in the ratios; few blocks make them too narrow."
    )
    against = "/ " + _named(f"{first.label} K = {base_k}", base_cut)
    headers = ["run", "K", "cut", "perplexity [95 %]", against, "/ own smallest K"]
    if not curves:
        return [Table(headers, rows, note)]
    figure = against_k(curves, f"perplexity under {teacher}")
    return [
        Table(headers, rows, note),
        Picture(figure, f"Perplexity under {teacher} at equal diversity against K"),
    ]


def _named(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _ratio(nats: np.ndarray) -> str:
    found = estimate(nats)
    if found["perplexity"] is None or found["interval"] is None:
        return or_dash(found["perplexity"], ".3f")
    return difference(found["perplexity"], found["interval"], ".3f", none=1)


def _samples(runs: list[Run]) -> list[Sample]:
    """The first prompts side by side; of each run and K the setting whose distinct-2 is nearest to that of human text."""
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


def mauve(runs: list[Run]) -> Section:
    """Every setting between ceiling and floor, and against K."""
    first, rows, curves = runs[0], [], dict[str, list[Row]]()
    base = first.report["results"][0]
    for name, what in (
        ("ceiling", "human text after other prompts (ceiling)"),
        ("floor", "its words shuffled (floor)"),
    ):
        rows.append([what, "", "", "", *_score(first.report[name]), "", "", ""])
    for run in runs:
        for r in run.report["results"]:
            others = (first.report["ceiling"], base, run.report["results"][0])
            compared = ["" if other is r else _difference(r, other) for other in others]
            rows.append([run.label, *_place(r), *_score(r), *compared])
            name = _named(run.label, f"T {r['temperature']:g}", setting_of(r).rest)
            curves.setdefault(name, []).append(
                {"K": r["num_steps"], "value": r["value"], "value_interval": r["interval"]}
            )
    protocol = first.report["protocol"]
    about = (
        f"Protocol {protocol['name']}: {first.report['references']:,} references, scaling factor {protocol['scaling_factor']:g}, "
        f"features of {first.report['featuriser']['name']}. Intervals cover the drawing of texts and of {protocol['seeds']} k-means seeds."
    )
    headers = ["run", *CELLS, "MAUVE [95 %]", "texts", "- ceiling", "- first row", "- own first row"]
    lines = {name: tuple(first.report[name]["interval"]) for name in ("ceiling", "floor")}
    return Section(
        "MAUVE", about, [Table(headers, rows), Picture(against_k(curves, "MAUVE", lines), "MAUVE against K")]
    )


def _score(entry: Json) -> list[str]:
    return [with_interval(entry["value"], entry["interval"]), f"{entry['texts']:,}"]


def _difference(entry: Json, other: Json) -> str:
    pairs: Any = ((each["value"], each["interval"]) for each in (entry, other))
    return difference(*mover(*pairs))
