"""From a checkpoint folder to something an Engine can run. Imports torch, so only commands and tests import
it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rdlm.checkpoints import folder as checkpoint
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer
from rdlm.device import usable_device, usable_dtype
from rdlm.errors import UserError
from rdlm.flops import costs_of
from rdlm.nn.quantization import Quantized, formats, quantized
from rdlm.objectives import Objective
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.objectives.next_token import NextToken
from rdlm.sampling_params import NUMBERS
from serve.engine.cpu.library import library
from serve.engine.cpu.modules import use_kernels
from serve.engine.engine import Served
from serve.engine.masked_runner import MaskedRunner
from serve.engine.packing import pack_weights
from serve.engine.replay import CudaGraphs
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.settings import EngineSettings

logger = logging.getLogger("rdlm.serve")
SMALL_TOKENIZER = 0.9
"""A tokenizer with a smaller share of the model's vocabulary is suspicious: padding adds a few ids."""


def load_served(folder: Path, settings: EngineSettings) -> Served:
    """Read a checkpoint and build the parts of an engine. Raises UserError."""
    if settings.resident_blocks is not None and settings.weights != "auto":
        problem = "with --resident-blocks weights are neither packed nor quantised"
        raise UserError("weights", settings.weights, problem, "leave one of the two out")
    loaded, tokenizer, ends = load_text(folder, settings)
    served = build_served(loaded.denoiser, loaded.config, tokenizer, settings, ends)
    if settings.generation_config == "auto":
        served = replace(served, sampling_defaults=sampling_defaults(folder))
    if settings.resident_blocks is None:  # otherwise weights come and go by name
        optimise(loaded.denoiser, settings, loaded.quantized)
    return served


def optimise(
    denoiser: Objective, settings: EngineSettings, stored: Mapping[str, Quantized] | None = None
) -> None:
    """Prepare a network for inference on this machine, in place: the kernels of serve/engine/cpu where they
    can be compiled, else weights packed for PyTorch's own. On a GPU it stays as it is. Raises UserError.

    stored: weights by name that the checkpoint holds quantised and that were kept so.
    """
    weights = None if settings.weights == "auto" else settings.weights
    wanted = settings.kernels == "auto" and denoiser.config.objective.left_to_right
    if wanted and use_kernels(denoiser, stored or weights):
        for part in denoiser.parts:
            part.fix_tables()
        return
    if weights is not None and denoiser.config.quantization is None:
        if not wanted or next(denoiser.parameters()).device.type != "cpu":
            problem = "they are quantised for the CPU kernels, which run next-token models on a CPU"
            raise UserError("weights", settings.weights, problem, "leave it out")
        logger.warning("without the CPU kernels %s weights are neither smaller nor faster", weights)
        chosen = formats(denoiser, weights)
        for name, parameter in denoiser.named_parameters():
            if name in chosen:
                parameter.data = quantized(parameter, chosen[name]).dequantized(parameter.dtype)
    pack_weights(denoiser)


def _check_quantised_once(config: CheckpointConfig, settings: EngineSettings) -> None:
    """UserError where weights that are stored quantised are to be quantised otherwise."""
    if config.quantization is not None and settings.weights not in ("auto", config.quantization.weights):
        problem = f"the checkpoint's weights are {config.quantization.weights} already"
        remedy = "leave it out, or give the checkpoint that it was made from"
        raise UserError("weights", settings.weights, problem, remedy)


def load_text(folder: Path, settings: EngineSettings) -> tuple[checkpoint.Loaded, Tokenizer, frozenset[int]]:
    """A checkpoint of text, its tokenizer, and the ids that end a text. Raises UserError."""
    device = usable_device(settings.device)
    dtype = usable_dtype(settings.dtype, device)
    logger.info("%s runs on %s in %s", folder.name, device, str(dtype).removeprefix("torch."))
    config = checkpoint.load_config(folder)
    config.check_text("generating text")
    _check_quantised_once(config, settings)
    kernels = settings.kernels == "auto" and config.objective.left_to_right and device.type == "cpu"
    keep = kernels and settings.resident_blocks is None and library() is not None
    loaded = checkpoint.load(folder, device, dtype, settings.resident_blocks, keep_quantized=keep)
    if loaded.tokenizer is None:
        raise UserError(
            "checkpoint",
            str(folder),
            "it has no tokenizer, so prompts cannot be read as text",
            "put the tokenizer that the model was trained with into its folder tokenizer/",
        )
    return loaded, loaded.tokenizer, end_ids(folder, loaded.tokenizer)


def end_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokenizer's end of text and what ``generation_config.json`` in its folder or in the checkpoint
    names as ``eos_token_id``.

    Chat models end texts with several ids (Huginn-0125: 65505 and 65508), of which a tokenizer can name one.
    """
    ends = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    for path, config in _generation_configs(folder):
        found = config.get("eos_token_id") or []
        listed = found if isinstance(found, list) else [found]
        if not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in listed):
            problem = f"must be ids below {tokenizer.vocab_size}"
            raise UserError(f"{path}: eos_token_id", found, problem, "give one id or a list of them")
        ends.update(listed)
    return frozenset(ends)


def sampling_defaults(folder: Path) -> dict[str, float]:
    """The numbers of ``SamplingParams`` that ``generation_config.json`` names, as vLLM takes them (it ignores
    ``do_sample`` too). Raises UserError for one that is out of range.
    """
    defaults: dict[str, float] = {}
    for path, config in _generation_configs(folder):
        for name, (kind, valid) in NUMBERS.items():
            if (value := config.get(name)) is None:
                continue
            if type(value) not in (int, kind) or not valid.holds(value):
                raise UserError(f"{path}: {name}", value, f"must lie in {valid}", "correct or remove it")
            defaults[name] = value
    return defaults


def _generation_configs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each ``generation_config.json`` of a checkpoint. Raises UserError."""
    for path in (folder / checkpoint.GENERATION, folder / checkpoint.TOKENIZER / checkpoint.GENERATION):
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError("checkpoint", str(path), "is not a JSON object", "correct or remove it")
        yield path, found


