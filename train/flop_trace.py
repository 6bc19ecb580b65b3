"""Floating-point operations of an update, found without computing it: the objective's own code on tensors
without data, as train/memory_trace.py finds its bytes."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.nn.attention import rotary_table
from rdlm.registry import build

PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit operations per second of a device whose name contains the key, from NVIDIA's data sheets. The first
key that fits counts."""

aten = torch.ops.aten
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class FlopCounter(TorchDispatchMode):
    """Counts matrix products and attention; of causal attention only pairs that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            found = formula(*args, **(kwargs or {}), out_val=result)
            if "attention" in func.__name__ and any(arg is True for arg in (*args, *(kwargs or {}).values())):
                length = args[1].shape[-2]
                found *= (length + 1) / (2 * length)
            self.total += found
        return result


def peak_flops(device: torch.device) -> float | None:
    """Operations per second that the device could do in 16 bits, None where that is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)


class UpdateFlops:
    """Operations of one micro-batch, forward and backward pass, by the number r of core steps. What is computed
    again to save memory is not counted (model FLOPs, Chowdhery et al. 2022, App. B)."""

    def __init__(self, config: CheckpointConfig, micro_size: int, seq_len: int) -> None:
        self.config, self.sizes = config, (micro_size, seq_len)

    def of(self, core_steps: float) -> float:
        """Every step costs the same, with gradient or without: traced where that changes, linear in between and
        for a mean of several r."""
        most = self.config.objective.depth_in_training.window(math.ceil(core_steps))
        return self._line(core_steps, most if core_steps > most else 1)

    def _line(self, at: float, first: int) -> float:
        start = self._traced(first)
        return start if at == first else start + (at - first) * (self._traced(first + 1) - start)

    def _traced(self, core_steps: int) -> float:
        return _trace(self.config.model_dump_json(), *self.sizes, core_steps)


@lru_cache(maxsize=256)
def _trace(config: str, micro_size: int, seq_len: int, core_steps: int) -> float:
    parsed = CheckpointConfig.model_validate_json(config)
    part = build(parsed, device="meta").parts[0]
    share = getattr(getattr(parsed.objective, "corruption", None), "share", 1.0)
    rotary_table.cache_clear()  # it must neither serve nor keep tensors without data
    try:
        with FakeTensorMode(), FlopCounter() as counter:
            for module in part.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
            if part.targets is not None:
                rows = torch.empty(part.model.vocab_size, part.model.ln_f.weight.shape[0])
                part.targets = lambda device: rows

            def read_out(hidden: Tensor, u: Tensor | None, table: Tensor | None) -> Tensor:
                logits = part.model.head(use=lambda weight: F.linear(hidden, weight))
                if u is not None and table is not None:
                    F.linear(u[: round(share * len(u))], table)
                return logits.sum()

            inputs = part.model.empty_inputs(micro_size, seq_len)
            part.traced_loss(inputs, core_steps, read_out).backward()
        return counter.total
    finally:
        rotary_table.cache_clear()
