"""Block-wise training against end-to-end training of the same autoregressive network: held-out NLL at equal
layer evaluations and at equal CPU time, and what partition, overlap and shared rows do.

    python -m benchmarks.blockwise --data data/books-4096 --minutes 2.5 --out docs/results/raw/blockwise.json

Blocks train jointly, one process a run. ``--minutes`` of one core give next-token training S updates; every
update costs what was measured interleaved in one process (benchmarks/train_step.py). "evaluations": S updates
of each block, so all layers are evaluated as often as end to end (the paper's epochs x B), which takes
longer, since every block has a read-out. "time": as many as fit into the same minutes. Interrupted runs go on
when started again; rows are merged into the JSON as they end.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import matplotlib
import typer

from benchmarks.common import (
    check_same_corpus,
    in_parallel,
    provenance,
    read_json,
    run_rdlm,
    train,
    write_json,
)
from benchmarks.equal_compute import BATCH_SIZE, SEQ_LEN, base_config, held_out
from benchmarks.train_step import Arm as Timed
from benchmarks.train_step import kept_seconds_per_update
from rdlm.cli import run
from rdlm.errors import UserError

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SHAPE: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 4096,
    "d_model": 128,
    "num_heads": 4,
    "mlp_width": 448,
    "num_layers": 8,
}
SIGMAS = "0.2,0.3,0.4,0.5,0.63,1,2,8"
"""Levels at which cross-entropies are compared, from what nearly names the token to what says nothing."""
CURVE_TOKENS = 16_384


@dataclass(frozen=True)
class Arm:
    """One way to train. equal: what it has in common with end-to-end training; blocks: see
    rdlm.config.checkpoint.BlocksConfig."""

    objective: str
    num_blocks: int = 1
    equal: Literal["evaluations", "time"] = "time"
    blocks: dict[str, Any] = field(default_factory=dict)
    num_layers: int = SHAPE["num_layers"]

    @property
    def cost(self) -> str:
        """Name of what an update costs: how noise is cut does not change it."""
        return f"{self.objective} B={self.num_blocks}"

    def cut(self, **changes: Any) -> dict[str, Any] | None:
        return None if self.num_blocks == 1 else {"num_blocks": self.num_blocks, **self.blocks, **changes}


OBJECTIVES, BLOCKS = ("paper", "evidence"), (1, 2, 4)
MAIN = {"next_token": Arm("next_token")} | {
    f"{objective} B={blocks} {equal}": Arm(objective, blocks, equal)
    for objective in OBJECTIVES for blocks in BLOCKS for equal in ("evaluations", "time")
}  # fmt: skip
DEPTH = {
    f"next_token {layers} layers": Arm("next_token", equal="evaluations", num_layers=layers)
    for layers in (2, 4)
}
"""A likelihood is asked of block 0 alone: what do its layers reach when they are the whole network, in as
many updates?"""
CUTS: dict[str, dict[str, Any]] = {
    "uniform": {"partition": "uniform"},
    "log-uniform": {"partition": "log_uniform"},
    "overlap 0": {"overlap": 0.0},
    "own rows": {"targets": "own"},
    "overlap 0.05": {"overlap": 0.05},
    "equal information": {"partition": "equal_information", "prior_nats": 4.5},
    "layers 5-1-1-1": {"layers_per_block": [5, 1, 1, 1]},
}
"""Against the arm of the same objective with equal probability, overlap 0.1, frozen rows and two layers a
block."""
ABLATION = {
    f"{objective} B=4 {name}": Arm(objective, 4, "time", CUTS[name])
    for objective, names in {"evidence": list(CUTS), "paper": list(CUTS)[:4]}.items() for name in names
}  # fmt: skip
ARMS = MAIN | DEPTH | ABLATION


def timed_arms() -> dict[str, Timed]:
    """By ``Arm.cost``; block 0 where there are blocks."""
    return {
        arm.cost: Timed({"name": arm.objective}, SHAPE, BATCH_SIZE, SEQ_LEN, "cpu", blocks=arm.cut())
        for arm in MAIN.values()
    }


def updates_of(arm: Arm, minutes: float, cost: dict[str, float]) -> int:
    """Updates of the whole run, over all its blocks."""
    whole = int(60 * minutes / cost[ARMS["next_token"].cost])
    return whole * arm.num_blocks if arm.equal == "evaluations" else int(60 * minutes / cost[arm.cost])


def config_of(name: str, seed: int, steps: int, lr: float, data: Path) -> dict[str, Any]:
    arm = ARMS[name]
    base = base_config(name, seed, steps, lr, data)
    warmup = min(
        100 * arm.num_blocks, steps // 5
    )  # as many of each block's own updates as the whole network gets
    return {
        **base, "model": {**SHAPE, "num_layers": arm.num_layers, "max_seq_len": SEQ_LEN},
        "objective": {"name": arm.objective},
        "schedule": {**base["schedule"], "warmup_steps": warmup},
        "recurrence": {"default_steps": 1 if arm.objective == "next_token" else 4, "max_steps": 64},
        **({"blocks": cut} if (cut := arm.cut()) else {}),
    }  # fmt: skip


def run_arm(
    name: str, seed: int, updates: int, lr: float, data: Path, root: Path, max_tokens: int, prompts: int
) -> dict[str, Any]:
    arm, config = ARMS[name], config_of(name, seed, updates, lr, data)
    folder = root / f"{config['name']}-{updates}-lr{lr:g}-seed{seed}"
    train(folder, config)
    row = {
        "arm": name, "seed": seed, "lr": lr, "objective": arm.objective, "num_blocks": arm.num_blocks,
        "equal": arm.equal,
        "updates": updates, "commit": provenance()["git_commit"],
        **held_out(folder, updates, data, max_tokens, ["--num-steps", "1"]),
    }  # fmt: skip
    common = ["--checkpoint", str(folder / "run" / "model"), "--data", str(data)]
    if arm.objective != "next_token":
        curve = folder / "curve.json"
        if not curve.exists():
            options = ["--sigmas", SIGMAS, "--max-tokens", str(CURVE_TOKENS), "--out", str(curve)]
            run_rdlm(["eval", "ce-by-sigma", *common, *options], folder / "log.txt")
        row["curve"] = [
            {key: r[key] for key in ("sigma", "ce", "reference")} for r in read_json(curve)["results"]
        ]
    for key, options in text_readings(arm).items():
        texts = folder / f"{key}.json"
        if prompts and not texts.exists():
            options = [*options, "--num-prompts", str(prompts), "--out", str(texts)]
            run_rdlm(["eval", "gen-ppl", *common, *options, "--cache", str(folder / key)], folder / "log.txt")
        if texts.exists():
            row[key] = read_json(texts)["results"]
    return row


def text_readings(arm: Arm) -> dict[str, list[str]]:
    """Key in a row -> options of `rdlm eval gen-ppl`: K = B at temperature 1, and of ``paper`` the published
    sampler too, with its four steps (one a block where there are more) and its greedy read-out."""
    found = {"texts": ["--num-steps", str(arm.num_blocks)]}
    if arm.objective == "paper":
        steps = str(max(4, arm.num_blocks))
        found["texts_published"] = ["--num-steps", steps, "--sampler", "published", "--temperature", "0"]
    return found


def plot(rows: list[dict[str, Any]], file: Path, minutes: float) -> None:
    """Left: held-out NLL against B. Right: cross-entropy by sigma of the main arms with most blocks. First
    seed and learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    first = [
        row
        for row in rows
        if row["seed"] == min(r["seed"] for r in rows) and row["lr"] == min(r["lr"] for r in rows)
    ]
    for objective in OBJECTIVES:
        for equal, style in (("evaluations", "-"), ("time", "--")):
            points = [
                (r["num_blocks"], r["results"][0]["nll"])
                for r in first
                if r["arm"] in MAIN and (r["objective"], r["equal"]) == (objective, equal)
            ]
            if points:
                left.plot(
                    *zip(*sorted(points), strict=True), style, marker="o", label=f"{objective}, equal {equal}"
                )
    for row in first:
        if row["objective"] == "next_token":
            nll, layers = row["results"][0]["nll"], ARMS[row["arm"]].num_layers
            left.axhline(
                nll, color="grey", linewidth=layers / 4, linestyle=":", label=f"next_token, {layers} layers"
            )
        elif row["num_blocks"] == max(BLOCKS) and row["arm"] in MAIN:
            right.plot(
                [p["sigma"] for p in row["curve"]],
                [p["ce"] for p in row["curve"]],
                marker=".",
                label=row["arm"],
            )
    left.set(
        xlabel="B, blocks",
        ylabel="held-out NLL, nats per token",
        title=f"{minutes:g} CPU minutes of next-token training",
    )
    left.set_xticks(BLOCKS, labels=[str(b) for b in BLOCKS])
    right.set(
        xscale="log",
        xlabel="noise level sigma",
        ylabel="cross-entropy with z from the truth, nats",
        title="Not a likelihood",
    )
    right.set_xticks([float(sigma) for sigma in SIGMAS.split(",")], labels=SIGMAS.split(","))
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def merge(out: Path, row: dict[str, Any], head: dict[str, Any]) -> list[dict[str, Any]]:
    """Put ``row`` in the place of an earlier one of its (arm, seed, lr); UserError where the file was made
    with other settings."""
    runs = [row]
    if out.exists():
        before = read_json(out)
        for name, value in head.items():
            if before[name] != value:
                raise UserError(
                    name, value, f"{out} was made with {before[name]}", "give the same, or another --out"
                )
        key = [row[name] for name in ("arm", "seed", "lr")]
        runs = [r for r in before["runs"] if [r[name] for name in ("arm", "seed", "lr")] != key] + [row]
    order = list(ARMS)
    runs.sort(key=lambda r: (order.index(r["arm"]), r["lr"], r["seed"]))
    write_json(out, {"provenance": provenance(), **head, "runs": runs})
    return runs


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare` with a vocabulary of 4096.")],
    out: Annotated[Path, typer.Option(help="JSON to write; a PNG of the same name stands beside it.")],
    minutes: Annotated[
        float, typer.Option(help="CPU minutes of one core that next-token training gets.")
    ] = 2.5,
    arms: Annotated[
        str, typer.Option(help="Arms with commas; main, depth and ablation stand for several.")
    ] = "main,depth,ablation",
    seeds: Annotated[str, typer.Option(help="Seeds with commas.")] = "0",
    lrs: Annotated[str, typer.Option(help="Learning rates with commas.")] = "0.002",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 1,
    root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/blockwise"),
    max_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 65_536,
    prompts: Annotated[
        int, typer.Option(min=0, help="Generative perplexity at K = B on so many prompts; 0: not now.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only measure costs and print what each run takes.")
    ] = False,
) -> int:
    """Train and score every arm; each row is written when its run ends."""
    names = [
        name
        for part in arms.split(",")
        for name in {"main": MAIN, "depth": DEPTH, "ablation": ABLATION}.get(part, [part])
    ]
    for name in names:
        if name not in ARMS:
            raise UserError(
                "--arms",
                name,
                "there is no such arm",
                f"choose among main, depth, ablation, {', '.join(ARMS)}",
            )
    check_same_corpus(out, data)
    root.mkdir(parents=True, exist_ok=True)
    cost = kept_seconds_per_update(root / "seconds_per_update.json", timed_arms)
    wanted = [
        (name, int(seed), float(lr)) for seed in seeds.split(",") for lr in lrs.split(",") for name in names
    ]
    updates = {name: updates_of(ARMS[name], minutes, cost) for name in names}
    for name in names:
        print(
            f"{name:28} {updates[name]:6} updates, at most {updates[name] * cost[ARMS[name].cost] / 60:5.1f} "
            "CPU minutes",
            flush=True,
        )
    if dry_run:
        return 0
    head = {"minutes": minutes, "shape": SHAPE, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN,
    "curve_tokens": CURVE_TOKENS,
            "seconds_per_update": cost}  # fmt: skip
    writing = threading.Lock()

    def one(name: str, seed: int, lr: float) -> None:
        row = run_arm(name, seed, updates[name], lr, data, root, max_tokens, prompts)
        with writing:
            plot(merge(out, row, head), out.with_suffix(".png"), minutes)
        print(
            f"{name:28} seed {seed} lr {lr:g}: NLL {row['results'][0]['nll']:.4f}, {row['cpu_seconds']:.0f} CPU s",
            flush=True,
        )

    in_parallel(jobs, [partial(one, *arguments) for arguments in wanted])
    return 0


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], "blockwise"))
