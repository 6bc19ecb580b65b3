"""Latency and throughput of `rdlm serve` under closed-loop and open-loop (Poisson) load with a mix of K.

    python -m benchmarks.serve --out docs/results/raw/serve.json

Starts its own server unless --url names one; without --checkpoint it serves a random 8-layer model of width
512. Closed loop: N clients that send as soon as they have their answer. Open loop: arrivals that wait for
nobody, at --rate requests a second or at --load times the best rate of the closed loops. TTFT counts from the
moment a request was due, ITL is the time from one token of a request to its next; goodput counts the requests
that meet both bounds. Client and server share the machine, so the client's own work is part of the figures.
"""

from __future__ import annotations

import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.client import (
    Sample,
    Server,
    Workload,
    ask,
    closed_loop,
    connect,
    open_loop,
    parse_steps,
    quantiles,
    running_server,
    scrape,
)  # fmt: skip
from benchmarks.common import provenance, write_json
from benchmarks.engine import build_model
from rdlm.checkpoints.folder import save
from rdlm.cli import run
from rdlm.errors import UserError

app = typer.Typer(add_completion=False)
Send = Callable[[float], Awaitable[Sample]]


def figures(
    samples: list[Sample], seconds: float, since: float, ttft_bound: float, itl_bound: float
) -> dict[str, Any]:
    """What the clients saw. Rates count what arrived within ``seconds`` after ``since``; latencies count
    every complete answer."""
    done = [sample for sample in samples if sample.done]
    good = [
        s for s in done if s.ttft <= ttft_bound and (not s.gaps or sum(s.gaps) / len(s.gaps) <= itl_bound)
    ]
    until = since + seconds
    tokens = sum(s.due + t <= until for s in samples for t in s.tokens)
    return {
        "seconds": seconds, "sent": len(samples), "complete": len(done),
        "by_status": {str(status): n for status, n in sorted(Counter(s.status for s in samples).items())},
        "broken": [s.problem for s in samples if s.status in (0, 200) and not s.done],
        "requests_per_s": sum(s.due + s.tokens[-1] <= until for s in done) / seconds,
        "goodput_per_s": sum(s.due + s.tokens[-1] <= until for s in good) / seconds,
        "share_within_bounds": len(good) / len(samples) if samples else None,
        "tokens_per_s": tokens / seconds,
        "ttft_s": quantiles([s.ttft for s in done]), "itl_s": quantiles([gap for s in done for gap in s.gaps]),
        "itl_s_by_steps": {
            str(k): quantiles([gap for s in done if s.num_steps == k for gap in s.gaps])
            for k in sorted({s.num_steps for s in done})
        },
    }  # fmt: skip


def engine_figures(before: dict[str, float], after: dict[str, float], seconds: float) -> dict[str, float]:
    """What the server's /metrics say about the same time."""
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    steps = gained["rdlm_core_steps_total"]
    rows, tokens = gained["rdlm_rows_per_core_step_sum"], gained["rdlm_tokens_total"]
    busy = gained["rdlm_busy_seconds_total"]
    return {
        "core_steps_per_s": steps / seconds, "rows_per_step": rows / steps if steps else 0.0,
        "core_rows_per_s": rows / seconds, "mean_k": gained["rdlm_steps_per_token_sum"] / tokens if tokens else 0.0,
        "busy_share": busy / seconds,
        "bookkeeping_share": 1 - gained["rdlm_model_seconds_total"] / busy if busy else 0.0,
    }  # fmt: skip


async def measure(
    client: httpx.AsyncClient, seconds: float, bounds: tuple[float, float], run: Awaitable[list[Sample]]
) -> dict[str, Any]:
    """One point: the load ``run`` makes, and the engine's own figures of its first ``seconds``."""
    before, began = await scrape(client), time.monotonic()
    load = asyncio.ensure_future(run)
    await asyncio.sleep(seconds)
    lasted = time.monotonic() - began
    after = await scrape(client)
    samples = await load
    return figures(samples, seconds, began, *bounds) | {"engine": engine_figures(before, after, lasted)}


