"""Does K think? Accuracy against K on running products in S3, every objective at equal CPU time.

    python -m benchmarks.depth --seconds 90 --jobs 2 --out docs/results/raw/depth.json

Position i must answer g_1 * ... * g_i: serial work that one pass over three layers cannot do for long
products. Each arm's learning rate is swept with seed 0 and the best one (accuracy at the largest K) is run
with the other seeds. Trained at 16 positions, also tested at 24. Equal time as in
benchmarks/equal_compute.py.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer

from benchmarks.common import (
    at_sigma_max,
    in_parallel,
    last_metrics,
    provenance,
    read_json,
    train,
    with_earlier_runs,
    write_json,
)
from benchmarks.train_step import Arm, kept_seconds_per_update
from eval.metrics.depth import evaluate_depth
from rdlm.checkpoints.folder import load
from rdlm.data.synthetic import GroupProduct

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPE = {
    "vocab_size": 6, "d_model": 32, "num_heads": 2, "mlp_width": 128,
    "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1,
    "rope_base": 100.0, "adapter_init": "random", "residual_init": "plain", "tie_embeddings": False,
}  # fmt: skip
"""Chosen on `onestep` and truncated BPTT alone, before the sweep: with the defaults of text models (tied
read-out, silent state, scaled projections, slow rotations) looped arms learned far more slowly
(docs/results/main-job.md); the sequences here have 16 positions, not 2048."""
BATCH_SIZE, LENGTH, LONG = 64, 16, 24
KS = (1, 2, 4, 8, 16, 32, 64)
POISSON = {"distribution": "lognormal_poisson", "mean": 8}

ARMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "next_token": ({"name": "next_token"},) * 2,
    "bptt 32/8": ({"name": "bptt"}, {"name": "bptt", "depth": {"distribution": "fixed", "mean": 33}}),
    "bptt 8/4": (
        {"name": "bptt", "depth": {"mean": 8, "grad_steps": 4}},
        {"name": "bptt", "depth": {"distribution": "fixed", "mean": 9, "grad_steps": 4}},
    ),
    "paper": ({"name": "paper"},) * 2,
    "evidence": ({"name": "evidence"},) * 2,
    "onestep": (
        {"name": "onestep", "depth": POISSON},
        {"name": "onestep", "depth": {"distribution": "fixed", "mean": 9}},
    ),
    "single_pass": (
        {"name": "single_pass", "depth": POISSON},
        {"name": "single_pass", "depth": {"distribution": "fixed", "mean": 9}},
    ),
    "single_pass by sequence": (
        {"name": "single_pass", "depth": POISSON, "corruption": {"per": "sequence"}},
        {
            "name": "single_pass",
            "depth": {"distribution": "fixed", "mean": 9},
            "corruption": {"per": "sequence"},
        },
    ),
}
"""Arm -> (objective trained, the same with r fixed at its mean, which is what is timed)."""


def config_of(name: str, seed: int, steps: int, lr: float) -> dict[str, Any]:
    return {
        "name": name.replace(" ", "-").replace("/", "-"), "seed": seed,
        "model": {"family": "huginn", **SHAPE, "max_seq_len": LONG},
        "objective": ARMS[name][0], "recurrence": {"default_steps": 8, "max_steps": max(KS)},
        "data": {"kind": "group_product", "group": "s3", "length": LENGTH}, "batch": {"global_size": BATCH_SIZE},
        "optimizer": {"lr": lr, "betas": [0.9, 0.98], "weight_decay": 0.01},
        "schedule": {"kind": "cosine", "steps": steps, "warmup_steps": min(100, steps // 5)},
        "precision": "fp32", "deepspeed": {"zero_stage": 0}, "checkpoint": {"interval_steps": steps, "keep": 1},
        "evaluation": {"interval_steps": 0}, "log": {"interval_steps": 20, "tensorboard": False},
    }  # fmt: skip


def accuracy(model: Path, length: int, rows: int = 2048) -> dict[str, dict[str, float]]:
    """Held-out share of right answers over all positions and at the last one, at each K."""
    results = evaluate_depth(load(model), GroupProduct("s3", length), KS, rows=rows)
    return {str(r["K"]): {"all": r["accuracy"], "last": r["last"]} for r in results}


def by_length(model: Path) -> dict[str, dict[str, dict[str, float]]]:
    return {"16": accuracy(model, LENGTH), "24": accuracy(model, LONG)}


def run_arm(name: str, seed: int, updates: int, lr: float, root: Path) -> dict[str, Any]:
    folder = root / f"{name.replace(' ', '-').replace('/', '-')}-lr{lr:g}-seed{seed}"
    scored = folder / "accuracy.json"
    if not scored.exists():
        train(folder, config_of(name, seed, updates, lr))
        write_json(scored, by_length(folder / "run" / "model"))
    other, second = at_sigma_max(folder / "run" / "model"), folder / "accuracy-at-sigma-max.json"
    if other is not None and not second.exists():
        write_json(second, by_length(other))
    metrics = last_metrics(folder)
    return {
        "arm": name,
        "seed": seed,
        "lr": lr,
        "updates": updates,
        "cpu_seconds": metrics["cpu_seconds"],
        "accuracy": read_json(scored),
        **({} if other is None else {"accuracy_at_sigma_max": read_json(second)}),
        "git_commit": provenance()["git_commit"],
    }


def best_lr(rows: list[dict[str, Any]], name: str) -> float:
    return max(
        (r for r in rows if r["arm"] == name),
        key=lambda r: max(a["all"] for a in r["accuracy"]["16"].values()),
    )["lr"]


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axes, length in zip(panels, ("16", "24"), strict=True):
        for name in ARMS:
            curves = [
                [r["accuracy"][length][str(k)]["all"] for k in KS]
                for r in rows
                if r["arm"] == name and r["best_lr"]
            ]
            if curves:
                axes.plot(
                    KS,
                    [statistics.mean(values) for values in zip(*curves, strict=True)],
                    marker="o",
                    label=name,
                )
        axes.axhline(1 / 6, color="grey", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="K, core steps", title=f"S3 running product, {length} positions")
        axes.set_xticks(KS, labels=[str(k) for k in KS])
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, mean over seeds and positions")
    panels[1].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a PNG of the same name stands beside it.")],
    seconds: Annotated[float, typer.Option(help="CPU seconds of one core a run.")] = 90.0,
    arms: Annotated[str, typer.Option(help="Arms with commas.")] = ",".join(ARMS),
    lrs: Annotated[
        str, typer.Option(help="Learning rates with commas, swept with the first seed.")
    ] = "0.003,0.005,0.008",
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0,1,2",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 1,
    root: Annotated[Path, typer.Option(help="Where runs are kept; interrupted ones go on.")] = Path(
        "runs/depth"
    ),
) -> None:
    """Train and test every arm."""
    root.mkdir(parents=True, exist_ok=True)

    def timed_arms() -> dict[str, Arm]:
        return {
            name: Arm(cost, SHAPE, BATCH_SIZE, LENGTH, "cpu", torch.float32)
            for name, (_, cost) in ARMS.items()
        }

    cost = kept_seconds_per_update(root / "seconds_per_update.json", timed_arms)
    names, first, *others = arms.split(","), *(int(s) for s in seeds.split(","))

    def call(name: str, seed: int, lr: float) -> partial[dict[str, Any]]:
        return partial(run_arm, name, seed, int(seconds / cost[name]), lr, root)

    rows = in_parallel(jobs, [call(name, first, float(lr)) for lr in lrs.split(",") for name in names])
    best = {name: best_lr(rows, name) for name in names}
    rows += in_parallel(jobs, [call(name, seed, best[name]) for seed in others for name in names])
    for row in rows:
        row["best_lr"] = row["lr"] == best[row["arm"]]
    rows = with_earlier_runs(out, rows)
    write_json(out, {"provenance": provenance(), "seconds": seconds, "shape": SHAPE, "batch_size": BATCH_SIZE,
                     "seconds_per_update": cost, "runs": rows})  # fmt: skip
    plot(rows, out.with_suffix(".png"))
    for row in rows:
        if row["best_lr"]:
            shown = " ".join(f"{k}:{row['accuracy']['16'][str(k)]['all']:.3f}" for k in KS)
            print(
                f"{row['arm']:12} lr {row['lr']:g} seed {row['seed']} {shown} | 24: "
                f"{row['accuracy']['24'][str(KS[-1])]['all']:.3f}"
            )


if __name__ == "__main__":
    typer.run(main)
