"""Runs of a sweep: held-out curves and quality against K."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eval.metric import Json, Measurement, Picture, Run, Section, Table, print_table
from eval.options import Out, Plot
from eval.plots import colour, k_axis, new_figure, png
from eval.provenance import provenance, write_bytes
from rdlm.data.manifest import MANIFEST, file_sha256
from rdlm.errors import UserError

BEFORE = "before training"


class Sweep(Measurement):
    """The runs of `rdlm sweep`: what each cost, its held-out NLL in training, and its NLL against K.

    Bars and bands go from the lowest to the highest seed: with few seeds that is what is known. Differences are
    between runs of the same seed.
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
        runs = []
        for run in plan["runs"]:
            folder = options.folder / run["folder"]
            metrics = _lines(folder / "run" / "metrics.jsonl")
            last = metrics[-1] if metrics else {}
            runs.append({
                **run, "finished": last.get("step", 0) >= run["updates"], "seconds": last.get("seconds"),
                "cpu_seconds": last.get("cpu_seconds"), "loss": last.get("loss"),
                "held_out": _lines(folder / "run" / "held_out.jsonl"), "nll": _nll(folder, plan["evaluations"]),
            })  # fmt: skip
        starts = [
            {"arm": f"{BEFORE}, {Path(start['source']).name}", "nll": _nll(options.folder / start["folder"],
                    plan["evaluations"])}
            for start in plan["starts"]
        ]  # fmt: skip
        manifest = Path(plan["data"]) / MANIFEST
        digest = file_sha256(manifest) if manifest.is_file() else None
        return {
            "evaluation": self.name, "provenance": provenance(), "checkpoint": {"name": plan["name"]},
            "data": {"task": "sweep", "split": "valid", "manifest_sha256": digest}, "budget": plan["budget"],
            "runs": runs, "starts": starts,
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
        """Of the first sweep; several are shown one after the other."""
        blocks: list[Table | Picture] = []
        for run in runs:
            blocks += [*_tables(run.report), *_pictures(run.report)]
        [(unit, amount)] = runs[0].report["budget"].items()
        about = (
            f"Every run has a budget of {amount:,g} {unit}. Bars and bands: lowest to highest seed. "
            "Differences: mean over the seeds that both arms have, and the lowest and highest of them."
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
    for name in _evaluations(report):
        curves = k_curves(report, name)
        ks = sorted({k for curve in curves.values() for k in curve})
        baseline = next(arm for arm in curves if not arm.startswith(BEFORE)) if curves else ""
        rows = []
        for arm, curve in curves.items():
            cells = [_range(list(curve[k].values())) if k in curve else "" for k in ks]
            base = curves.get(baseline) or {}
            against = "" if arm == baseline else _difference(curve, base)
            rows.append([arm, *cells, against])
        headers = ["arm", *(f"K = {k}" for k in ks), f"against {baseline}, largest common K"]
        found.append(Table(headers, rows, f"NLL, nats per token: {name}"))
    return found


def _pictures(report: Json) -> list[Picture]:
    found = []
    for name in _evaluations(report):
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
    """Of one evaluation: arm -> K -> seed -> NLL, only normalised likelihoods and bounds. What the runs started from
    comes first, with seed None."""
    found: dict[str, dict[int, dict[Any, float]]] = {}
    for run in [*report["starts"], *report["runs"]]:
        for row in run["nll"].get(name, []):
            if not row["estimator"].startswith("mixture"):
                found.setdefault(run["arm"], {}).setdefault(row["K"], {})[run.get("seed")] = row["nll"]
    return found


def _difference(curve: dict[int, dict[Any, float]], base: dict[int, dict[Any, float]]) -> str:
    common = sorted(set(curve) & set(base))
    if not common:
        return ""
    k = common[-1]
    pairs = [value - base[k][seed] for seed, value in curve[k].items() if seed in base[k]]
    return f"{_range(pairs, '+.4f')} (K = {k})" if pairs else ""


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


def _evaluations(report: Json) -> list[str]:
    return list(dict.fromkeys(name for run in [*report["runs"], *report["starts"]] for name in run["nll"]))


def _nll(folder: Path, evaluations: dict[str, str]) -> dict[str, list[Json]]:
    """Name of an evaluation -> rows of `rdlm eval nll`. evaluations: part of a file's name -> name."""
    found = {}
    for file in sorted(folder.glob("eval-*.json")):
        report, name = _json(file), evaluations.get(file.stem.removeprefix("eval-"))
        if name is not None and isinstance(report, dict) and report.get("evaluation") == "nll":
            keys = ("K", "nll", "nll_interval", "estimator")
            found[name] = [{key: row[key] for key in keys} for row in report["results"]]
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
