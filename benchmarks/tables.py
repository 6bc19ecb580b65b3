"""Markdown tables of docs/results from the raw JSON: python -m benchmarks.tables language|depth|cost|cache FILE"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import read_json


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def language(raw: dict[str, Any]) -> str:
    ks = ["1", "2", "4", "8", "16", "32"]
    rows = []
    for run in raw["runs"]:
        nll = {str(r["K"]): r for r in run["results"]}
        first = run["results"][0]
        interval = f"{first['nll_interval'][0]:.3f} to {first['nll_interval'][1]:.3f}"
        rows.append([run["arm"], str(run["seed"]), f"{run['lr']:g}", f"{run['updates']:,}",
                     f"{run['train_tokens'] / 1e6:.2f}", f"{run['cpu_seconds']:.0f}",
                     *(f"{nll[k]['nll']:.4f}" if k in nll else "" for k in ks), interval])  # fmt: skip
    head = ["objective", "seed", "learning rate", "updates", "M tokens", "CPU s", *(f"K = {k}" for k in ks), "95 % at first K"]
    return table(head, rows)


def depth(raw: dict[str, Any]) -> str:
    rows, ks = [], ("1", "2", "4", "8", "16", "32", "64")
    for name in dict.fromkeys(run["arm"] for run in raw["runs"]):
        runs = [run for run in raw["runs"] if run["arm"] == name and run["best_lr"]]
        for length in ("16", "24"):
            cells = []
            for k in ks:
                values = [run["accuracy"][length][k]["all"] for run in runs]
                cells.append(f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
            rows.append([name if length == "16" else "", length, f"{runs[0]['lr']:g}", str(runs[0]["updates"]), *cells])
    return table(["objective", "positions", "learning rate", "updates", *(f"K = {k}" for k in ks)], rows)


def cost(raw: dict[str, Any]) -> str:
    rows = [
        [name, f"{r['step_s'] * 1e3:.0f}", f"{r['tokens_per_s']:.0f}", f"{r['bptt_over_this']:.2f}", f"{r['flops_bptt_over_this']:.2f}",
         f"{100 * r['share_of_matmul_peak']:.0f} %", f"{r['peak_memory_bytes'] / 2**20:.0f}"]
        for name, r in raw["arms"].items()
    ]  # fmt: skip
    return table(
        ["objective", "ms an update", "tokens/s", "time, BPTT / this", "FLOPs, BPTT / this", "of matmul peak", "peak MiB"], rows
    )


def cache(raw: dict[str, Any]) -> str:
    rows = [
        [k, *(f"{row[name]:.5f}" for name in ("exact", "full", "shared")), f"{row['shared'] - row['exact']:+.5f}"]
        for k, row in raw["nll"].items()
    ]
    return table(["K", "exact (scoring)", "full cache", "shared cache", "shared - exact"], rows)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {"language": language, "depth": depth, "cost": cost, "cache": cache}


def main(kind: Annotated[str, typer.Argument(help=" | ".join(RENDER))], file: Path) -> None:
    """Print one table."""
    print(RENDER[kind](read_json(file)))


if __name__ == "__main__":
    typer.run(main)
