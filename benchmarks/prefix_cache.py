"""What the prefix cache saves, and what reusing the keys of another K costs.

    python -m benchmarks.prefix_cache --checkpoint runs/x/model --data data/books-bytes --num-steps 1,4,16 \\
        --out docs/results/raw/prefix_cache.json

First token: milliseconds from submission, where the prompt but for its last tokens is known, and where it is not,
by turns. Loss: held-out nats per token of text that continues a known prefix, at K, after a prefix at another K
(``any-steps``), and the paired difference from a prefix at the same K, with its 95 % interval over texts.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.common import held_out_prompts, provenance, write_json
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine, Served
from serve.engine.sequence import Request, StepBudget, StepResult
from serve.loading import load_served
from serve.settings import EngineSettings

FRESH = 16
"""Tokens of the prompt that are new where the others are known."""


def first_token_ms(engine: Engine, prompt: tuple[int, ...], num_steps: int) -> tuple[float, int]:
    """Until the first token of an answer, and how many positions were known."""
    request = Request(prompt, StepBudget(num_steps), 1, SamplingParams(temperature=0))
    usage = engine.generate([request])[0][-1].usage
    assert usage is not None
    return 1000 * usage.first_token_s, usage.cached_tokens


def continuation_nats(served: Served, text: tuple[int, ...], prefix: int, num_steps: int) -> float:
    """Mean over the tokens of ``text`` after the known prefix, which must be known."""
    runner, scheduler = served.runner, served.scheduler
    plain = Request(text, StepBudget(num_steps), 0)
    sequence = runner.sequence(0, plain, scheduler.chunk)
    scheduler.add(sequence)
    scheduler.admit()
    sequence.skip(runner.attach(sequence))
    if (sequence.cached or 0) < prefix:
        raise RuntimeError(f"{sequence.cached} of {prefix} positions are known")
    sequence.request = replace(plain, prompt_logprobs=0)
    nats: list[float] = []
    while batch := scheduler.schedule():
        result = runner.run(batch).get(sequence.id) or StepResult()
        nats += [-entry.logprob for entry in result.prompt_logprobs or ()]
        sequence.advance(result)
        if sequence.is_done:
            runner.release(sequence)
            scheduler.remove(sequence)
    return statistics.mean(nats)


def compute(served: Served, text: tuple[int, ...], num_steps: int) -> None:
    """Make the prefix of ``text`` known at K."""
    with Engine(lambda: served) as engine:
        engine.generate([Request(text, StepBudget(num_steps), 1, SamplingParams(temperature=0))])


def main(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`, for the texts.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    num_steps: Annotated[str, typer.Option(help="K, with commas.")] = "1,4,16",
    prefix: Annotated[int, typer.Option(help="Known positions, a multiple of 64.")] = 128,
    length: Annotated[int, typer.Option(help="Positions of a text.")] = 240,
    texts: Annotated[int, typer.Option(help="Texts of the loss.")] = 64,
    rounds: int = 9,
) -> None:
    """Time to the first token, and the loss of other K, at each K."""
    ks = [int(part) for part in num_steps.split(",")]
    windows = held_out_prompts(data, texts, length)
    settings = EngineSettings(
        max_slots=4, max_len=length + 1, max_steps=max(ks), chunk=64, prefix_cache="exact"
    )
    speed = []
    for k in ks:
        times: dict[str, list[float]] = {"known": [], "new": []}
        with Engine(lambda: load_served(checkpoint, settings)) as engine:
            for turn in range(rounds + 1):  # the first one warms up
                text = windows[turn % len(windows)]
                new, _ = first_token_ms(engine, text, k)
                again = (*text[: length - FRESH], *windows[turn - 1][:FRESH])
                known, found = first_token_ms(engine, again, k)
                if turn:
                    times["new"].append(new)
                    times["known"].append(known)
        medians = {name: statistics.median(values) for name, values in times.items()}
        speed.append(
            {
                "num_steps": k,
                "first_token_ms": times,
                "cached_tokens": found,
                "ratio": medians["new"] / medians["known"],
            }
        )
        print(k, medians, found, flush=True)
    loss = []
    any_steps = settings.model_copy(update={"prefix_cache": "any-steps"})
    for k in ks:
        nats: dict[int, list[float]] = {}
        for source in ks:
            served = load_served(checkpoint, any_steps)
            nats[source] = []
            for text in windows:
                compute(served, (*text[:prefix], text[prefix]), source)
                nats[source].append(continuation_nats(served, text, prefix, k))
        for source in ks:
            gaps = [other - same for other, same in zip(nats[source], nats[k], strict=True)]
            row = {
                "num_steps": k,
                "prefix_num_steps": source,
                "nats_per_token": statistics.mean(nats[source]),
            }
            if source != k:
                row |= {
                    "difference": statistics.mean(gaps),
                    "half_width": 1.96 * statistics.stdev(gaps) / math.sqrt(texts),
                }
            loss.append(row)
            print(row, flush=True)
    facts = {
        "prefix": prefix,
        "length": length,
        "texts": texts,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
    }
    write_json(out, {"provenance": provenance(), **facts, "first_token": speed, "loss": loss})


if __name__ == "__main__":
    typer.run(main)
