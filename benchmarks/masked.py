"""Masked diffusion against next-token prediction at equal CPU time: the bound, whole and in blocks, beside
the likelihood, and samples.

    rdlm data prepare embedded --vocab-size 257 --out data/demo-bytes      # one token a byte; any other data will do
    python -m benchmarks.masked --data data/demo-bytes --minutes 3 --out docs/results/raw/masked_bytes.json

Every arm gets as many updates as fit into ``--minutes`` of one core at what an update costs, measured
interleaved in one process (benchmarks/train_step.py). Blocks train jointly; an update is one of one block.
Interrupted runs go on when started again.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.blockwise import SHAPE
from benchmarks.common import provenance, train, write_json
from benchmarks.equal_compute import BATCH_SIZE, SEQ_LEN, base_config, held_out
from benchmarks.train_step import Arm, kept_seconds_per_update
from rdlm.cli import run
from rdlm.data.token_shards import read_manifest
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

ARMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "next_token": ("next_token", None),
    "masked": ("masked", None),
    "masked B=3": ("masked", {"num_blocks": 3, "overlap": 0.05}),
}
"""Arm -> (objective, how it is cut)."""
BOUNDS = "1,16,128,1024"
PROMPT, ANSWER, SAMPLED = "The old man looked at the sea and", 48, (1, 4, 16, 48)


def shape_of(objective: str, vocab_size: int) -> dict[str, Any]:
    return {**SHAPE, "vocab_size": vocab_size, "family": "masked" if objective == "masked" else "llama"}


def timed_arms(vocab_size: int) -> dict[str, Arm]:
    """Block 0 where there are blocks."""
    return {
        name: Arm(
            {"name": objective}, shape_of(objective, vocab_size), BATCH_SIZE, SEQ_LEN, "cpu", blocks=blocks
        )
        for name, (objective, blocks) in ARMS.items()
    }


def run_arm(name: str, updates: int, lr: float, data: Path, root: Path, max_tokens: int) -> dict[str, Any]:
    """Train, score and, where masked, sample."""
    (objective, blocks), vocab_size = ARMS[name], read_manifest(data).vocab_size
    base = base_config(name, 0, updates, lr, data)
    warmup = min(100 * (1 if blocks is None else blocks["num_blocks"]), updates // 5)
    folder = root / f"{base['name']}-{updates}-lr{lr:g}"
    train(
        folder,
        {
            **base, "model": {**shape_of(objective, vocab_size), "max_seq_len": SEQ_LEN},
            "objective": {"name": objective},
            "schedule": {**base["schedule"], "warmup_steps": warmup},
            "recurrence": {"default_steps": 1 if objective == "next_token" else 16, "max_steps": 64}, "blocks": blocks,
        },
    )  # fmt: skip
    steps = ["--num-steps", BOUNDS if objective == "masked" else "1"]
    row = {"arm": name, "lr": lr, "updates": updates, **held_out(folder, updates, data, max_tokens, steps)}
    if objective == "masked":
        row["samples"] = samples(folder / "run" / "model")
    return row


def samples(model: Path) -> dict[str, str]:
    """K -> what stands behind the prompt."""
    with Engine(lambda: load_served(model, EngineSettings())) as engine:
        prompt, sampling = engine.served.tokenizer.encode(PROMPT), SamplingParams(temperature=0.8, top_p=0.95)
        asked = [
            Request(tuple(prompt), StepBudget(k), ANSWER, sampling, stop_ids=engine.served.end_ids)
            for k in SAMPLED
        ]
        answers = engine.generate(asked)
    return {
        str(k): "".join(event.text for event in events) for k, events in zip(SAMPLED, answers, strict=True)
    }


app = typer.Typer(add_completion=False)


@app.command()
def main(
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    minutes: Annotated[float, typer.Option(help="CPU minutes of one core an arm.")] = 2.5,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    rounds: Annotated[int, typer.Option(min=1, help="Timed updates of each arm.")] = 9,
    root: Annotated[Path, typer.Option(help="Where runs are kept.")] = Path("runs/masked"),
    max_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 65_536,
) -> int:
    """Train and score every arm; the file is written anew as each ends."""
    root.mkdir(parents=True, exist_ok=True)
    vocab_size = read_manifest(data).vocab_size
    timing, runs = root / "seconds_per_update.json", []
    cost = kept_seconds_per_update(timing, lambda: timed_arms(vocab_size), rounds)
    shape = {**SHAPE, "vocab_size": vocab_size}
    head = {"minutes": minutes, "shape": shape, "batch_size": BATCH_SIZE, "seq_len": SEQ_LEN,
    "seconds_per_update": cost,
            "prompt": PROMPT, "answer_tokens": ANSWER}  # fmt: skip
    for name in ARMS:
        runs.append(run_arm(name, int(60 * minutes / cost[name]), lr, data, root, max_tokens))
        write_json(out, {"provenance": provenance(), **head, "runs": runs})
        found = ", ".join(
            f"K={r['K']} {r['nll']:.3f} ({r['bits_per_character']:.3f} BPC)" for r in runs[-1]["results"]
        )
        print(
            f"{name:12} {runs[-1]['updates']} updates, {runs[-1]['cpu_seconds']:.0f} CPU s: {found}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], "masked"))
