"""Peak memory of one update of a 12-layer autoregressive model: end to end against blocks, plain against
recomputed activations.

    OMP_NUM_THREADS=1 python -m benchmarks.memory --out docs/results/raw/memory.json

Each arm is a process of its own, forked from one that has only imported, and trains through train/trainer.py.
It counts from the resident set (CUDA: allocated bytes) after the same arm has run once and was freed, the
"fixed" cost. Weights, gradients and moments are counted from the engine's live tensors, the rest of the peak
is activations and temporaries. Times are CPU seconds of the process in interleaved rounds (GPU: wall), so
other load on the machine disturbs them little.
"""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import typer

from benchmarks.common import provenance, write_json
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.diffusion.targets import frozen_rows
from rdlm.objectives.base import Keys
from train.data import Corpus
from train.memory_plan import predict
from train.settings import TrainConfig
from train.trainer import Trainer

BLOCKS = (1, 2, 3, 4, 6)
SHAPE = {"vocab_size": 2048, "d_model": 384, "num_heads": 6, "mlp_width": 1024, "num_layers": 12}
SMALL = {"vocab_size": 64, "d_model": 48, "num_heads": 6, "mlp_width": 64, "num_layers": 12}


@dataclass(frozen=True)
class Arm:
    """One way to train. objective: next_token is the ordinary language model, which has no blocks."""

    objective: str
    num_blocks: int = 1
    checkpointing: bool = False
    precision: str = "fp32"
    zero_stage: int = 0
    mode: Literal["alone", "joint", "resident"] = "alone"
    """Of blocks: the first alone, all on the device, or one at a time."""
    visit_steps: int = 1

    def config(self, folder: str, shape: dict[str, int], micro_size: int, seq_len: int) -> TrainConfig:
        document: dict[str, Any] = {
            "name": "memory", "output": f"{folder}/run", "precision": self.precision,
            "activation_checkpointing": self.checkpointing,
            "model": {"family": "llama", "max_seq_len": seq_len, **shape}, "objective": {"name": self.objective},
            "data": {"kind": "tokens", "path": "none", "seq_len": seq_len}, "batch": {"global_size": micro_size},
            "optimizer": {"lr": 1e-4}, "schedule": {"steps": 1000}, "deepspeed": {"zero_stage": self.zero_stage},
            "log": {"tensorboard": False},
        }  # fmt: skip
        if self.num_blocks > 1:
            document |= {
                "blocks": {"num_blocks": self.num_blocks},
                "block": 0 if self.mode == "alone" else None,
            }
        if self.mode == "resident":
            document |= {"resident": {"visit_steps": self.visit_steps}}
        return parse(TrainConfig, document, "benchmark")


class RandomTokens(Corpus):
    """A corpus of random ids: memory does not depend on what they say."""

    unit, identity, tokenizer = "token", "random", None

    def __init__(self, config: TrainConfig) -> None:
        self.vocab_size, self.seq_len = config.model.vocab_size, config.data.seq_len

    def rows(self, numbers: np.ndarray, seed: int) -> Batch:
        drawn = torch.Generator().manual_seed(int(numbers[0]))
        ids = torch.randint(self.vocab_size, (len(numbers), self.seq_len + 1), generator=drawn)
        return Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))

    def windows(self, max_tokens: int | None, batch_size: int) -> Any:
        raise AssertionError("nothing is evaluated here")


class Run:
    """A trainer of one arm and its next update."""

    def __init__(self, config: TrainConfig, device: torch.device) -> None:
        self.trainer = Trainer(config, RandomTokens(config), device, io.StringIO())

    def update(self, between: Callable[[str], None] = lambda _: None) -> None:
        """One update. ``between`` is called after the forward and after the backward pass."""
        trainer = self.trainer
        (batch,), engine = trainer._batches(trainer.step), trainer.due()
        total, _, _ = engine(batch, Keys(seed=0, step=trainer.step))
        between("forward")
        engine.backward(total / batch.mask.sum())
        del total
        between("backward")
        engine.step()
        trainer.step += 1


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":")
    )
    return int(line.split()[1]) * 1024


def held(device: torch.device) -> int:
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


def peak_of(call: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is resident
    call()
    return status("VmHWM")


def start(folder: str) -> torch.device:
    """What an arm's process does first: allocator without hidden reserves, a process group of one."""
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(-3, 65_536)  # M_MMAP_THRESHOLD: tensors go back to the system when they are freed
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
    on_gpu = torch.cuda.is_available()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
    )
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", verbose=False)
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def measure(arm: Arm, shape: dict[str, int], micro_size: int, seq_len: int, folder: str) -> dict[str, Any]:
    """Bytes of one update of every block there is, in the steady state: the second, so that moments exist."""
    device = start(folder)
    # The same once before, and freed: what libraries compile for the shapes is the process'. oneDNN's bf16
    # kernels take 20 MiB at
    # every size of the model tried, so they must not count as what weights or an optimizer hold. The ZeRO
    # stage is warmed up by a
    # small model: what it imports is the process' too, but DeepSpeed does not free its engines, or frees them
    # while others are measured.
    for name, before, of in (("kernels", replace(arm, zero_stage=0), shape), ("zero", arm, SMALL)):
        warm = Run(before.config(f"{folder}/{name}", of, micro_size, seq_len), device)
        warm.update()
        warm.trainer.close()
        del warm
    frozen_rows.cache_clear()
    fixed = held(device)
    run = Run(arm.config(folder, shape, micro_size, seq_len), device)
    blocks = range(len(run.trainer.engines))
    for _ in blocks:
        run.update()
    steady, at = held(device), {}
    peak = peak_of(
        lambda: [run.update(lambda phase: at.update({phase: held(device)})) for _ in blocks], device
    )
    denoiser = run.trainer.engines[run.trainer.block].module
    return {
        **asdict(arm), "fixed": fixed, "peak": peak - fixed, "parameters_and_optimizer": steady - fixed,
        "activations": at["forward"] - steady, "gradients": at["backward"] - steady,
        "parameter_count": sum(p.numel() for p in denoiser.parameters()),
        "layer_parameter_count": sum(p.numel() for layer in denoiser.model.core_layers for p in layer.parameters()),
    }  # fmt: skip


