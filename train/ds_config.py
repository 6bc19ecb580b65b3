"""DeepSpeed's configuration, derived from TrainConfig: every number is stated once, there."""

from __future__ import annotations

from typing import Any

from train.settings import TrainConfig

PERSISTENT_ELEMENTS = 10_000
"""ZeRO 3 keeps parameters of at most this size (norms, biases) whole on every process: gathering them costs more than it saves."""


def ds_config(config: TrainConfig, world: int) -> dict[str, Any]:
    """The dictionary ``deepspeed.initialize`` takes for ``world`` processes."""
    micro, accumulation = config.batch.accumulation(world)
    spec = config.deepspeed
    zero: dict[str, Any] = {
        "stage": spec.zero_stage,
        "reduce_bucket_size": spec.bucket_elements,
        "allgather_bucket_size": spec.bucket_elements,
        "overlap_comm": False,  # one stream: the order of additions, and so every bit, stays the same between runs
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
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": None,
    }
    if config.precision == "bf16" and spec.zero_stage > 0:  # stage 0 offers bf16 accumulation only
        result["data_types"] = {"grad_accum_dtype": "fp32"}
    return result
