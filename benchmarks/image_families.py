"""ViT and DiT on CIFAR-10 at equal CPU time: whole and in blocks, accuracy and distance of drawn images
against K.

    rdlm data images cifar10 --out data/cifar10          # or the folder with train.parquet and test.parquet
    python -m benchmarks.image_families vit --data data/cifar10 --minutes 2.5 --jobs 2 \\
        --out docs/results/raw/images_vit.json
    python -m benchmarks.image_families dit --data data/cifar10 --minutes 15 --jobs 2 \\
        --out docs/results/raw/images_dit.json

Every arm gets as many updates as fit into ``--minutes`` of one core at what an update costs, measured
interleaved in one process (benchmarks/train_step.py). Blocks train jointly; an update is one of one block.
Interrupted runs go on when started again.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.common import (
    at_sigma_max,
    in_parallel,
    last_metrics,
    provenance,
    read_json,
    run_rdlm,
    train,
    with_earlier_runs,
    write_json,
)
from benchmarks.train_step import Arm, kept_seconds_per_update
from eval.metrics.fid import plot_images
from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.data.images import ImageStore
from rdlm.registry import build
from train.settings import TrainConfig

BLOCKS = {"num_blocks": 3, "overlap": 0.05}
VIT: dict[str, Any] = {
    "family": "vit", "image_size": 32, "patch_size": 4, "num_classes": 10,
    "d_model": 128, "num_heads": 4, "mlp_width": 344, "num_layers": 6,
}  # fmt: skip
DIT = {**VIT, "family": "dit", "d_model": 192, "num_heads": 6, "mlp_width": 512, "noise_embed_dim": 192}
ARMS: dict[str, dict[str, tuple[str, dict[str, Any] | None]]] = {
    "vit": {
        "classify": ("classify", None),
        "forward-forward": ("forward_forward", None),
        "paper B=3": ("paper", BLOCKS),
        "evidence B=3": ("evidence", BLOCKS),
        "paper B=1": ("paper", None),
    },
    "dit": {"edm B=1": ("edm", None), "edm B=3": ("edm", BLOCKS)},
}
"""Family -> arm -> (objective, how it is cut)."""
ONCE = ("classify", "forward_forward")
"""Objectives that name a class in one step."""
SAMPLED = {"steps": "4,10,25", "guidance": "1,2"}
"""What a DiT is asked for."""


class ImageArm(Arm):
    """One arm's model (block 0 where there are blocks), optimizer and batch."""

    def __init__(self, config: CheckpointConfig, batch: Batch, dtype: torch.dtype) -> None:
        first = config if config.blocks is None else config.model_copy(update={"block": 0})
        self.denoiser = build(first, seed=0).to(dtype)
        self.optimizer = torch.optim.AdamW(self.denoiser.parameters(), lr=1e-4, fused=True)
        self.batch, self.device, self.step = batch, "cpu", 0


