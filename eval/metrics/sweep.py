"""Runs of a sweep: held-out curves and quality against K."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from eval.metric import Json, Measurement, Picture, Run, Section, Table, print_table
from eval.options import Out, Plot
from eval.plots import colour, k_axis, new_figure, png
from eval.provenance import provenance, write_bytes
from eval.stats import FEWEST_UNITS, interval, resamples, with_interval
from rdlm.data.manifest import MANIFEST, file_sha256
from rdlm.errors import UserError

BEFORE = "before training"
ROW = ("K", "nll", "nll_interval", "estimator")
"""What is kept of a measurement at a K."""


class Sweep(Measurement):
    """The runs of `rdlm sweep`: what each cost, its held-out NLL in training, and its NLL against K.

    Bars and bands go from the lowest to the highest seed: with few seeds that is what is known. Differences are
    between runs of the same seed; where the evaluations keep the nats of every window (``--per-window``) they have
    95 % bootstrap intervals over windows, paired.
    """

    name = "sweep"
    example = "rdlm eval sweep --folder runs/sweeps/debug --out results.json"

    @dataclass(frozen=True, kw_only=True)
    class Options:
        folder: Annotated[Path, typer.Option(help="Output folder of `rdlm sweep`.")]
        out: Out = None
        plot: Plot = None

    def measure(self, options: Options) -> Json:
        plan = _json(options.folder / "plan.json")
        if plan is None:
            problem, remedy = "has no plan.json", "give the output folder of `rdlm sweep`"
            raise UserError("--folder", str(options.folder), problem, remedy)
        found: list[_Measured] = []

        def nll(arm: str, seed: int | None, place: str, start: str | None = None) -> dict[str, list[Json]]:
            rows = {}
            for name, report in _nll(options.folder / place, plan["evaluations"]).items():
                rows[name] = [{key: row[key] for key in ROW} for row in report["results"]]
                found.append(_Measured.of(arm, seed, start or place, name, report))
            return rows

        starts = []
        for start in plan["starts"]:
            arm = f"{BEFORE}, {_named(start['source'])}"
            starts.append({"arm": arm, "nll": nll(arm, None, start["folder"])})
        runs = []
        for run in plan["runs"]:
            folder = options.folder / run["folder"]
            metrics = _lines(folder / "run" / "metrics.jsonl")
            last = metrics[-1] if metrics else {}
            runs.append({
                **run, "finished": last.get("step", 0) >= run["updates"], "seconds": last.get("seconds"),
                "cpu_seconds": last.get("cpu_seconds"), "loss": last.get("loss"),
                "held_out": _lines(folder / "run" / "held_out.jsonl"),
                "nll": nll(run["arm"], run["seed"], run["folder"], run.get("start")),
            })  # fmt: skip
        differences = {
            name: _differences([each for each in found if each.evaluation == name])
            for name in _evaluations(starts, runs)
        }
        manifest = Path(plan["data"]) / MANIFEST
        digest = file_sha256(manifest) if manifest.is_file() else None
        return {
            "evaluation": self.name, "provenance": provenance(), "checkpoint": {"name": plan["name"]},
            "data": {"task": "sweep", "split": "valid", "manifest_sha256": digest}, "budget": plan["budget"],
            "runs": runs, "starts": starts, "differences": differences,
        }  # fmt: skip

    def show(self, report: Json, console: Console) -> None:
        for table in _tables(report):
            print_table(console, f"{report['checkpoint']['name']}: {table.note}", table.headers, table.rows)

    def plot(self, report: Json, file: Path) -> None:
        """NLL against K of the first evaluation; held-out NLL in training where there is none."""
        pictures = _pictures(report)
        if not pictures:
            problem = "no run of the sweep has a measurement yet"
            raise UserError("--plot", str(file), problem, "leave it out until a run has finished")
        write_bytes(file, pictures[0].content)

    def section(self, runs: list[Run]) -> Section:
        """The first sweep; several are shown one after the other."""
        blocks: list[Table | Picture] = []
        for run in runs:
            blocks += [*_tables(run.report), *_pictures(run.report)]
        [(unit, amount)] = runs[0].report["budget"].items()
        about = (
            f"Every run has a budget of {amount:,g} {unit}. Bars and bands: lowest to highest seed. "
            "Differences: mean over the seeds that both arms have; in brackets a 95 % bootstrap interval over "
            "windows, paired, where these are known, else the lowest and highest seed."
        )
        return Section("Sweep", about, blocks)


def _tables(report: Json) -> list[Table]:
    headers = ["arm", "seeds", "finished", "updates", "tokens", "FLOPs", "seconds", "last loss"]
    rows = []
    for arm, runs in _by_arm(report).items():
        done = [run for run in runs if run["finished"]]
        seconds = ", ".join("-" if run["seconds"] is None else f"{run['seconds']:.0f}" for run in runs)
        loss = ", ".join("-" if run["loss"] is None else f"{run['loss']:.4f}" for run in runs)
        first = runs[0]
        rows.append([arm, ", ".join(str(run["seed"]) for run in runs), f"{len(done)} of {len(runs)}",
                f"{first['updates']:,}",
                     f"{first['tokens']:,}", f"{first['flops']:.3g}", seconds, loss])  # fmt: skip
    found = [Table(headers, rows, "runs")]
    for name in _evaluations(report["starts"], report["runs"]):
        curves = k_curves(report, name)
        ks = sorted({k for curve in curves.values() for k in curve})
        rows = [
            [arm, *(_range(list(curve[k].values())) if k in curve else "" for k in ks)]
            for arm, curve in curves.items()
        ]
        at = [f"K = {k}" for k in ks]
        found.append(Table(["arm", *at], rows, f"NLL, nats per token: {name}"))
        for kind, what in DIFFERENCES.items():
            cells: dict[str, dict[int, str]] = {}
            for each in report.get("differences", {}).get(name, []):
                if each["kind"] == kind:
                    shown = with_interval(each["value"], each["interval"], "+.4f")
                    cells.setdefault(each["arm"], {})[each["K"]] = shown
            if cells:
                rows = [[arm, *(row.get(k, "") for k in ks)] for arm, row in cells.items()]
                found.append(Table(["arm", *at], rows, f"difference of NLL {what}: {name}"))
    return found


def _pictures(report: Json) -> list[Picture]:
    found = []
    for name in _evaluations(report["starts"], report["runs"]):
        figure, (axes,) = new_figure()
        curves = k_curves(report, name)
        for i, (arm, curve) in enumerate(curves.items()):
            ks = sorted(curve)
            values = [list(curve[k].values()) for k in ks]
            means = [sum(v) / len(v) for v in values]
            bars = [
                [m - min(v) for m, v in zip(means, values, strict=True)],
                [max(v) - m for m, v in zip(means, values, strict=True)],
            ]
            style = ":" if arm.startswith(BEFORE) else "-"
            axes.errorbar(
                ks, means, yerr=bars, fmt=f"o{style}", capsize=3, markersize=4, color=colour(i), label=arm
            )
        k_axis(axes, [k for curve in curves.values() for k in curve])
        axes.set_ylabel("NLL, nats per token")
        axes.legend(fontsize=7)
        found.append(Picture(png(figure), f"NLL against K: {name}"))
    trained = [(arm, runs) for arm, runs in _by_arm(report).items() if any(run["held_out"] for run in runs)]
    if trained:
        figure, panels = new_figure(2)
        for axes, x in zip(panels, ("tokens", "flops"), strict=True):
            for i, (arm, runs) in enumerate(trained):
                _draw_training(axes, arm, runs, x, colour(i))
            axes.set(xlabel={"tokens": "tokens seen", "flops": "FLOPs, forward and backward"}[x])
            axes.set_ylabel("held-out NLL at the largest K, nats per token")
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        found.append(Picture(png(figure), "Held-out NLL in training"))
    return found


def _draw_training(axes: Any, arm: str, runs: Sequence[Json], x: str, color: str) -> None:
    by_step: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for record in run["held_out"]:
            ks = [key for key in record if key.startswith("K=") and record[key] is not None]
            if ks:
                by_step[record["step"]].append(record[max(ks, key=lambda key: int(key[2:]))])
    steps = sorted(by_step)
    per_update = runs[0][x] / runs[0]["updates"]
    at, values = [step * per_update for step in steps], [by_step[step] for step in steps]
    axes.plot(at, [sum(v) / len(v) for v in values], color=color, marker=".", label=arm)
    axes.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2)


def k_curves(report: Json, name: str) -> dict[str, dict[int, dict[Any, float]]]:
    """Curves of one evaluation: arm -> K -> seed -> NLL, only normalised likelihoods and bounds. What the
    runs started from comes first, with seed None."""
    found: dict[str, dict[int, dict[Any, float]]] = {}
    for run in [*report["starts"], *report["runs"]]:
        for row in run["nll"].get(name, []):
            if _is_likelihood(row):
                found.setdefault(run["arm"], {}).setdefault(row["K"], {})[run.get("seed")] = row["nll"]
    return found


@dataclass(frozen=True)
class _Measured:
    """One evaluation of one model: NLL at each K, and the nats and tokens of every window where it kept them."""

    arm: str
    seed: int | None
    """None: what runs start from."""
    start: str
    """Names what it started from, where it did."""
    evaluation: str
    data: Any
    nll: dict[int, float]
    nats: dict[int, np.ndarray]
    counts: np.ndarray

    @classmethod
    def of(cls, arm: str, seed: int | None, start: str, evaluation: str, report: Json) -> _Measured:
        nll = {row["K"]: row["nll"] for row in report["results"] if _is_likelihood(row)}
        kept = report.get("window_nll", {})
        nats = {k: np.array(kept[str(k)]) for k in nll if str(k) in kept}
        counts = np.array(report.get("window_tokens", ()))
        return cls(arm, seed, start, evaluation, report.get("data"), nll, nats, counts)


DIFFERENCES = {
    "gain": "from the smallest K",
    "change": "from before training at the same K",
    "against": "from the first arm at the same K",
}
_Pair = tuple[_Measured, int, _Measured, int]
"""A measurement at a K, and another one at a K, which is subtracted."""


def _differences(found: Sequence[_Measured]) -> list[Json]:
    """Differences of NLL in one evaluation that DIFFERENCES names, of each arm at each K."""
    arms: dict[str, list[_Measured]] = {}
    for each in found:
        if each.nll:
            arms.setdefault(each.arm, []).append(each)
    first = next((of for of in arms.values() if of[0].seed is not None), [])
    starts = [each for each in found if each.seed is None]
    made = []
    for arm, of in arms.items():
        low, *more = sorted(of[0].nll)
        for k in (low, *more):
            pairs: dict[str, list[_Pair]] = {
                "gain": [(one, k, one, low) for one in of if k in more],
                "change": [
                    (one, k, other, k) for one in of if one.seed is not None
                    for other in starts if one.start == other.start
                ],
                "against": [
                    (one, k, other, k) for one in of if of is not first
                    for other in first if one.seed in (other.seed, None)
                ],
            }  # fmt: skip
            for kind, every in pairs.items():
                if same := [
                    p for p in every if p[0].data == p[2].data and k in p[0].nll and p[3] in p[2].nll
                ]:
                    made.append({"kind": kind, "arm": arm, "K": k, **_paired(same)})
    return made


def _paired(pairs: Sequence[_Pair]) -> Json:
    """Mean difference, and its bootstrap interval over windows; where these are not known, the lowest and the
    highest of several."""
    values = [one.nll[k] - other.nll[low] for one, k, other, low in pairs]
    value, counts = sum(values) / len(values), pairs[0][0].counts
    windows = all(np.array_equal(each.counts, counts) for one, _, other, _ in pairs for each in (one, other))
    if not windows or len(counts) < FEWEST_UNITS:
        return {"value": value, "interval": [min(values), max(values)] if len(values) > 1 else None}
    mean = sum(one.nats[k] - other.nats[low] for one, k, other, low in pairs) / len(pairs)
    draws = resamples(len(counts), 0)
    return {"value": value, "interval": interval(draws @ mean / (draws @ counts))}


def _range(values: Sequence[float], digits: str = ".4f") -> str:
    mean = sum(values) / len(values)
    return format(mean, digits) + (
        "" if len(values) == 1 else f" [{min(values):{digits}}, {max(values):{digits}}]"
    )


def _by_arm(report: Json) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for run in report["runs"]:
        found.setdefault(run["arm"], []).append(run)
    return found


def _is_likelihood(row: Json) -> bool:
    """Whether it is one, or a bound on it."""
    return not row["estimator"].startswith("mixture")


def _evaluations(starts: Sequence[Json], runs: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(name for run in [*runs, *starts] for name in run["nll"]))


def _named(source: str) -> str:
    """A checkpoint as a reader tells it from others: the model of a run by the run."""
    parts = [part for part in Path(source).parts if part not in ("model", "run")]
    return parts[-1] if parts else source


def _nll(folder: Path, evaluations: dict[str, str]) -> dict[str, Json]:
    """Name of an evaluation -> what `rdlm eval nll` wrote. evaluations: part of a file's name -> name."""
    found = {}
    for file in sorted(folder.glob("eval-*.json")):
        report, name = _json(file), evaluations.get(file.stem.removeprefix("eval-"))
        if name is not None and isinstance(report, dict) and report.get("evaluation") == "nll":
            found[name] = report
    return found


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _lines(file: Path) -> list[Json]:
    """Records of a JSONL file; a line that was cut short is passed over."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
