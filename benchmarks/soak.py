"""Hours of unfriendly traffic in minutes: `rdlm serve` at twice its capacity, with clients that leave, dawdle
and talk nonsense.

    python -m benchmarks.soak --minutes 30 --out docs/results/raw/soak.json

Measures the capacity with well-behaved clients first, then sends Poisson arrivals at --overload times that.
Checked: every status is the promised one, every accepted answer that its client waits for comes to its end
with all its tokens, memory stays flat, p99 TTFT of admitted requests stays below --ttft-factor x (queue +
slots) / capacity (the time a full house takes, and as much again for refusing the rest), no slot stays taken,
the log has no defect, SIGTERM ends the server with status 0. Exit status 1 when a check fails; the JSON is
written either way.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

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
    scrape,
)
from benchmarks.common import provenance, write_json
from benchmarks.serve import card, reach
from rdlm.cli import run

app = typer.Typer(add_completion=False)
MIB = 1 << 20
KINDS = {
    "stream": 40, "plain": 15, "score": 5, "leave-stream": 10, "leave-plain": 5, "slow-reader": 5,
    "malformed": 12, "oversized": 2,
    "half-body": 6,
}  # fmt: skip
"""Weights. The first six are requests that are to be answered with 200 or 429."""
VALID = ("stream", "plain", "score", "leave-stream", "leave-plain", "slow-reader")
MALFORMED: list[tuple[str, str, bytes, int]] = [
    ("POST", "/v1/completions", b"{", 400),
    ("POST", "/v1/completions", b"", 400),
    ("POST", "/v1/completions", b"[]", 400),
    ("POST", "/v1/completions", b"\xff\xfe\x00", 400),
    ("POST", "/v1/completions", b'{"prompt": NaN}', 400),
    ("POST", "/v1/completions", b"[" * 100_000, 400),
    ("POST", "/v1/completions", b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "num_steps": 0}', 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "num_steps": 1e30}', 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "temperature": -1}', 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}", 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "unknown": 1}', 400),
    ("POST", "/v1/completions", b'{"prompt": [[5, 999999999]]}', 400),
    ("POST", "/v1/completions", b'{"prompt": [-1]}', 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "max_tokens": 999999}', 400),
    ("POST", "/v1/completions", b'{"prompt": "x", "model": "nobody"}', 404),
    ("POST", "/v1/completions", b'{"prompt": "x", "logit_bias": {"a": 1}}', 400),
    ("POST", "/v1/chat/completions", b'{"messages": []}', 400),
    ("POST", "/v1/score", b'{"prompt": "x"}', 400),
    ("POST", "/tokenize", b'{"prompt": 5}', 400),
    ("POST", "/detokenize", b'{"tokens": [999999999]}', 400),
    ("GET", "/v1/completions", b"", 405),
    ("GET", "/nowhere", b"", 404),
    ("GET", "/v1/models/nobody", b"", 404),
]
"""Method, path, body and the status that is promised for it."""


async def refused(
    client: httpx.AsyncClient, method: str, path: str, body: bytes, wanted: int, due: float, kind: str
) -> Sample:
    """Send what must be refused with ``wanted`` and OpenAI's form of an error."""
    sample = Sample(kind, 0, due)
    try:
        answer = await client.request(
            method, path, content=body, headers={"Content-Type": "application/json"}
        )
    except httpx.HTTPError as error:  # of a body too large the server may close before all of it was sent
        sample.problem = (
            None if wanted == 413 and isinstance(error, httpx.WriteError | httpx.ReadError) else repr(error)
        )
        return sample
    sample.status = answer.status_code
    try:
        told = bool(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        told = False
    if sample.status not in (wanted, 429) or not told:  # a full queue refuses before it reads a body
        sample.problem = (
            f"{method} {path} {body[:60]!r}: {wanted} was promised, got {sample.status} {answer.text[:200]!r}"
        )
    return sample


async def score(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Sample:
    """The prompt at two K."""
    sample = Sample("score", body["num_steps"], due)
    try:
        answer = await client.post(
            "/v1/score", json={"prompt": body["prompt"], "num_steps": [1, body["num_steps"]]}
        )
        sample.status, sample.done = answer.status_code, answer.status_code == 200
    except httpx.HTTPError as error:
        sample.problem = repr(error)
    return sample


async def leave_plain(client: httpx.AsyncClient, body: dict[str, Any], due: float, patience: float) -> Sample:
    """Hang up after ``patience`` seconds, answer or not; a status stays 0 where none came in time."""
    try:
        return await asyncio.wait_for(ask(client, body, due, "leave-plain"), patience)
    except TimeoutError:
        return Sample("leave-plain", body["num_steps"], due)


def _post(host: str, body: bytes, length: int) -> bytes:
    head = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {host}",
        "Connection: close",
        "Content-Type: application/json",
    ]
    return "\r\n".join([*head, f"Content-Length: {length}", "", ""]).encode() + body


async def half_body(url: str, due: float, rng: random.Random) -> Sample:
    """Announce a body, send a piece of it, hang up."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    writer.write(_post(where.netloc, b'{"prompt": "x', 1000))
    await writer.drain()
    await asyncio.sleep(rng.uniform(0, 1))
    writer.close()
    return Sample("half-body", 0, due)


async def read_slowly(url: str, body: dict[str, Any], due: float) -> Sample:
    """A stream fat with log-probabilities read through a tiny window at some 100 kB/s: the server's buffers
    fill."""
    sample, where = Sample("slow-reader", body["num_steps"], due, asked=body["max_tokens"]), urlsplit(url)
    pipe = socket.socket()
    pipe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    pipe.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(pipe, (where.hostname, where.port))
        reader, writer = await asyncio.open_connection(sock=pipe, limit=2048)
        content = json.dumps(body | {"stream": True, "logprobs": 20}).encode()
        writer.write(_post(where.netloc, content, len(content)))
        raw = bytearray()
        while received := await reader.read(2048):
            raw += received
            fresh = raw.count(b'"finish_reason"') - len(sample.tokens)
            sample.tokens += [time.monotonic() - due] * fresh
            await asyncio.sleep(0.02)
        writer.close()
        sample.status = int(raw.split(b" ", 2)[1])
        sample.done = b"data: [DONE]\n\n" in raw and b'{"error"' not in raw
    except (OSError, IndexError, ValueError) as error:
        sample.problem = repr(error)
    return sample


class Traffic:
    """Draws what each arrival does, all from one seed."""

    def __init__(
        self, client: httpx.AsyncClient, url: str, workload: Workload, body_limit: int, seed: int
    ) -> None:
        self.client, self.url, self.workload, self.rng = client, url, workload, random.Random(seed)
        self.oversized = b'{"prompt": "' + b"x" * body_limit + b'"}'

    async def send(self, due: float) -> Sample:
        rng, client = self.rng, self.client
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        body = self.workload.body(rng)
        if kind in ("stream", "plain"):
            return await ask(client, body | {"stream": kind == "stream"}, due, kind)
        if kind == "leave-stream":
            return await ask(
                client, body | {"stream": True}, due, kind, leave=rng.randint(1, body["max_tokens"])
            )
        if kind == "leave-plain":
            return await leave_plain(client, body, due, rng.uniform(0.01, 3))
        if kind == "slow-reader":
            return await read_slowly(self.url, body, due)
        if kind == "score":
            return await score(client, body, due)
        if kind == "half-body":
            return await half_body(self.url, due, rng)
        if kind == "oversized":
            return await refused(client, "POST", "/v1/completions", self.oversized, 413, due, kind)
        return await refused(client, *rng.choice(MALFORMED), due, kind)


def complaint(sample: Sample) -> str | None:
    """What the server broke its promise with, if it did."""
    if sample.kind not in VALID:
        return sample.problem
    left = sample.kind.startswith("leave")
    if sample.status == 429 or (left and sample.status in (0, 200)):
        return None
    if sample.status != 200:
        return f"{sample.kind}: status {sample.status}: {sample.problem}"
    if not sample.done or len(sample.tokens) != sample.asked:
        return (
            f"{sample.kind}: {len(sample.tokens)} of {sample.asked} tokens, "
            f"{'' if sample.done else 'no end, '}{sample.problem}"
        )
    return None


async def watch_memory(pid: int, every: float, into: list[tuple[float, float]]) -> None:
    """Append (seconds, MiB resident) until cancelled."""
    process, began = psutil.Process(pid), time.monotonic()
    while True:
        into.append((time.monotonic() - began, process.memory_info().rss / MIB))
        await asyncio.sleep(every)


def memory(series: list[tuple[float, float]], requests: int) -> dict[str, Any]:
    """growth_mib: median of the last quarter of the time less that of the second; the first is warm-up."""
    resident = np.array([mib for _, mib in series])
    quarters = np.array_split(resident, 4)
    growth = float(np.median(quarters[3]) - np.median(quarters[1]))
    return {"growth_mib": growth, "growth_kib_per_request": 1024 * growth / max(1, requests / 2),
            "largest_mib": float(resident.max()),
            "series_s_mib": [(round(s, 1), round(m, 2)) for s, m in series]}  # fmt: skip


async def settle(client: httpx.AsyncClient, workload: Workload, seconds: float = 60.0) -> dict[str, Any]:
    """Wait until the server is idle, then ask it once more."""
    until = time.monotonic() + seconds
    while (busy := await scrape(client))["rdlm_kv_slots_used"] + busy[
        "rdlm_queue_sequences"
    ] and time.monotonic() < until:
        await asyncio.sleep(0.5)
    again = await ask(client, workload.body(random.Random(0), stream=True), time.monotonic())
    return {"slots_left_taken": busy["rdlm_kv_slots_used"], "answers_again": again.done, "metrics": busy}


async def soak(
    live: Server,
    workload: Workload,
    seconds: float,
    calibrate: float,
    slots: int,
    overload: float,
    body_limit: int,
    seed: int,
) -> dict[str, Any]:
    """All phases; returns what was seen, unjudged."""
    assert live.process is not None
    async with connect(live.url) as client:
        traffic = Traffic(client, live.url, workload, body_limit, seed)

        async def friendly(due: float) -> Sample:
            return await ask(client, workload.body(traffic.rng, stream=True), due)

        await closed_loop(2, slots, friendly)
        began = time.monotonic()
        calm = await closed_loop(calibrate, 2 * slots, friendly)
        capacity = len(calm) / (time.monotonic() - began)
        answered = sum(KINDS[kind] for kind in ("stream", "plain", "slow-reader")) / sum(KINDS.values())
        rate = overload * capacity / answered
        series: list[tuple[float, float]] = []
        watcher = asyncio.ensure_future(watch_memory(live.process.pid, max(0.5, seconds / 400), series))
        with tqdm(
            desc=f"capacity {capacity:.2f}/s, sending {rate:.2f}/s", unit=" requests", mininterval=5
        ) as bar:
            samples = await open_loop(seconds, rate, traffic.rng, traffic.send, bar.update)
        watcher.cancel()
        after = await settle(client, workload)
    return {
        "capacity_per_s": capacity,
        "arrivals_per_s": rate,
        "samples": samples,
        "series": series,
        "after": after,
    }


def report(
    seen: dict[str, Any], ttft_bound: float, growth_bound: float, exit_status: int | None, log: str
) -> dict[str, Any]:
    """Figures and the verdict on each check."""
    samples: list[Sample] = seen.pop("samples")
    complaints = [text for text in map(complaint, samples) if text is not None]
    admitted = [s.ttft for s in samples if s.kind in ("stream", "leave-stream") and s.tokens]
    resident, ttft = memory(seen.pop("series"), len(samples)), quantiles(admitted)
    checks = {
        "every status is promised and every awaited answer complete": not complaints,
        "memory is flat": resident["growth_mib"] <= growth_bound,
        "p99 TTFT within its bound": ttft is not None and ttft["p99"] <= ttft_bound,
        "no slot stays taken and the server answers": not seen["after"]["slots_left_taken"]
        and seen["after"]["answers_again"],
        "the log has no defect": "Traceback" not in log,
        "SIGTERM ends it with status 0": exit_status == 0,
    }  # fmt: skip
    by_kind = {
        kind: dict(sorted(Counter(str(s.status) for s in samples if s.kind == kind).items()))
        for kind in KINDS
    }
    return seen | {
        "checks": checks, "complaints": len(complaints), "first_complaints": complaints[:20], "status_by_kind": by_kind,
        "sent": len(samples), "ttft_s": ttft, "ttft_bound_s": ttft_bound, "memory": resident,
        "growth_bound_mib": growth_bound,
        "log_tail": log[-2000:],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    table = Table("kind", "answers by status (0: left before one)")
    for kind, statuses in found["status_by_kind"].items():
        table.add_row(kind, "  ".join(f"{status}: {n}" for status, n in statuses.items()))
    console = Console()
    console.print(table)
    for name, held in found["checks"].items():
        console.print(f"{'ok    ' if held else 'FAILED'} {name}", style="" if held else "bold red")
    for text in found["first_complaints"][:5]:
        console.print(text, markup=False)
    ttft = found["ttft_s"]
    console.print(f"p99 TTFT {ttft['p99'] if ttft else float('nan'):.2f} s of at most "
                  f"{found['ttft_bound_s']:.2f} s; memory "
                  f"{found['memory']['growth_mib']:+.1f} MiB, "
                  f"{found['memory']['growth_kib_per_request']:+.2f} KiB a request")  # fmt: skip


def stop(process: subprocess.Popen[bytes]) -> int | None:
    """SIGTERM -> exit status, None if it does not end within a minute."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        return None


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    checkpoint: Annotated[Path | None, typer.Option(help="Serve this one instead of a random model.")] = None,
    minutes: Annotated[float, typer.Option(min=0.1)] = 30.0,
    overload: Annotated[
        float, typer.Option(min=0.1, help="Arrivals that want an answer, times the capacity.")
    ] = 2.0,
    max_slots: Annotated[int, typer.Option(min=1)] = 16,
    max_queue: Annotated[int, typer.Option(min=0)] = 32,
    steps: Annotated[str, typer.Option(help="Mix of K: K or K:weight, ...")] = "2,4,8",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Mean.")] = 24,
    num_tokens: Annotated[int, typer.Option(min=1, help="Mean of an answer.")] = 24,
    calibrate: Annotated[
        float, typer.Option(min=1, help="Seconds in which the capacity is measured.")
    ] = 30.0,
    ttft_factor: Annotated[
        float, typer.Option(help="p99 TTFT may be so many times (queue + slots) / capacity.")
    ] = 2.0,
    growth_mib: Annotated[
        float, typer.Option(help="Memory may grow so much from the second quarter to the last.")
    ] = 32.0,
    body_mib: Annotated[int, typer.Option(help="Size of an oversized body.")] = 17,
    seed: int = 0,
) -> int:
    """Soak a server, print the verdicts, write everything."""
    mix = parse_steps(steps)
    with reach(None, checkpoint, f"--max-slots {max_slots} --max-queue {max_queue}") as live:
        assert live.process is not None and live.log is not None
        model, vocab_size = card(live.url, None)
        workload = Workload(vocab_size, prompt_tokens, num_tokens, mix)
        seen = asyncio.run(
            soak(live, workload, 60 * minutes, calibrate, max_slots, overload, body_mib * MIB, seed)
        )
        status, log = stop(live.process), live.log.read_text(errors="replace")
    bound = ttft_factor * (max_queue + max_slots) / seen["capacity_per_s"]
    found = report(seen, bound, growth_mib, status, log)
    show(found)
    shape = {"minutes": minutes, "overload": overload, "max_slots": max_slots, "max_queue": max_queue, "steps": mix,
             "prompt_tokens": prompt_tokens, "num_tokens": num_tokens, "mix": KINDS}  # fmt: skip
    write_json(out, {"provenance": provenance(), "seed": seed, "model": model, "shape": shape} | found)
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(run(app, sys.argv[1:], "benchmarks.soak"))
