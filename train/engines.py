"""DeepSpeed engines: one for a whole network, one for each block of a network that is cut.

One engine over all blocks would move idle ones: DeepSpeed fills missing gradients with zeros, on which AdamW
still decays weights and lets momentum coast. An engine that is not called cannot; its step count, clipping
and momentum are those of the block alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn
from torch.optim import Optimizer

from rdlm.nn.layers import TransformerLayer
from train.offload import Mover, Store
from train.optim import Cut, reset_state
from train.settings import TrainConfig

PERSISTENT_ELEMENTS = 10_000
"""ZeRO 3 keeps parameters of at most this size (norms, biases) whole on every process: gathering them costs
more than it saves."""


def start_engine(module: nn.Module, optimizer: Optimizer, config: TrainConfig, world: int) -> DeepSpeedEngine:
    """The engine of one module, before its first update. Collective."""
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=ds_config(config, world))[0]
    # At ZeRO stage 0 in bf16 DeepSpeed makes an update with zero gradients to allocate the state: Adam's step
    # count would stay
    # one ahead, and its bias correction with it.
    reset_state(optimizer)
    if hasattr(optimizer, "cuts"):  # it works on whole matrices
        optimizer.cuts = cuts_of(engine)
    if config.deepspeed.zero_stage in (
        1,
        2,
    ):  # by default DeepSpeed looks for overflows in 16-bit training only
        engine.optimizer.check_grad_overflow = True
    return engine


def cuts_of(engine: DeepSpeedEngine) -> dict[int, Cut]:
    """id of each flat tensor of ZeRO 1 to 3 -> the parameters that are in it."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return {}
    if stage == 3:
        flats, groups = zero.fp32_partitioned_groups_flat, zero.fp16_groups
    elif hasattr(zero, "bf16_groups"):  # BF16_Optimizer, which DeepSpeed takes at stage 1 in bf16
        flats, groups = zero.fp32_groups_flat_partition, zero.bf16_groups
    else:
        flats, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
    return {
        id(flat): Cut([tuple(getattr(p, "ds_shape", p.shape)) for p in group], stage == 3)
        for flat, group in zip(flats, groups, strict=True)
    }


def partitioner(config: TrainConfig, world: int) -> Callable[[nn.Parameter], None]:
    """What cuts a new parameter for the processes at ZeRO 3, where no process ever holds the network; at other
    stages nothing. Collective."""
    if config.deepspeed.zero_stage < 3:
        return lambda parameter: None
    made = ds_config(config, world)

    def cut(parameter: nn.Parameter) -> None:
        deepspeed.zero.Init(module=nn.ParameterList([parameter]), config_dict_or_path=made)

    return cut


def ds_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """The dictionary that ``deepspeed.initialize`` takes for ``world`` processes; every number comes from
    ``config``."""
    micro, accumulation = config.batch.accumulation(world)
    spec = config.deepspeed
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": spec.bucket_elements,
        "allgather_bucket_size": spec.bucket_elements,
        # Stages 1 and 2: one stream, so that the order of additions, and every bit, stays the same between
        # runs. Stage 3: without
        # it gathers and reductions would run on the stream of the computation, one after the other.
        "overlap_comm": spec.zero_stage == 3 if spec.overlap_comm is None else spec.overlap_comm,
    }
    if spec.offload_optimizer == "cpu":
        zero["offload_optimizer"] = {"device": "cpu"}
    if spec.zero_stage == 3:
        zero["stage3_prefetch_bucket_size"] = spec.bucket_elements
        zero["stage3_param_persistence_threshold"] = PERSISTENT_ELEMENTS
        if spec.live_elements is not None:
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = spec.live_elements
        if spec.offload_param == "cpu":
            zero["offload_param"] = {"device": "cpu"}
        if config.compile != "off":
            # One gather for a layer instead of one for each of its matrices, whose hooks no compiler could trace.
            layer = TransformerLayer
            zero["leaf_module"] = {"classes": [f"{layer.__module__}.{layer.__qualname__}"]}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        # OPTIMIZERS and OFFLOADED of train/optim.py decide.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if spec.communication_dtype != "auto":
        result["communication_data_type"] = spec.communication_dtype
    if config.precision == "bf16" and spec.zero_stage > 0:  # stage 0 offers bf16 accumulation only
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result


class ResidentEngines(Sequence[DeepSpeedEngine]):
    """The engines of all blocks, of which one at a time is on the device: ``engines[b]`` moves the previous
    block off it and block b onto it. An engine is ready for use until another one is taken."""

    def __init__(
        self,
        starts: Sequence[Callable[[], DeepSpeedEngine]],
        store: Callable[[], Store],
        device: torch.device,
    ) -> None:
        """starts: builds the engine of each block. store: makes the place for the bytes of one inactive
        block."""
        self.swap_seconds = 0.0
        """Time spent on moving blocks."""
        self.active = 0
        self._engines: list[DeepSpeedEngine] = []
        self._movers: list[Mover] = []
        for block, start in enumerate(starts):
            if block:
                self._movers[-1].leave()
            self._engines.append(start())
            self._movers.append(Mover(self._engines[-1], store(), device))
            self.active = block

    def __len__(self) -> int:
        return len(self._engines)

    @overload
    def __getitem__(self, block: int) -> DeepSpeedEngine: ...
    @overload
    def __getitem__(self, block: slice) -> Sequence[DeepSpeedEngine]: ...
    def __getitem__(self, block: int | slice) -> DeepSpeedEngine | Sequence[DeepSpeedEngine]:
        if isinstance(block, slice):
            raise TypeError("one block at a time is on the device")
        engine = self._engines[block]
        if block != self.active:
            get_accelerator().synchronize()  # what is still computing is not part of the move
            begun = time.perf_counter()
            self._movers[self.active].leave()
            self._movers[block].come_back()
            self.swap_seconds += time.perf_counter() - begun
            self.active = block
        return engine

    def __iter__(self) -> Iterator[DeepSpeedEngine]:
        return (self[block] for block in range(len(self)))


def full_precision_weights(engine: DeepSpeedEngine, model: nn.Module) -> dict[str, Tensor] | None:
    """fp32 copies of the model's parameters on the CPU of rank 0, tied ones once; None on the other ranks.
    Collective."""
    masters = _unpartitioned_masters(engine)
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                value = parameter.detach().clone()
        elif engine.zero_optimization_stage() == 0:
            value = masters[id(parameter)]
        else:
            value = safe_get_full_fp32_param(parameter)
        if engine.global_rank == 0:
            weights[name] = value.detach().float().cpu().clone()
    return weights if engine.global_rank == 0 else None


def _unpartitioned_masters(engine: DeepSpeedEngine) -> dict[int, Tensor]:
    """Stage 0: parameter id -> fp32 master, which in fp32 training is the parameter itself."""
    if engine.zero_optimization_stage() > 0:
        return {}
    if not engine.bfloat16_enabled():
        return {id(p): p for p in engine.module.parameters()}
    optimizer = engine.optimizer
    pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def grad_norm(engine: DeepSpeedEngine) -> Tensor:
    """Gradient norm before ``engine.step()``, of an engine at stage 0 in fp32."""
    return nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def step_without_gradients(engine: DeepSpeedEngine) -> None:
    """``engine.step()`` at stage 0 in fp32 that changes nothing: torch's optimizers pass over parameters
    without a gradient.

    The gradients are dropped after DeepSpeed has clipped them, which needs some.
    """
    hook = engine.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: engine.zero_grad())
    engine.step()
    hook.remove()
