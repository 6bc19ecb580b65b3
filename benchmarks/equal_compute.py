"""Held-out NLL of every objective at equal CPU time, against K.

    python -m benchmarks.equal_compute --data data/books-4096 --minutes 15 --jobs 2 --out docs/results/raw/language.json

Equal time means: seconds per update of all arms are measured interleaved in one process
(benchmarks/train_step.py), and every arm gets as many updates as fit into ``--minutes`` of one core at that
rate. So a machine that is slower for a while slows a run down but does not take updates from it; the CPU
seconds a run really took stand in the result. Interrupted runs go on when started again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from benchmarks.common import (
    at_sigma_max,
    check_same_corpus,
    in_parallel,
    last_metrics,
    provenance,
    read_json,
    run_rdlm,
    train,
    with_earlier_runs,
    write_json,
)
from benchmarks.train_step import ARMS as ARM_COSTS
from benchmarks.train_step import Arm, kept_seconds_per_update
from train.config_file import native_precision

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPE = {"vocab_size": 4096, "d_model": 128, "num_heads": 4, "mlp_width": 448}
BATCH_SIZE, SEQ_LEN = 8, 128
STEPS = "1,2,4,8,16,32"

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "next_token": ("next_token", {"name": "next_token"}),
    "bptt 32/8": ("bptt 32/8", {"name": "bptt"}),
    "bptt 8/4": ("bptt 8/4", {"name": "bptt", "depth": {"mean": 8, "grad_steps": 4}}),
    "paper": ("paper", {"name": "paper"}),
    "evidence": ("evidence", {"name": "evidence"}),
    "onestep": ("onestep", {"name": "onestep"}),
    "single_pass": ("single_pass", {"name": "single_pass"}),
    "single_pass by sequence": ("single_pass", {"name": "single_pass", "corruption": {"per": "sequence"}}),
}
"""Arm -> (cost model in train_step.py, objective as a user writes it)."""


def timed_arms() -> dict[str, Arm]:
    return {name: Arm(ARM_COSTS[cost], SHAPE, BATCH_SIZE, SEQ_LEN, "cpu") for name, (cost, _) in ARMS.items()}


def config_of(name: str, seed: int, steps: int, lr: float, data: Path) -> dict[str, Any]:
    return {
        **base_config(name, seed, steps, lr, data), "model": {"family": "huginn", **SHAPE, "max_seq_len": SEQ_LEN},
        "objective": ARMS[name][1], "recurrence": {"default_steps": 4, "max_steps": 64},
    }  # fmt: skip


def base_config(name: str, seed: int, steps: int, lr: float, data: Path) -> dict[str, Any]:
    """Data, batch, optimizer and schedule, which every arm of every family shares."""
    return {
        "name": name.replace(" ", "-").replace("/", "-").replace("=", ""), "seed": seed,
        "data": {"kind": "tokens", "path": str(data), "seq_len": SEQ_LEN}, "batch": {"global_size": BATCH_SIZE},
        "optimizer": {"lr": lr, "weight_decay": 0.1}, "schedule": {"kind": "cosine", "steps": steps,
            "warmup_steps": min(100, steps // 5)},
        "precision": native_precision(), "deepspeed": {"zero_stage": 0},
        "checkpoint": {"interval_steps": max(50, steps // 5), "keep": 1},
        "evaluation": {"interval_steps": 0},
    }  # fmt: skip


def run_arm(
    name: str, seed: int, updates: int, lr: float, data: Path, root: Path, max_tokens: int
) -> dict[str, Any]:
    folder = root / f"{name.replace(' ', '-').replace('/', '-')}-lr{lr:g}-seed{seed}"
    train(folder, config_of(name, seed, updates, lr, data))
    wanted = ["--num-steps", STEPS] if name not in ("paper", "evidence") else []
    return {
        "arm": name,
        "seed": seed,
        "lr": lr,
        "updates": updates,
        **held_out(folder, updates, data, max_tokens, wanted),
    }


def held_out(folder: Path, updates: int, data: Path, max_tokens: int, options: list[str]) -> dict[str, Any]:
    """What a trained run cost and its held-out NLL (`rdlm eval nll`, made once and kept in ``folder``), of
    models that are read at a quantile of their noise levels at sigma_max too."""
    model = folder / "run" / "model"
    report, metrics = _scored(model, folder / "nll.json", data, max_tokens, options), last_metrics(folder)
    other = at_sigma_max(model)
    second = (
        None if other is None else _scored(other, folder / "nll-at-sigma-max.json", data, max_tokens, options)
    )
    return {
        **({} if second is None else {"at_sigma_max": second["results"]}),
        "train_tokens": updates * BATCH_SIZE * SEQ_LEN, "cpu_seconds": metrics["cpu_seconds"],
        "tokens": report["tokens"],
        "results": report["results"], "data": report["data"], "window_nll": report["window_nll"],
        "git_commit": provenance()["git_commit"],
    }  # fmt: skip


def _scored(model: Path, file: Path, data: Path, max_tokens: int, options: list[str]) -> dict[str, Any]:
    if not file.exists():
        run_rdlm(["eval", "nll", "--checkpoint", str(model), "--data", str(data), "--max-tokens", str(max_tokens),
                  "--per-window", "--out", str(file), *options], file.parent / "log.txt")  # fmt: skip
    return read_json(file)


def plot(rows: list[dict[str, Any]], file: Path, minutes: float) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for row in rows:
        ks, nll = [r["K"] for r in row["results"]], [r["nll"] for r in row["results"]]
        axes.plot(ks, nll, marker="o", label=f"{row['arm']} (seed {row['seed']})")
    axes.set(
        xscale="log",
        xlabel="K, core steps",
        ylabel="held-out NLL, nats per token",
        title=f"Equal compute: {minutes:g} CPU minutes an arm",
    )
    axes.set_xticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def main(
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare` with a vocabulary of 4096.")],
    out: Annotated[Path, typer.Option(help="JSON to write; a PNG of the same name stands beside it.")],
    minutes: Annotated[float, typer.Option(help="CPU minutes of one core an arm.")] = 15.0,
    arms: Annotated[str, typer.Option(help="Arms with commas.")] = ",".join(ARMS),
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0",
    lr: float = 2e-3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 1,
    root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/equal_compute"),
    max_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 65_536,
) -> None:
    """Train and score every arm; writes what is finished so far after each call."""
    check_same_corpus(out, data)
    root.mkdir(parents=True, exist_ok=True)
    cost = kept_seconds_per_update(root / "seconds_per_update.json", timed_arms)
    wanted = [(name, int(seed)) for seed in seeds.split(",") for name in arms.split(",")]
    rows = in_parallel(
        jobs,
        [
            partial(run_arm, name, seed, int(60 * minutes / cost[name]), lr, data, root, max_tokens)
            for name, seed in wanted
        ],
    )
    rows = with_earlier_runs(out, rows)
    write_json(out, {"provenance": provenance(), "minutes": minutes, "shape": SHAPE, "batch_size": BATCH_SIZE,
            "seq_len": SEQ_LEN,
                     "seconds_per_update": cost, "runs": rows})  # fmt: skip
    plot(rows, out.with_suffix(".png"), minutes)
    for row in rows:
        print(
            f"{row['arm']:12} seed {row['seed']} {row['updates']:5} updates "
            + " ".join(f"K={r['K']}:{r['nll']:.4f}" for r in row["results"])
        )


if __name__ == "__main__":
    typer.run(main)
