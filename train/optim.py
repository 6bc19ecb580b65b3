"""The optimizer of a run and its learning rate: one entry of OPTIMIZERS or SCHEDULES for each name that a config may give."""

from __future__ import annotations

import fcntl
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from train.settings import OptimizerConfig, ScheduleConfig, TrainConfig

Groups = list[dict]


def adamw(groups: Groups, spec: OptimizerConfig) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps)


def offloaded_adamw(groups: Groups, spec: OptimizerConfig) -> Optimizer:
    """The same on the CPU while weights are on a GPU; its C++ extension is compiled once, in about two minutes."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    with building("cpu_adam"):
        return DeepSpeedCPUAdam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, adamw_mode=True)


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {"adamw": adamw}
OFFLOADED: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {"adamw": offloaded_adamw}


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of ``config.optimizer.name`` over all parameters of ``model``.

    Its learning rate is 0: the training loop sets the rate of each update, and DeepSpeed, which makes an update with zero gradients
    while it initializes a bf16 engine at ZeRO stage 0, cannot decay the weights with it.
    """
    table = OFFLOADED if config.deepspeed.offload_optimizer == "cpu" else OPTIMIZERS
    optimizer = table[config.optimizer.name](
        parameter_groups(model, config.optimizer.weight_decay), config.optimizer
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def reset_state(optimizer: Optimizer) -> None:
    """Undo updates that were made before training: step counts and moments back to zero, in place."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            elif isinstance(value, int | float):
                state[key] = type(value)(0)


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Two groups: weights of nn.Linear decay; norms, biases (qk_bias too), scalars and token tables never do."""
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def constant(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """The peak rate."""
    return peak


def cosine(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Half a cosine from the peak to ``min_lr_ratio * peak`` at the last update."""
    floor = schedule.min_lr_ratio * peak
    span = max(1, schedule.steps - 1 - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def trapezoid(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """The peak rate, then linear to ``min_lr_ratio * peak`` over the last ``cooldown_steps`` updates (also called WSD)."""
    if not schedule.cooldown_steps:
        return peak
    floor = schedule.min_lr_ratio * peak
    remaining = max(0, schedule.steps - 1 - step)
    return floor + (peak - floor) * min(1.0, remaining / schedule.cooldown_steps)


SCHEDULES: dict[str, Callable[[ScheduleConfig, float, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "trapezoid": trapezoid,
}
"""Name -> rate of update ``step`` (0-based) after the warm-up, in 1 / update."""


def learning_rate(schedule: ScheduleConfig, peak: float, step: int) -> float:
    """Rate of update ``step`` (0-based): a pure function, so that resuming needs no scheduler state.

    Warm-up is linear and reaches ``peak`` at ``step == warmup_steps``.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    return SCHEDULES[schedule.kind](schedule, peak, step)


@contextmanager
def building(name: str) -> Iterator[None]:
    """Guard a call that compiles or loads the C++ extension ``name``: one process of this user at a time.

    torch guards a build with a file that only its owner removes. A killed owner leaves the file behind and every later run waits for
    ever. The kernel releases our lock when its holder ends; whoever has it removes torch's file if no process holds that open.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with (folder.parent / f".{name}.rdlm-lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        lock = folder / "lock"
        if lock.exists() and not _held(lock):
            print(f"removing {lock}: the process that was compiling {name} is gone", file=sys.stderr)
            lock.unlink(missing_ok=True)
        yield


def _held(file: Path) -> bool:
    """Whether a process on this machine has the file open, as torch has its lock while it compiles."""
    for process in psutil.process_iter():
        try:
            if any(Path(opened.path) == file for opened in process.open_files()):
                return True
        except psutil.Error:  # gone, or of another user, who cannot be building in our cache
            continue
    return False
