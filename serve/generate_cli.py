"""``rdlm generate``: continue prompts without a server, through the same engine. Imports torch only once its
options are valid."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from rdlm.command_line import new_app
from rdlm.config.base import parse
from rdlm.errors import UserError
from rdlm.sampling_params import Order, SamplingParams, check_masked, check_sampler
from serve.cli import (
    CacheOption,
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    KernelOption,
    WeightOption,
)
from serve.engine.engine import Engine, Served
from serve.engine.sequence import MAX_WAVEFRONT, Event, Request, Speculation, StepBudget, Wavefront
from serve.settings import EngineSettings

app = new_app()
MAX_TOGETHER = 16
"""Prompts that the engine runs at once."""


@app.command(
    epilog="Example: rdlm generate --checkpoint runs/demo/model "
    '--prompt "And it came to pass" --num-steps 1,4,16'
)
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
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(help="Keep the most probable tokens up to this total probability.")
    ] = 0.95,
    top_k: Annotated[
        int, typer.Option(help="Keep this many of the most probable tokens; 0 or -1 keeps all.")
    ] = 0,
    order: Annotated[
        Order | None,
        typer.Option(help="Masked models: which tokens are unmasked first [random].", show_default=False),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            help="Models with noise levels: sample a token at each level (renoise), or follow the ODE (euler, "
            "dpmpp_2m)."
        ),
    ] = "renoise",
    draft_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Self-speculative decoding: draft tokens at so many core steps, verify them at K. Greedy "
            "texts are the same, sampled ones have the same law; needs --kv-cache full or first.",
            show_default=False,
        ),
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, max=64, help="Most tokens of a draft.")] = 4,
    wavefront: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MAX_WAVEFRONT,
            help="Diffusion forcing: decode so many positions at a time, later ones with the tokens that are "
            "predicted so far; 1 is plain decoding.",
            show_default=False,
        ),
    ] = None,
    inner_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --wavefront: core steps between two read-outs of all positions [4].",
            show_default=False,
        ),
    ] = None,
    wavefront_threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="With --wavefront: a position leaves before its K steps once its state changes relatively by "
            "less between two read-outs; 0 never [0.03].",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache: CacheOption = "shared",
    kernels: KernelOption = "auto",
    weights: WeightOption = "auto",
    resident_blocks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Networks of blocks: how many blocks are kept in memory; by default all.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Continue prompts at one or several K, and print tokens/s and core steps.

    One prompt is streamed. Several run together and are printed in their order, each as it would be alone. A
    masked model fills in --max-tokens tokens after the prompt in K steps.
    """
    prompts = [*(prompt or []), *(_read_prompts(prompt_file) if prompt_file is not None else [])]
    if not prompts:
        raise UserError("--prompt", None, "there is no prompt", "give --prompt TEXT or --prompt-file FILE")
    given = {
        "device": device,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "kernels": kernels,
        "weights": weights,
        "max_slots": min(len(prompts), MAX_TOGETHER),
        "max_queue": len(prompts),
        "resident_blocks": resident_blocks,
    }
    settings: EngineSettings = parse(EngineSettings, given, "the options of rdlm generate")
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, sampler=sampler)
    ks = _parse_steps(num_steps)
    speculation = None if draft_steps is None else Speculation(draft_steps, draft_tokens)
    if wavefront is None and (inner_steps, wavefront_threshold) != (None, None):
        problem = "its settings are given, and it is not"
        raise UserError("--wavefront", None, problem, "give --wavefront N, or leave them out")
    waves = None if wavefront is None else Wavefront.of(wavefront, inner_steps, wavefront_threshold)

    from serve.loading import load_served

    with Engine(lambda: load_served(checkpoint, settings), settings.max_queue) as engine:
        served = engine.served
        check_sampler(sampler, served.config)
        check_masked(sampling, order, served.config)
        ids = [_encode(text, max_tokens, served) for text in prompts]
        for k in check_range(ks or [served.default_steps], served.max_steps):
            requests = [
                Request(
                    one,
                    StepBudget(k, speculation=speculation, wavefront=waves),
                    max_tokens,
                    sampling,
                    seed,
                    stop_ids=served.end_ids,
                    order=order or "random",
                )
                for one in ids
            ]
            typer.secho(f"K = {k}", bold=True)
            if (warning := served.config.depth_warning(k)) is not None:
                typer.echo(f"rdlm: {warning}", err=True)
            _generate(engine, prompts, requests)


def _read_prompts(path: Path) -> list[str]:
    """One prompt a line, empty lines apart. Raises UserError."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'it is not UTF-8 text'})"
        raise UserError(
            "--prompt-file", str(path), problem, "name a UTF-8 text file, or - for standard input"
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
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


def check_range(ks: list[int], most: int) -> list[int]:
    """``ks``; UserError for one out of range."""
    for k in ks:
        if not 1 <= k <= most:
            raise UserError("--num-steps", k, "is out of range", f"this model takes 1 to {most}")
    return ks


def _encode(prompt: str, max_tokens: int, served: Served) -> tuple[int, ...]:
    """Ids of a prompt whose answer fits the context. Raises UserError."""
    tokenizer = served.tokenizer
    ids = [*tokenizer.start, *tokenizer.encode(prompt)]
    if len(ids) + max_tokens > served.max_len:
        problem = (
            f"its {len(ids)} tokens and --max-tokens {max_tokens} do not fit the context of {served.max_len}"
        )
        raise UserError("--prompt", prompt, problem, "shorten it, or lower --max-tokens")
    if not ids and served.config.objective.left_to_right:
        raise UserError("--prompt", prompt, "it has no tokens", "write at least one word")
    return tuple(ids)


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
