"""The optimizer of a run: one entry of OPTIMIZERS for each name that a config may give."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import cpp_extension

from rdlm.errors import UserError
from rdlm.nn.layers import TransformerLayer
from train.ema import KEY as AVERAGE
from train.ema import keep_average
from train.lora import is_trained, plain_name
from train.patterns import matches
from train.process import device_kind
from train.settings import LoraConfig, OptimizerConfig, TrainConfig

Groups = list[dict]


def adamw(groups: Groups, spec: OptimizerConfig) -> Optimizer:
    """Decoupled weight decay (Loshchilov and Hutter 2019). On GPUs in one kernel, without temporaries."""
    fused = device_kind() == "cuda" or None
    return torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)


def offloaded_adamw(groups: Groups, spec: OptimizerConfig) -> Optimizer:
    """The same on the CPU while weights are on a GPU; its C++ extension is compiled once, in about two
    minutes."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    with building("cpu_adam"):
        return DeepSpeedCPUAdam(groups, lr=spec.lr, betas=spec.betas, eps=spec.eps, adamw_mode=True)


@dataclass(frozen=True)
class Cut:
    """Matrices of which a process holds parts in one flat tensor. each: whether every matrix is cut for the processes
    (ZeRO 3), and not all of them in a row (ZeRO 1 and 2)."""

    shapes: Sequence[tuple[int, ...]]
    each: bool

    def matrices(self, gathered: Tensor, rank: int) -> Iterator[tuple[Tensor, slice, slice]]:
        """gathered: the flat tensors of all processes [world, n] -> every matrix of which process ``rank`` holds a
        part, where the part stands in its flat tensor, and where in the flattened matrix."""
        world, size = gathered.shape
        start = 0
        for shape in self.shapes:
            count = prod(shape)
            if self.each:
                part = -(-count // world)
                first, last = rank * part, min((rank + 1) * part, count)
                matrix, place = gathered[:, start : start + part].flatten()[:count], start
                start += part
            else:
                first, last = max(0, rank * size - start), min(count, (rank + 1) * size - start)
                matrix, place = gathered.view(-1)[start : start + count], max(0, start - rank * size)
                start += count
            if first < last:
                yield matrix.view(shape), slice(place, place + last - first), slice(first, last)


class Muon(Optimizer):
    """Momentum that is orthogonalised, for the weights of linear layers (Jordan et al. 2024), and AdamW for all
    else. Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that learning rate and
    weight decay mean the same for both.

    The library's two optimizers work on the groups and the state of this one. Where ZeRO has cut the matrices, each
    process moves the momentum of its part and the parts are gathered, so that the library sees whole matrices: an
    update is that of ZeRO 0. It takes 4 bytes for every element of a group while it is made.
    """

    counts_in_tensors = True
    """Whether counts are tensors, as ``step`` of torch's own optimizers is."""
    cuts: Mapping[int, Cut] = {}
    """id of a flat tensor -> what is in it (train/engines.py)."""

    def __init__(self, groups: Groups, spec: OptimizerConfig) -> None:
        super().__init__(groups, {"lr": spec.lr})
        matrices = [dict(group) for group in groups if group["matrices"]]
        others = [dict(group) for group in groups if not group["matrices"]]
        self._parts: list[tuple[bool, Optimizer]] = []
        if matrices:
            # Groups come with every step; at ZeRO 3 their weights are cut already, which the library would refuse.
            none = [nn.Parameter(torch.zeros(1, 1))]
            muon = torch.optim.Muon(none, lr=spec.lr, momentum=spec.momentum, adjust_lr_fn="match_rms_adamw")
            self._parts.append((True, muon))
        if others:
            self._parts.append((False, adamw(others, spec)))
        for of_matrices, part in self._parts:
            for group in (g for g in self.param_groups if g["matrices"] is of_matrices):
                group |= {key: value for key, value in part.defaults.items() if key not in group}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for of_matrices, part in self._parts:
            part.param_groups = [group for group in self.param_groups if group["matrices"] is of_matrices]
            part.state = self.state
            moved = [p for g in part.param_groups for p in g["params"] if p.grad is not None]
            if of_matrices and any(parameter.dim() < 2 for parameter in moved):
                for group in part.param_groups:
                    for flat in group["params"]:
                        self._move_parts(group, flat)
            else:
                part.step()
            for parameter in moved if of_matrices else ():  # as AdamW counts
                state = self.state[parameter]
                state["step"] = state.get("step", torch.tensor(0.0)) + 1

    def _move_parts(self, group: dict[str, Any], flat: Tensor) -> None:
        """One update of the parts of matrices in ``flat``. Collective."""
        if flat.grad is None or id(flat) not in self.cuts:  # while DeepSpeed starts
            return
        state, rate = self.state[flat], group["lr"]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(flat))
        momentum.lerp_(flat.grad, 1 - group["momentum"])
        mixed = flat.grad.lerp(momentum, group["momentum"])  # Nesterov's, element by element
        gathered = mixed.new_empty(dist.get_world_size(), len(mixed))
        dist.all_gather(list(gathered.unbind()), mixed)
        for matrix, place, part in self.cuts[id(flat)].matrices(gathered, dist.get_rank()):
            weight = nn.Parameter(torch.zeros_like(matrix))  # of which only the part counts
            weight.view(-1)[part] = flat[place]
            weight.grad = matrix.contiguous()
            decay = group["weight_decay"]
            torch.optim.Muon(
                [weight], lr=rate, momentum=0.0, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ).step()
            flat[place] = weight.view(-1)[part]


