"""How much memory a training config needs, by part, and which way of training fits: ``rdlm plan``.

Weights, gradients and optimizer state are counted (bytes per parameter below); activations are those of the
objective's own code on tensors without data (train/memory_trace.py). Nothing is fitted. Not included: the
fixed cost of a process (libraries, CUDA context).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from rdlm.registry import build
from train.lora import add_adapters
from train.memory_trace import Traced, trace
from train.optim import build_optimizer, parameter_groups
from train.settings import TrainConfig
from train.trainer import recompute_layers

ADAM = 8
"""Bytes of AdamW's two fp32 moments per parameter."""
MASTER = 4
"""Bytes of the fp32 copy of a weight."""
AVERAGE = 4
"""Bytes of the fp32 average of a weight."""
SUM = 4
"""Bytes of a gradient summed up in fp32."""
TEMPORARIES = 8
"""Bytes per element of AdamW's two fp32 temporaries: of one weight at ZeRO 0 on a CPU, else of all that it
works on at once."""
SENT_ELEMENTS = 500_000_000
"""DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE: gradients sent in one message at ZeRO 0."""

VISIT_STEPS = 100
"""Updates of a visit that a plan proposes for resident blocks: moving them then takes little of the time."""
Mode = Literal["one run", "parallel", "resident"]
"""Blocks are trained at the same time on devices of their own, or one after the other, the others resting in
host memory."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of an update."""

    parameters: int
    optimizer: int
    """Moments and, where there are any, fp32 masters."""
    gradients: int
    """Gradients that exist when the peak is reached, buffers for sending them included."""
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class _Sizes:
    """Elements of one block (of the network where it is whole): of all its parameters, of the largest one, of
    the optimizer's larger group; bytes of the frozen rows that are noised."""

    parameters: int
    moved: int
    """Elements of those that are trained."""
    largest: int
    group: int
    frozen: int


@lru_cache(maxsize=256)
def _traced(text: str, micro_size: int, on_gpu: bool) -> tuple[_Sizes, Traced]:
    config = TrainConfig.model_validate_json(text)
    denoiser = build(config.checkpoint_config, device="meta").parts[0]
    add_adapters(denoiser, config.lora, config.seed)
    total = sum(p.numel() for p in denoiser.parameters())
    build_optimizer(denoiser, config)  # freezes what does not move
    counts = [p.numel() for p in denoiser.parameters() if p.requires_grad]
    groups = [
        sum(p.numel() for p in group["params"])
        for group in parameter_groups(denoiser, config.optimizer, config.lora)
        if group["lr_factor"]
    ]
    frozen = 0 if denoiser.targets is None else 4 * config.model.vocab_size * config.model.d_model
    if config.activation_checkpointing:
        recompute_layers(denoiser)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    traced = trace(
        denoiser, micro_size, config.seq_len, dtype, config.objective.depth_in_training.mean, on_gpu
    )
    return _Sizes(total, sum(counts), max(counts), max(groups), frozen), traced


