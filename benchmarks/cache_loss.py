"""What the shared cache and rounded weights cost in likelihood: held-out NLL through the engine, decoding
position by position.

    python -m benchmarks.cache_loss --checkpoint runs/x/model --data data/books-4096 --steps 1,2,4,8 \\
        --out docs/results/raw/cache_loss.json

``exact`` is ``Objective.score`` (every step reads the past at the same step); ``full`` must reproduce it;
``shared`` reads the past's last step. ``bfloat16`` and ``int8`` are full with rounded weights. Prompts are scored
with a chunk of one position, which is what decoding does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import provenance, write_json
from rdlm.checkpoints.folder import load
from rdlm.data.token_shards import TokenStore
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {"kv_cache": "full", "dtype": "float32"},
    "shared": {"kv_cache": "shared", "dtype": "float32"},
    "first": {"kv_cache": "first", "dtype": "float32"},
    "bfloat16": {"kv_cache": "full", "dtype": "bfloat16"},
    "int8": {"kv_cache": "full", "dtype": "float32", "weights": "int8"},
}


def engine_nll(checkpoint: Path, windows: torch.Tensor, num_steps: int, variant: str) -> float:
    """Mean nats per token of windows [N, T + 1], one position at a time."""
    settings = EngineSettings(
        **VARIANTS[variant],
        chunk=1,
        prefill_rows=64,
        max_slots=64,
        max_len=windows.shape[1],
        max_steps=num_steps,
        default_steps=num_steps,
    )
    requests = [
        Request(tuple(row), StepBudget(num_steps), max_tokens=0, prompt_logprobs=0)
        for row in windows.tolist()
    ]
    with Engine(lambda: load_served(checkpoint, settings)) as engine:
        answers = engine.generate(requests)
    logprobs = [
        entry.logprob for events in answers for event in events for entry in event.prompt_logprobs or []
    ]
    assert len(logprobs) == windows[:, 1:].numel()
    return -sum(logprobs) / len(logprobs)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder of a thinking model.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    steps: str = "1,2,4,8",
    seq_len: int = 96,
    num_windows: int = 64,
    variants: Annotated[str, typer.Option(help="Which, with commas.")] = ",".join(VARIANTS),
) -> None:
    """NLL of every variant at each K."""
    loaded = load(checkpoint, device="cpu", dtype=torch.float32)
    batch = next(iter(TokenStore(data, "valid").windows(seq_len, num_windows * seq_len, num_windows)))
    windows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    rows: dict[str, Any] = {}
    for k in (int(part) for part in steps.split(",")):
        exact = -loaded.denoiser.token_logprobs(batch.inputs, batch.targets, [k])[k].mean().item()
        rows[str(k)] = {
            "exact": exact,
            **{variant: engine_nll(checkpoint, windows, k, variant) for variant in variants.split(",")},
        }
        print(
            f"K={k}: " + ", ".join(f"{name} {value:.5f}" for name, value in rows[str(k)].items()), flush=True
        )
    write_json(
        out,
        {
            "provenance": provenance(),
            "checkpoint": loaded.config.model_dump(mode="json"),
            "tokens": batch.targets.numel(),
            "nll": rows,
        },
    )


if __name__ == "__main__":
    typer.run(main)