OPTIMIZERS: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {"adamw": adamw, "muon": Muon}
"""Optimizers by name. Their state must be tensors in the shape of the weights and numbers that all parameters
share, or else a run cannot be resumed: see train/saved_state.py."""
OFFLOADED: dict[str, Callable[[Groups, OptimizerConfig], Optimizer]] = {"adamw": offloaded_adamw}
"""What takes their place where the optimizer runs on the CPU while the weights are on a GPU; the others run
there as they are."""
NOT_OFFLOADED = ("muon",)
"""Optimizers that gather their parts from all processes, which takes the devices' own memory."""


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer of ``config.optimizer.name`` over the parameters of ``model`` that move. Frozen ones are
    left out and record no gradient: they take no memory but their own.

    Its learning rate is 0: the training loop sets the rate of each update, and DeepSpeed, which makes an
    update with zero gradients while it initializes a bf16 engine at ZeRO stage 0, cannot decay the weights
    with it.
    """
    table = OPTIMIZERS | (OFFLOADED if config.deepspeed.offload_optimizer == "cpu" else {})
    groups = [{**group, "lr": 0.0} for group in moving_groups(model, config)]
    optimizer = table[config.optimizer.name](groups, config.optimizer)
    if config.ema is not None:
        keep_average(optimizer, config.ema.decay)
    return optimizer


def moving_groups(model: nn.Module, config: TrainConfig) -> Groups:
    """The groups of what training moves; all else records no gradient from now on."""
    groups = parameter_groups(model, config.optimizer, config.lora)
    for parameter in (p for group in groups if group["lr_factor"] == 0 for p in group["params"]):
        parameter.requires_grad_(False)
    return [group for group in groups if group["lr_factor"]]


def reset_state(optimizer: Optimizer) -> None:
    """Undo updates that were made before training: step counts and moments back to zero, in place.

    An optimizer that keeps other numbers, whose first values only it knows, makes its state anew.
    """
    for state in optimizer.state.values():
        state.pop(AVERAGE, None)
        if any(
            key != "step" and not (torch.is_tensor(value) and value.dim()) for key, value in state.items()
        ):
            state.clear()
        for key, value in state.items():
            if torch.is_tensor(value):
                value.zero_()
            else:
                state[key] = type(value)(0)


def parameter_groups(model: nn.Module, spec: OptimizerConfig, lora: LoraConfig | None = None) -> Groups:
    """At most two groups for each learning-rate factor that occurs, that of 1 first and that of frozen
    parameters, 0, last. With muon a third one: weights of one row or column, such as an exit gate's, are no matrices
    that could be orthogonalised.

    Weights of nn.Linear decay; norms, biases (qk_bias too), scalars and token tables never do.
    """
    linear = {
        id(m.weight): min(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)
    }
    factors = dict.fromkeys([1.0, *spec.lr_factors.values()])
    kinds = [(True, True), (True, False), (False, False)]  # whether it decays, and is a matrix
    found: dict[tuple[float, bool, bool], list[nn.Parameter]] = {
        (f, *kind): [] for f in factors for kind in kinds
    }
    still: dict[tuple[float, bool, bool], list[nn.Parameter]] = {(0.0, *kind): [] for kind in kinds}
    trains = getattr(model, "is_trained", lambda name: True)
    behind = layers_behind(model) if spec.layer_decay < 1 else {}
    for name, parameter in model.named_parameters():
        frozen = not trains(name) or (lora is not None and not is_trained(name, lora))
        factor = (
            0.0 if frozen else lr_factor(plain_name(name), spec) * spec.layer_decay ** behind.get(name, 0)
        )
        width = linear.get(id(parameter))
        place = (factor, width is not None, width is not None and (width > 1 or spec.name != "muon"))
        (found if factor else still).setdefault(place, []).append(parameter)
    found |= still
    return [
        {
            "params": parameters,
            "weight_decay": spec.weight_decay if decayed else 0.0,
            "lr_factor": factor,
            "matrices": is_matrix,
        }
        for (factor, decayed, is_matrix), parameters in found.items()
        if parameters
    ]


def layers_behind(model: nn.Module) -> dict[str, int]:
    """Name of a parameter -> how many transformer layers come after it. Networks register their parts in the
    order in which they are used."""
    layers = [name for name, module in model.named_modules() if isinstance(module, TransformerLayer)]
    found, seen = {}, 0
    for name, _ in model.named_parameters():
        own = next((i for i, layer in enumerate(layers) if name.startswith(f"{layer}.")), None)
        seen = seen if own is None else own + 1
        found[name] = len(layers) - seen
    return found


def lr_factor(name: str, spec: OptimizerConfig) -> float:
    """Factor of a parameter's learning rate; 0 where it is frozen."""
    if any(matches(name, pattern) for pattern in spec.freeze):
        return 0.0
    return next((f for pattern, f in reversed(spec.lr_factors.items()) if matches(name, pattern)), 1.0)


