"""The sections of a report: a table, curves and what can be said about differences, for each kind of evaluation.

Differences are against the first file. Where both files hold the nats of every window (``rdlm eval nll --per-window``) the bootstrap
is paired; elsewhere the interval of a difference is put together from the two intervals as if they were independent
(eval/stats.py), which is too wide for measurements on the same texts, never too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eval.convergence import draw_convergence, draw_picture
from eval.noise_curve import draw_noise_curve
from eval.plots import Row, against_k, colour, draw_depth, draw_nll, k_axis, new_figure, png
from eval.report.images import accuracy, fid
from eval.report.report import Json, Picture, Run, Sample, Section, Table
from eval.report.texts import gen_ppl, mauve
from eval.stats import Pair, interval, mover, resamples
from eval.wording import difference, or_dash, with_interval


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
            bits = [or_dash(r[name], ".4f") for name in ("bits_per_byte", "bits_per_character")]
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
        draw_nll(axes, run.report, color=colour(i), label=run.label)
    k_axis(axes, [r["K"] for run in runs for r in run.report["results"]])
    axes.legend(fontsize=7)
    data = first.report["data"]
    about = (
        f"{first.report['tokens']:,} tokens of {data['source']}, split {data['split']}, in windows of {data['seq_len']}. "
        "Estimators that are mixtures over noise draws are no likelihoods and biased upward."
    )
    return Section(
        "Held-out likelihood",
        about,
        [Table([*headers, "estimator"], rows), Picture(png(figure), "NLL against K")],
    )


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
    return difference(
        *mover((mine["nll"], mine["nll_interval"]), (other["nll"], other["nll_interval"])), "+.4f"
    )


def _depth(runs: list[Run]) -> Section:
    first, rows, whole = runs[0], [], runs[0].report["data"]["whole"]
    unit = first.report["data"]["unit"]
    for run in runs:
        order = run.report.get("order")  # of masked models
        name = run.label if order is None else f"{run.label}, {order} order"
        for r in run.report["results"]:
            same = next(
                (o for o in first.report["results"] if (o["length"], o["K"]) == (r["length"], r["K"])), None
            )
            against = (
                ""
                if run is first or same is None
                else difference(*mover(_pair(r, "accuracy"), _pair(same, "accuracy")))
            )
            figures = [with_interval(*_pair(r, name)) for name in ("accuracy", whole)]
            rows.append([name, str(r["length"]), str(r["K"]), figures[0], against, figures[1]])
    figure, (left, right) = new_figure(2)
    for i, run in enumerate(runs):
        draw_depth(left, run.report, f"{run.label}, ", color=None if len(runs) == 1 else colour(i))
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
        draw_convergence(panels, found, f"{label}, {size}", color=colour(i))
    panels[0].legend(fontsize=7)
    return [Picture(png(figure), "What one more core step changes on the task")]


def _noise_curve(runs: list[Run]) -> Section:
    rows = []
    figure, (axes,) = new_figure()
    for i, run in enumerate(runs):
        draw_noise_curve(axes, run.report, f"{run.label}: ", colour(i))
        for r in run.report["results"]:
            own = (
                ["-", "-"]
                if r["ce"] is None
                else [with_interval(*_pair(r, "ce")), difference(*_pair(r, "gap"))]
            )
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
        draw_convergence(panels[:2], run.report, run.label, color=colour(i))
        last = run.report["results"][-1]["K"]
        for r in run.report["results"]:
            if r["K"] == last or r["K"] & (r["K"] - 1) == 0:
                rows.append(
                    [
                        run.label,
                        str(r["K"]),
                        *(with_interval(*_pair(r, n), ".4f") for n in ("distance", "changed")),
                    ]
                )
    panels[0].legend(fontsize=7)
    draw_picture(panels[2], runs[-1].report)
    panels[2].set_title(runs[-1].label, fontsize=9)
    headers = ["run", "K", "relative change of the latent state", "share of top tokens that change"]
    about = f"What core step K changes, over {runs[0].report['tokens']:,} held-out tokens."
    return Section(
        "Convergence", about, [Table(headers, rows), Picture(png(figure), "What one more core step changes")]
    )


def _lm_eval(runs: list[Run]) -> Section:
    first, rows = runs[0], []
    for run in runs:
        for task, metrics in run.report["results"].items():
            for name, value in metrics.items():
                if "_stderr" in name or "," not in name or not isinstance(value, int | float):
                    continue
                rows.append(
                    [run.label, task, name.partition(",")[0], *_lm_eval_cells(run, first, task, name)]
                )
    about = (
        "lm-evaluation-harness; the interval is 1.96 standard errors. Estimators: "
        + "; ".join(
            f"{run.label}: {run.report['config'].get('estimator', 'that of the server')}" for run in runs
        )
        + ". Documents without a unique best choice count for the first one: "
        + ", ".join(f"{run.label} {run.report['config'].get('tied_documents', 'unknown')}" for run in runs)
        + "."
    )
    table = Table(["run", "task", "metric", "value [95 %]", f"against {first.label}"], rows)
    return Section("lm-eval", about, [table, *_lm_eval_against_k(runs)])


def _lm_eval_against_k(runs: list[Run]) -> list[Picture]:
    """The groups of tasks (or, without groups, the tasks) against K, where some checkpoint was run at more than one."""
    curves: dict[tuple[str, str, str], list[Row]] = {}
    for run in runs:
        config, groups = run.report["config"], run.report.get("groups") or run.report["results"]
        for task, metrics in groups.items():
            for name in metrics:
                found = _lm_eval_pair(run, task, name)
                if found is not None and config.get("num_steps") is not None:
                    row = {"K": config["num_steps"], "value": found[0], "value_interval": found[1]}
                    key = (str(config.get("checkpoint")), task, name.partition(",")[0])
                    curves.setdefault(key, []).append(row)
    if not any(len(rows) > 1 for rows in curves.values()):
        return []
    named = {" ".join(key): sorted(rows, key=lambda r: r["K"]) for key, rows in curves.items()}
    return [Picture(against_k(named, "score"), "Scores against K")]


def _lm_eval_cells(run: Run, first: Run, task: str, name: str) -> list[str]:
    mine, other = (_lm_eval_pair(each, task, name) for each in (run, first))
    shown = f"{run.report['results'][task][name]:.4f}" if mine is None else with_interval(*mine, ".4f")
    return [
        shown,
        "" if run is first or mine is None or other is None else difference(*mover(mine, other), "+.4f"),
    ]


def _lm_eval_pair(run: Run, task: str, name: str) -> Pair | None:
    """A score and its interval; None where lm-eval gives no standard error."""
    metrics = run.report["results"].get(task, {})
    error = metrics.get(name.replace(",", "_stderr,"))
    if name not in metrics or "_stderr" in name or not isinstance(error, int | float):
        return None
    return metrics[name], [metrics[name] - 1.96 * error, metrics[name] + 1.96 * error]


def _pair(row: Json, name: str) -> Pair:
    return row[name], row[f"{name}_interval"]


SECTIONS: dict[str, Callable[[list[Run]], Section]] = {
    "nll": _nll,
    "gen-ppl": gen_ppl,
    "mauve": mauve,
    "lm-eval": _lm_eval,
    "depth": _depth,
    "convergence": _convergence,
    "ce-by-sigma": _noise_curve,
    "accuracy": accuracy,
    "fid": fid,
}
