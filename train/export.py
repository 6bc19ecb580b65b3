"""The portable model at the end of a run: ``model/``, with a card written from the run's own facts."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.folder import WEIGHTS, compare, write
from rdlm.registry import build
from train.metrics import read
from train.trainer import Trainer


def export(trainer: Trainer) -> None:
    """Write ``model/`` from the full-precision weights, one block in memory at a time. Collective; rank 0 writes."""
    parts = trainer.output / ".tmp-weights"
    if trainer.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
    for number, weights in enumerate(trainer.weights_by_block()):
        if trainer.rank == 0:
            save_file(weights, parts / f"{number}.safetensors")
    if trainer.rank == 0:
        _put_together(trainer, parts)
        shutil.rmtree(parts)


def _put_together(trainer: Trainer, parts: Path) -> None:
    config = trainer.config.checkpoint_config.model_copy(update={"step": trainer.step})
    entries = {name: entry for part in parts.iterdir() for name, entry in tensors.stored(part).items()}
    weights: dict[str, nn.Parameter] = dict(build(config, device="meta").named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    compare(
        str(parts),
        {name: entry.shape for name, entry in entries.items()},
        shapes,
        "report this: it is a defect",
    )

    def fill(folder: Path) -> None:
        tensors.write(folder / WEIGHTS, entries, lambda size: None)

    write(trainer.output / "model", config, trainer.corpus.tokenizer, weights, fill, _card(trainer))


def _card(trainer: Trainer) -> str:
    config, log = trainer.config, read(trainer.output / "metrics.jsonl")
    last, held_out = log[-1], read(trainer.output / "held_out.jsonl")
    data = ", ".join(f"{key} {value}" for key, value in config.data.model_dump().items())
    optimizer, schedule, unit = config.optimizer, config.schedule, trainer.corpus.unit
    examples = "images" if unit == "image" else f"sequences of {trainer.corpus.seq_len} {unit}s"
    lines = [
        "## Data and training",
        "",
        f"- Data: {data} (identity {trainer.corpus.identity[:16]}).",
        f"- {trainer.step:,} updates of {config.batch.global_size} {examples}: "
        f"{trainer.step * config.batch.global_size * trainer.corpus.seq_len:,} {unit}s.",
        f"- AdamW, lr {optimizer.lr}, betas {optimizer.betas}, weight decay {optimizer.weight_decay} (matrices of linear layers), "
        f"gradient norm clipped at {optimizer.grad_clip}; schedule {schedule.kind}, {schedule.warmup_steps} warm-up steps.",
        f"- {config.precision}, ZeRO stage {config.deepspeed.zero_stage}, {trainer.world} processes, seed {config.seed}; "
        f"{last['seconds']:.0f} s, {last['cpu_seconds']:.0f} s of CPU time.",
        f"- Last training loss {last['loss']:.4f} per {unit}.",
    ]
    if held_out:
        values = ", ".join(f"{k}: {v:.4f}" for k, v in held_out[-1].items() if k != "step")
        lines.append(f"- Held out, mean per {unit} of {config.evaluation.max_tokens:,} at most: {values}.")
    return "\n".join(lines)
