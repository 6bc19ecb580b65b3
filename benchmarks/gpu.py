"""Ten minutes on a GPU: what only a GPU can say, in parts that can be repeated one by one.

    python -m benchmarks.gpu --out gpu.json              # cases that are in the file already are not run again
    python -m benchmarks.gpu --out gpu.json --only step  # one part again
    python -m benchmarks.gpu --out try.json --tiny       # every part at a tiny size, on a CPU too: is it right?

| part | what it says |
|---|---|
| losses | every kind of model: loss of a batch in bf16 against fp32 on the CPU; whether the host waits in a forward |
| bandwidth | bytes a second that a copy moves: what decoding is compared with |
| published | tokens/s of Huginn-0125's shape (3.5B) at K = 32 and Ouro-1.4B's at K = 4, one request; graphs on, off |
| step | an update of a 1B Huginn: ms, tokens/s, MFU, memory; objectives x compile off and blocks; a trace |
| attention | which kernel each kind of attention runs, and how long it takes |
| decode | tokens/s of the 1B Huginn at several batch sizes and K, with CUDA graphs and without |
| paged | attention of a decode step to pages: keys gathered, read in place, by PyTorch's varlen kernel |
| quantised | products of one to 64 rows with int8 and int4 weights against bf16, by PyTorch's own kernels |
| deterministic | two times 20 updates with deterministic kernels and without: equal bits? what does it cost? |
| noise | normal numbers a second, by generator on the CPU and by counter on the device |

Each part is a process of its own with a time limit, and each of its cases is written when it ends. A case that fails
writes its error; one that hangs, or breaks the device for its process, ends its part's process, and the part goes on
with the next case. Nothing here needs a corpus or a network.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.common import provenance
from benchmarks.generate import bytes_per_token
from rdlm.atomic import write_file
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.nn.attention import BidirectionalContext, CausalContext, PaddedContext, TwoStreamContext
from rdlm.nn.kv_cache import PAGE, KVCache, PagedContext, Segment
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.random_streams import counter_stream, generator
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.replay import CudaGraphs, Eager, bucket
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Request, StepBudget, StepResult
from train.compilation import compile_layers
from train.cost import UpdateFlops, peak_flops

Result = dict[str, Any]
Case = tuple[str, Callable[[], Result]]
Cases = Iterator[Case]


@dataclass(frozen=True)
class Size:
    """Of everything that is measured."""

    width: int
    heads: int
    mlp: int
    vocab: int
    length: int
    micro: int
    updates: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    tokens: int


FULL = Size(2688, 21, 9216, 65536, 4096, 4, 8, (1, 16, 64), (1, 8, 32), 32)
"""The 1B Huginn of 2-4-2 layers."""
TINY = Size(32, 2, 48, 64, 16, 2, 2, (1, 3), (1, 2), 3)
KINDS = {
    "huginn single_pass": ("huginn", "single_pass"), "huginn onestep": ("huginn", "onestep"),
    "huginn bptt": ("huginn", "bptt"),
    "huginn evidence": ("huginn", "evidence"), "huginn paper": ("huginn", "paper"),
    "llama next_token": ("llama", "next_token"),
    "masked": ("masked", "masked"), "vit classify": ("vit", "classify"), "vit evidence": ("vit", "evidence"),
    "dit edm": ("dit", "edm"),
}  # fmt: skip


def config_of(family: str, objective: str, size: Size) -> CheckpointConfig:
    noisy = objective in ("single_pass", "evidence", "paper", "masked", "edm")
    model: Result = {"family": family, "d_model": size.width, "num_heads": size.heads, "mlp_width": size.mlp,
                     "noise_conditioning": noisy}  # fmt: skip
    if family in ("vit", "dit"):
        model |= {"num_layers": 2, "image_size": 8, "patch_size": 4, "num_classes": 4}
    else:
        model |= {"vocab_size": size.vocab, "max_seq_len": max(size.length, 64)}
        layers = {"num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2}
        model |= layers if family == "huginn" else {"num_layers": 4}
    return CheckpointConfig.model_validate({"name": "gpu", "model": model, "objective": objective})


def batch_of(config: CheckpointConfig, size: Size) -> Batch:
    rng = torch.Generator().manual_seed(0)
    if config.model.is_image:
        images, classes = (
            torch.randn(size.micro, 3, 8, 8, generator=rng),
            torch.zeros(size.micro, 1, dtype=torch.int64),
        )
        return Batch(images, classes, torch.ones(size.micro, 1, dtype=torch.bool))
    ids = torch.randint(0, size.vocab, (size.micro, size.length + 1), generator=rng)
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(size.micro, size.length, dtype=torch.bool))


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """On a GPU an operation that makes the host wait raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median of some runs after one that warms up."""
    run()
    found = []
    for _ in range(repeats):
        finish(device)
        began = time.perf_counter()
        run()
        finish(device)
        found.append(time.perf_counter() - began)
    return sorted(found)[len(found) // 2]


def losses(device: torch.device, size: Size, out: Path) -> Cases:
    for name, (family, objective) in KINDS.items():
        yield name, partial(_loss, config_of(family, objective, TINY), device)


def _loss(config: CheckpointConfig, device: torch.device) -> Result:
    batch, keys = batch_of(config, TINY), Keys(0, 3, source="counter")
    wanted = float(build(config, seed=0).loss(batch, keys).total.detach())
    there = build(config, seed=0).to(device, torch.bfloat16)
    moved = batch.to(device)
    there.loss(moved, keys)  # makes the rotary table
    try:
        with no_waits(device):
            total = there.loss(moved, keys).total
        waits = ""
    except RuntimeError as error:
        waits, total = str(error).splitlines()[0], there.loss(moved, keys).total
    total.backward()
    loss = float(total.detach())
    close = math.isclose(loss, wanted, rel_tol=5e-2)
    return {"loss": loss, "on_cpu": wanted, "close": close, "waits": waits}


def bandwidth(device: torch.device, size: Size, out: Path) -> Cases:
    def copy() -> Result:
        source = torch.ones(size.width * size.vocab * 4, dtype=torch.bfloat16, device=device)
        there = torch.empty_like(source)
        seconds = seconds_of(lambda: there.copy_(source), device, 5)
        return {"bytes_per_s": 2 * source.nbytes / seconds}

    yield "copy", copy


def attention(device: torch.device, size: Size, out: Path) -> Cases:
    batch, length, heads = size.micro, size.length, size.heads
    contexts: list[tuple[str, Callable[[], Any], int, int]] = [
        ("causal", lambda: CausalContext(length, device), length, heads),
        ("grouped heads", lambda: CausalContext(length, device), length, 1),
        ("bidirectional", lambda: BidirectionalContext(length, device), length, heads),
        ("padded", lambda: PaddedContext(torch.full((batch,), length - 3), length, device), length, heads),
        ("two streams", lambda: TwoStreamContext(length, True, device), 2 * length, heads),
    ]
    for name, make, rows, kv_heads in contexts:
        yield name, partial(_attention, make, rows, kv_heads, device, size)


def _attention(make: Callable[[], Any], rows: int, kv_heads: int, device: torch.device, size: Size) -> Result:
    context, dtype, width = make(), torch.bfloat16, size.width // size.heads
    q = torch.randn(size.micro, rows, size.heads, width, device=device, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(size.micro, rows, kv_heads, width, device=device, dtype=dtype) for _ in range(2))

    def both() -> None:
        context.attend(q, k, v, 0).sum().backward()

    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    both()
    with torch.profiler.profile(activities=activities) as profile:
        both()
    names = (event.key for event in profile.key_averages())
    kernels = {name for name in names if any(word in name for word in ("attention", "fmha", "flash"))}
    found: Result = {"ms": 1e3 * seconds_of(both, device, 3), "kernels": sorted(kernels)}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        try:
            with sdpa_kernel(backend):
                found[backend.name.lower()] = 1e3 * seconds_of(both, device, 3)
        except RuntimeError as error:
            found[backend.name.lower()] = str(error).splitlines()[0][:100]
    return found


def step(device: torch.device, size: Size, out: Path) -> Cases:
    for objective, source, mode in (
        ("onestep", "counter", "off"), ("onestep", "counter", "blocks"), ("single_pass", "counter", "off"),
        ("single_pass", "counter", "blocks"), ("single_pass", "generator", "off"),
    ):  # fmt: skip
        name = f"{objective}, {source}, compile {mode}"
        config, trace = config_of("huginn", objective, size), out / f"{name}.json.gz"
        yield name, partial(_one_step, config, mode, source, device, size, trace)


def _one_step(
    config: CheckpointConfig, mode: str, source: Any, device: torch.device, size: Size, trace: Path
) -> Result:
    network = filled(config, device)
    if mode == "blocks":
        compile_layers(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    batch, flops = batch_of(config, size), UpdateFlops(config, size.length)
    done = 0.0

    def update(number: int) -> None:
        nonlocal done
        terms = network.loss(batch.to(device), Keys(0, number, source=source))
        (terms.total / (size.micro * size.length)).backward()
        optimizer.step()
        optimizer.zero_grad()
        done += size.micro * flops.of(int(terms.metrics["core_steps"]))

    began = time.perf_counter()
    for number in range(3):
        update(number)
    finish(device)
    first, done = time.perf_counter() - began, 0.0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for number in range(3, 3 + size.updates):
        update(number)
    finish(device)
    seconds = time.perf_counter() - began
    counted = done
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    peak = peak_flops(device)
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            update(0)
            finish(device)
        profile.export_chrome_trace(str(trace))
        written = str(trace)
    except (RuntimeError, OSError) as error:  # the figures above stand without it
        written = f"{type(error).__name__}: {error}"
    return {
        "ms": 1e3 * seconds / size.updates, "tokens_per_s": size.micro * size.length * size.updates / seconds,
        "tflops": counted / seconds / 1e12, "mfu": None if peak is None else counted / seconds / peak,
        "first_three_s": first, "peak_memory_bytes": memory, "trace": written,
    }  # fmt: skip


def deterministic(device: torch.device, size: Size, out: Path) -> Cases:
    for on in (False, True):
        yield "on" if on else "off", partial(_twice, on, device)


def _twice(on: bool, device: torch.device) -> Result:
    torch.use_deterministic_algorithms(on)
    began, weights = time.perf_counter(), []
    try:
        for _ in range(2):
            network = build(config_of("huginn", "single_pass", TINY), seed=0).to(device, torch.bfloat16)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
            batch = batch_of(network.config, TINY).to(device)
            for number in range(20):
                network.loss(batch, Keys(0, number, source="counter")).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append([p.detach().cpu() for p in network.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    return {"equal_bits": same, "wall_s": time.perf_counter() - began}


def filled(config: CheckpointConfig, device: torch.device) -> Objective:
    """A network in bf16 whose weights are drawn on the device: drawing billions on the CPU takes a minute."""
    network = build(config, device="meta").to(torch.bfloat16).to_empty(device=device)
    rng = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=rng)
            else:
                parameter.fill_(1)
    return network


def published(device: torch.device, size: Size, out: Path) -> Cases:
    """Shapes of released models, one request, weights at random."""
    for name, num_steps in (("Huginn-0125", 32), ("Ouro-1.4B", 4)):
        for graphs in (False, True):
            label = f"{name}, K = {num_steps}" + (", graphs" if graphs else "")
            yield label, partial(_published, name, num_steps, graphs, device, size)


def _published(name: str, num_steps: int, graphs: bool, device: torch.device, size: Size) -> Result:
    config = published_config(name, size if size == TINY else None)
    return _fresh_decoded(config, device, 1, num_steps, size.tokens, graphs)


def published_config(name: str, tiny: Size | None = None) -> CheckpointConfig:
    """The shape of a released model; tiny: with these widths."""
    huginn = name == "Huginn-0125"
    width, heads, mlp, vocab = (5280, 55, 17920, 65536) if huginn else (2048, 16, 5632, 49152)
    if tiny is not None:
        width, heads, mlp, vocab = tiny.width, tiny.heads, tiny.mlp, tiny.vocab
    model: Result = {"d_model": width, "vocab_size": vocab, "max_seq_len": 4096}
    if huginn:
        model |= {
            "family": "huginn", "num_heads": heads, "mlp_width": mlp, "num_prelude_layers": 2,
            "num_core_layers": 4, "num_coda_layers": 2, "qk_bias": True, "state_init": "normal",
        }  # fmt: skip
    else:
        loop = {"num_core_layers": 24, "state": "embedding", "boundary_norm": "weighted", "final_norm": False}
        layer = {"num_heads": heads, "mlp_width": mlp, "norms": "sandwich_branch", "rope": {"base": 1e6}}
        model |= {"family": "recurrent", "tie_embeddings": False, "layer": layer, "loop": loop}
    return CheckpointConfig.model_validate({"name": "gpu", "model": model, "objective": {"name": "onestep"}})


def decode(device: torch.device, size: Size, out: Path) -> Cases:
    config = config_of("huginn", "onestep", size)
    for rows in size.batches:
        for num_steps in size.steps:
            for graphs in (False, True):
                name = f"batch {rows}, K = {num_steps}" + (", graphs" if graphs else "")
                yield name, partial(_fresh_decoded, config, device, rows, num_steps, size.tokens, graphs)


def _fresh_decoded(
    config: CheckpointConfig, device: torch.device, rows: int, num_steps: int, tokens: int, graphs: bool
) -> Result:
    network = filled(config, device).eval()
    read = bytes_per_token(config, "bfloat16", num_steps)
    found = _decoded(network, config, device, rows, num_steps, tokens, graphs)
    return {**found, "bytes_per_token": read, "weights_gb_per_s": 1e-9 * read * found["tokens_per_s"] / rows}


def paged(device: torch.device, size: Size, out: Path) -> Cases:
    """Attention of a decode step of the 1B model to contexts of 1,024 positions: a gather of all keys, as now; in
    place by FlexAttention (``Runner(attention="pages")``); and by PyTorch's own kernel, where it takes the pages."""
    for rows in size.batches:
        for form in (
            "gather",
            "in place",
            *(("varlen, pages of 64", "varlen, pages of 256") if device.type == "cuda" else ()),
        ):
            yield f"{form}, {rows} rows", partial(_paged, form, rows, device, size)


