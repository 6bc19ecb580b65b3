"""``rdlm generate``: continue a prompt without a server, through the same engine."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from rdlm.config.base import parse
from rdlm.errors import UserError
from rdlm.sampling_params import Bridge, Order, SamplingParams, check_bridge, check_masked
from serve.cli import CacheOption, CheckpointOption, DeviceOption, DtypeOption
from serve.settings import EngineSettings

app = typer.Typer(add_completion=False)


@app.command(
    epilog='Example: rdlm generate --checkpoint runs/demo/model --prompt "And it came to pass" --num-steps 1,4,16'
)
def generate(
    checkpoint: CheckpointOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    num_steps: Annotated[
        str | None,
        typer.Option(help="K, or several K with commas; by default the checkpoint's.", show_default=False),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this total probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")] = 0,
    order: Annotated[
        Order | None,
        typer.Option(
            help="Of masked models: which tokens come into sight first [random].", show_default=False
        ),
    ] = None,
    bridge: Annotated[
        Bridge,
        typer.Option(help="Of models that draw through noise levels: draw at each level, or follow the ODE."),
    ] = "hard",
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    kv_cache: CacheOption = "shared",
    resident_blocks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of a network of blocks, keep so many in memory; by default all.", show_default=False
        ),
    ] = None,
) -> None:
    """Continue a prompt at one or several K, streaming to the terminal, with tokens/s and core steps.

    A masked model fills in --max-tokens tokens behind the prompt in K steps; they are printed as far as all before them are in sight.
    """
    given = {
        "device": device,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "max_slots": 1,
        "resident_blocks": resident_blocks,
    }
    settings: EngineSettings = parse(EngineSettings, given, "the options of rdlm generate")
    sampling = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, bridge=bridge)
    ks = _parse_steps(num_steps)

    from serve.engine.engine import Engine
    from serve.loading import load_served

    engine = Engine(lambda: load_served(checkpoint, settings))
    with engine:
        served = engine.served
        check_bridge(bridge, served.config)
        check_masked(sampling, order, served.config)
        for k in check_range(ks or [served.default_steps], served.max_steps):
            _answer(engine, prompt, k, max_tokens, sampling, order or "random", seed)


def _parse_steps(text: str | None) -> list[int]:
    try:
        return [int(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise UserError(
            "--num-steps", text, "is not a number or a list of numbers", "write for instance 1,4,16"
        ) from None


def check_range(ks: list[int], most: int) -> list[int]:
    """``ks``; UserError for one out of range."""
    for k in ks:
        if not 1 <= k <= most:
            raise UserError("--num-steps", k, "is out of range", f"this model takes 1 to {most}")
    return ks


def _answer(
    engine: object,
    prompt: str,
    num_steps: int,
    max_tokens: int,
    sampling: SamplingParams,
    order: Order,
    seed: int,
) -> None:
    """Stream one answer, then a line with what it cost."""
    from serve.engine.engine import Engine
    from serve.engine.events import Event
    from serve.engine.sequence import Request, StepBudget

    assert isinstance(engine, Engine)
    served = engine.served
    tokenizer = served.tokenizer
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
    if len(ids) + max_tokens > served.max_len:
        problem = (
            f"its {len(ids)} tokens and --max-tokens {max_tokens} do not fit the context of {served.max_len}"
        )
        raise UserError("--prompt", prompt, problem, "shorten it, or ask for fewer tokens")
    if not ids and served.config.objective.left_to_right:
        raise UserError("--prompt", prompt, "it has no tokens", "write at least one word")
    typer.secho(f"K = {num_steps}", bold=True)
    typer.echo(prompt, nl=False)

    def show(event: Event) -> None:
        typer.echo(event.text, nl=False)

    began = time.monotonic()
    request = Request(
        tuple(ids), StepBudget(num_steps), max_tokens, sampling, seed, stop_ids=served.end_ids, order=order
    )
    events = engine.generate([request], show)[0]
    seconds, usage = time.monotonic() - began, events[-1].usage
    assert usage is not None
    if events[-1].finish not in ("stop", "length"):
        raise RuntimeError(f"generation ended with {events[-1].finish!r}")
    core = usage.prefill_core_steps + usage.decode_core_steps
    typer.secho(
        f"\n[{usage.completion_tokens} tokens, {usage.completion_tokens / seconds:.1f} tokens/s, {core} core steps]\n",
        dim=True,
    )