def build_served(
    denoiser: Objective,
    config: CheckpointConfig,
    tokenizer: Tokenizer,
    settings: EngineSettings,
    ends: frozenset[int] | None = None,
) -> Served:
    """The parts of an engine around a model in memory. ends: ids that end a text, by default the
    tokenizer's one.

    Raises UserError where settings and checkpoint contradict each other.
    """
    known, vocab = tokenizer.vocab_size, config.model.vocab_size
    if known > vocab:
        problem = f"it has {known} tokens, the model {vocab}"
        raise UserError("tokenizer", "...", problem, "serve the tokenizer that the model was trained with")
    if known < SMALL_TOKENIZER * vocab:
        logger.warning(
            "the tokenizer has %d tokens and the model %d ids: is it the model's tokenizer? "
            "The other ids are never drawn",
            known,
            vocab,
        )
    if ends is None:
        ends = frozenset() if tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    config.check_text("the engine")
    config.check_whole()
    limit = config.model.max_seq_len
    max_len = limit if settings.max_len is None else settings.max_len
    if max_len > limit:
        raise UserError(
            "max_len", max_len, f"the model was built for {limit} positions", f"ask for at most {limit}"
        )
    if settings.chunk > settings.prefill_rows:
        raise UserError(
            "chunk",
            settings.chunk,
            f"it exceeds prefill_rows ({settings.prefill_rows})",
            "raise prefill_rows",
        )
    most = config.max_steps
    if settings.forbid_beyond_trained:
        if config.trained_steps is None:
            problem = "the checkpoint does not say at which K it was trained"
            raise UserError(
                "forbid_beyond_trained", True, problem, "set the largest K instead: --max-num-steps"
            )
        most = min(most, config.trained_steps)
    max_steps = most if settings.max_steps is None else settings.max_steps
    if max_steps > most:
        raise UserError("max_steps", max_steps, f"K may be up to {most} here", f"ask for at most {most}")
    default = (
        min(config.default_steps, max_steps) if settings.default_steps is None else settings.default_steps
    )
    if default > max_steps:
        raise UserError(
            "default_steps", default, f"it exceeds max_steps ({max_steps})", f"ask for at most {max_steps}"
        )
    if settings.kernels == "graphs":
        _check_graphs(denoiser, config, settings)
    runner, rows = _parts(denoiser.eval(), config, settings, max_len, max_steps, tokenizer.vocab_size)
    scheduler = Scheduler(settings.max_slots, rows, settings.chunk, _readout_cost(denoiser, config))
    return Served(config, tokenizer, runner, scheduler, max_len, max_steps, default, ends)


def _readout_cost(denoiser: Objective, config: CheckpointConfig) -> float:
    """Weights that a pass through prelude, coda and head reads for each weight of a core step; 0 where every step
    is read out."""
    if not config.objective.supports_exits:
        return 0.0
    costs = costs_of(denoiser)
    once = costs.encode.weights + costs.decode.weights + costs.head
    return once / costs.core.weights if costs.core.weights else 0.0


def _check_graphs(denoiser: Objective, config: CheckpointConfig, settings: EngineSettings) -> None:
    """Raises UserError where a step cannot be captured."""
    for fails, problem, remedy in (
        (not config.objective.left_to_right, "a masked model is not decoded row by row", "use auto"),
        (
            settings.resident_blocks is not None,
            "resident blocks move their weights",
            "leave one of the two out",
        ),
        (
            next(denoiser.parameters()).device.type != "cuda",
            "there are CUDA graphs on a GPU only",
            "use auto",
        ),
    ):
        if fails:
            raise UserError("kernels", settings.kernels, problem, remedy)


def _parts(
    denoiser: Objective,
    config: CheckpointConfig,
    settings: EngineSettings,
    max_len: int,
    max_steps: int,
    num_tokens: int,
) -> tuple[Runner | MaskedRunner, int]:
    """What runs the model, and how many positions of longer segments may share a step. Raises UserError."""
    if config.objective.left_to_right:
        if settings.prefix_cache == "any-steps" and settings.kv_cache == "full":
            problem = "keys of every step are kept, which are those of one K"
            raise UserError("prefix_cache", settings.prefix_cache, problem, "use exact, or the shared cache")
        runner = Runner(
            cast(NextToken, denoiser),
            config,
            num_slots=settings.max_slots,
            max_len=max_len,
            max_steps=max_steps,
            num_tokens=num_tokens,
            kv_cache=settings.kv_cache,
            prefix_cache=settings.prefix_cache,
            prefix_cache_bytes=settings.prefix_cache_gb * 1e9,
            chunk=settings.chunk,
            replay=CudaGraphs() if settings.kernels == "graphs" else None,
        )
        return runner, settings.prefill_rows
    if settings.kv_cache != "shared":
        raise UserError("kv_cache", settings.kv_cache, "a masked model keeps no keys", "leave it out")
    # Texts that have a slot step together: one that waited for a longer one would wait for all its steps.
    return MaskedRunner(cast(MaskedDiffusion, denoiser), num_tokens), max(
        settings.chunk, settings.max_slots * max_len
    )
