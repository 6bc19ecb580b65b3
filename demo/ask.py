"""Ask the demo's server over HTTP with the stock openai client and show what comes back."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path
from subprocess import Popen

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from demo.processes import StepFailed

PROMPT = "And it came to pass"
SEED = 7
MAX_TOKENS = 48
TEMPERATURE = 0.7
STEPS = (1, 4, 16)


def wait_until_ready(server: Popen[bytes], port_file: Path, log: Path, seconds: float = 120) -> str:
    """The base address of the server, once ``/ready`` answers; raises StepFailed if it ends or takes too
    long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise StepFailed("rdlm serve", f"ended with status {server.returncode} before it was ready", log)
        if port_file.is_file() and (port := port_file.read_text(encoding="utf-8").strip()):
            base = f"http://127.0.0.1:{port}"
            if _answers(f"{base}/ready"):
                return base
        time.sleep(0.2)
    raise StepFailed("rdlm serve", f"was not ready after {seconds:.0f} s", log)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def ask(base: str, console: Console) -> None:
    """One prompt and seed at several K, first a warm-up; prints the texts with tokens/s and core steps."""
    client = OpenAI(base_url=f"{base}/v1", api_key="none", timeout=300, max_retries=0)
    model = client.models.list().data[0].id
    table = Table(
        "K",
        "tokens/s",
        "core steps",
        "text",
        title=f"{model}: {PROMPT!r}, seed {SEED}, temperature {TEMPERATURE}",
        show_lines=True,
    )
    client.completions.create(model=model, prompt=PROMPT, max_tokens=2)
    for num_steps in STEPS:
        started = time.perf_counter()
        answer = client.completions.create(
            model=model,
            prompt=PROMPT,
            max_tokens=MAX_TOKENS,
            temperature=TEMPERATURE,
            seed=SEED,
            extra_body={"num_steps": num_steps},
        )
        seconds = time.perf_counter() - started
        usage = answer.usage
        assert usage is not None, "the server always sends usage"
        core_steps = usage.model_dump()["recurrence"]["core_steps"]
        table.add_row(
            str(num_steps),
            f"{usage.completion_tokens / seconds:.1f}",
            str(core_steps),
            PROMPT + answer.choices[0].text,
        )
    console.print(table)
