"""Reading full-precision weights and the gradient norm out of a DeepSpeed engine, whatever the ZeRO stage."""

from __future__ import annotations

import deepspeed
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


def full_precision_weights(engine: deepspeed.DeepSpeedEngine, model: nn.Module) -> dict[str, Tensor] | None:
    """fp32 copies of the model's parameters on the CPU of rank 0, tied ones once; None on the other ranks. Collective."""
    masters = _unpartitioned_masters(engine)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        value = (
            masters[id(parameter)]
            if engine.zero_optimization_stage() == 0
            else safe_get_full_fp32_param(parameter)
        )
        if engine.global_rank == 0:
            weights[name] = value.detach().float().cpu().clone()
    return weights if engine.global_rank == 0 else None


def _unpartitioned_masters(engine: deepspeed.DeepSpeedEngine) -> dict[int, Tensor]:
    """Stage 0: parameter id -> fp32 master, which in fp32 training is the parameter itself."""
    if engine.zero_optimization_stage() > 0:
        return {}
    if not engine.bfloat16_enabled():
        return {id(p): p for p in engine.module.parameters()}
    optimizer = engine.optimizer
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def unreported_grad_norm(engine: deepspeed.DeepSpeedEngine) -> Tensor | None:
    """Gradient norm before ``engine.step()`` where DeepSpeed reports none afterwards: stage 0 in fp32. None elsewhere."""
    if engine.zero_optimization_stage() > 0 or engine.bfloat16_enabled():
        return None
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