def predict(config: TrainConfig, world: int, on_gpu: bool = False) -> Memory:
    """Memory of each of ``world`` processes. Of blocks it is one that counts: they are trained one by one, or
    apart.

    The peak is that of the forward pass, of the backward pass or of AdamW's step, whichever is highest, above
    what is kept between updates. What DeepSpeed 0.19.8 holds and copies in each was found by listing its live
    tensors (tests/train/test_plan.py repeats it).
    """
    micro, accumulation = config.batch.accumulation(world)
    sizes, traced = _traced(_essence(config), micro, on_gpu)
    width = 2 if config.precision == "bf16" else 4
    spec, stage, count = config.deepspeed, config.deepspeed.zero_stage, sizes.moved
    shares = world if stage > 0 else 1
    owned, group = count // shares, sizes.group // shares
    masters = MASTER if stage > 0 or width == 2 else 0
    gradient = width if stage == 0 else SUM  # gradients are summed up in the weights' type, with ZeRO in fp32
    sums = gradient * (owned if stage >= 2 else count)
    # A buffer of bucket_elements is allocated whole; host memory is taken up only where it is written to.
    bucket = (
        width * (spec.bucket_elements if on_gpu else min(spec.bucket_elements, count)) if stage >= 2 else 0
    )
    # On a GPU also at stage 1 in fp32: on a CPU nothing is written to it there before the backward pass is
    # over, and in bf16 it has none.
    if stage == 1 and width == 4 and on_gpu:
        bucket = width * spec.bucket_elements
    beside = bucket if stage in (1, 2) else 0  # ZeRO 3 keeps its bucket
    gathered = width * sizes.parameters if stage == 3 and world > 1 else 0
    kept = {1: sums if width == 2 else 0, 3: sums + bucket}.get(
        stage, 0
    )  # stages 1 (bf16) and 3 do not let go of their sums

    if stage == 0:
        working = count if on_gpu else sizes.largest
        copies = MASTER * count if width == 2 else 0
        sent = width * min(SENT_ELEMENTS, count)  # DeepSpeed sends gradients in flat copies, before the step
        step = sums + max(sent, copies + TEMPORARIES * working)
    else:
        flat = MASTER * group if width == 4 or stage == 3 else 0
        raw = {1: width * count, 2: sums}.get(
            stage, 0
        )  # what of the gradients is still there beside ``kept``
        step = raw + flat + TEMPORARIES * group

    forward, backward = traced.forward_peak, max(traced.backward_peak, sums if stage == 2 else 0) + beside
    if accumulation > 1:  # earlier micro-batches have left their gradients
        left = 0 if kept else sums
        forward, backward = forward + left, max(backward - traced.gradients, traced.forward) + left + beside
    peak = max(forward + gathered, backward + gathered, step)
    gradients = min(
        max(traced.backward_peak - traced.forward, 0) if stage == 0 and accumulation == 1 else sums,
        kept + peak,
    )
    return Memory(
        parameters=width * (sizes.parameters // (shares if stage == 3 else 1)) + sizes.frozen,
        optimizer=(ADAM + masters + (AVERAGE if config.ema is not None else 0)) * owned,
        gradients=gradients,
        activations=kept + peak - gradients,
    )


def _essence(config: TrainConfig) -> str:
    """The config as far as the trace depends on it: runs that differ in the rest share one."""
    alike = {"name": "plan", "output": "plan", "batch": {"global_size": 1}, "deepspeed": {}, "seed": 0}
    return TrainConfig.model_validate({**config.model_dump(), **alike}).model_dump_json()


@dataclass(frozen=True)
class Arm:
    """One way to train a config, and what it takes."""

    config: TrainConfig
    num_blocks: int
    processes: int
    """That share the run of the network or of one block."""
    memory: Memory
    mode: Mode

    @property
    def settings(self) -> list[str]:
        """What to write behind ``rdlm train CONFIG``."""
        c = self.config
        flags = [f"batch.micro_size={c.batch.micro_size}", f"deepspeed.zero_stage={c.deepspeed.zero_stage}"]
        flags += [f"activation_checkpointing={str(c.activation_checkpointing).lower()}"]
        if self.num_blocks > 1:
            flags += [f"objective.name={c.objective.name}", f"blocks.num_blocks={self.num_blocks}"]
        if self.mode == "resident":
            flags.append(
                f"resident.visit_steps={max(1, min(VISIT_STEPS, c.schedule.steps // self.num_blocks))}"
            )
            if c.evaluation.interval_steps:
                flags.append("evaluation.steps=[1]")
        return flags


def arms(config: TrainConfig, devices: int, on_gpu: bool) -> Iterator[Arm]:
    """Every way, the least harmful first: fewer blocks (they cost quality), then no recomputation (a third of
    the time), then a lower ZeRO stage (less communication), then larger micro-batches."""
    for num_blocks in block_counts(config):
        apart = num_blocks > 1 and devices >= num_blocks
        world = devices // num_blocks if apart else devices
        mode: Mode = "one run" if num_blocks == 1 else "parallel" if apart else "resident"
        for again in (False, True):
            for stage in (0, 1, 2, 3) if world > 1 else (0,):
                for micro in micro_sizes(config, world):
                    variant = _variant(config, num_blocks, again, stage, micro)
                    yield Arm(variant, num_blocks, world, predict(variant, world, on_gpu), mode)


def block_counts(config: TrainConfig) -> list[int]:
    """Divisors of the number of layers, up to one layer a block; 1 where the family cannot be cut."""
    layers = config.model.num_layers
    return [b for b in range(1, layers + 1) if layers % b == 0] if config.model.can_be_cut else [1]


def micro_sizes(config: TrainConfig, world: int) -> list[int]:
    """From a process' whole share of the update down to one sequence by halves, as far as they divide it."""
    share, _ = config.batch.model_copy(update={"micro_size": None}).accumulation(world)
    halves = [share >> n for n in range(share.bit_length())]
    return [size for size in halves if share % size == 0]


def _variant(config: TrainConfig, num_blocks: int, again: bool, stage: int, micro: int) -> TrainConfig:
    document = config.model_dump()
    document["batch"]["micro_size"], document["activation_checkpointing"] = micro, again
    document["deepspeed"] = {
        **document["deepspeed"],
        "zero_stage": stage,
        "offload_optimizer": "none",
        "offload_param": "none",
    }
    if num_blocks == 1:
        document |= {"blocks": None, "block": None}
    else:
        blocks = {**(document["blocks"] or {}), "num_blocks": num_blocks, "layers_per_block": None}
        document |= {"blocks": blocks, "block": 0}
        if config.objective.supports_exits:  # blocks share out noise levels, which this objective lacks
            del document["model"]["noise_conditioning"]
            document["objective"] = {"name": "evidence"}
    return TrainConfig.model_validate(document)
