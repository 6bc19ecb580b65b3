"""What the engine gains over answering one request at a time, and how far it is from the forward passes alone.

    python -m benchmarks.engine --out docs/results/raw/engine.json

Same random model, prompts, K and greedy tokens everywhere; fp32, wall time, medians over interleaved repeats.
``naive``: plain PyTorch with a key-value cache, one request after the other. ``limit``: the same loop over all requests as one
dense batch of equal length and equal K, which a server cannot choose: forwards and arg-max only. ``engine``: serve/engine.py.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.common import provenance, write_json
from rdlm.config import CheckpointConfig
from rdlm.context import attention
from rdlm.decoding_types import SamplingParams
from rdlm.denoiser import Denoiser
from rdlm.layers.rope import rotary_table
from rdlm.registry import build
from rdlm.tokenizer import train_tokenizer
from serve.engine import Engine
from serve.loading import build_served
from serve.sequence import Request
from serve.settings import EngineSettings

MIX = (4, 8, 16, 32)


def build_model(d_model: int, vocab_size: int, max_len: int) -> tuple[Denoiser, CheckpointConfig, Any]:
    """A random 8-layer model with a tokenizer whose every id is text."""
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40_000, 6), generator=rng).tolist()
    tokenizer = train_tokenizer(
        "bpe", (" ".join(bytes(word).decode() for word in letters[i::100]) for i in range(100)), vocab_size
    )
    config = CheckpointConfig.model_validate({
        "name": "engine-benchmark", "objective": {"name": "single_pass"},
        "model": {
            "family": "huginn", "vocab_size": tokenizer.vocab_size, "d_model": d_model, "num_heads": d_model // 64,
            "mlp_width": 4 * d_model, "num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2,
            "max_seq_len": max_len, "noise_conditioning": True,
        },
        "recurrence": {"default_steps": 4, "max_steps": max(MIX)},
    })  # fmt: skip
    return build(config, seed=1).eval(), config, tokenizer


class DenseCache:
    """Attention of B sequences of equal length in step, as anybody would write it first: keys of the last core step are kept."""

    def __init__(self, denoiser: Denoiser, batch: int, max_len: int) -> None:
        model = denoiser.model
        weight, shape = model.ln_f.weight, (model.num_cache_layers, batch, max_len, model.num_kv_heads, model.head_dim)
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.start = self.end = 0

    def rope(self, head_dim: int, base: float) -> Tensor:
        return rotary_table(head_dim, base, self.k.shape[2], self.k.device)[self.start : self.end][None, :, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        self.k[layer, :, self.start : self.end], self.v[layer, :, self.start : self.end] = k, v
        return attention(
            q, self.k[layer, :, : self.end], self.v[layer, :, : self.end], is_causal=self.start == 0 and self.end > 1
        )


@torch.inference_mode()
def dense_greedy(denoiser: Denoiser, prompts: Tensor, num_steps: int, num_tokens: int) -> Tensor:
    """prompts [B, L] -> the next ``num_tokens`` greedy ids [B, num_tokens]."""
    ctx = DenseCache(denoiser, len(prompts), prompts.shape[1] + num_tokens)
    ids, said = prompts, []
    for _ in range(num_tokens):
        ctx.start, ctx.end = ctx.end, ctx.end + ids.shape[1]
        e = denoiser.model.encode(ids, ctx)
        state, cond = denoiser.model.initial_state(e), denoiser.condition(None, e)
        for _ in range(num_steps):
            state = denoiser.step(state, e, cond, ctx)
        ids = denoiser.predict(denoiser.model.decode(state, ctx)[:, -1]).prior.argmax(-1, keepdim=True)
        said.append(ids)
    return torch.cat(said, 1)


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    ids = call().cpu()
    return time.perf_counter() - began, ids


def engine_run(engine: Engine, prompts: Tensor, ks: Sequence[int], num_tokens: Sequence[int]) -> dict[str, Any]:
    """All requests at once, greedy, to their ends."""
    before = engine.counters
    was = (before.steps, before.rows.sum, before.model_s, before.busy_s)
    requests = [
        Request(tuple(p), k, n, SamplingParams(temperature=0)) for p, k, n in zip(prompts.tolist(), ks, num_tokens, strict=True)
    ]
    began = time.perf_counter()
    answers = engine.generate(requests)
    seconds, now = time.perf_counter() - began, engine.counters
    rows, busy = now.rows.sum - was[1], now.busy_s - was[3]
    return {
        "seconds": seconds, "tokens_per_s": sum(num_tokens) / seconds, "core_rows_per_s": rows / seconds,
        "rows_per_step": rows / (now.steps - was[0]), "bookkeeping_share": 1 - (now.model_s - was[2]) / busy,
        "ids": [[event.token for event in events] for events in answers],
    }  # fmt: skip


def median_run(engine: Engine, prompts: Tensor, ks: Sequence[int], num_tokens: Sequence[int], repeats: int) -> dict[str, Any]:
    runs = [engine_run(engine, prompts, ks, num_tokens) for _ in range(repeats)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "ids"}


def against_naive(denoiser: Denoiser, engine: Engine, prompts: Tensor, k: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Engine, naive loop and limit at one K, interleaved so that all see the same machine."""
    found: dict[str, list[float]] = {"naive": [], "limit": [], "engine": []}
    runs = []
    for _ in range(repeats):
        seconds, naive = timed(lambda: torch.cat([dense_greedy(denoiser, p[None], k, num_tokens) for p in prompts]))
        found["naive"].append(seconds)
        found["limit"].append(timed(lambda: dense_greedy(denoiser, prompts, k, num_tokens))[0])
        runs.append(engine_run(engine, prompts, [k] * len(prompts), [num_tokens] * len(prompts)))
        found["engine"].append(runs[-1]["seconds"])
    total = len(prompts) * num_tokens
    rates = {name: total / statistics.median(seconds) for name, seconds in found.items()}
    same = (torch.tensor(runs[-1]["ids"]) == naive).float().mean().item()
    return {
        "num_steps": k, "tokens_per_s": rates, "engine_over_naive": rates["engine"] / rates["naive"],
        "engine_over_limit": rates["engine"] / rates["limit"], "share_of_equal_tokens": same, "seconds": found,
        "bookkeeping_share": statistics.median(run["bookkeeping_share"] for run in runs),
        "rows_per_step": runs[-1]["rows_per_step"],
    }  # fmt: skip


