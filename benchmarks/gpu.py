"""Ten minutes on a GPU: what only a GPU can say, in parts that can be repeated one by one.

    python -m benchmarks.gpu --out gpu.json                  # parts that are in the file already are not run again
    python -m benchmarks.gpu --out gpu.json --only step      # again, and alone
    python -m benchmarks.gpu --out try.json --tiny  # every part at a tiny size, on a CPU too: is it right?

| part | what it says |
|---|---|
| losses | every kind of model: loss of a batch in bf16 against fp32 on the CPU; whether the host waits in a forward |
| attention | which kernel each kind of attention runs, and how long it takes |
| step | an update of a 1B Huginn: ms, tokens/s, MFU, memory; objectives x compile off and blocks; a trace |
| deterministic | two times 20 updates with deterministic kernels and without: equal bits? what does it cost? |
| decode | tokens/s at several batch sizes and K, with CUDA graphs and without: the same tokens? |
| noise | normal numbers a second, by generator on the CPU and by counter on the device |

A part that fails writes its error and the next one goes on. Nothing here needs a corpus or a network.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from rdlm.atomic import write_file
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.nn.attention import BidirectionalContext, CausalContext, PaddedContext, TwoStreamContext
from rdlm.objectives import Objective
from rdlm.objectives.base import Keys
from rdlm.random_streams import counter_stream, generator
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.replay import CudaGraphs, Eager
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Request, StepBudget, StepResult
from train.compilation import compile_layers
from train.cost import UpdateFlops, peak_flops

Result = dict[str, Any]


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


def losses(device: torch.device, size: Size, out: Path) -> Result:
    found: Result = {}
    for name, (family, objective) in KINDS.items():
        config = config_of(family, objective, TINY)
        batch, keys = batch_of(config, TINY), Keys(0, 3, source="counter")
        here = build(config, seed=0)
        wanted = float(here.loss(batch, keys).total.detach())
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
        found[name] = {
            "loss": loss,
            "on_cpu": wanted,
            "close": math.isclose(loss, wanted, rel_tol=5e-2),
            "waits": waits,
        }
    return found


def attention(device: torch.device, size: Size, out: Path) -> Result:
    batch, length, heads, width = size.micro, size.length, size.heads, size.width // size.heads
    dtype = torch.bfloat16
    contexts = {
        "causal": (CausalContext(length, device), length, heads),
        "grouped heads": (CausalContext(length, device), length, 1),
        "bidirectional": (BidirectionalContext(length, device), length, heads),
        "padded": (PaddedContext(torch.full((batch,), length - 3), length, device), length, heads),
        "two streams": (TwoStreamContext(length, True, device), 2 * length, heads),
    }
    found: Result = {}
    for name, (context, rows, kv_heads) in contexts.items():
        q = torch.randn(batch, rows, heads, width, device=device, dtype=dtype, requires_grad=True)
        k, v = (torch.randn(batch, rows, kv_heads, width, device=device, dtype=dtype) for _ in range(2))

        def both(q: Any = q, k: Any = k, v: Any = v, context: Any = context) -> None:
            context.attend(q, k, v, 0).sum().backward()

        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        both()
        with torch.profiler.profile(activities=activities) as profile:
            both()
        kernels = {
            event.key
            for event in profile.key_averages()
            if "attention" in event.key or "fmha" in event.key or "flash" in event.key
        }
        found[name] = {"ms": 1e3 * seconds_of(both, device, 3), "kernels": sorted(kernels)}
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
        ):
            try:
                with sdpa_kernel(backend):
                    found[name][backend.name.lower()] = 1e3 * seconds_of(both, device, 3)
            except RuntimeError as error:
                found[name][backend.name.lower()] = str(error).splitlines()[0][:100]
    return found


def step(device: torch.device, size: Size, out: Path) -> Result:
    found: Result = {}
    for objective in ("onestep", "single_pass"):
        for source in ("counter", "generator") if objective == "single_pass" else ("counter",):
            for mode in ("off", "blocks") if source == "counter" else ("off",):
                name = f"{objective}, {source}, compile {mode}"
                found[name] = _one_step(
                    config_of("huginn", objective, size), mode, source, device, size, out / f"{name}.json.gz"
                )
    return found


def _one_step(
    config: CheckpointConfig, mode: str, source: Any, device: torch.device, size: Size, trace: Path
) -> Result:
    network = build(config, seed=0).to(device, torch.bfloat16)
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
    with torch.profiler.profile() as profile:
        update(0)
        finish(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(trace))
    peak = peak_flops(device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "ms": 1e3 * seconds / size.updates, "tokens_per_s": size.micro * size.length * size.updates / seconds,
        "tflops": done / seconds / 1e12, "mfu": None if peak is None else done / seconds / peak,
        "first_three_s": first, "peak_memory_bytes": memory, "trace": str(trace),
    }  # fmt: skip


def deterministic(device: torch.device, size: Size, out: Path) -> Result:
    found: Result = {}
    for on in (False, True):
        torch.use_deterministic_algorithms(on)
        began, weights = time.perf_counter(), []
        for _ in range(2):
            network = build(config_of("huginn", "single_pass", TINY), seed=0).to(device, torch.bfloat16)
            optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
            batch = batch_of(network.config, TINY).to(device)
            for number in range(20):
                network.loss(batch, Keys(0, number, source="counter")).total.backward()
                optimizer.step()
                optimizer.zero_grad()
            weights.append([p.detach().cpu() for p in network.parameters()])
        same = all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
        found["on" if on else "off"] = {"equal_bits": same, "seconds": time.perf_counter() - began}
    torch.use_deterministic_algorithms(False)
    return found


def decode(device: torch.device, size: Size, out: Path) -> Result:
    config = config_of("huginn", "onestep", size)
    network = build(config, seed=0).to(device, torch.bfloat16).eval()
    found: Result = {}
    for rows in size.batches:
        for num_steps in size.steps:
            for graphs in (False, True):
                name = f"batch {rows}, K = {num_steps}" + (", graphs" if graphs else "")
                found[name] = _decoded(network, config, device, rows, num_steps, size.tokens, graphs)
            plain = found[f"batch {rows}, K = {num_steps}"]
            found[name]["same_tokens"] = found[name].pop("ids") == plain.pop("ids")
    return found


def _decoded(
    network: Objective,
    config: CheckpointConfig,
    device: torch.device,
    rows: int,
    num_steps: int,
    tokens: int,
    graphs: bool,
) -> Result:
    """graphs: without a GPU, their passes are run as they come. Tokens may differ where rounding decides."""
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
    return {
        "tokens_per_s": counted / seconds,
        "ms_per_step": 1e3 * seconds / max(1, counted // rows * num_steps),
        "ids": ids,
    }


def noise(device: torch.device, size: Size, out: Path) -> Result:
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


PARTS: dict[str, Callable[[torch.device, Size, Path], Result]] = {
    "losses": losses, "attention": attention, "noise": noise, "step": step, "deterministic": deterministic,
    "decode": decode,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON file; traces go into a folder beside it"
    )
    parser.add_argument("--only", help=f"parts, separated by commas: {', '.join(PARTS)}")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, without a GPU as well")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else list(PARTS)
    if unknown := set(wanted) - PARTS.keys():
        parser.error(f"--only: there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny runs every part on a CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: Result = json.loads(options.out.read_text()) if options.out.exists() else {}
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    found["machine"] = {"device": name, "torch": torch.__version__, "tiny": options.tiny}
    for part in wanted:
        if not options.only and "error" not in found.get(part, {"error": ""}):
            continue
        began = time.perf_counter()
        try:
            result = PARTS[part](device, TINY if options.tiny else FULL, options.out.with_suffix(""))
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        found[part] = {"seconds": time.perf_counter() - began, **result}
        write_file(options.out, json.dumps(found, indent=1) + "\n")
        print(f"{part}: {json.dumps(found[part])[:300]}", file=sys.stderr, flush=True)
    return int(any("error" in found[part] for part in wanted))


if __name__ == "__main__":
    sys.exit(main())
