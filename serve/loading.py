"""From a checkpoint folder to something an Engine can run. Imports torch, so only commands and tests import it."""

from __future__ import annotations

from pathlib import Path

import torch

from rdlm import checkpoint
from rdlm.config import CheckpointConfig
from rdlm.denoiser import Denoiser
from rdlm.errors import UserError
from rdlm.tokenizer import Tokenizer
from serve.events import Served
from serve.runner import Runner
from serve.scheduler import Scheduler
from serve.settings import EngineSettings


def load_served(folder: Path, settings: EngineSettings) -> Served:
    """Read a checkpoint and build the parts of an engine. Raises UserError."""
    loaded = checkpoint.load(folder, device=_device(settings.device), dtype=getattr(torch, settings.dtype))
    if loaded.tokenizer is None:
        raise UserError(
            "checkpoint", str(folder), "it has no tokenizer, so its ids are not text", "serve a model trained on text"
        )
    return build_served(loaded.denoiser, loaded.config, loaded.tokenizer, settings)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            "device", name, f"cannot be used ({str(error).splitlines()[0]})", "use cpu, or cuda on a machine with one"
        ) from None
    return device


def build_served(denoiser: Denoiser, config: CheckpointConfig, tokenizer: Tokenizer, settings: EngineSettings) -> Served:
    """The parts of an engine around a model in memory. Raises UserError where settings and checkpoint contradict each other."""
    limit = config.model.max_seq_len
    max_len = limit if settings.max_len is None else settings.max_len
    if max_len > limit:
        raise UserError("max_len", max_len, f"the model was built for {limit} positions", f"ask for at most {limit}")
    if settings.chunk > settings.prefill_rows:
        raise UserError("chunk", settings.chunk, f"it exceeds prefill_rows ({settings.prefill_rows})", "raise prefill_rows")
    most = config.recurrence.max_steps
    max_steps = most if settings.max_steps is None else settings.max_steps
    if max_steps > most:
        raise UserError("max_steps", max_steps, f"the checkpoint allows K up to {most}", f"ask for at most {most}")
    default = min(config.recurrence.default_steps, max_steps) if settings.default_steps is None else settings.default_steps
    if default > max_steps:
        raise UserError("default_steps", default, f"it exceeds max_steps ({max_steps})", f"ask for at most {max_steps}")
    runner = Runner(
        denoiser.eval(),
        config,
        num_slots=settings.max_slots,
        max_len=max_len,
        max_steps=max_steps,
        kv_cache=settings.kv_cache,
        num_tokens=tokenizer.vocab_size,
    )
    scheduler = Scheduler(settings.max_slots, settings.prefill_rows, settings.chunk)
    return Served(config, tokenizer, runner, scheduler, max_len, max_steps, default)
