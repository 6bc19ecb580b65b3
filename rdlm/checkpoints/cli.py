"""``rdlm import``, ``rdlm convert``, ``rdlm quantize``, ``rdlm export``, ``rdlm logits`` and ``rdlm inspect``:
checkpoints of other formats, smaller ones, and what is in one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rdlm.command_line import new_app
from rdlm.errors import UserError

_IMPORT_EXAMPLE = "Example: rdlm import ByteDance/Ouro-1.4B runs/ouro"
_CONVERT_EXAMPLE = "Example: rdlm convert runs/smollm2 runs/smollm2-looped --prelude 8 --core 14 --coda 8"
_EXPORT_EXAMPLE = "Example: rdlm export huginn runs/debug/model exported/huginn"
_HF_EXAMPLE = "Example: rdlm export hf runs/demo/model exported/demo"
_GGUF_EXAMPLE = "Example: rdlm export gguf runs/smollm2 exported/smollm2.gguf"
_LOGITS_EXAMPLE = (
    "Example: rdlm logits runs/ouro inputs.safetensors --num-steps 1,2,4 --out logits.safetensors"
)
import_app = new_app(no_args_is_help=True)
convert_app = new_app(no_args_is_help=True)
export_app = new_app(no_args_is_help=True, epilog=_EXPORT_EXAMPLE)
logits_app = new_app(no_args_is_help=True)
quantize_app = new_app(no_args_is_help=True)
inspect_app = new_app(no_args_is_help=True)
Force = Annotated[bool, typer.Option("--force", help="Replace what OUT holds.")]
Unroll = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        min=1,
        help="Write a loop as plain layers, its core K times: for models whose steps run their layers and nothing "
        "else.",
        show_default=False,
    ),
]
OutFolder = Annotated[Path, typer.Argument(help="Folder to create.")]
ShardGB = Annotated[
    float, typer.Option(min=1e-6, max=1e9, help="Largest weights file in GB, unless one tensor is larger.")
]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint folder.")]


@import_app.command(epilog=_IMPORT_EXAMPLE)
def importing(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[FAMILY] SOURCE OUT",
            help="SOURCE: folder in the published layout, GGUF file, or id on the hub. OUT: checkpoint folder to "
            "create. FAMILY: its "
            "family; left out, it is found from the files.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Model name on the server [the source's].")] = None,
    zero_state: Annotated[
        bool,
        typer.Option(
            "--zero-state",
            help="Start the recurrence from zero, so that greedy answers do not depend on a seed.",
        ),
    ] = False,
    force: Force = False,
) -> None:
    """Import a published checkpoint. Weights keep their dtype; tokenizer and chat template are copied.

    Families: Huginn, retrofitted recurrence, Ouro, Parcae, IFM LoopedLM P2, Nanbeige4.2, LoopUS, LoopFormer,
    HRM-Text, and plain decoders (Llama, SmolLM2, Mistral, Qwen2, Qwen3, OLMo-2). Needs little memory.
    """
    from rdlm.checkpoints.convert.importers import import_checkpoint
    from rdlm.checkpoints.folder import TOKENIZER

    if len(paths) not in (2, 3):
        problem = "SOURCE and OUT are needed, and at most a family before them"
        raise UserError("arguments", " ".join(paths), problem, "see `rdlm import --help`")
    family, (source, out) = paths[0] if len(paths) == 3 else None, paths[-2:]
    import_checkpoint(source, Path(out), family=family, name=name, zero_state=zero_state, force=force)
    if (Path(out) / TOKENIZER).is_dir():
        typer.echo(f"{out}: imported. Try: rdlm serve --checkpoint {out}")
    else:
        typer.echo(f"{out}: imported without a tokenizer, so it takes ids only. Try: rdlm inspect {out}")


@convert_app.command(epilog=_CONVERT_EXAMPLE)
def converting(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder of a plain transformer, for instance of `rdlm import`.")
    ],
    out: Annotated[Path, typer.Argument(help="Checkpoint folder to create.")],
    prelude: Annotated[int, typer.Option(min=0, help="Layers before the loop.")],
    core: Annotated[int, typer.Option(min=1, help="Layers inside the loop, which run K times.")],
    coda: Annotated[int, typer.Option(min=0, help="Layers after the loop.")],
    keep_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="The source's layers for prelude, core and coda, in this order, counted from 0, for instance "
            "0-3,10-17,18-21. Left out: "
            "the first ones for the prelude, the last ones for core and coda.",
            show_default=False,
        ),
    ] = None,
    injection: Annotated[
        Literal["linear", "diagonal", "none"],
        typer.Option(
            help="How a step combines the state with the prelude's output e. linear: a matrix on [state, e], which "
            "starts at [0, I], so "
            "that K changes nothing until it is trained. diagonal: a decayed state plus a matrix on e. none: the "
            "state starts as e and "
            "is looped, with no new weights.",
        ),
    ] = "linear",
    num_steps: Annotated[int, typer.Option(min=1, help="Default K of the new checkpoint.")] = 1,
    max_num_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Largest K of a request [64, or the default K].", show_default=False),
    ] = None,
    keep_tokens: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATA",
            help="Reduce the vocabulary to the tokens of this prepared data (made with the checkpoint's tokenizer), "
            "all bytes and special "
            "tokens; may be given several times. Prepare the data again with the new tokenizer.",
            show_default=False,
        ),
    ] = None,
    state_scale: Annotated[
        float | None,
        typer.Option(
            help="Injection linear: factor of the state, which in a pretrained core is many times larger than e [the "
            "power of two that makes both equally large, measured on a few tokens].",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Model name on the server [the source's, followed by -recurrent].", show_default=False
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Make a plain transformer recurrent: its layers become prelude, core and coda.

    With all layers kept it computes at K = 1 exactly what the source computes. With fewer, layers between
    prelude and core are left out. Fine-tune it with `init_from: OUT` in a training config; see
    docs/finetuning.md. Needs little memory.
    """
    from rdlm.checkpoints.retrofit import convert, parse_layers

    kept = None if keep_layers is None else parse_layers(keep_layers)
    convert(
        checkpoint, out, prelude=prelude, core=core, coda=coda, keep_layers=kept, injection=injection,
        num_steps=num_steps,
        max_steps=max_num_steps, keep_tokens=keep_tokens or (), state_scale=state_scale, name=name, force=force,
        say=typer.echo,
    )  # fmt: skip
    typer.echo(f"{out}: converted. Try: rdlm inspect {out}")


