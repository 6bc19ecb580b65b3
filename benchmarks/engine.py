"""What the engine gains over answering one request at a time, and how far it is from the forward passes
alone.

    python -m benchmarks.engine --out docs/results/raw/engine.json

One random 8-layer model, greedy, wall time, medians over repeats that are interleaved so that all sides see
the same machine. ``naive``: plain PyTorch with a key-value cache, one request after the other. ``limit``: the
same loop over all requests as one dense batch of equal length and equal K, which a server cannot choose:
forwards and arg-max only. ``engine``: serve/engine/engine.py as ``rdlm serve`` builds it. Naive runs the
model as it is, the other two the weights that a server packs (serve/engine/packing.py). Tokens a second count
the time of the prompts too. All three for each dtype, so that a gain of the dtype is not counted as one of
the engine; compiled: MLPs through torch.compile on all sides, and nothing packed.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import typer
from torch import Tensor

from benchmarks.common import provenance, write_json
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.nn.attention import attention, rotary_table
from rdlm.nn.layers import MLP
from rdlm.objectives import Objective
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.packing import pack_weights
from serve.engine.runner import Runner
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served
from serve.settings import EngineSettings

MIX = (4, 8, 16, 32)
T = TypeVar("T")


def build_model(d_model: int, vocab_size: int, max_len: int) -> tuple[Objective, CheckpointConfig, Any]:
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
    """Attention of B sequences of equal length in step, as anybody would write it first: keys of the last
    core step are kept."""

    def __init__(self, denoiser: Objective, batch: int, max_len: int) -> None:
        model = denoiser.model
        weight, shape = (
            model.ln_f.weight,
            (model.num_cache_layers, batch, max_len, model.num_kv_heads, model.head_dim),
        )
        self.k, self.v = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.start = self.end = 0

    def rope(self, head_dim: int, base: float, scaling: None = None) -> Tensor:
        return rotary_table(head_dim, base, self.k.shape[2], self.k.device)[self.start : self.end][
            None, :, None
        ]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        self.k[layer, :, self.start : self.end], self.v[layer, :, self.start : self.end] = k, v
        return attention(
            q,
            self.k[layer, :, : self.end],
            self.v[layer, :, : self.end],
            is_causal=self.start == 0 and self.end > 1,
        )


@torch.inference_mode()
def dense_greedy(denoiser: Objective, prompts: Tensor, num_steps: int, num_tokens: int) -> Tensor:
    """prompts [B, L] -> the next ``num_tokens`` greedy ids [B, num_tokens]."""
    ctx = DenseCache(denoiser, len(prompts), prompts.shape[1] + num_tokens)
    ids, said = prompts, []
    for _ in range(num_tokens):
        ctx.start, ctx.end = ctx.end, ctx.end + ids.shape[1]
        e = denoiser.model.encode(ids, ctx)
        state, cond = denoiser.model.initial_state(e), denoiser.condition(None, e)
        for _ in range(num_steps):
            state = denoiser.model.core(state, e, cond, ctx)
        ids = denoiser.predict(denoiser.model.decode(state, ctx)[:, -1]).prior.argmax(-1, keepdim=True)
        said.append(ids)
    return torch.cat(said, 1)


def timed(call: Callable[[], T]) -> tuple[float, float, T]:
    """Wall seconds, CPU seconds of all threads, result."""
    began, cpu_began = time.perf_counter(), time.process_time()
    result = call()
    return time.perf_counter() - began, time.process_time() - cpu_began, result


def engine_run(
    engine: Engine, prompts: Tensor, ks: Sequence[int], num_tokens: Sequence[int], in_step: bool = True
) -> dict[str, Any]:
    """All requests at once, greedy, to their ends. Not in_step: their first tokens take 1, 2, ... steps,
    modulo K."""
    before = engine.counters
    was = (before.steps, before.rows.sum, before.model_s, before.busy_s)
    requests = [
        Request(
            tuple(p),
            StepBudget(k, schedule=() if in_step else (1 + i % k, k)),
            n,
            SamplingParams(temperature=0),
        )
        for i, (p, k, n) in enumerate(zip(prompts.tolist(), ks, num_tokens, strict=True))
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


def median(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "ids"}


def against_naive(
    denoiser: Objective, engine: Engine, prompts: Tensor, k: int, num_tokens: int, repeats: int
) -> dict[str, Any]:
    """Engine, naive loop and limit at one K. The naive loop answers an eighth of the prompts: its rate does
    not depend on how many.

    denoiser: the model of the naive loop; that of the limit is the engine's own.
    """
    assert isinstance(engine.served.runner, Runner)
    served, few = engine.served.runner.denoiser, prompts[: max(1, len(prompts) // 8)]
    sides: dict[str, tuple[int, Callable[[], Any]]] = {
        "naive": (
            len(few),
            lambda: torch.cat([dense_greedy(denoiser, p[None], k, num_tokens) for p in few]).cpu(),
        ),
        "limit": (len(prompts), lambda: dense_greedy(served, prompts, k, num_tokens).cpu()),
        "engine": (
            len(prompts),
            lambda: engine_run(engine, prompts, [k] * len(prompts), [num_tokens] * len(prompts)),
        ),
    }
    runs: dict[str, list[tuple[float, float, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (_, call) in sides.items():
            runs[name].append(timed(call))
    seconds, cpu_seconds = ({name: [run[i] for run in runs[name]] for name in sides} for i in (0, 1))
    rates = {
        name: answered * num_tokens / statistics.median(seconds[name])
        for name, (answered, _) in sides.items()
    }
    cpu = {
        name: statistics.median(cpu_seconds[name]) / (answered * num_tokens)
        for name, (answered, _) in sides.items()
    }
    of_engine, naive = [found for _, _, found in runs["engine"]], runs["naive"][-1][2]
    return {
        "num_steps": k, "tokens_per_s": rates, "seconds": seconds, "cpu_seconds_per_token": cpu,
        "engine_over_naive": rates["engine"] / rates["naive"],
        "engine_over_naive_in_cpu_time": cpu["naive"] / cpu["engine"],
        "engine_over_limit": rates["engine"] / rates["limit"], "limit_over_naive": rates["limit"] / rates["naive"],
        "share_of_equal_tokens": (torch.tensor(of_engine[-1]["ids"][: len(few)]) == naive).float().mean().item(),
        **{name: median(of_engine)[name] for name in ("bookkeeping_share", "rows_per_step")},
    }  # fmt: skip


def against_mean_k(engine: Engine, prompts: Tensor, num_tokens: int, repeats: int) -> dict[str, Any]:
    """A mix of K against its mean K.

    Each K gets as many tokens, so lanes in proportion to K, as in a queue that never empties: 1, 2, 4 and 8
    of them, and all end together. The mean K of the tokens is then 15, and both sides do the same work a
    token. Prompts of one token keep prefill out. Started together, lanes of one K also share every prelude,
    coda and read-out, which lanes of a mix cannot; a server's requests do not arrive together, so both sides
    are measured out of step too: core rows a second there, as first tokens are shorter.
    """
    ks = [k for k in MIX for _ in range(k // min(MIX))]
    mean, one = sum(MIX) // len(MIX), prompts[: len(ks), :1]
    work = num_tokens * max(MIX)
    sides = {"mix": (ks, [work // k for k in ks]), "even": ([mean] * len(ks), [round(work / mean)] * len(ks))}
    runs: dict[tuple[str, bool], list[dict[str, Any]]] = {
        (side, in_step): [] for in_step in (True, False) for side in sides
    }
    for _ in range(repeats):
        for (side, in_step), found in runs.items():
            found.append(engine_run(engine, one, *sides[side], in_step=in_step))
    mix, even, mix_apart, even_apart = (median(found) for found in runs.values())
    return {
        "lanes": len(ks), "mix": mix, "mean_k": mean, "even": even, "mix_out_of_step": mix_apart,
        "even_out_of_step": even_apart,
        "mix_over_even": mix["tokens_per_s"] / even["tokens_per_s"],
        "mix_over_even_out_of_step": mix_apart["core_rows_per_s"] / even_apart["core_rows_per_s"],
    }  # fmt: skip


def along_k(engine: Engine, prompts: Tensor, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds a token at each K, and the straight line through them: a token costs fixed + per_step K."""
    ks, lanes, one = (1, 2, 4, 8, 16, 32), len(prompts), prompts[:, :1]
    runs: dict[int, list[dict[str, Any]]] = {k: [] for k in ks}
    for _ in range(repeats):
        for k in ks:
            runs[k].append(engine_run(engine, one, [k] * lanes, [num_tokens] * lanes))
    cost = {k: 1 / median(runs[k])["tokens_per_s"] for k in ks}
    x = torch.tensor([[1.0, k] for k in ks], dtype=torch.float64)
    y = torch.tensor([cost[k] for k in ks], dtype=torch.float64)
    weight = 1 / y  # relative errors count alike
    fixed, per_step = torch.linalg.lstsq(x * weight[:, None], y * weight).solution.tolist()
    off = max(abs(fixed + per_step * k - cost[k]) / cost[k] for k in ks)
    return {
        "seconds_per_token": cost,
        "fixed": fixed,
        "per_step": per_step,
        "largest_relative_deviation": off,
    }


