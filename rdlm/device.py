"""Which device and precision a model runs with, and how tensors get there."""

from __future__ import annotations

import torch
from torch import Tensor

from rdlm.errors import UserError, reason


def usable_device(name: str, field: str = "device") -> torch.device:
    """The device of that name; ``auto`` is the GPU where torch sees one, else the CPU. Raises UserError if it
    cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        remedy = "use auto, cpu, or cuda on a machine with a GPU"
        raise UserError(field, name, f"cannot be used ({reason(error)})", remedy) from None
    return device


def usable_dtype(name: str, device: torch.device, field: str = "dtype") -> torch.dtype:
    """float32 or bfloat16; ``auto`` is bfloat16 on a GPU that computes in it, else float32. Raises UserError
    for other names."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in ("float32", "bfloat16"):
        raise UserError(field, name, "there is no such precision", "use auto, float32 or bfloat16")
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def staged(values: Tensor, device: torch.device) -> Tensor:
    """``values`` of host memory on ``device``, in a copy that neither waits for the kernels before it nor keeps
    the host waiting.

    The only way to a GPU in a training step: a copy from memory that is not pinned waits for all that is queued.
    """
    if values.device == device:
        return values
    if device.type == "cpu" or values.device.type == device.type:
        return values.to(device)
    if torch.cuda.is_available() and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
