"""Self-speculative decoding beside plain decoding of the same model: acceptance, tokens a second, equal tokens.

    python -m benchmarks.speculation --checkpoint runs/x/model --data data/books-bytes --num-steps 16 \\
        --draft-steps 2,4 --draft-tokens 4,8 --out docs/results/raw/speculation.json

Prompts are windows of held-out text; sides take turns, medians over rounds (least to most). Acceptance is the
share of drafted tokens that became part of the answer; greedy tokens must be equal, sampled ones have one law and
are others. Both sides use the full cache, which speculation needs.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import held_out_prompts, provenance, write_json
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, Speculation, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings


def timed(engine: Engine, requests: list[Request]) -> tuple[float, list[list[int]], int, int]:
    """Seconds, tokens of each answer, drafted and accepted tokens."""
    began = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - began
    usages = [events[-1].usage for events in answers]
    tokens = [[event.token for event in events if event.token is not None] for events in answers]
    drafted = sum(usage.drafted for usage in usages if usage)
    return seconds, tokens, drafted, sum(usage.accepted for usage in usages if usage)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder of a thinking model.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`, for the prompts.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    num_steps: Annotated[int, typer.Option(help="K of the answers.")] = 16,
    draft_steps: Annotated[str, typer.Option(help="K of the drafts, with commas.")] = "2,4",
    draft_tokens: Annotated[str, typer.Option(help="Most tokens of a draft, with commas.")] = "4,8",
    temperatures: str = "0,1",
    batches: Annotated[str, typer.Option(help="Requests at a time.")] = "1,8",
    prompt_tokens: int = 32,
    num_tokens: int = 64,
    rounds: int = 5,
) -> None:
    """Acceptance and speed of every draft at each temperature and batch."""
    sizes = [int(part) for part in batches.split(",")]
    drafts = list(product(*([int(part) for part in text.split(",")] for text in (draft_steps, draft_tokens))))
    prompts = held_out_prompts(data, max(sizes), prompt_tokens)
    settings = EngineSettings(
        kv_cache="full",
        prefix_cache="off",
        max_slots=max(sizes),
        max_len=prompt_tokens + num_tokens,
        max_steps=num_steps,
        default_steps=num_steps,
    )
    rows: list[dict[str, Any]] = []
    with Engine(lambda: load_served(checkpoint, settings)) as engine:
        for size, temperature in product(sizes, (float(part) for part in temperatures.split(","))):
            plain = [
                Request(
                    ids,
                    StepBudget(num_steps),
                    num_tokens,
                    SamplingParams(temperature=temperature),
                    seed=i,
                )
                for i, ids in enumerate(prompts[:size])
            ]
            sides = {(0, 0): plain} | {
                draft: [replace(r, budget=replace(r.budget, speculation=Speculation(*draft))) for r in plain]
                for draft in drafts
            }
            found: dict[Any, list[Any]] = {draft: [] for draft in sides}
            for turn in range(rounds + 1):  # the first one warms up
                for draft, requests in sides.items():
                    measured = timed(engine, requests)
                    if turn:
                        found[draft].append(measured)
            rates = {
                draft: sorted(size * num_tokens / seconds for seconds, *_ in runs)
                for draft, runs in found.items()
            }
            for draft, runs in found.items():
                _, tokens, drafted, accepted = runs[0]
                speed = statistics.median(rates[draft])
                row = {
                    "batch": size,
                    "temperature": temperature,
                    "draft_steps": draft[0],
                    "draft_tokens": draft[1],
                    "tokens_per_second": speed,
                    "spread": [rates[draft][0], rates[draft][-1]],
                    "speedup": speed / statistics.median(rates[0, 0]),
                    "acceptance": accepted / drafted if drafted else None,
                    "equal_tokens": tokens == found[0, 0][0][1],
                }
                rows.append(row)
                print(row, flush=True)
    facts = {
        "num_steps": num_steps,
        "prompt_tokens": prompt_tokens,
        "num_tokens": num_tokens,
        "rounds": rounds,
    }
    write_json(out, {"provenance": provenance(), **facts, "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