def compile_mlps(denoiser: Objective) -> None:
    """torch.compile where rows are all that varies; attention reads its context object and would break the
    graph anyway."""
    for module in denoiser.modules():
        if isinstance(module, MLP):
            module.compile(dynamic=True)


def describe(name: str, found: dict[str, Any]) -> str:
    rates = ", ".join(f"{side} {rate:.1f}" for side, rate in found["tokens_per_s"].items())
    return (
        f"{name}, K = {found['num_steps']}: tokens/s {rates}; engine {found['engine_over_naive']:.2f}x naive "
        f"({found['engine_over_naive_in_cpu_time']:.2f}x in CPU time) and {found['engine_over_limit']:.2f}x "
        "the limit; bookkeeping "
        f"{found['bookkeeping_share']:.1%}, {found['rows_per_step']:.1f} rows a step (prompts included); "
        f"{found['share_of_equal_tokens']:.1%} of tokens equal"
    )


def verdicts(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets with what was measured; ``met`` says whether ``value`` is at least, or at most, ``bound``."""
    pairs = found["against_naive"]
    targets = [
        (f"engine over naive, {name}", pair["engine_over_naive"], ">=", 8.0) for name, pair in pairs.items()
    ]
    for k in sorted({pair["num_steps"] for pair in pairs.values()}):
        best = {
            side: max(
                (pair["tokens_per_s"][side], name) for name, pair in pairs.items() if pair["num_steps"] == k
            )
            for side in ("engine", "naive")
        }
        (fast, of_engine), (slow, of_naive) = best["engine"], best["naive"]
        targets.append(
            (f"engine ({of_engine}) over naive ({of_naive}), each at its best", fast / slow, ">=", 8.0)
        )
    targets += [
        (f"bookkeeping's share of a step, {name}", pair["bookkeeping_share"], "<=", 0.1)
        for name, pair in pairs.items()
    ]
    for key, when in (
        ("mix_over_even", "all started together"),
        ("mix_over_even_out_of_step", "out of step"),
    ):
        targets.append(
            (
                f"rate of a mix of K over that of its mean K, {when}, {found['dtype']}",
                found["mix"][key],
                ">=",
                0.9,
            )
        )
    off = found["along_k"]["largest_relative_deviation"]
    targets.append(
        (f"largest deviation of a token's cost from a line in K, {found['dtype']}", off, "<=", 0.1)
    )
    return [
        {
            "target": name,
            "value": value,
            "bound": f"{sign} {bound}",
            "met": value >= bound if sign == ">=" else value <= bound,
        }
        for name, value, sign, bound in targets
    ]


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    concurrent: Annotated[int, typer.Option(min=15, help="Requests in flight; the mix of K takes 15.")] = 16,
    prompt_tokens: int = 32,
    num_tokens: int = 48,
    repeats: int = 3,
    d_model: int = 512,
    vocab_size: int = 4096,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    device: str = "cpu",
    compiled: Annotated[
        bool, typer.Option(help="Measure with compiled MLPs too (needs a C++ compiler on a CPU).")
    ] = True,
) -> None:
    """Measure, print the ratios, write everything."""
    torch.set_num_threads(threads)
    short = max(1, num_tokens // 4)
    longest = max(num_tokens, short * max(MIX) // min(MIX))
    denoiser, config, tokenizer = build_model(d_model, vocab_size, prompt_tokens + longest)
    prompts = torch.randint(
        5, tokenizer.vocab_size, (concurrent, prompt_tokens), generator=torch.Generator().manual_seed(1)
    )
    found: dict[str, Any] = {"dtype": "float32", "against_naive": {}, "packed_layers": {}}
    for name in ["float32", "bfloat16", *["bfloat16, compiled"] * compiled]:
        denoiser, there = (
            denoiser.to(device=device, dtype=getattr(torch, name.partition(",")[0])),
            prompts.to(device),
        )
        served = denoiser
        if name.endswith("compiled"):
            compile_mlps(denoiser)
        else:
            served = copy.deepcopy(denoiser)
            found["packed_layers"][name] = pack_weights(served)
        with Engine(
            partial(
                build_served,
                served,
                config,
                tokenizer,
                EngineSettings(max_slots=concurrent, prefix_cache="off"),
            )
        ) as engine:
            against_naive(denoiser, engine, there, 1, 2, 1)  # warm up
            for k in (4, 16):
                found["against_naive"][f"{name}, K = {k}"] = one = against_naive(
                    denoiser, engine, there, k, num_tokens, repeats
                )
                print(describe(name, one), flush=True)
            if name == found["dtype"]:
                found["mix"] = mix = against_mean_k(engine, there, short, repeats)
                print(f"K mix {MIX} makes {mix['mix_over_even']:.2f}x the tokens/s of K = {mix['mean_k']} everywhere; "
                      f"out of step {mix['mix_over_even_out_of_step']:.2f}x", flush=True)  # fmt: skip
                found["along_k"] = line = along_k(engine, there, short, repeats)
                print(f"a token costs {1e3 * line['fixed']:.2f} + {1e3 * line['per_step']:.3f} K ms of the engine; "
                      f"largest deviation {line['largest_relative_deviation']:.1%}", flush=True)  # fmt: skip
    found["targets"] = verdicts(found)
    for target in found["targets"]:
        print(
            f"{'met   ' if target['met'] else 'MISSED'} {target['target']}: {target['value']:.3g} ({target['bound']})"
        )
    shape = {
        "concurrent": concurrent, "prompt_tokens": prompt_tokens, "num_tokens": num_tokens,
        "repeats": repeats, "device": device,
        "threads": threads,
    }  # fmt: skip
    write_json(
        out,
        {"provenance": provenance(), "seed": 1, "shape": shape, "model": config.model_dump(mode="json")}
        | found,
    )


if __name__ == "__main__":
    typer.run(main)
