"""What quantised weights cost in likelihood, and their bytes: held-out NLL at several K of one checkpoint as it is
and as `rdlm quantize` writes it, through the kernels of `rdlm serve`.

    python -m benchmarks.quantization MODEL --data data/books-bytes --steps 1,2,4,8,16 \\
        --out docs/results/raw/quantization.json

Texts are scored with the full cache, in which a prompt read in chunks gives what decoding gives. *differences* are
those from fp32 of the same windows. ``rounded weights alone`` has the weights of int4 and fp32 rows: without what the
kernels' int8 rows cost.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import provenance, write_json
from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.quantize import quantize
from rdlm.config.checkpoint import QuantizationConfig
from rdlm.data.token_shards import TokenStore
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

VARIANTS: dict[str, tuple[QuantizationConfig | None, dict[str, Any]]] = {
    "float32": (None, {}),
    "bfloat16": (None, {"dtype": "bfloat16"}),
    "int8": (QuantizationConfig(weights="int8"), {}),
    "int8, groups of 128": (QuantizationConfig(weights="int8", group_size=128), {}),
    "int4": (QuantizationConfig(weights="int4"), {}),
    "int4, groups of 64": (QuantizationConfig(weights="int4", group_size=64), {}),
    "int4, groups of 128": (QuantizationConfig(weights="int4", group_size=128), {}),
    "int4, rounded weights alone": (QuantizationConfig(weights="int4"), {"kernels": "torch"}),
}


def nll_of_windows(
    folder: Path, windows: Tensor, ks: list[int], settings: dict[str, Any]
) -> dict[int, Tensor]:
    """{K: mean nats per token of each of windows [N, T + 1]}."""
    length = windows.shape[1]
    engine_settings = EngineSettings(
        **{"dtype": "float32", **settings}, device="cpu", kv_cache="full", prefix_cache="off", max_slots=8,
        max_len=length, max_steps=max(ks), default_steps=1,
    )  # fmt: skip
    found: dict[int, Tensor] = {}
    with Engine(lambda: load_served(folder, engine_settings)) as engine:
        for k in ks:
            requests = [
                Request(tuple(row), StepBudget(k), max_tokens=0, prompt_logprobs=0)
                for row in windows.tolist()
            ]
            scored = [
                [entry.logprob for event in events for entry in event.prompt_logprobs or []]
                for events in engine.generate(requests)
            ]
            found[k] = -torch.tensor(scored, dtype=torch.float64).mean(1)
            assert all(len(row) == length - 1 for row in scored)
    return found


def main(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder of a model with a likelihood at every K.")],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`, with the model's tokenizer.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    steps: Annotated[str, typer.Option(help="K, by commas.")] = "1,2,4,8,16",
    seq_len: Annotated[int, typer.Option(help="Tokens of a window, the first one unscored.")] = 128,
    num_windows: int = 64,
    only: Annotated[str, typer.Option(help="Variants to leave out all others, by semicolons.")] = "",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(threads)
    ks = [int(k) for k in steps.split(",")]
    batch = next(
        iter(TokenStore(data, "valid").windows(seq_len - 1, num_windows * (seq_len - 1), num_windows))
    )
    windows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1)
    rows: dict[str, Any] = {}
    exact: dict[int, Tensor] = {}
    for name, (quantization, settings) in VARIANTS.items():
        if only and name not in only.split(";"):
            continue
        with TemporaryDirectory() as scratch:
            folder = model if quantization is None else Path(scratch) / "model"
            if quantization is not None:
                quantize(model, folder, quantization)
            size = (folder / checkpoint.WEIGHTS).stat().st_size
            found = nll_of_windows(folder, windows, ks, settings)
        exact = exact or found
        size = size // 2 if name == "bfloat16" else size  # what they take when they have been rounded
        rows[name] = {"bytes": size, "nll": {}, "difference": {}, "half_width": {}}
        for k in ks:
            gap = found[k] - exact[k]
            rows[name]["nll"][k] = found[k].mean().item()
            rows[name]["difference"][k] = gap.mean().item()
            rows[name]["half_width"][k] = 1.96 * gap.std().item() / math.sqrt(len(gap))
        print(name, f"{size:,} bytes", {k: round(v, 5) for k, v in rows[name]["nll"].items()}, flush=True)
    config = checkpoint.load_config(model)
    facts = {"tokens": batch.targets.numel(), "seq_len": seq_len, "windows": len(windows), "threads": threads}
    write_json(
        out,
        {"provenance": provenance(), "checkpoint": config.model_dump(mode="json"), **facts, "variants": rows},
    )


if __name__ == "__main__":
    typer.run(main)
