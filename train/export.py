"""The portable model at the end of a run: ``model/``, with a card written from the run's own facts."""

from __future__ import annotations

from rdlm.checkpoint import save
from rdlm.registry import build
from train.loop import Trainer
from train.metrics import read


def export(trainer: Trainer) -> None:
    """Write ``model/`` from the full-precision weights. Collective; rank 0 writes."""
    weights = trainer.weights()
    if weights is None:
        return
    config = trainer.config.checkpoint_config.model_copy(update={"step": trainer.step})
    denoiser = build(config)
    denoiser.load_state_dict(weights, strict=True)
    save(trainer.output / "model", denoiser, config, trainer.corpus.tokenizer, _card(trainer))


def _card(trainer: Trainer) -> str:
    config, log = trainer.config, read(trainer.output / "metrics.jsonl")
    last, held_out = log[-1], read(trainer.output / "held_out.jsonl")
    data = ", ".join(f"{key} {value}" for key, value in config.data.model_dump().items())
    optimizer, schedule = config.optimizer, config.schedule
    lines = [
        "## Data and training",
        "",
        f"- Data: {data} (identity {trainer.corpus.identity[:16]}).",
        f"- {trainer.step:,} updates of {config.batch.global_size} sequences of {trainer.corpus.seq_len} positions: "
        f"{trainer.step * config.batch.global_size * trainer.corpus.seq_len:,} positions.",
        f"- AdamW, lr {optimizer.lr}, betas {optimizer.betas}, weight decay {optimizer.weight_decay} (matrices of linear layers), "
        f"gradient norm clipped at {optimizer.grad_clip}; schedule {schedule.kind}, {schedule.warmup_steps} warm-up steps.",
        f"- {config.precision}, ZeRO stage {config.deepspeed.zero_stage}, {trainer.world} processes, seed {config.seed}; "
        f"{last['seconds']:.0f} s, {last['cpu_seconds']:.0f} s of CPU time.",
        f"- Last training loss {last['loss']:.4f} nats per position.",
    ]
    if held_out:
        values = ", ".join(f"{k}: {v:.4f}" for k, v in held_out[-1].items() if k != "step")
        lines.append(f"- Held-out NLL, nats per token, {config.evaluation.max_tokens:,} tokens at most: {values}.")
    return "\n".join(lines)
