"""The sections of a report: a table, curves and what can be said about differences, for each kind of evaluation.

Differences are against the first file. Where both files hold the nats of every window (``rdlm eval nll --per-window``) the bootstrap
is paired; elsewhere the interval of a difference is put together from the two intervals as if they were independent (Zou and Donner
2008, "MOVER"), which is too wide for measurements on the same texts, never too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.bootstrap import interval, resamples
from eval.convergence import draw_convergence, draw_picture
from eval.frontier import draw_frontier
from eval.noise_curve import draw_noise_curve
from eval.plots import draw_depth, draw_nll, k_axis, new_figure, png
from eval.report import Json, Picture, Run, Sample, Section, Table
from eval.wording import WITHIN_NOISE, difference, with_interval

Pair = tuple[float, Sequence[float]]
"""A figure and its interval."""


def _colour(i: int) -> str:
    return f"C{i % 10}"


def mover(a: Pair, b: Pair) -> Pair:
    """a - b with its interval, from those of a and b taken as independent."""
    (x, (x_low, x_high)), (y, (y_low, y_high)) = a, b
    return x - y, [x - y - math.hypot(x - x_low, y_high - y), x - y + math.hypot(x_high - x, y - y_low)]


def sections(runs: Sequence[Run]) -> list[Section]:
    """One for each kind there is, in a fixed order."""
    out = []
    for kind, make in SECTIONS.items():
        chosen = [run for run in runs if run.kind == kind]
        if chosen:
            out.append(make(chosen))
    return out


def _nll(runs: list[Run]) -> Section:
    first, rows = runs[0], []
    for run in runs:
        for r in run.report["results"]:
            against = "" if run is first else _nll_difference(run, first, r["K"])
            bits = [_or_dash(r[name], ".4f") for name in ("bits_per_byte", "bits_per_character")]
            figures = [with_interval(r["nll"], r["nll_interval"], ".4f"), against]
            rows.append([run.label, str(r["K"]), *figures, f"{r['perplexity']:.2f}", *bits, r["estimator"]])
    headers = [
        "run",
        "K",
        "NLL, nats per token [95 %]",
        f"against {first.label}, same K",
        "perplexity",
        "bits/byte",
        "bits/character",
    ]
    figure, (axes,) = new_figure()
    for i, run in enumerate(runs):
        draw_nll(axes, run.report, color=_colour(i), label=run.label)
    k_axis(axes, [r["K"] for run in runs for r in run.report["results"]])
    axes.legend(fontsize=7)
    data = first.report["data"]
    about = (
        f"{first.report['tokens']:,} tokens of {data['source']}, split {data['split']}, in windows of {data['seq_len']}. "
        "Estimators that are mixtures over noise draws are no likelihoods and biased upward."
    )
    return Section("Held-out likelihood", about, [Table([*headers, "estimator"], rows), Picture(png(figure), "NLL against K")])


def _nll_difference(run: Run, first: Run, k: int) -> str:
    mine, other = (next((r for r in each.report["results"] if r["K"] == k), None) for each in (run, first))
    if mine is None or other is None:
        return ""
    if all("window_nll" in each.report for each in (run, first)):
        a, b = (np.array(each.report["window_nll"][str(k)]) for each in (run, first))
        counts = np.array(first.report["window_tokens"])
        draws = resamples(len(counts), 0)
        found = float((a - b).sum() / counts.sum()), interval(draws @ (a - b) / (draws @ counts))
        return difference(*found, "+.4f") + ", paired"
    return difference(*mover((mine["nll"], mine["nll_interval"]), (other["nll"], other["nll_interval"])), "+.4f")


def _depth(runs: list[Run]) -> Section:
    first, rows, whole = runs[0], [], runs[0].report["data"]["whole"]
    unit = first.report["data"]["unit"]
    for run in runs:
        for r in run.report["results"]:
            same = next((o for o in first.report["results"] if (o["length"], o["K"]) == (r["length"], r["K"])), None)
            against = "" if run is first or same is None else difference(*mover(_pair(r, "accuracy"), _pair(same, "accuracy")))
            figures = [with_interval(*_pair(r, name)) for name in ("accuracy", whole)]
            rows.append([run.label, str(r["length"]), str(r["K"]), figures[0], against, figures[1]])
    figure, (left, right) = new_figure(2)
    for i, run in enumerate(runs):
        draw_depth(left, run.report, f"{run.label}, ", color=None if len(runs) == 1 else _colour(i))
    left.axhline(first.report["chance"], color="grey", linestyle=":", label="chance")
    k_axis(left, [r["K"] for run in runs for r in run.report["results"]], "K")
    left.legend(fontsize=7)
    _by_position(right, runs[-1], unit)
    headers = [
        "run",
        unit,
        "K",
        "right [95 %]",
        f"against {first.label}",
        {"last": "last position", "valid": "valid as a whole"}[whole],
    ]
    data = first.report["data"]
    about = f"Task {data['task']}: {data['rows']:,} held-out examples of each length, chance {first.report['chance']:.3f}."
    caption = f"Accuracy against K, and by position for {runs[-1].label}"
    pictures = [Picture(png(figure), caption), *_settling(runs)]
    return Section("Depth", about, [Table(headers, rows), *pictures])


def _by_position(axes: Any, run: Run, unit: str) -> None:
    longest = max(r["length"] for r in run.report["results"])
    for r in run.report["results"]:
        if r["length"] == longest:
            axes.plot(range(1, len(r["by_position"]) + 1), r["by_position"], label=f"K = {r['K']}")
    axes.set_xlabel(f"position that counts ({unit} {longest})")
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _settling(runs: list[Run]) -> list[Picture]:
    known = [(run.label, size, found) for run in runs for size, found in run.report["convergence"].items()]
    if not known:
        return []
    figure, panels = new_figure(2)
    for i, (label, size, found) in enumerate(known):
        draw_convergence(panels, found, f"{label}, {size}", color=_colour(i))
    panels[0].legend(fontsize=7)
    return [Picture(png(figure), "What one more core step changes on the task")]


def _gen_ppl(runs: list[Run]) -> Section:
    first = runs[0]
    names = [teacher["name"] for teacher in first.report["teachers"]]
    rows = [row for run in runs for row in _text_rows(run, names, [*run.report["results"]])]
    rows += _text_rows(Run(first.file, "gen-ppl", "human text", {}), names, [first.report["human"]])
    headers = ["run", "K", "T", "top-p", *(h for n in names for h in (f"perplexity, {n} [95 %]", "/ human"))]
    headers += ["distinct-1", "distinct-2", "distinct-3", "repetition", "entropy (bits)", "words"]
    blocks: list[Table | Picture | Sample] = [Table(headers, rows), _equal_diversity(runs, names)]
    figure, panels = new_figure(len(names), 4.8)
    for axes, name in zip(panels, names, strict=True):
        draw_frontier(axes, [(run.label, run.report) for run in runs], name)
    blocks.append(Picture(png(figure), "Quality against diversity: lines join temperatures, the star is human text"))
    shape = first.report["samples"]["shape"]
    about = (
        f"{first.report['samples']['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, {shape['continuations']} x "
        f"{shape['max_tokens']} tokens each. Perplexity alone rewards repetition: read it beside the diversity."
    )
    return Section("Generative perplexity and diversity", about, [*blocks, *_samples(runs)])


def _text_rows(run: Run, names: list[str], results: list[Json]) -> list[list[str]]:
    rows = []
    for r in results:
        place = [str(r["num_steps"]), f"{r['temperature']:g}", f"{r['top_p']:g}"] if "num_steps" in r else ["", "", ""]
        judged: list[str] = []
        for name in names:
            entry = r["perplexity"][name]
            against = entry.get("against_human")
            ratio = difference(against["ratio"], against["interval"], ".2f", none=1) if against else ""
            judged += [with_interval(entry["value"], entry["interval"], ".1f"), ratio]
        kinds = {"distinct_1": 3, "distinct_2": 3, "distinct_3": 3, "repetition": 3, "entropy_bits": 2, "mean_words": 1}
        rows.append([run.label, *place, *judged, *(f"{r['diversity'][name]['value']:.{n}f}" for name, n in kinds.items())])
    return rows


def _equal_diversity(runs: list[Run], names: list[str]) -> Table:
    rows = [
        [run.label, name, str(p["num_steps"]), f"{p['top_p']:g}", _or_dash(p["perplexity"], ".1f")]
        for run in runs
        for name in names
        for p in run.report["at_human_distinct_2"][name]
    ]
    note = "Perplexity where the curve over temperatures has the distinct-2 of human text; a dash where it does not get there."
    return Table(["run", "teacher", "K", "top-p", "perplexity at equal diversity"], rows, note)


def _samples(runs: list[Run]) -> list[Sample]:
    """The first prompts side by side; of each run and K the setting whose distinct-2 is nearest to that of human text."""
    human = runs[0].report["human"]["diversity"]["distinct_2"]["value"]
    chosen: list[tuple[Run, int]] = []
    for run in runs:
        results = run.report["results"]
        for k in dict.fromkeys(r["num_steps"] for r in results):
            same = [i for i, r in enumerate(results) if r["num_steps"] == k]
            chosen.append((run, min(same, key=lambda i: abs(results[i]["diversity"]["distinct_2"]["value"] - human))))
    out = []
    for n, example in enumerate(runs[0].report["examples"]):
        answers = [("the author", example["human"])]
        for run, i in chosen:
            r = run.report["results"][i]
            who = f"{run.label}, K {r['num_steps']}, T {r['temperature']:g}, top-p {r['top_p']:g}"
            answers.append((who, run.report["examples"][n]["texts"][i]))
        out.append(Sample(example["prompt"], answers))
    return out


def _mauve(runs: list[Run]) -> Section:
    first, rows = runs[0], []
    base = first.report["results"][0]
    for name, what in (("ceiling", "human text after other prompts (ceiling)"), ("floor", "its words shuffled (floor)")):
        rows.append([what, "", "", "", *_mauve_cells(first.report[name]), "", ""])
    for run in runs:
        for r in run.report["results"]:
            ceiling = _mauve_difference(r, first.report["ceiling"])
            against = "" if r is base else _mauve_difference(r, base)
            place = [str(r["num_steps"]), f"{r['temperature']:g}", f"{r['top_p']:g}"]
            rows.append([run.label, *place, *_mauve_cells(r), ceiling, against])
    protocol = first.report["protocol"]
    about = (
        f"Protocol {protocol['name']}: {first.report['references']:,} references, scaling factor {protocol['scaling_factor']:g}, "
        f"features of {first.report['featuriser']['name']}. The deviation is that of {protocol['seeds']} k-means seeds and leaves out "
        "the chance of having drawn other texts."
    )
    headers = ["run", "K", "T", "top-p", "MAUVE", "sd", "texts", "- ceiling", "- first row"]
    return Section("MAUVE", about, [Table(headers, rows)])


def _mauve_cells(entry: Json) -> list[str]:
    return [f"{entry['value']:.4f}", _or_dash(entry["sd"], ".4f"), f"{entry['texts']:,}"]


def _mauve_difference(entry: Json, other: Json) -> str:
    value = entry["value"] - other["value"]
    if entry["sd"] is None or other["sd"] is None:
        return f"{value:+.4f} (noise unknown: one seed)"
    return f"{value:+.4f}" + (WITHIN_NOISE if abs(value) <= 2 * math.hypot(entry["sd"], other["sd"]) else "")


def _noise_curve(runs: list[Run]) -> Section:
    rows = []
    figure, (axes,) = new_figure()
    for i, run in enumerate(runs):
        draw_noise_curve(axes, run.report, f"{run.label}: ", _colour(i))
        for r in run.report["results"]:
            own = ["-", "-"] if r["ce"] is None else [with_interval(*_pair(r, "ce")), difference(*_pair(r, "gap"))]
            rows.append([run.label, f"{r['sigma']:g}", own[0], with_interval(*_pair(r, "reference")), own[1]])
    axes.legend(fontsize=7)
    edges = [
        [run.label, name, ", ".join(f"{edge:.4g}" for edge in found)]
        for run in runs
        for name, found in run.report["equal_information_edges"].items()
    ]
    about = (
        f"{runs[0].report['tokens']:,} tokens. NOT a likelihood: z is made from the token that is asked for. The exact denoiser is "
        "p(x | context) exp(<y_x, z> / sigma^2) with the model's own prediction at z = 0 as p(x | context)."
    )
    table = Table(["run", "sigma", "denoiser [95 %]", "exact for its own prior", "difference"], rows)
    blocks: list[Table | Picture | Sample] = [
        table,
        Picture(png(figure), "Cross-entropy against sigma"),
        Table(["run", "curve", "edges of equal information"], edges),
    ]
    return Section("Cross-entropy by noise level", about, blocks)


def _convergence(runs: list[Run]) -> Section:
    figure, panels = new_figure(3)
    rows = []
    for i, run in enumerate(runs):
        draw_convergence(panels[:2], run.report, run.label, color=_colour(i))
        last = run.report["results"][-1]["K"]
        for r in run.report["results"]:
            if r["K"] == last or r["K"] & (r["K"] - 1) == 0:
                rows.append([run.label, str(r["K"]), *(with_interval(*_pair(r, n), ".4f") for n in ("distance", "changed"))])
    panels[0].legend(fontsize=7)
    draw_picture(panels[2], runs[-1].report)
    panels[2].set_title(runs[-1].label, fontsize=9)
    headers = ["run", "K", "relative change of the latent state", "share of top tokens that change"]
    about = f"What core step K changes, over {runs[0].report['tokens']:,} held-out tokens."
    return Section("Convergence", about, [Table(headers, rows), Picture(png(figure), "What one more core step changes")])


def _lm_eval(runs: list[Run]) -> Section:
    first, rows = runs[0], []
    for run in runs:
        for task, metrics in run.report["results"].items():
            for name, value in metrics.items():
                if "_stderr" in name or "," not in name or not isinstance(value, int | float):
                    continue
                rows.append([run.label, task, name.partition(",")[0], *_lm_eval_cells(run, first, task, name)])
    about = (
        "lm-evaluation-harness; the interval is 1.96 standard errors. Estimators: "
        + "; ".join(f"{run.label}: {run.report['config'].get('estimator', 'that of the server')}" for run in runs)
        + ". Documents without a unique best choice count for the first one: "
        + ", ".join(f"{run.label} {run.report['config'].get('tied_documents', 'unknown')}" for run in runs)
        + "."
    )
    return Section("lm-eval", about, [Table(["run", "task", "metric", "value [95 %]", f"against {first.label}"], rows)])


def _lm_eval_cells(run: Run, first: Run, task: str, name: str) -> list[str]:
    def pair(each: Run) -> Pair | None:
        metrics = each.report["results"].get(task, {})
        error = metrics.get(name.replace(",", "_stderr,"))
        if name not in metrics or not isinstance(error, int | float):
            return None
        return metrics[name], [metrics[name] - 1.96 * error, metrics[name] + 1.96 * error]

    mine, other = pair(run), pair(first)
    shown = f"{run.report['results'][task][name]:.4f}" if mine is None else with_interval(*mine, ".4f")
    return [shown, "" if run is first or mine is None or other is None else difference(*mover(mine, other), "+.4f")]


def _pair(row: Json, name: str) -> Pair:
    return row[name], row[f"{name}_interval"]


def _or_dash(value: float | None, digits: str) -> str:
    return "-" if value is None else format(value, digits)


SECTIONS: dict[str, Callable[[list[Run]], Section]] = {
    "nll": _nll,
    "gen-ppl": _gen_ppl,
    "mauve": _mauve,
    "lm-eval": _lm_eval,
    "depth": _depth,
    "convergence": _convergence,
    "ce-by-sigma": _noise_curve,
}
