"""``rdlm eval``: measurements of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from eval.depth_cli import depth
from eval.harness_cli import PASS_ON, lm_eval
from eval.output import write_json
from eval.text_cli import gen_ppl, mauve
from rdlm.errors import UserError

app = typer.Typer(no_args_is_help=True)
app.command("lm-eval", context_settings=PASS_ON)(lm_eval)
app.command(epilog="Example: rdlm eval depth --checkpoint runs/s3/model --group s3 --lengths 16,24 --plot depth.png")(depth)
app.command(
    "gen-ppl",
    epilog="Example: rdlm eval gen-ppl --checkpoint runs/demo/model --data data/demo --temperature 0.7,1.0 --plot f.png",
)(gen_ppl)
app.command(epilog="Example: rdlm eval mauve --checkpoint runs/demo/model --data data/demo --protocol quick --num-steps 1,4")(
    mauve
)


@app.callback()
def evaluate() -> None:
    """Measure a checkpoint."""


@app.command(epilog="Example: rdlm eval nll --checkpoint runs/demo/model --data data/demo --steps 1,4,16 --plot nll.png")
def nll(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    data: Annotated[Path, typer.Option(help="Folder made by `rdlm data prepare` with the checkpoint's tokenizer.")],
    split: Annotated[str, typer.Option(help="Split to evaluate.")] = "valid",
    steps: Annotated[
        str | None, typer.Option(help="Values of K with commas [1,2,4,8,16,32 where they have a likelihood].")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use the first so many tokens [the whole split].")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a window [the model's max_seq_len].")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of one forward pass.")] = 16,
    num_draws: Annotated[int, typer.Option(min=1, help="Noise draws of a mixture estimate.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of noise draws and bootstrap.")] = 0,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of the weights.")] = "float32",
    out: Annotated[Path | None, typer.Option(help="Write the results with their provenance as JSON.")] = None,
    per_window: Annotated[bool, typer.Option("--per-window", help="Add the nats of every window to the JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a figure of NLL against K as PNG.")] = None,
) -> None:
    """Held-out NLL per token, perplexity and bits per byte against K, with 95 % bootstrap intervals over windows."""
    from tqdm import tqdm

    from eval.nll import PER_WINDOW, check_steps, evaluate_nll
    from eval.plots import plot_nll
    from rdlm.checkpoint import load
    from rdlm.shards import TokenStore

    wanted = _parse_steps(steps)
    store = TokenStore(data, split)
    loaded = load(checkpoint, device=_usable(device), dtype=_dtype(dtype))
    _check_tokenizer(checkpoint, loaded, data, store)
    ks = check_steps(wanted, loaded.denoiser, loaded.config)
    length = _window(seq_len, loaded.config.model.max_seq_len)
    windows = store.windows(length, max_tokens, batch_size)
    total = store.num_windows(length)
    total = total if max_tokens is None else min(total, max(1, max_tokens // length))
    with tqdm(total=total, unit="window", desc=f"K = {', '.join(map(str, ks))}") as bar:
        measured = evaluate_nll(loaded, windows, ks, seed=seed, num_draws=num_draws, progress=bar.update)
    report = {**_origin(checkpoint, loaded, store, length), "seed": seed, "num_draws": num_draws, "dtype": dtype, **measured}
    _show(report)
    if out is not None:
        write_json(out, report if per_window else {key: value for key, value in report.items() if key not in PER_WINDOW})
    if plot is not None:
        plot_nll(report, plot)


def _parse_steps(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError("--steps", text, "is not a list of whole numbers", "write for instance 1,4,16") from None


def _usable(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device", device, "torch sees no GPU", "use --device cpu")
    return device


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def _window(seq_len: int | None, limit: int) -> int:
    if seq_len is not None and seq_len > limit:
        raise UserError("--seq-len", seq_len, f"the model was built for {limit} positions", f"use {limit} or less")
    return seq_len or limit


def _check_tokenizer(checkpoint: Path, loaded: Any, data: Path, store: Any) -> None:
    if loaded.tokenizer is None:
        raise UserError("--checkpoint", str(checkpoint), "it has no tokenizer, so its ids are not text", "give a model of text")
    if loaded.tokenizer.fingerprint != store.manifest.tokenizer_fingerprint:
        remedy = f"prepare it again with --tokenizer {checkpoint / 'tokenizer'}"
        raise UserError("--data", str(data), "was not tokenised with the checkpoint's tokenizer", remedy)


def _origin(checkpoint: Path, loaded: Any, store: Any, seq_len: int) -> dict[str, Any]:
    from eval.provenance import provenance
    from rdlm.checkpoint import WEIGHTS
    from rdlm.shards import file_sha256

    config = loaded.config
    return {
        "provenance": provenance(),
        "checkpoint": {
            "name": config.name,
            "objective": config.objective.name,
            "step": config.step,
            "weights_sha256": file_sha256(checkpoint / WEIGHTS),
        },
        "data": {
            "source": store.manifest.source,
            "split": store.split,
            "manifest_sha256": store.manifest_sha256,
            "seq_len": seq_len,
            "windows": "in order, without overlap: a token sees what precedes it in its window",
        },
    }


def _show(report: dict[str, Any]) -> None:
    checkpoint, data = report["checkpoint"], report["data"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}) on {data['split']}",
        caption=f"{report['tokens']:,} tokens in {report['windows']:,} windows of {data['seq_len']}; nats per token",
    )
    for name in ("K", "NLL [95 %]", f"against K = {report['results'][0]['K']}", "perplexity", "bits/byte"):
        table.add_column(name, justify="right")
    for r in report["results"]:
        low, high = r["nll_interval"]
        d_low, d_high = r["delta_nll_interval"]
        delta = f"{r['delta_nll']:+.4f} [{d_low:+.4f}, {d_high:+.4f}]" if r is not report["results"][0] else ""
        bits = "" if r["bits_per_byte"] is None else f"{r['bits_per_byte']:.4f}"
        table.add_row(str(r["K"]), f"{r['nll']:.4f} [{low:.4f}, {high:.4f}]", delta, f"{r['perplexity']:.2f}", bits)
    console = Console()
    console.print(table)
    for r in report["results"]:
        console.print(f"K = {r['K']}: {r['estimator']}", highlight=False, style="dim")
