"""How much of the saving of adaptive depth the engine reaches at full load.

    python -m benchmarks.mixed_depth --out docs/results/raw/mixed-depth.json

Every position exits at a known depth, drawn evenly from 1 to K: the sum of core steps asked for over K times the
tokens is what an engine without loss would need. All requests are submitted at once, several times as many as
there are slots, and only the time while some wait counts. *calls* compares core steps of the engine with those of
full batches; *time* compares seconds per token with those of the same engine when every position takes K steps
(sides take turns, medians). Prelude, coda and read-out take no part in what depth saves: *work* is the saving in
FLOPs that they leave. Positions that end at different steps are read out together where waiting costs less
(serve/engine/scheduler.py): core_calls_per_token and readouts_per_token count what became of it; ``--no-waiting`` is
the engine without.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import torch
import typer

from benchmarks.common import provenance, write_json
from benchmarks.engine import build_model
from rdlm.flops import costs_of
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Event, Request, StepBudget
from serve.loading import build_served, optimise
from serve.settings import EngineSettings


@dataclass
class Load:
    """What an engine did while requests waited. rows: of core steps of positions that are decoded; readouts:
    passes through the coda."""

    seconds: float
    tokens: int
    calls: int
    rows: int
    readouts: int


class CountedDecode:
    """A model's ``decode`` that counts its calls."""

    def __init__(self, engine: Engine) -> None:
        self.model = engine.served.runner.denoiser.model  # type: ignore[attr-defined]
        self.plain, self.calls = self.model.decode, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.plain(*args)

    def __enter__(self) -> CountedDecode:
        self.model.decode = self
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.decode


def full_load(engine: Engine, requests: Sequence[Request]) -> Load:
    """Run requests; from the first token on, as long as others wait."""
    marks: list[tuple[float, int, int, int, int]] = []
    tokens, rows, ends = 0, 0, SimpleQueue[str]()

    def sink(event: Event) -> None:  # in the engine's thread
        nonlocal tokens, rows
        if event.token is not None and event.steps is not None:
            tokens, rows = tokens + 1, rows + event.steps
        if engine.num_waiting:
            marks.append((time.perf_counter(), tokens, engine.counters.steps, rows, decode.calls))
        if event.finish is not None:
            ends.put(event.finish)

    with CountedDecode(engine) as decode:
        engine.submit(requests, sink)
        for _ in requests:
            ends.get()
    first, last = marks[0], marks[-1]
    t, n, c, r, d = (end - start for start, end in zip(first, last, strict=True))
    return Load(t, int(n), int(c), int(r), int(d))


def workload(num_steps: int, count: int, tokens: int, adaptive: bool, vocab_size: int) -> list[Request]:
    """Prompts of one token, so that nothing but decoding counts."""
    rng = random.Random(0)
    depths = [[rng.randint(1, num_steps) for _ in range(tokens)] for _ in range(count)]
    return [
        Request(
            (rng.randrange(vocab_size),),
            StepBudget(num_steps, schedule=tuple(steps) if adaptive else ()),
            tokens,
            SamplingParams(temperature=0),
        )
        for steps in depths
    ]


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    num_steps: Annotated[int, typer.Option(help="K, the largest depth.")] = 16,
    slots: str = "4,16,64",
    width: int = 256,
    num_tokens: int = 24,
    requests_per_slot: int = 3,
    rounds: int = 3,
    waiting: bool = True,
) -> None:
    """Saving by number of slots."""
    rows: list[dict[str, Any]] = []
    for count in (int(part) for part in slots.split(",")):
        denoiser, config, tokenizer = build_model(width, 4096, 64)
        costs = costs_of(denoiser)
        once = costs.encode.weights + costs.decode.weights + costs.head
        settings = EngineSettings(max_slots=count, prefix_cache="off")
        served = build_served(denoiser, config, tokenizer, settings)
        if not waiting:
            served = replace(served, scheduler=Scheduler(count, settings.prefill_rows, settings.chunk))
        optimise(denoiser, settings)
        sides = {
            adaptive: workload(
                num_steps, count * requests_per_slot, num_tokens, adaptive, tokenizer.vocab_size
            )
            for adaptive in (False, True)
        }
        found: dict[bool, list[Load]] = {side: [] for side in sides}
        with Engine(lambda served=served: served) as engine:
            for turn in range(rounds + 1):  # the first one warms up
                for side, requests in sides.items():
                    measured = full_load(engine, requests)
                    if turn:
                        found[side].append(measured)
        exact = found[True][0]
        asked = exact.rows / (num_steps * exact.tokens)
        per_token = {s: statistics.median(r.seconds / r.tokens for r in runs) for s, runs in found.items()}
        work = (once + asked * num_steps * costs.core.weights) / (once + num_steps * costs.core.weights)
        rows.append(
            {
                "slots": count,
                "steps_asked_for": asked,
                "rows_per_call": exact.rows / exact.calls,
                "core_calls_per_token": exact.calls / exact.tokens,
                "readouts_per_token": exact.readouts / exact.tokens,
                "share_by_calls": (1 - exact.calls * count / (num_steps * exact.tokens)) / (1 - asked),
                "share_by_work": (1 - work) / (1 - asked),
                "share_by_time": (1 - per_token[True] / per_token[False]) / (1 - asked),
                "seconds_per_token": {"K": per_token[False], "known depths": per_token[True]},
            }
        )
        print(rows[-1], flush=True)
    facts = {
        "num_steps": num_steps,
        "width": width,
        "num_tokens": num_tokens,
        "rounds": rounds,
        "waiting": waiting,
    }
    write_json(out, {"provenance": provenance(), **facts, "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