def check_patterns(names: Sequence[str], spec: OptimizerConfig, lora: LoraConfig | None = None) -> None:
    """UserError for a pattern that stands for none of the parameters ``names``, and where nothing is left to
    train."""
    tops = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in names))
    also = () if lora is None else lora.also_train
    for field, patterns in (
        ("optimizer.freeze", spec.freeze),
        ("optimizer.lr_factors", spec.lr_factors),
        ("lora.also_train", also),
    ):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise UserError(field, pattern, "matches no parameter", f"names begin with {tops}")
    if not any(lr_factor(name, spec) for name in names):
        raise UserError("optimizer.freeze", list(spec.freeze), "nothing is left to train", "freeze less")


@contextmanager
def building(name: str) -> Iterator[None]:
    """Guard a call that compiles or loads the C++ extension ``name``: one process of this user at a time.

    torch guards a build with a file that only its owner removes. A killed owner leaves the file behind and
    every later run waits for ever. The kernel releases our lock when its holder ends; whoever has it removes
    torch's file if no process holds that open.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with (folder.parent / f".{name}.rdlm-lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        theirs = folder / "lock"
        if theirs.exists() and not _held(theirs):
            print(f"removing {theirs}: the process that was compiling {name} is gone", file=sys.stderr)
            theirs.unlink(missing_ok=True)
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