async def measure_all(
    client: httpx.AsyncClient, workload: Workload, clients: list[int], rates: list[float], loads: list[float],
    seconds: float, bounds: tuple[float, float], seed: int, tell: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    rng = random.Random(seed)

    async def send(due: float) -> Sample:
        return await ask(client, workload.body(rng, stream=True), due)

    points: list[dict[str, Any]] = []

    async def point(mode: str, level: float, run: Awaitable[list[Sample]]) -> None:
        points.append({"mode": mode, "level": level} | await measure(client, seconds, bounds, run))
        tell(points[-1])

    await closed_loop(min(3.0, seconds), max(clients, default=4), send)  # warm up
    for lanes in clients:
        await point("closed", lanes, closed_loop(seconds, lanes, send))
    best = max((found["tokens_per_s"] for found in points), default=0.0) / workload.num_tokens
    for rate in [*rates, *(load * best for load in loads)]:
        await point("open", rate, open_loop(seconds, rate, rng, send))
    return points


def row(point: dict[str, Any]) -> list[str]:
    ttft, itl = (
        [f"{1e3 * q[name]:.0f}" if q else "-" for name in ("p50", "p90", "p99")]
        for q in (point["ttft_s"], point["itl_s"])
    )
    load = f"{point['level']:.0f} clients" if point["mode"] == "closed" else f"{point['level']:.2f} req/s"
    engine = point["engine"]
    status = " ".join(f"{status}:{n}" for status, n in point["by_status"].items())
    return [
        load, f"{point['requests_per_s']:.2f}", f"{point['goodput_per_s']:.2f}",
        f"{point['tokens_per_s']:.1f}", " ".join(ttft),
        " ".join(itl), f"{engine['core_steps_per_s']:.1f}", f"{engine['rows_per_step']:.1f}",
        f"{engine['bookkeeping_share']:.1%}", status,
    ]  # fmt: skip


def table(points: list[dict[str, Any]]) -> Table:
    shown = Table(
        "load",
        "req/s",
        "goodput",
        "tokens/s",
        "TTFT ms p50 p90 p99",
        "ITL ms p50 p90 p99",
        "steps/s",
        "rows/step",
        "bookkeeping",
        "status",
    )
    for point in points:
        shown.add_row(*row(point))
    return shown


def numbers(text: str, field: str) -> list[float]:
    """ "1,4" -> [1.0, 4.0]; "" -> []. Raises UserError."""
    try:
        found = [float(item) for item in text.split(",") if item.strip()]
    except ValueError:
        found = [0.0]
    if any(value <= 0 for value in found):
        raise UserError(field, text, "is not a list of positive numbers", "write for example 1,4,16")
    return found


def card(url: str, key: str | None) -> tuple[dict[str, Any], int]:
    """The served model's entry of /v1/models and its vocabulary."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    models, tokenizer = (
        httpx.get(url + path, headers=headers).raise_for_status().json()
        for path in ("/v1/models", "/tokenizer_info")
    )
    return models["data"][0], tokenizer["vocab_size"]


@contextmanager
def reach(url: str | None, checkpoint: Path | None, options: str) -> Iterator[Server]:
    """The server at ``url``, or one started for ``checkpoint``, or for the random model of
    benchmarks/engine.py."""
    if url is not None:
        if checkpoint is not None or options:
            raise UserError(
                "url", url, "that server is already running", "leave out --checkpoint and --server"
            )
        yield Server(url.rstrip("/"))
        return
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint is None:
            checkpoint = Path(folder) / "model"
            denoiser, config, tokenizer = build_model(512, 4096, 512)
            save(checkpoint, denoiser, config, tokenizer)
        with running_server(checkpoint, options) as live:
            yield live


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Serve this one instead of a random model.")] = None,
    url: Annotated[str | None, typer.Option(help="Or use this running server.")] = None,
    server: Annotated[str, typer.Option(help="Further options of rdlm serve, as one string.")] = "",
    api_key: Annotated[str | None, typer.Option(envvar="RDLM_API_KEY")] = None,
    clients: Annotated[str, typer.Option(help="Closed loops: clients of each.")] = "1,4,16",
    rate: Annotated[str, typer.Option(help="Open loops: requests a second of each.")] = "",
    load: Annotated[
        str, typer.Option(help="Open loops: times the best rate of the closed ones.")
    ] = "0.5,0.8,1.2",
    steps: Annotated[str, typer.Option(help="Mix of K: K or K:weight, ...")] = "4,8,16,32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean.")] = 32,
    num_tokens: Annotated[int, typer.Option(min=1, help="Mean of an answer.")] = 32,
    seconds: Annotated[float, typer.Option(min=1, help="Of each point.")] = 20.0,
    ttft_ms: Annotated[float, typer.Option(help="Goodput: largest time to the first token.")] = 2000.0,
    itl_ms: Annotated[
        float, typer.Option(help="Goodput: largest mean time between an answer's tokens.")
    ] = 200.0,
    seed: int = 0,
) -> None:
    """Measure every point, print a table, write everything."""
    lanes, rates, loads = (
        [round(n) for n in numbers(clients, "clients")],
        numbers(rate, "rate"),
        numbers(load, "load"),
    )
    if loads and not lanes:
        raise UserError(
            "load",
            load,
            "is relative to closed loops and there are none",
            "name --clients, or --rate instead",
        )
    mix, console = parse_steps(steps), Console(width=max(150, Console().width))
    with reach(url, checkpoint, server) as live:
        model, vocab_size = card(live.url, api_key)
        workload = Workload(vocab_size, prompt_tokens, num_tokens, mix)

        async def load_it() -> list[dict[str, Any]]:
            async with connect(live.url, api_key) as client:
                return await measure_all(
                    client, workload, lanes, rates, loads, seconds, (ttft_ms / 1e3, itl_ms / 1e3), seed,
                    lambda point: console.print("  ".join(row(point)), style="dim"),
                )  # fmt: skip

        points = asyncio.run(load_it())
    console.print(table(points))
    write_json(out, {
        "provenance": provenance(), "seed": seed, "server_options": server, "model": model,
        "workload": {"steps": mix, "prompt_tokens": prompt_tokens, "num_tokens": num_tokens},
        "bounds": {"ttft_s": ttft_ms / 1e3, "itl_s": itl_ms / 1e3}, "points": points,
    })  # fmt: skip


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], "benchmarks.serve"))