def against_mean_k(engine: Engine, prompts: Tensor, num_tokens: int, repeats: int) -> dict[str, Any]:
    """A mix of K against its mean K; tokens are dealt out so that all end together and the pack stays full."""
    lanes, mean = len(prompts), sum(MIX) // len(MIX)
    ks = [MIX[i % len(MIX)] for i in range(lanes)]
    work = num_tokens * max(MIX)
    mixed = median_run(engine, prompts, ks, [work // k for k in ks], repeats)
    even = median_run(engine, prompts, [mean] * lanes, [work // mean] * lanes, repeats)
    return {"mix": mixed, "mean_k": mean, "even": even, "mix_over_even": mixed["core_rows_per_s"] / even["core_rows_per_s"]}


def along_k(engine: Engine, prompts: Tensor, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds a token at each K, and the straight line through them: a token costs fixed + per_step K."""
    ks = [1, 2, 4, 8, 16, 32]
    lanes = len(prompts)
    cost = {k: 1 / median_run(engine, prompts, [k] * lanes, [num_tokens] * lanes, repeats)["tokens_per_s"] for k in ks}
    x = torch.tensor([[1.0, k] for k in ks], dtype=torch.float64)
    y = torch.tensor([cost[k] for k in ks], dtype=torch.float64)
    weight = 1 / y  # relative errors count alike
    fixed, per_step = torch.linalg.lstsq(x * weight[:, None], y * weight).solution.tolist()
    off = max(abs(fixed + per_step * k - cost[k]) / cost[k] for k in ks)
    return {"seconds_per_token": cost, "fixed": fixed, "per_step": per_step, "largest_relative_deviation": off}


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    concurrent: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    prompt_tokens: int = 32,
    num_tokens: int = 32,
    repeats: int = 3,
    d_model: int = 512,
    vocab_size: int = 4096,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
) -> None:
    """Measure, print the ratios, write everything."""
    torch.set_num_threads(threads)
    longest = prompt_tokens + num_tokens * max(MIX) // min(MIX)
    denoiser, config, tokenizer = build_model(d_model, vocab_size, longest)
    settings = EngineSettings(max_slots=concurrent)
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randint(5, tokenizer.vocab_size, (concurrent, prompt_tokens), generator=rng)
    with Engine(lambda: build_served(denoiser, config, tokenizer, settings)) as engine:
        engine_run(engine, prompts, [1] * concurrent, [4] * concurrent)  # warm up
        naive = against_naive(denoiser, engine, prompts, 4, num_tokens, repeats)
        rates = ", ".join(f"{name} {rate:.1f}" for name, rate in naive["tokens_per_s"].items())
        print(f"K=4: tokens/s {rates}; engine is {naive['engine_over_naive']:.2f}x naive, {naive['engine_over_limit']:.2f}x the "
              f"limit; bookkeeping {naive['bookkeeping_share']:.1%}, {naive['rows_per_step']:.1f} rows a step (prompts "
              f"included); {naive['share_of_equal_tokens']:.1%} of tokens equal", flush=True)  # fmt: skip
        mix = against_mean_k(engine, prompts, max(1, num_tokens // 4), repeats)
        print(f"K mix {MIX} runs {mix['mix_over_even']:.2f}x the core rows/s of K = {mix['mean_k']} everywhere", flush=True)
        line = along_k(engine, prompts, num_tokens, repeats)
        print(f"a token costs {1e3 * line['fixed']:.2f} + {1e3 * line['per_step']:.3f} K ms of the engine; "
              f"largest deviation {line['largest_relative_deviation']:.1%}", flush=True)  # fmt: skip
    shape = {"concurrent": concurrent, "prompt_tokens": prompt_tokens, "num_tokens": num_tokens, "repeats": repeats}
    write_json(out, {"provenance": provenance(), "shape": shape, "model": config.model_dump(mode="json"),
                     "against_naive": naive, "mix": mix, "along_k": line})  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