@quantize_app.command(epilog="Example: rdlm quantize runs/demo/model runs/demo/int4 --weights int4")
def quantizing(
    checkpoint: Checkpoint,
    out: OutFolder,
    weights: Annotated[
        Literal["int8", "int4"],
        typer.Option(
            help="Of attention and feed-forward layers. Token tables and other matrices become int8; norms and "
            "biases stay."
        ),
    ],
    group_size: Annotated[
        int, typer.Option(help="Inputs that share a scale: 32, 64 or 128. Larger is smaller and less exact.")
    ] = 32,
    force: Force = False,
) -> None:
    """Write a checkpoint with quantised weights, which every command reads. Needs no data and little memory.

    On a CPU the server's kernels read them as they are; elsewhere they are dequantised when they are loaded.
    Training, convert and export need the exact weights and refuse them.
    """
    from rdlm.checkpoints.quantize import quantize
    from rdlm.config.base import parse
    from rdlm.config.checkpoint import QuantizationConfig

    given = {"weights": weights, "group_size": group_size}
    before, after = quantize(
        checkpoint, out, parse(QuantizationConfig, given, "the options of rdlm quantize"), force
    )
    typer.echo(
        f"{out}: {weights}, {after / 1e6:.3g} MB of {before / 1e6:.3g} MB. Try: rdlm serve --checkpoint {out}"
    )


@export_app.callback()
def exporting() -> None:
    """Write a checkpoint in a published layout."""


@export_app.command("huginn", epilog=_EXPORT_EXAMPLE)
def huginn_out(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder of a huginn without noise conditioning.")
    ],
    out: OutFolder,
    shard_gb: ShardGB = 5.0,
    force: Force = False,
) -> None:
    """Write the published layout of Huginn. Needs little memory."""
    from rdlm.checkpoints.convert.huginn import export_huginn

    export_huginn(checkpoint, out, shard_bytes=int(shard_gb * 1e9), force=force)
    typer.echo(f"{out}: exported. Check it: rdlm import {out} CHECKPOINT")