def times(
    arms: list[Arm], shape: dict[str, int], micro_size: int, seq_len: int, rounds: int, folder: str
) -> list[float]:
    """Median seconds of an update of each arm: of CPU time, on a GPU of wall time. They take turns in one
    process."""
    device = start(folder)
    runs = [
        Run(arm.config(f"{folder}/{i}", shape, micro_size, seq_len), device) for i, arm in enumerate(arms)
    ]
    seconds: list[list[float]] = [[] for _ in arms]
    for round_ in range(rounds + 1):
        for run, own in zip(runs, seconds, strict=True):
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            begun = clock()
            run.update()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                own.append(clock() - begun)
    return [statistics.median(own) for own in seconds]


def limited(arm: Arm, shape: dict[str, int], micro_size: int, seq_len: int, limit: int, folder: str) -> int:
    """Two updates where the process may add ``limit`` bytes of data to what it has (RLIMIT_DATA); returns how
    many it made."""
    device = start(folder)
    bound = status("VmData") + limit
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    made = 0
    try:
        run = Run(arm.config(folder, shape, micro_size, seq_len), device)
        while made < 2:
            run.update()
            made += 1
    except (RuntimeError, MemoryError) as error:
        if "allocate" not in str(error) and not isinstance(error, MemoryError):
            raise
    return made


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """``call(*arguments, folder)`` in a forked process; raises RuntimeError if it died."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            os.dup2(os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT), 1)
            sender.send(call(*arguments, folder))

        process = context.Process(target=work)
        process.start()
        sender.close()
        try:
            return receiver.recv()
        except EOFError:
            raise RuntimeError(f"{call.__name__}{arguments} died") from None
        finally:
            process.join()


APPENDIX_G = {
    "standard": Arm("evidence"), "checkpointing": Arm("evidence", checkpointing=True),
    "block-wise, B = 4": Arm("evidence", 4),
    "both": Arm("evidence", 4, True),
}  # fmt: skip


def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    micro_size: int = 2,
    seq_len: int = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Timed updates of each arm.")] = 3,
    zero: Annotated[
        bool, typer.Option(help="Also one of 4 blocks in fp32 and bf16 at every ZeRO stage (one process).")
    ] = True,
) -> None:
    """Memory of every arm with its prediction, the table of appendix G, and one run in a memory limit."""
    arms = [Arm("evidence", blocks, again) for again, blocks in itertools.product((False, True), BLOCKS)]
    arms += [Arm("next_token"), Arm("next_token", checkpointing=True)]
    if zero:
        arms += [Arm("evidence", 4, False, "fp32", stage) for stage in (1, 2, 3)]
        arms += [Arm("evidence", 4, False, "bf16", stage) for stage in (0, 1, 2, 3)]
    sizes = (SHAPE, micro_size, seq_len)
    rows = []
    for arm in arms:
        row = apart(measure, arm, *sizes)
        memory = predict(arm.config("none", *sizes), 1, torch.cuda.is_available())
        rows.append({**row, "predicted": {**asdict(memory), "total": memory.total}})
        show(rows[-1])
    by_arm = {arm: row for arm, row in zip(arms, rows, strict=True)}
    whole, quarter = by_arm[Arm("evidence")]["peak"], by_arm[Arm("evidence", 4)]["peak"]
    limit = (whole + quarter) // 2
    updates = {
        name: apart(limited, arm, *sizes, limit)
        for name, arm in (("B = 1", Arm("evidence")), ("B = 4", Arm("evidence", 4)))
    }
    seconds = apart(times, list(APPENDIX_G.values()), *sizes, rounds)
    table = {
        name: {"seconds_per_update": second, "peak": by_arm[arm]["peak"]}
        for (name, arm), second in zip(APPENDIX_G.items(), seconds, strict=True)
    }
    write_json(out, {
        "provenance": provenance(), "seed": 0,
        "shape": {**SHAPE, "micro_size": micro_size, "seq_len": seq_len}, "arms": rows,
        "memory_limit": {"bytes": limit, "updates_made_of_two": updates}, "appendix_g": table,
    })  # fmt: skip


def show(row: dict[str, Any]) -> None:
    mib = {key: value / 2**20 for key, value in row.items() if isinstance(value, int) and value > 10**5}
    off = row["predicted"]["total"] / row["peak"] - 1
    print(
        f"{row['objective']} B={row['num_blocks']} again={row['checkpointing']} {row['precision']} zero "
        f"{row['zero_stage']}: "
        + ", ".join(f"{key} {value:.0f}" for key, value in mib.items()) + f" MiB; predicted {off:+.1%}",
        flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