def document(
    family: str, arm: str, updates: int, lr: float, data: Path, seed: int, batch_size: int, precision: str
) -> dict[str, Any]:
    """The config that `rdlm train` is given, but for its output."""
    objective, blocks = ARMS[family][arm]
    warmup = min(100 * (1 if blocks is None else blocks["num_blocks"]), updates // 5)
    most = 1 if objective in ONCE else 64 if family == "vit" else 1000
    return {
        "name": f"{family}-{arm.replace(' ', '-').replace('=', '')}", "seed": seed,
        "model": VIT if family == "vit" else DIT,
        "objective": {"name": objective}, "blocks": blocks, "recurrence": {"default_steps": min(4, most),
            "max_steps": most},
        "data": {"kind": "images", "path": str(data), "augment": "flip_crop" if family == "vit" else "flip"},
        "batch": {"global_size": batch_size}, "optimizer": {"lr": lr, "weight_decay": 0.05 if family == "vit" else 0.0},
        "schedule": {"kind": "cosine", "steps": updates, "warmup_steps": warmup}, "precision": precision,
        "deepspeed": {"zero_stage": 0}, "checkpoint": {"interval_steps": max(50, updates // 8), "keep": 1},
        "evaluation": {"interval_steps": max(1, updates // 8), "steps": [1], "max_tokens": 1000},
        "log": {"interval_steps": 10, "tensorboard": False},
    }  # fmt: skip


def timed_arms(family: str, data: Path, batch_size: int, precision: str) -> dict[str, Arm]:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = ImageStore(data, "train").rows(torch.arange(batch_size).numpy())
    timed: dict[str, Arm] = {}
    for arm in ARMS[family]:
        written = {**document(family, arm, 100, 1e-3, data, 0, batch_size, precision), "output": "none"}
        timed[arm] = ImageArm(parse(TrainConfig, written, arm).checkpoint_config, batch, dtype)
    return timed


def run_arm(
    family: str,
    arm: str,
    updates: int,
    lr: float,
    data: Path,
    seed: int,
    batch_size: int,
    precision: str,
    num_images: int,
    root: Path,
) -> dict[str, Any]:
    """Train and judge one arm."""
    written = document(family, arm, updates, lr, data, seed, batch_size, precision)
    folder = root / f"{written['name']}-{updates}-lr{lr:g}-seed{seed}"
    train(folder, written)
    found, model = folder / "found.json", folder / "run" / "model"
    second = None
    if family == "vit":
        judge_vit(model, found, ARMS[family][arm][0], data, num_images)
        other = at_sigma_max(model)
        if other is not None:
            second = folder / "found-at-sigma-max.json"
            judge_vit(other, second, ARMS[family][arm][0], data, num_images)
    elif not found.exists():
        command = [
            "eval",
            "fid",
            "--checkpoint",
            str(model),
            "--reference",
            str(data / "test" / "images.npy"),
            "--out",
            str(found),
        ]
        options = [
            "--num-steps",
            SAMPLED["steps"],
            "--guidance",
            SAMPLED["guidance"],
            "--num-images",
            str(num_images),
        ]
        run_rdlm(
            [*command, *options, "--cache", str(root / "cache"), "--dtype", "bfloat16"], folder / "log.txt"
        )
    metrics = last_metrics(folder)
    return {
        "arm": arm, "seed": seed, "lr": lr, "updates": updates, "cpu_seconds": metrics["cpu_seconds"],
        "report": read_json(found),
        **({} if second is None else {"report_at_sigma_max": read_json(second)}),
        "git_commit": provenance()["git_commit"],
    }  # fmt: skip


def judge_vit(model: Path, found: Path, objective: str, data: Path, num_images: int) -> None:
    """`rdlm eval accuracy` at several K and with every sampler that fits the objective."""
    if found.exists():
        return
    samplers = "renoise,euler" + (",published" if objective == "paper" else "")
    sampling = [] if objective in ONCE else ["--num-steps", "1,2,4,8", "--sampler", samplers]
    command = ["eval", "accuracy", "--checkpoint", str(model), "--data", str(data), "--per-image",
               "--max-images", str(num_images), "--out", str(found), *sampling]  # fmt: skip
    run_rdlm(command, found.parent / "log.txt")


def main(
    family: Annotated[Literal["vit", "dit"], typer.Argument(help="Which family.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data images`.")],
    out: Annotated[Path, typer.Option(help="JSON to write; of dit a picture beside it.")],
    minutes: Annotated[float, typer.Option(help="CPU minutes of one core an arm.")] = 2.5,
    arms: Annotated[str | None, typer.Option(help="Arms with commas; by default all.")] = None,
    lr: float = 1e-3,
    seed: int = 0,
    batch_size: int = 64,
    precision: Literal["bf16", "fp32"] = "bf16",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one core each.")] = 1,
    num_images: Annotated[
        int, typer.Option(help="Test images that are classified; images that are drawn.")
    ] = 2000,
    rounds: Annotated[int, typer.Option(min=1, help="Timed updates of each arm.")] = 9,
    root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/image_families"),
) -> None:
    """Train and judge every arm; what earlier calls wrote of other arms stays."""
    root.mkdir(parents=True, exist_ok=True)
    timed = partial(timed_arms, family, data, batch_size, precision)
    cost = kept_seconds_per_update(root / f"{family}_seconds_per_update.json", timed, rounds)
    wanted = list(ARMS[family]) if arms is None else arms.split(",")
    calls = [
        partial(
            run_arm,
            family,
            arm,
            int(60 * minutes / cost[arm]),
            lr,
            data,
            seed,
            batch_size,
            precision,
            num_images,
            root,
        )
        for arm in wanted
    ]
    rows = with_earlier_runs(out, in_parallel(jobs, calls))
    head = {
        "minutes": minutes,
        "shape": VIT if family == "vit" else DIT,
        "batch_size": batch_size,
        "seconds_per_update": cost,
    }
    write_json(out, {"provenance": provenance(), **head, "runs": rows})
    if family == "dit":
        plot_images({r["arm"]: r["report"] for r in rows}, out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