@export_app.command("hf", epilog=_HF_EXAMPLE)
def hf_out(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint folder of a text model that predicts the next token.")
    ],
    out: OutFolder,
    shard_gb: ShardGB = 5.0,
    unroll: Unroll = None,
    force: Force = False,
) -> None:
    """Write a folder that transformers loads without rdlm.

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) loads it without a network.

    Plain transformers become transformers' own classes and need no trust_remote_code. Needs little memory.
    """
    from rdlm.checkpoints.convert.hf_export import export_hf

    architecture = export_hf(checkpoint, out, shard_bytes=int(shard_gb * 1e9), unroll=unroll, force=force)
    typer.echo(
        f"{out}: exported as {architecture}; its README.md says how to load it. Back: rdlm import {out} CHECKPOINT"
    )


@export_app.command("ouro", epilog="Example: rdlm export ouro runs/ouro exported/ouro")
def ouro_out(checkpoint: Checkpoint, out: OutFolder, shard_gb: ShardGB = 5.0, force: Force = False) -> None:
    """Write the published layout of Ouro. The model must have its layers, loop and gate. Needs little memory."""
    from rdlm.checkpoints.convert.published import export_published

    export_published("ouro", checkpoint, out, shard_bytes=int(shard_gb * 1e9), force=force)
    typer.echo(f"{out}: exported. Check it: rdlm import {out} CHECKPOINT")


@export_app.command("retrofit", epilog="Example: rdlm export retrofit runs/looped exported/looped")
def retrofit_out(
    checkpoint: Checkpoint, out: OutFolder, shard_gb: ShardGB = 5.0, force: Force = False
) -> None:
    """Write the published layout of retrofitted recurrence. It fits what `rdlm convert` makes of a Llama, for
    instance. Needs little memory."""
    from rdlm.checkpoints.convert.published import export_published

    export_published("retrofit", checkpoint, out, shard_bytes=int(shard_gb * 1e9), force=force)
    typer.echo(f"{out}: exported. Check it: rdlm import {out} CHECKPOINT")


@export_app.command("gguf", epilog=_GGUF_EXAMPLE)
def gguf_out(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="File to create, OUT.gguf.")],
    unroll: Unroll = None,
    force: Force = False,
) -> None:
    """Write a GGUF file for llama.cpp and its relatives.

    The model is a plain transformer, or a loop at a fixed K (--unroll). Weights keep their dtype; quantise them
    with the tools of llama.cpp. Needs little memory.
    """
    from rdlm.checkpoints.convert.gguf_file import export_gguf

    architecture = export_gguf(checkpoint, out, unroll=unroll, force=force)
    typer.echo(f"{out}: exported as {architecture}. Check it: rdlm import {out} CHECKPOINT")


@logits_app.command(epilog=_LOGITS_EXAMPLE)
def logits(
    checkpoint: Checkpoint,
    inputs: Annotated[
        Path,
        typer.Argument(
            metavar="IN",
            help="Safetensors file: input_ids [B, T] int64; optionally input_states [B, T, D], the state before the "
            "first step, and "
            "token_type_ids [B, T], where 1 marks a prefix that sees itself in both directions.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File to write: logits_K{K} [B, T, V] fp32, and gate_K{K} [B, T] where there is a gate."
        ),
    ],
    num_steps: Annotated[
        str, typer.Option(help="K, one or several with commas [the checkpoint's default].")
    ] = "",
    zero_state: Annotated[bool, typer.Option("--zero-state", help="Start the recurrence from zero.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of a random initial state.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    step_sizes: Annotated[
        str, typer.Option(help="Lengths of the steps of a LoopFormer, with commas; K is their number.")
    ] = "",
) -> None:
    """Compute the logits of whole sequences at several K, in fp32 and without a tokenizer."""
    from rdlm.inference import logits_file

    note = logits_file(
        checkpoint,
        inputs,
        out,
        num_steps=num_steps,
        zero_state=zero_state,
        seed=seed,
        device=device,
        step_sizes=step_sizes,
    )
    typer.echo(f"{out}: {note}")


@inspect_app.command(epilog="Example: rdlm inspect runs/demo/model")
def inspect(checkpoint: Checkpoint) -> None:
    """Describe a checkpoint: topology, parameters, cache, FLOPs by K, what K means, and which commands
    apply."""
    from rdlm.inference import description

    for name, value in description(checkpoint).items():
        typer.echo(f"{name:<22} {value}")
