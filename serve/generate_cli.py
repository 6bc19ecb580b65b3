"""``rdlm generate``: continue prompts without a server, through the same engine. Imports torch only once its
options are valid."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rdlm.command_line import new_app
from rdlm.config.base import parse
from rdlm.errors import UserError
from serve.api.schemas import CompletionRequest
from serve.cli import CheckpointOption
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request
from serve.options import takes_options, unnamed_defaults
from serve.settings import EngineSettings, HttpSettings

app = new_app()
MAX_TOGETHER = 16
"""Prompts that the engine runs at once."""


@app.command(
    epilog="Example: rdlm generate --checkpoint runs/demo/model "
    '--prompt "And it came to pass" --num-steps 1,4,16'
)
@takes_options
def generate(
    checkpoint: CheckpointOption,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; repeat the option for several.", show_default=False),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="File with further prompts, one per line (.jsonl: one JSON string per line); - reads standard input.",
            show_default=False,
        ),
    ] = None,
    num_steps: Annotated[
        str | None,
        typer.Option(
            help="K, the core steps (or noise levels, or unmasking steps) of a token; several K with commas. "
            "By default the checkpoint's.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    resident_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Networks of blocks: how many blocks are kept in memory; by default all.",
            show_default=False,
        ),
    ] = None,
    *,
    engine: dict[str, Any],
    request: dict[str, Any],
) -> None:
    """Continue prompts at one or several K, and print tokens/s and core steps.

    One prompt is streamed. Several run together and are printed in their order, each as it would be alone. A
    masked model fills in --max-tokens tokens after the prompt in K steps.
    """
    prompts = [*(prompt or []), *(_read_prompts(prompt_file) if prompt_file is not None else [])]
    if not prompts:
        raise UserError("--prompt", None, "there is no prompt", "give --prompt TEXT or --prompt-file FILE")
    given = {
        **engine,
        "max_slots": min(len(prompts), MAX_TOGETHER),
        "max_queue": len(prompts),
        "resident_blocks": resident_blocks,
    }
    settings: EngineSettings = parse(EngineSettings, given, "the options of rdlm generate")
    ks = _parse_steps(num_steps)
    body = {"max_tokens": max_tokens, "seed": seed, **request}
    # Mistakes end the command before the model is loaded.
    CompletionRequest.parse({**body, "prompt": prompts[0]})

    from serve.api.request_parsing import parse_completion
    from serve.api.state import ServerState
    from serve.loading import load_served

    with Engine(lambda: load_served(checkpoint, settings), settings.max_queue) as running:
        server = ServerState(running, HttpSettings())
        body = {**unnamed_defaults(running.served), **body}
        for k in ks:
            server.check_range(k, "num_steps")
        for k in ks or [len(body.get("step_sizes", ())) or running.served.default_steps]:
            parsed = [
                parse_completion(CompletionRequest.parse({**body, "prompt": prompt, "num_steps": k}), server)
                for prompt in prompts  # one at a time: a file may have more than a request of the server's
            ]
            typer.secho(f"K = {k}", bold=True)
            for warning in parsed[0].warnings:
                typer.echo(f"rdlm: {warning}", err=True)
            _generate(running, prompts, [one.requests[0] for one in parsed])


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line, empty lines apart. Raises UserError."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'})"
        raise UserError(
            "--prompt-file", str(path), problem, "name a UTF-8 text file, or - for standard input"
        ) from None
    lines = [line for line in text.removeprefix("\ufeff").split("\n") if line.strip()]  # U+2028 ends no line
    if path.suffix != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            one = json.loads(line)
        except ValueError:
            one = None
        if not isinstance(one, str):
            problem = f"line {number} is not a JSON string"
            raise UserError("--prompt-file", str(path), problem, 'write one "text" a line') from None
        found.append(one)
    return found


def _parse_steps(text: str | None) -> list[int]:
    """Numbers of the form 1,4,16: ASCII digits only. Raises UserError."""
    if text is None:
        return []
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*(,\s*[0-9]{1,9}\s*)*", text):
        problem = "is not a number or a list of numbers"
        raise UserError("--num-steps", text, problem, "write for instance 1,4,16")
    return [int(part) for part in text.split(",")]


def _generate(engine: Engine, prompts: Sequence[str], requests: Sequence[Request]) -> None:
    """Print the answers, one prompt's as it comes, then a line with what they cost. Raises UserError where a
    request cannot be answered."""
    streams = len(requests) == 1
    if streams:
        typer.echo(prompts[0], nl=False)

    def stream(event: Event) -> None:
        typer.echo(event.text, nl=False)

    began = time.monotonic()
    answers = engine.generate(requests, stream if streams else None)
    seconds, tokens, steps = time.monotonic() - began, 0, 0
    for prompt, events in zip(prompts, answers, strict=True):
        last = events[-1]
        if last.error is not None:
            raise last.error
        if last.finish not in ("stop", "length") or last.usage is None:
            raise RuntimeError(f"generation ended with {last.finish!r}")
        tokens += last.usage.completion_tokens
        steps += last.usage.prefill_core_steps + last.usage.decode_core_steps
        if not streams:
            typer.echo(prompt + "".join(event.text for event in events) + "\n")
    typer.secho(f"\n[{tokens} tokens, {tokens / seconds:.1f} tokens/s, {steps} core steps]\n", dim=True)