def _paged(form: str, rows: int, device: torch.device, size: Size) -> Result:
    context, heads, width = max(PAGE, size.length // 4), size.heads, size.width // size.heads
    q, k, v = (torch.randn(1, rows, heads, width, device=device, dtype=torch.bfloat16) for _ in range(3))
    if form.startswith("varlen"):
        page = int(form.split()[-1])
        count = context // page
        pools = [
            torch.randn(rows * count, page, heads, width, device=device, dtype=torch.bfloat16) for _ in "kv"
        ]
        table = torch.randperm(rows * count, device=device).view(rows, count).int()
        ends, used = (
            torch.arange(rows + 1, device=device).int(),
            torch.full((rows,), context, device=device).int(),
        )

        def attend() -> Any:
            return varlen_attn(
                q[0], *pools, ends, None, 1, context, window_size=(-1, 0), seqused_k=used, block_table=table
            )

    else:
        sizes = (1, rows, context, heads, width, torch.bfloat16, device)
        cache = KVCache(*sizes, num_unkept=bucket(rows), by_rows=form == "in place")
        store, segments = cache.stores[0], [Segment(slot, 0, context) for slot in range(rows)]
        for segment in segments:
            store.reserve(segment)
        store.k.normal_(), store.v.normal_()
        seen = torch.tensor([store.row(segment)[:context].tolist() for segment in segments], device=device)
        at = torch.full((rows,), context - 1, device=device)

        def attend() -> Any:
            return PagedContext(cache, at, at, context, [(store, seen[:, -1], seen)]).attend(q, k, v, 0)

    seconds = seconds_of(attend, device, 10)
    read = 2 * rows * context * heads * width * 2
    found: Result = {"us": 1e6 * seconds, "keys_gb_per_s": 1e-9 * read / seconds}
    if device.type == "cuda":  # without the host's part
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend()
        found["us_captured"] = 1e6 * seconds_of(graph.replay, device, 10)
    return found


def quantised(device: torch.device, size: Size, out: Path) -> Cases:
    """The fused gate and up product of the 1B model's MLP."""
    for rows in (1, 16, 64):
        for form in ("bfloat16", "int8", "int4"):
            yield f"{form}, {rows} rows", partial(_product, form, rows, device, size)


def _product(form: str, rows: int, device: torch.device, size: Size) -> Result:
    inputs, outputs, group = -(-size.width // 128) * 128, -(-2 * size.mlp // 64) * 64, 128
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    # Copies, so that a cache of 50 MB does not hold the weight.
    copies = 4 if device.type == "cuda" else 1
    weights = [torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    if form == "bfloat16":
        runs = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
        stored = weights[0].nbytes
    elif form == "int8":
        whole = [(127 * weight.clamp(-1, 1)).to(torch.int8) for weight in weights]
        scales = torch.full((outputs,), 1 / 127, device=device, dtype=torch.bfloat16)
        runs = [partial(torch._weight_int8pack_mm, x, weight, scales) for weight in whole]
        stored = whole[0].nbytes + scales.nbytes
    else:
        halves = [
            torch.randint(0, 256, (outputs, inputs // 2), device=device, dtype=torch.uint8) for _ in weights
        ]
        scales = torch.full((inputs // group, outputs, 2), 1 / 8, device=device, dtype=torch.bfloat16)
        if device.type == "cuda":
            packed = [torch._convert_weight_to_int4pack(half, 8) for half in halves]
            runs = [partial(torch._weight_int4pack_mm, x, weight, group, scales) for weight in packed]
        else:
            wide = [torch.randint(0, 16, (outputs, inputs), dtype=torch.int32) for _ in weights]
            packed = [torch._convert_weight_to_int4pack_for_cpu(each, 1) for each in wide]
            runs = [partial(torch._weight_int4pack_mm_for_cpu, x, weight, group, scales) for weight in packed]
        stored = halves[0].nbytes + scales.nbytes

    def every() -> None:
        for run in runs:
            run()

    seconds = seconds_of(every, device, 5) / copies
    return {"us": 1e6 * seconds, "weight_gb_per_s": 1e-9 * stored / seconds}


def _decoded(
    network: Objective,
    config: CheckpointConfig,
    device: torch.device,
    rows: int,
    num_steps: int,
    tokens: int,
    graphs: bool,
) -> Result:
    """graphs: without a GPU, their passes are run as they come. Where rounding decides, they draw other tokens."""
    replay = None if not graphs else CudaGraphs() if device.type == "cuda" else Eager()
    runner = Runner(
        network,  # type: ignore[arg-type]
        config,
        num_slots=rows,
        max_len=64,
        max_steps=num_steps,
        num_tokens=config.model.vocab_size,
        replay=replay,
    )
    scheduler = Scheduler(rows, 64 * rows, 16)
    for number in range(rows):
        request = Request(
            (1, 2, 3, 4), StepBudget(num_steps), tokens, SamplingParams(temperature=0.7), seed=number
        )
        scheduler.add(runner.sequence(number, request, 16))
    scheduler.admit()
    drawn, steps, began = 0, 0, 0.0
    ids: dict[int, list[int]] = {}
    while running := scheduler.schedule():
        results = runner.run(running)
        for sequence in running:
            result = results.get(sequence.id)
            sequence.advance(result or StepResult())
            tokens_drawn = list(result.tokens) if result else []
            sequence.output.extend(tokens_drawn)
            ids.setdefault(sequence.id, []).extend(tokens_drawn)
            drawn += len(tokens_drawn)
            if len(sequence.output) >= tokens:
                runner.release(sequence)
                scheduler.remove(sequence)
        steps += 1
        if drawn >= 2 * rows and not began:  # the prompt, the first tokens and captures are not counted
            finish(device)
            began = time.perf_counter()
    finish(device)
    seconds = time.perf_counter() - began
    counted = drawn - 2 * rows
    digest = hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()
    return {
        "tokens_per_s": counted / seconds,
        "ms_per_step": 1e3 * seconds / max(1, counted // rows * num_steps),
        "tokens_sha256": digest[:16],
    }


def noise(device: torch.device, size: Size, out: Path) -> Cases:
    yield "normal numbers", partial(_noise, device, size)


def _noise(device: torch.device, size: Size) -> Result:
    rows = torch.arange(size.micro * size.length, device=device)
    count = len(rows) * size.width
    by_counter = seconds_of(lambda: counter_stream(0, 1).normals(rows, size.width), device, 3)
    by_generator = seconds_of(
        lambda: torch.randn(len(rows), size.width, generator=generator(0, 1)).to(device), device, 3
    )
    here, there = (counter_stream(0, 1).normals(rows[:64].to(where), size.width) for where in ("cpu", device))
    bits = torch.equal(counter_stream(0, 1).bits(rows.cpu()), counter_stream(0, 1).bits(rows).cpu())
    return {
        "counter_ns_per_number": 1e9 * by_counter / count, "generator_ns_per_number": 1e9 * by_generator / count,
        "integers_equal_the_cpus": bits, "largest_difference_from_the_cpu": float((here - there.cpu()).abs().max()),
    }  # fmt: skip


PARTS: dict[str, Callable[[torch.device, Size, Path], Cases]] = {
    "losses": losses, "bandwidth": bandwidth, "published": published, "step": step, "attention": attention,
    "decode": decode, "paged": paged, "quantised": quantised, "deterministic": deterministic, "noise": noise,
}  # fmt: skip
LIMITS = {
    "losses": 90, "bandwidth": 40, "published": 120, "step": 180, "attention": 60, "decode": 150, "paged": 90,
    "quantised": 40,
    "deterministic": 60, "noise": 40,
}  # fmt: skip
"""Seconds that a part may take, start included."""
BROKEN = 3
"""Exit status of a part's process whose device is of no use any more."""
UNFINISHED = "it did not end: the process was killed, or took too long"


def run_part(part: str, out: Path, tiny: bool, session: str) -> int:
    """Run the cases of a part that ``out`` does not have -> exit status. session: failed cases of it are not
    run again."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    status = 0
    try:
        cases = list(PARTS[part](device, TINY if tiny else FULL, out.with_suffix("")))
    except Exception as error:
        cases = [("cases", partial(_again, error))]
    for name, run in cases:
        found = read(out)
        of_part = found.setdefault(part, {})
        known = of_part.get(name)
        if known is not None and ("error" not in known or known.get("session") == session):
            continue
        of_part[name] = {"error": UNFINISHED, "session": session}
        write_file(out, json.dumps(found, indent=1) + "\n")
        began = time.perf_counter()
        try:
            of_part[name] = {**run(), "seconds": time.perf_counter() - began}
        except Exception as error:
            traceback.print_exc()
            of_part[name] = {"error": f"{type(error).__name__}: {error}"[:2000], "session": session}
            status = 1
        write_file(out, json.dumps(found, indent=1) + "\n")
        print(f"{part}, {name}: {json.dumps(of_part[name])[:300]}", file=sys.stderr, flush=True)
        gc.collect()
        if device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return BROKEN
    return status


def _again(error: Exception) -> Result:
    raise error


def read(out: Path) -> Result:
    return json.loads(out.read_text()) if out.exists() else {}


def in_processes(part: str, options: argparse.Namespace, session: str, end: float) -> None:
    """Run a part in processes of its own: another one goes on where one broke down or hung."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--out",
        str(options.out),
        "--only",
        part,
        "--here",
        session,
    ]
    stop = min(end, time.monotonic() + LIMITS[part])
    while (left := stop - time.monotonic()) > 0:
        try:
            code = subprocess.run([*command, *(["--tiny"] if options.tiny else [])], timeout=left).returncode
        except subprocess.TimeoutExpired:
            print(f"{part}: stopped after {LIMITS[part]} s", file=sys.stderr, flush=True)
            return
        if code in (0, 1):
            return
        print(f"{part}: its process ended with {code}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; traces go into a folder beside it"
    )
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, without a GPU as well")
    parser.add_argument("--minutes", type=float, default=10, help="of all parts together")
    parser.add_argument("--here", metavar="SESSION", help="run in this process, without a time limit")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny runs every part on a CPU")
    if options.here is not None:
        return max((run_part(part, options.out, options.tiny, options.here) for part in wanted), default=0)
    found = read(options.out)
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    facts = {key: value for key, value in provenance().items() if key != "command"}
    found["machine"] = {**facts, "device": name, "tiny": options.tiny}
    for part in wanted if options.only else ():
        found.pop(part, None)  # asked for: run again
    write_file(options.out, json.dumps(found, indent=1) + "\n")
    session, end = str(time.time_ns()), time.monotonic() + 60 * options.minutes
    for part in wanted:
        in_processes(part, options, session, end)
    found = read(options.out)
    print(render(found))
    return int(
        any("error" in case for part in wanted for case in found.get(part, {"": {"error": ""}}).values())
    )


def render(found: Result) -> str:
    """A line for each case."""
    lines = []
    for part in PARTS:
        for name, case in found.get(part, {}).items():
            figures = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in case.items()]
            lines.append(f"{part} | {name} | {', '.join(figures)}"[:400])
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
