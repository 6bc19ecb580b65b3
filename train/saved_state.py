"""Weights and optimizer state as DeepSpeed's files hold them, and how an engine gets its share of them.

The files give whole tensors by parameter name, whatever ZeRO stage and number of processes saved them, and
each process cuts its share for the stage and number it has now. Only where a number lies changes, so this is
exact. DeepSpeed's universal checkpoints do the same for ZeRO 1 to 3, but write a converted copy to disk
first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from torch.optim import Optimizer

from rdlm.errors import UserError
from train.ema import KEY as AVERAGE

_NONE = torch.empty(0)
WEIGHT = "weight"
"""Key of the fp32 weights in ``SavedState``, which also has the names of the optimizer's moments."""


class SavedState:
    """Weights and optimizer state of one engine as DeepSpeed's files hold them: whole tensors by parameter
    name, read one by one.

    ZeRO 1 and 2 cut the flat vector of each parameter group into equal parts, padded at its end; ZeRO 3 cuts
    every parameter (Rajbhandari et al. 2020). Names are those of the network: a wrapper's prefix is removed.
    Frozen parameters are saved beside the optimizer's, in the precision of the run.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]]) -> None:
        """groups: names of the parameters as the optimizer groups them, which files of stage 0 do not hold;
        frozen ones last."""
        saved = [_read(file) for file in _sorted_by_rank(folder.glob("*zero_pp_rank_*_optim_states.pt"))]
        models = _sorted_by_rank(folder.glob("*model_states.pt"))
        if not models:
            raise UserError("checkpoint", str(folder), "holds no weights", "use a complete checkpoint")
        model = _read(models[0])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.counts: dict[str, float] | None
        """What the optimizer keeps once for all parameters (``step``); None before its first update."""
        self._places: dict[str, tuple[int, int]] = {}
        """Name -> (group, first element in its flat vector)."""
        self._frozen: dict[str, list[Tensor]] = {}
        """Name -> its pieces, one a process where they are cut."""
        if not saved:
            self._read_whole(folder, model, groups)
            self._read_frozen([model], cut=False)
            return
        states = [part["optimizer_state_dict"] for part in saved]
        self._cut_each = "fp32_flat_groups" in states[0]
        weights, base = (
            ("fp32_flat_groups", "optimizer_state_dict")
            if self._cut_each
            else ("single_partition_of_fp32_groups", "base_optimizer_state")
        )
        self._flat: dict[str, list[list[Tensor]]] = {WEIGHT: [state[weights] for state in states]}
        optimizers = [state[base]["state"] for state in states]
        for key in self._read_counts(folder, [s for state in optimizers for s in state.values()]):
            self._flat[key] = [[state[i].get(key, _NONE) for i in range(len(state))] for state in optimizers]
        for group, shapes in enumerate(model["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                self.shapes[own_name(name)], self._places[own_name(name)] = tuple(shape), (group, start)
                start += -(-prod(shape) // len(saved)) if self._cut_each else prod(shape)
        self._read_frozen([_read(file) for file in models] if self._cut_each else [model], self._cut_each)

    def _read_frozen(self, models: Sequence[dict[str, Any]], cut: bool) -> None:
        """Parameters that no optimizer holds. cut: ZeRO 3, where each process has a piece of them."""
        if cut:
            for name, shape in (models[0].get("frozen_param_shapes") or {}).items():
                self.shapes[own_name(name)] = tuple(shape)
                self._frozen[own_name(name)] = [m["frozen_param_fragments"][name].flatten() for m in models]
            return
        for name, weight in models[0]["module"].items():
            if own_name(name) not in self.shapes:
                self.shapes[own_name(name)] = tuple(weight.shape)
                self._frozen[own_name(name)] = [weight.flatten()]

    def _read_counts(self, folder: Path, states: Sequence[Mapping[str, Any]]) -> list[str]:
        """Set ``counts`` from the optimizer's states -> the names of its elementwise tensors.

        Raises UserError for what is neither elementwise nor one number for all parameters: it cannot be cut
        anew.
        """
        first = states[0] if states else {}
        elementwise = list(
            dict.fromkeys(
                key
                for state in states
                for key, value in state.items()
                if torch.is_tensor(value) and value.dim()
            )
        )
        self.counts = {key: float(value) for key, value in first.items() if key not in elementwise} or None
        for state in states:
            kept = {key: float(state[key]) for key in self.counts or ()}
            if kept != (self.counts or {}) or len({state[k].numel() for k in elementwise if k in state}) > 1:
                problem = (
                    "its optimizer keeps more than tensors in the shape of the weights and common numbers"
                )
                raise UserError("checkpoint", str(folder), problem, "this state cannot be restored")
        return elementwise

    def _read_whole(self, folder: Path, model: dict[str, Any], groups: Sequence[Sequence[str]]) -> None:
        """Stage 0: nothing is cut. Moments, and in bf16 training the fp32 weights, are numbered through the
        groups."""
        self._cut_each = False
        optimizer = model["optimizer"]
        held = optimizer.get("optimizer_state_dict", optimizer)["param_groups"]
        names = [own_name(name) for group in groups for name in group][: sum(len(g["params"]) for g in held)]
        masters = [weight for group in optimizer.get("fp32_groups", []) for weight in group]
        found = {own_name(name): weight for name, weight in model["module"].items()}
        whole: dict[str, list[Tensor]] = {WEIGHT: masters or [found[name] for name in names]}
        state = optimizer.get("optimizer_state_dict", optimizer)["state"]
        for key in self._read_counts(folder, list(state.values())):
            whole[key] = [state[i].get(key, _NONE) for i in range(len(names))]
        self.shapes = {name: tuple(weight.shape) for name, weight in zip(names, whole[WEIGHT], strict=True)}
        self._places = {name: (number, 0) for number, name in enumerate(names)}
        self._flat = {
            key: [[tensor if tensor is _NONE else tensor.flatten() for tensor in tensors]]
            for key, tensors in whole.items()
        }

    def holds(self, key: str, name: str) -> bool:
        """Whether the optimizer keeps this of a parameter: another one may be none of its business."""
        place = self._places.get(name)
        return place is None or self._flat[key][0][place[0]] is not _NONE

    @property
    def moments(self) -> list[str]:
        """Names of the optimizer's tensors; none before its first update."""
        return [key for key in self._flat if key != WEIGHT]

    def tensor(self, key: str, name: str) -> Tensor:
        """A copy of the whole fp32 weight or moment of a parameter, flat. A parameter that was frozen has
        moments of zero."""
        if name in self._frozen:
            weight = torch.cat(self._frozen[name])[: prod(self.shapes[name])].float()
            return weight if key in (WEIGHT, AVERAGE) else torch.zeros_like(weight)
        group, start = self._places[name]
        pieces, count = [process[group].detach() for process in self._flat[key]], prod(self.shapes[name])
        if self._cut_each:
            size = -(-count // len(pieces))
            return torch.cat([piece[start : start + size] for piece in pieces])[:count].float()
        part = len(pieces[0])
        end = start + count
        touched = [
            piece[max(start - i * part, 0) : end - i * part]
            for i, piece in enumerate(pieces)
            if i * part < end and start < (i + 1) * part
        ]
        return torch.cat(touched).float()


def own_name(name: str) -> str:
    """A parameter's name in the network, without the name that a wrapper gave the network."""
    return name.removeprefix("module.").removeprefix("denoiser.")


def _sorted_by_rank(files: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        match = re.search(r"zero_pp_rank_(\d+)_", path.name)
        return int(match[1]) if match else 0

    return sorted(files, key=rank)


def _read(path: Path) -> dict[str, Any]:
    # The manifest's checksums vouch for the file; it holds DeepSpeed's own classes besides tensors.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def restore(engine: DeepSpeedEngine, saved: SavedState) -> None:
    """Put saved weights and optimizer state into an engine, in this process' share. Collective."""
    names = {id(p): own_name(engine.param_names[p]) for p in engine.module.parameters()}
    _check_shapes(engine, names, saved)
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    rank, world = dist.get_rank(), dist.get_world_size()
    if stage == 0:
        low = engine.bfloat16_enabled()
        base = optimizer.optimizer if low else optimizer
        pairs = (
            zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            if low
            else ((group["params"], group["params"]) for group in optimizer.param_groups)
        )
        for lows, masters in pairs:
            for parameter, master in zip(lows, masters, strict=True):
                name = names[id(parameter)]
                _fill(base, master, saved, partial(_whole, saved, name, master.shape), name)
                parameter.data.copy_(master.data)
    elif stage < 3:
        bf16 = hasattr(optimizer, "bf16_groups")  # BF16_Optimizer, which DeepSpeed takes at stage 1 in bf16
        flats = optimizer.fp32_groups_flat_partition if bf16 else optimizer.single_partition_of_fp32_groups
        groups = optimizer.bf16_groups if bf16 else optimizer.round_robin_bit16_groups
        for flat, parameters in zip(flats, groups, strict=True):
            order = [names[id(parameter)] for parameter in parameters]
            first = rank * flat.numel()
            cut = partial(_window, saved, order, first, flat.numel())
            _fill(optimizer.optimizer, flat, saved, cut, order[0])
            for parameter, name in zip(parameters, order, strict=True):
                parameter.data.copy_(saved.tensor(WEIGHT, name).view(parameter.shape))
    else:
        optimizer.checkpoint_event_prologue()
        for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            order = [names[id(parameter)] for parameter in optimizer.fp16_groups[group]]
            _fill(optimizer.optimizer, flat, saved, partial(_shares, saved, order, rank, world), order[0])
            optimizer.fp16_partitioned_groups_flat[group].data.copy_(flat.data)
        optimizer.checkpoint_event_epilogue()
    for parameter in (p for p in engine.module.parameters() if not p.requires_grad):
        name = names[id(parameter)]
        if stage == 3:
            parameter.ds_tensor.data.copy_(_shares(saved, [name], rank, world, WEIGHT))
        else:
            parameter.data.copy_(saved.tensor(WEIGHT, name).view(parameter.shape))


def _check_shapes(engine: DeepSpeedEngine, names: Mapping[int, str], saved: SavedState) -> None:
    shapes = {names[id(p)]: tuple(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters()}
    for name in sorted(shapes.keys() | saved.shapes.keys()):
        if shapes.get(name) != saved.shapes.get(name):
            problem = f"the checkpoint has {saved.shapes.get(name)}"
            raise UserError(
                f"shape of {name}", shapes.get(name), problem, "restore the model's config, or use init_from"
            )


def _fill(
    base: Optimizer, target: Tensor, saved: SavedState, cut: Callable[[str], Tensor], name: str
) -> None:
    """Write the weights of ``target`` and the optimizer's state for it. cut: key -> this process' share, in
    the shape of ``target``. name: of a parameter in it."""
    target.data.copy_(cut(WEIGHT))
    if saved.counts is None:
        base.state.pop(target, None)
        return
    state = base.state[target]
    for key in saved.moments:
        if not saved.holds(key, name):
            continue
        if key in state:
            state[key].copy_(cut(key))
        else:
            state[key] = cut(key).to(target.device)
    of_torch = isinstance(base, torch.optim.Optimizer) and type(base).__module__.startswith("torch.")
    counts_in_tensors = getattr(base, "counts_in_tensors", of_torch)
    for key, value in saved.counts.items():
        state[key] = torch.tensor(value) if counts_in_tensors else int(value)


def _whole(saved: SavedState, name: str, shape: torch.Size, key: str) -> Tensor:
    """ZeRO 0: the parameter itself."""
    return saved.tensor(key, name).view(shape)


def _window(saved: SavedState, order: Sequence[str], first: int, size: int, key: str) -> Tensor:
    """ZeRO 1 and 2: elements [first, first + size) of the parameters in a row, zeros beyond their end."""
    pieces, start = [], 0
    for name in order:
        end = start + prod(saved.shapes[name])
        if start < first + size and first < end:
            pieces.append(saved.tensor(key, name)[max(first - start, 0) : first + size - start])
        start = end
    return _padded(torch.cat(pieces) if pieces else torch.zeros(0), size)


def _shares(saved: SavedState, order: Sequence[str], rank: int, world: int, key: str) -> Tensor:
    """ZeRO 3: a share of every parameter, the last one padded."""
    shares = []
    for name in order:
        size = -(-prod(saved.shapes[name]) // world)
        shares.append(_padded(saved.tensor(key, name)[rank * size : (rank + 1) * size], size))
    return torch.cat(shares)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - values.numel())])
