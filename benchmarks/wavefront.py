"""Wavefront decoding (diffusion forcing) beside plain and self-speculative decoding of the same model.

    python -m benchmarks.wavefront MODEL --data data/books-bytes --num-steps 16 --out docs/results/raw/wavefront.json

Prompts are windows of held-out text; sides take turns, medians over rounds (least to most). ``equal`` is the
share of tokens that stand at their place in the answer of plain decoding with the same cache, ``mean_steps``
the core steps of the positions that tokens were drawn from, ``row_steps`` all core steps that decoding took, by
token: those of positions that began again, too.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.common import held_out_prompts, provenance, write_json
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, Speculation, StepBudget, Wavefront
from serve.loading import load_served
from serve.settings import EngineSettings

CACHES: tuple[Literal["shared", "full"], ...] = ("shared", "full")


def figures(answers: list[list[Event]]) -> dict[str, float]:
    usages = [events[-1].usage for events in answers]
    decoded = sum(u.completion_tokens - 1 for u in usages if u)
    return {
        "mean_steps": sum(u.token_steps for u in usages if u) / sum(u.completion_tokens for u in usages if u),
        "row_steps": sum(u.decode_core_steps for u in usages if u) / decoded,
    }


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Model folder of a thinking model.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`, for the prompts.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    num_steps: Annotated[int, typer.Option(help="K of the answers.")] = 16,
    inner_steps: Annotated[str, typer.Option(help="Of the wavefronts, with commas.")] = "1,2,4",
    thresholds: Annotated[str, typer.Option(help="Of the wavefronts, with commas.")] = "0,0.03,0.1",
    draft_steps: Annotated[str, typer.Option(help="Of speculation, with commas.")] = "2,4",
    draft_tokens: Annotated[int, typer.Option(help="Most tokens of a draft.")] = 8,
    temperatures: str = "0,1",
    batches: Annotated[str, typer.Option(help="Requests at a time.")] = "1,8",
    prompt_tokens: int = 32,
    num_tokens: int = 64,
    rounds: int = 3,
) -> None:
    """Speed, equal tokens and core steps of every side at each temperature and batch."""
    sizes = [int(part) for part in batches.split(",")]
    prompts = held_out_prompts(data, max(sizes), prompt_tokens)
    plain = StepBudget(num_steps)
    waves = [
        replace(plain, wavefront=Wavefront.of(None, int(inner), float(threshold)))
        for inner, threshold in product(inner_steps.split(","), thresholds.split(","))
    ]
    drafts = [
        replace(plain, speculation=Speculation(int(part), draft_tokens)) for part in draft_steps.split(",")
    ]
    sides = [
        *(("shared", budget) for budget in (plain, *waves)),
        *(("full", budget) for budget in (plain, *waves, *drafts)),
    ]
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        for kind in CACHES:
            settings = EngineSettings(
                kv_cache=kind,
                prefix_cache="off",
                max_slots=max(sizes),
                max_len=prompt_tokens + num_tokens,
                max_steps=num_steps,
                default_steps=num_steps,
            )
            engines[kind] = stack.enter_context(Engine(lambda s=settings: load_served(checkpoint, s)))  # type: ignore[misc]
        for size, temperature in product(sizes, (float(part) for part in temperatures.split(","))):
            sampling = SamplingParams(temperature=temperature)
            seconds: dict[Any, list[float]] = {side: [] for side in sides}
            answers: dict[Any, list[list[Event]]] = {}
            for turn in range(rounds + 1):  # the first one warms up
                for cache, budget in sides:
                    requests = [
                        Request(ids, budget, num_tokens, sampling, seed=i)
                        for i, ids in enumerate(prompts[:size])
                    ]
                    began = time.perf_counter()
                    answers[cache, budget] = engines[cache].generate(requests)
                    if turn:
                        seconds[cache, budget].append(time.perf_counter() - began)
            tokens = {
                side: [e.token for events in found for e in events if e.token is not None]
                for side, found in answers.items()
            }
            speeds = {side: size * num_tokens / statistics.median(found) for side, found in seconds.items()}
            best_draft = max(speeds["full", budget] for budget in drafts)
            for cache, budget in sides:
                side, guesses = (cache, budget), budget.wavefront or budget.speculation
                pairs = list(zip(tokens[side], tokens[cache, plain], strict=True))
                rows.append(
                    {
                        "batch": size,
                        "temperature": temperature,
                        "kv_cache": cache,
                        "side": type(guesses).__name__.lower() if guesses else "plain",
                        **(asdict(guesses) if guesses else {}),
                        "tokens_per_second": speeds[side],
                        "spread": [size * num_tokens / f(seconds[side]) for f in (max, min)],
                        "over_plain": speeds[side] / speeds[cache, plain],
                        "over_speculation": speeds[side] / best_draft,
                        "equal": sum(token == other for token, other in pairs) / len(pairs),
                        **figures(answers[side]),
                    }
                )
                print(rows[-1], flush=True)
    facts = {
        "num_steps": num_steps,
        "prompt_tokens": prompt_tokens,
        "num_tokens": num_tokens,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    write_json(out, {"provenance": provenance(), **facts, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
