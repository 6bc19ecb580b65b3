"""Optimizer state that N processes saved, cut anew for M: exact, since only where a number lies changes.

DeepSpeed's ZeRO files are read as they are (mapped, one tensor at a time in memory) and every process builds the state dictionary it
would have saved itself; DeepSpeed's own loader takes it from there. ZeRO 1 and 2 cut each parameter group's flat vector into equal
parts, padded at its end; ZeRO 3 cuts every parameter (Rajbhandari et al. 2020).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

Shapes = Sequence[Mapping[str, Sequence[int]]]
"""For each flat tensor of an optimizer: its parameters' names and shapes in the order they lie in it."""


def load_repartitioned(engine: deepspeed.DeepSpeedEngine, folder: Path, tag: str, saved_world: int) -> None:
    """What ``engine.load_checkpoint(folder, tag)`` does, for a checkpoint of ``saved_world`` processes. Collective."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage < 3:  # weights are whole; at stage 0 so is the optimizer
        engine.load_checkpoint(str(folder), tag=tag, load_optimizer_states=stage == 0)
    if stage == 0:
        return
    saved = [
        _read(folder / tag, f"*zero_pp_rank_{rank}_mp_rank_*_optim_states.pt") for rank in range(saved_world)
    ]
    parts = [part["optimizer_state_dict"] for part in saved]
    rank, world = dist.get_rank(), dist.get_world_size()
    if stage < 3:
        sizes = [group["params"][0].numel() for group in optimizer.param_groups]
        mine = _rebuilt(
            parts, "single_partition_of_fp32_groups", "base_optimizer_state", _recut_groups(sizes, rank)
        )
    else:
        old_shapes = _read(folder / tag, "zero_pp_rank_0_mp_rank_*_model_states.pt")["param_shapes"]
        new_shapes = [{engine.param_names[p]: p.ds_shape for p in group} for group in optimizer.fp16_groups]
        mine = _rebuilt(
            parts,
            "fp32_flat_groups",
            "optimizer_state_dict",
            _recut_parameters(old_shapes, new_shapes, rank, world),
        )
        optimizer.checkpoint_event_prologue()
    optimizer.load_state_dict([mine] * world, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()


Recut = Callable[[list[list[Tensor]]], list[Tensor]]
"""Flat tensors of every saving process ([process][group]) -> those of this one ([group])."""


def _rebuilt(parts: list[dict[str, Any]], weights_key: str, state_key: str, recut: Recut) -> dict[str, Any]:
    """The first process' state dictionary with this process' share in the place of its own."""
    weights = [part[weights_key] for part in parts]
    states = [part[state_key]["state"] for part in parts]
    new_weights = recut(weights)
    first = states[0][0]
    moments = [key for key, value in first.items() if torch.is_tensor(value) and value.dim() > 0]
    recut_moments = {
        key: recut([[state[i][key] for i in range(len(state))] for state in states]) for key in moments
    }
    counters = {
        key: value for key, value in first.items() if key not in moments
    }  # "step": the same number in every group,
    state = {  # but never the same tensor, which every group's update would count up
        i: {**copy.deepcopy(counters), **{key: recut_moments[key][i] for key in moments}}
        for i in range(len(new_weights))
    }
    template = parts[0][state_key]
    return {**parts[0], weights_key: new_weights, state_key: {**template, "state": state}}


def _recut_groups(sizes: list[int], rank: int) -> Recut:
    """ZeRO 1 and 2. sizes: elements of this process' part of every group; a last part may be saved with or without its padding."""

    def recut(saved: list[list[Tensor]]) -> list[Tensor]:
        new = []
        for group, size in enumerate(sizes):
            whole = torch.cat([process[group] for process in saved])
            new.append(_padded(whole[rank * size : (rank + 1) * size], size))
        return new

    return recut


def _recut_parameters(old: Shapes, new: Shapes, rank: int, world: int) -> Recut:
    """ZeRO 3: every parameter is cut by itself, its last part padded. The groups may be composed differently."""

    def recut(saved: list[list[Tensor]]) -> list[Tensor]:
        whole: dict[str, list[Tensor]] = {}
        for group, shapes in enumerate(old):
            start = 0
            for name, shape in shapes.items():
                size = -(-prod(shape) // len(saved))
                whole[name] = [process[group][start : start + size] for process in saved]
                start += size
        return [
            torch.cat([_share(whole[name], prod(shape), rank, world) for name, shape in shapes.items()])
            for shapes in new
        ]

    return recut


def _share(pieces: list[Tensor], numel: int, rank: int, world: int) -> Tensor:
    size = -(-numel // world)
    return _padded(torch.cat(pieces)[:numel][rank * size : (rank + 1) * size], size)


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - values.numel())])


def _read(folder: Path, pattern: str) -> dict[str, Any]:
    (path,) = folder.glob(pattern)
    # The manifest's checksums vouch for the file; it holds DeepSpeed's own classes besides tensors.
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
