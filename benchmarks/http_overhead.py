"""What HTTP costs: the same requests through `rdlm serve` and through an engine in this process, in turns.

    python -m benchmarks.http_overhead --out docs/results/raw/http-overhead.json

Every client streams one completion; the engine gets all of them at once. Server, clients and engine share the
machine and never work at the same time, except for a server with its clients. Medians over rounds.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.client import Sample, ask, connect, quantiles, running_server
from benchmarks.common import provenance, write_json
from benchmarks.engine import build_model
from rdlm.checkpoints.folder import save
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings


async def over_http(url: str, bodies: list[dict[str, Any]]) -> tuple[float, list[Sample]]:
    """Seconds until every client has its answer, and what each saw."""
    async with connect(url) as client:
        began = time.monotonic()
        samples = await asyncio.gather(*(ask(client, body, began) for body in bodies))
        return time.monotonic() - began, list(samples)


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    clients: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
    num_steps: int = 4,
    prompt_tokens: int = 32,
    num_tokens: int = 64,
    rounds: int = 5,
    width: Annotated[int, typer.Option(help="Of the random 8-layer model.")] = 512,
) -> None:
    """Tokens a second of both, their ratio, and the time between tokens that clients see."""
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
    seconds: dict[str, list[float]] = {"http": [], "engine": []}
    gaps: list[float] = []
    firsts: list[float] = []
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
                took, samples = asyncio.run(over_http(live.url, bodies))
                failed = [sample.problem for sample in samples if not sample.done]
                if failed:
                    raise RuntimeError(f"a request failed: {failed[0]}")
                began = time.monotonic()
                engine.generate(requests)
                alone = time.monotonic() - began
                if turn:
                    seconds["http"].append(took)
                    seconds["engine"].append(alone)
                    gaps += [gap for sample in samples for gap in sample.gaps]
                    firsts += [sample.ttft for sample in samples]
    count = clients * num_tokens
    rates = {name: count / statistics.median(values) for name, values in seconds.items()}
    between = quantiles(gaps)
    assert between is not None
    result = {
        "provenance": provenance(), "clients": clients, "num_steps": num_steps, "prompt_tokens": prompt_tokens,
        "num_tokens": num_tokens, "width": width, "threads": torch.get_num_threads(), "seconds": seconds,
        "tokens_per_second": rates, "http_over_engine": rates["http"] / rates["engine"],
        "between_tokens_s": between, "p99_over_median": between["p99"] / between["p50"],
        "first_token_s": quantiles(firsts),
    }  # fmt: skip
    for name in ("tokens_per_second", "http_over_engine", "between_tokens_s", "p99_over_median"):
        print(name, result[name])
    write_json(out, result)


if __name__ == "__main__":
    typer.run(main)
