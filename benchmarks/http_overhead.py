"""What HTTP costs: the same requests through `rdlm serve` and through an engine in this process, in turns.

    python -m benchmarks.http_overhead --out docs/results/raw/http-overhead.json

Every client streams one completion; the engine gets all of them at once. Server, clients and engine share the
machine and never work at the same time, except for a server with its clients, which take their part of it:
``raw`` clients count chunks and parse nothing, ``httpx`` ones read lines and parse JSON, as a program would.
Medians over rounds of tokens a second, and of the CPU time that a token costs: of the server's engine thread,
of its event loop, of its whole process (the threads of kernels wait by spinning, so this is no more than what
the cores were held for) and of the clients. CPU times of threads say what HTTP costs on a busy machine too.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.client import Sample, ask, ask_raw, connect, quantiles, running_server, scrape
from benchmarks.common import provenance, write_json
from benchmarks.engine import build_model
from rdlm.checkpoints.folder import save
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

SIDES = ("raw", "httpx", "engine")
"""HTTP with either kind of client, and the engine alone."""


async def over_http(
    url: str, bodies: list[dict[str, Any]], side: str
) -> tuple[dict[str, float], list[Sample]]:
    """Seconds until every client has its answer, CPU seconds of each part, and what each client saw."""
    async with connect(url) as client:
        before, began, spent = await scrape(client), time.monotonic(), time.process_time()
        asked = [ask(client, b, began) if side == "httpx" else ask_raw(url, b, began) for b in bodies]
        samples = list(await asyncio.gather(*asked))
        seconds, clients = time.monotonic() - began, time.process_time() - spent
        after = await scrape(client)
    failed = [sample.problem for sample in samples if not sample.done]
    if failed:
        raise RuntimeError(f"a request failed: {failed[0]}")
    gained = {
        of: after[f"rdlm_cpu_seconds_total{{of={of}}}"] - before[f"rdlm_cpu_seconds_total{{of={of}}}"]
        for of in ("engine", "event_loop", "process")
    }
    return {"wall": seconds, **gained, "clients": clients}, samples


def alone(engine: Engine, requests: list[Request]) -> dict[str, float]:
    """The same figures of the engine in this process, whose threads are all its own meanwhile."""
    clocks: tuple[Callable[[], float], ...] = (time.monotonic, lambda: engine.cpu_s, time.process_time)
    before = [clock() for clock in clocks]
    engine.generate(requests)
    return {
        name: clock() - b
        for name, clock, b in zip(("wall", "engine", "process"), clocks, before, strict=True)
    }


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    num_steps: int = 4,
    prompt_tokens: int = 32,
    num_tokens: int = 64,
    rounds: int = 5,
    width: Annotated[int, typer.Option(help="Of the random 8-layer model.")] = 512,
) -> None:
    """Tokens a second of each side, their ratios, CPU time of a token, and the time between tokens that raw
    clients see."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 4000, (clients, prompt_tokens), generator=rng).tolist()
    requests = [
        Request(tuple(ids), StepBudget(num_steps), num_tokens, SamplingParams(temperature=0.8), seed=i)
        for i, ids in enumerate(prompts)
    ]
    bodies: list[dict[str, Any]] = [
        {"prompt": ids, "num_steps": num_steps, "max_tokens": num_tokens, "ignore_eos": True,
         "temperature": 0.8, "seed": i, "stream": True}
        for i, ids in enumerate(prompts)
    ]  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    seen: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model"
        denoiser, config, tokenizer = build_model(width, 4096, prompt_tokens + num_tokens)
        save(checkpoint, denoiser, config, tokenizer)
        settings = EngineSettings(max_slots=clients, prefix_cache="off")
        with (
            running_server(checkpoint, f"--max-slots {clients} --prefix-cache off") as live,
            Engine(lambda: load_served(checkpoint, settings)) as engine,
        ):
            for turn in range(rounds + 1):  # the first one warms up
                for side in SIDES:
                    if side == "engine":
                        figures = alone(engine, requests)
                    else:
                        figures, samples = asyncio.run(over_http(live.url, bodies, side))
                        seen += samples if turn and side == "raw" else []
                    if turn:
                        found[side].append(figures)
    count = clients * num_tokens
    medians = {
        side: {name: statistics.median(f[name] for f in rows) for name in rows[0]}
        for side, rows in found.items()
    }
    rates = {side: count / of["wall"] for side, of in medians.items()}
    cpu = {
        side: {name: 1e6 * value / count for name, value in of.items() if name != "wall"}
        for side, of in medians.items()
    }
    between = quantiles([gap for sample in seen for gap in sample.gaps])
    assert between is not None
    result = {
        "provenance": provenance(), "clients": clients, "num_steps": num_steps, "prompt_tokens": prompt_tokens,
        "num_tokens": num_tokens, "width": width, "threads": torch.get_num_threads(), "rounds": found,
        "tokens_per_second": rates, "http_over_engine": {s: rates[s] / rates["engine"] for s in SIDES[:2]},
        "cpu_us_per_token": cpu, "between_tokens_s": between,
        "p99_over_median": between["p99"] / between["p50"], "first_token_s": quantiles([s.ttft for s in seen]),
    }  # fmt: skip
    for name in ("tokens_per_second", "http_over_engine", "cpu_us_per_token", "between_tokens_s"):
        print(name, result[name])
    write_json(out, result)


if __name__ == "__main__":
    typer.run(main)
