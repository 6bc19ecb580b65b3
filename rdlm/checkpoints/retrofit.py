"""A plain transformer made recurrent: ``rdlm convert``.

Layers become prelude, core and coda; some may be left out (retrofitted recurrence, McLeish et al. 2025, arXiv
2511.07384). With all layers the result computes at K = 1 what the source computes, bit for bit. Injection
``none`` runs middle layers several times (arXiv 2510.07358), which needs no training.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints import state_size
from rdlm.checkpoints.convert.base import check, check_out, progress_bar
from rdlm.checkpoints.safetensors_io import DTYPES, Entry
from rdlm.checkpoints.vocabulary_cut import cut_for
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.model import LoopConfig, RecurrentConfig
from rdlm.errors import UserError

Injection = Literal["linear", "diagonal", "none"]
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def convert(
    source: Path,
    out: Path,
    *,
    prelude: int,
    core: int,
    coda: int,
    keep_layers: Sequence[int] | None = None,
    injection: Injection = "linear",
    num_steps: int = 1,
    max_steps: int | None = None,
    keep_tokens: Sequence[Path] = (),
    state_scale: float | None = None,
    name: str | None = None,
    force: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Write the checkpoint folder ``out`` with ``prelude``, ``core`` and ``coda`` layers of the plain
    transformer ``source``.

    keep_layers: the source's layers in the order of their new places; None takes the first ones for the
    prelude and the last ones for core and coda. num_steps and max_steps: default and largest K. keep_tokens:
    prepared data whose tokens alone stay in the vocabulary (rdlm/checkpoints/vocabulary_cut.py). state_scale:
    factor of the state in injection ``linear``; None measures it (rdlm/checkpoints/state_size.py). say: takes a
    line about what was chosen. Weights keep their dtype; one layer is in memory at a time. UserError where the
    source is no plain transformer of text, or the numbers do not fit it.
    """
    source_config = checkpoint.load_config(source)
    source_config.check_exact("`rdlm convert`")
    plain = _plain(source, source_config)
    check_out(out, source, force)
    kept = _kept(plain.num_layers, prelude, core, coda, keep_layers)
    cut = cut_for(source / checkpoint.TOKENIZER, keep_tokens) if keep_tokens else None
    _check_scale(state_scale, injection)
    stored = tensors.stored(source / checkpoint.WEIGHTS)
    scale, measured = state_scale or 1.0, None
    if injection == "linear" and state_scale is None:
        layers = kept[:prelude], kept[prelude : prelude + core]
        measured = state_size.sizes(source, source_config, stored, *layers)
        scale = state_size.balancing_scale(*measured)
    model = plain.model_copy(update={"loop": _loop(prelude, core, coda, injection, scale)})
    if cut is not None:
        model = model.model_copy(update={"vocab_size": len(cut.kept)})
    document = {
        "name": name or f"{source_config.name}-recurrent",
        "model": model.model_dump(),
        "objective": {"name": "next_token"},
        "recurrence": {"default_steps": num_steps, "max_steps": max_steps or max(64, num_steps)},
        "step": source_config.step,
    }
    config = checkpoint.parse_config(document, "rdlm convert")
    if cut is not None:
        stored = cut.weights(stored, plain.vocab_size)
    weights = {**_renamed(stored, kept, prelude, core), **_adapter(injection, model.d_model, stored)}
    check(str(source), weights, config, f"use the {checkpoint.CONFIG} and {checkpoint.WEIGHTS} of one export")

    def fill(temporary: Path) -> None:
        with progress_bar(weights, "convert") as bar:
            tensors.write(temporary / checkpoint.WEIGHTS, weights, bar.update)
        if cut is not None:
            cut.write_tokenizer(source / checkpoint.TOKENIZER, temporary / checkpoint.TOKENIZER)
        elif (source / checkpoint.TOKENIZER).is_dir():
            shutil.copytree(source / checkpoint.TOKENIZER, temporary / checkpoint.TOKENIZER)
        if (source / checkpoint.GENERATION).is_file():
            ends = (source / checkpoint.GENERATION).read_text(encoding="utf-8")
            (temporary / checkpoint.GENERATION).write_text(
                ends if cut is None else cut.generation(ends), encoding="utf-8"
            )

    described = {
        key: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
        for key, entry in weights.items()
    }
    notes = _notes(source, source_config, plain.num_layers, kept, (prelude, core, coda), injection)
    if injection == "linear":
        why = ", as given"
        if measured is not None:
            why = f": the root mean square of e is {measured[0]:.3g}, that of the state {measured[1]:.3g}"
        say(f"state scale of the injection {scale:g}{why}")
        notes += f"\n- State scale of the injection {scale:g}{why}."
    if cut is not None:
        notes += (
            f"\n- Vocabulary: {len(cut.kept):,} of {plain.vocab_size:,} tokens, those that its data uses."
        )
    return checkpoint.write(out, config, None, described, fill, notes)


def parse_layers(text: str) -> list[int]:
    """``0-3,10-17`` -> the numbers, in this order. UserError where it is no such list."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            remedy = "write ranges by commas, for instance 0-3,10-17,18-21"
            raise UserError("--keep-layers", text, "is not a list of layers", remedy)
        found += range(first, last + 1)
    return found


def _plain(source: Path, config: CheckpointConfig) -> RecurrentConfig:
    """The source's general form. UserError where it is more than a stack of layers that runs once."""
    field, remedy = (
        "CHECKPOINT",
        "give a causal model whose layers run once: an import of a plain decoder, or family llama",
    )
    config.check_text("rdlm convert")
    if config.model.iterates:
        raise UserError(field, str(source), "it is recurrent already", remedy)
    layout = cast(RecurrentConfig, config.model.layout())  # type: ignore[union-attr]
    if layout.masked:
        raise UserError(field, str(source), "a masked diffusion model has no next token", remedy)
    if layout.noise_conditioning or config.objective.readout != "plain" or config.blocks is not None:
        problem = f"objective {config.objective.name!r} conditions its layers on noise"
        raise UserError(field, str(source), problem, "give a model trained with objective next_token")
    plain = LoopConfig(num_core_layers=layout.num_layers, iterates=False, injection="replace")
    if layout.loop != plain or layout.value_embeddings:
        problem = f"it is more than a stack of layers: {layout.topology()}"
        raise UserError(field, str(source), problem, remedy)
    return layout


def _kept(count: int, prelude: int, core: int, coda: int, given: Sequence[int] | None) -> list[int]:
    """Layers of the source in the order of their new places. UserError where there are none of that number."""
    wanted, parts = prelude + core + coda, f"{prelude}-{core}-{coda}"
    if given is None:
        if wanted > count:
            problem = f"{wanted} layers are needed, the source has {count}"
            raise UserError(
                "--prelude, --core, --coda", parts, problem, f"let them add up to {count} or less"
            )
        return [*range(prelude), *range(count - core - coda, count)]
    shown = ",".join(map(str, given))
    if len(given) != wanted:
        problem = f"names {len(given)} layers; --prelude, --core and --coda are {parts}, {wanted} together"
        raise UserError("--keep-layers", shown, problem, "name as many layers as they are together")
    for layer in given:
        if layer >= count:
            raise UserError("--keep-layers", layer, f"the source has {count} layers", f"use 0 to {count - 1}")
        if given.count(layer) > 1:
            raise UserError("--keep-layers", layer, "is named twice", "name every layer once")
    return list(given)


def _check_scale(scale: float | None, injection: Injection) -> None:
    if scale is None:
        return
    if injection != "linear":
        problem = f"injection {injection!r} does not scale the state"
        raise UserError("--state-scale", scale, problem, "leave it out, or use --injection linear")
    if not 0 < scale < math.inf:
        raise UserError("--state-scale", scale, "is no factor", "give a number above 0")


def _loop(prelude: int, core: int, coda: int, injection: Injection, scale: float) -> LoopConfig:
    return LoopConfig(
        num_prelude_layers=prelude,
        num_core_layers=core,
        num_coda_layers=coda,
        state="embedding" if injection == "none" else "zero",
        injection=injection,
        injection_state_scale=scale,
    )


def _renamed(stored: Mapping[str, Entry], kept: Sequence[int], prelude: int, core: int) -> dict[str, Entry]:
    """The source's weights without the layers that are left out, under their new names."""
    places = {layer: _place(i, prelude, core) for i, layer in enumerate(kept)}
    found = {}
    for name, entry in stored.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            found[name] = entry
        elif int(match[1]) in places:
            found[f"model.{places[int(match[1])]}.{match[2]}"] = entry
    return found


def _place(index: int, prelude: int, core: int) -> str:
    if index < prelude:
        return f"prelude.{index}"
    if index < prelude + core:
        return f"core_block.{index - prelude}"
    return f"coda.{index - prelude - core}"


def _adapter(injection: Injection, d_model: int, stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """New weights of the injection, with which the first step begins with e exactly.

    linear: [0, I]. diagonal: B = I at step size 1, which in fp32 is softplus(dt_bias) to the last bit (and in
    bf16 and fp16 near enough that e comes out of the rounding unchanged); the state, zero at first, decays by
    exp(-1) a step.
    """
    table = stored.get("model.wte.weight")
    dtype = DTYPES.get(table.dtype, torch.float32) if table is not None else torch.float32
    identity = torch.eye(d_model, dtype=dtype)
    made: dict[str, Tensor] = {}
    match injection:
        case "linear":
            made = {"model.adapter.weight": torch.cat([torch.zeros_like(identity), identity], dim=1)}
        case "diagonal":
            made = {
                "model.adapter.A_log": torch.zeros(d_model),
                "model.adapter.dt_bias": torch.full((d_model,), math.log(math.expm1(1.0))),
                "model.adapter.B.weight": identity,
            }
    return {name: tensors.entry_of(tensor) for name, tensor in made.items()}


def _notes(
    source: Path,
    config: CheckpointConfig,
    count: int,
    kept: Sequence[int],
    sizes: tuple[int, int, int],
    injection: Injection,
) -> str:
    parts, start = [], 0
    for part, size in zip(("prelude", "core", "coda"), sizes, strict=True):
        taken = kept[start : start + size]
        parts.append(f"{part} {', '.join(map(str, taken)) if size else 'none'}")
        start += size
    dropped = sorted(set(range(count)) - set(kept))
    at_one = (
        f"Layers left out: {', '.join(map(str, dropped))}; what it predicts without them is not what the "
        "source predicts."
        if dropped
        else "At K = 1 its logits are those of the source."
        if list(kept) == list(range(count))
        else "Layers are in another order than in the source."
    )
    at_more = {
        "linear": "The injection starts at [0, I]: every K gives the same logits until it is trained.",
        "diagonal": "The injection starts with B = I, step size 1 and decay exp(-1).",
        "none": "There is no injection: a step goes on from the last one.",
    }[injection]
    family = getattr(config.model, "origin", None) or config.model.family
    lines = [
        "## Conversion",
        "",
        f"- Made by `rdlm convert` from `{source.resolve().name}` (model {config.name!r}, {family}, {count} "
        "layers that run once).",
        f"- Its layers, counted from 0: {'; '.join(parts)}.",
        f"- {at_one}",
        f"- {at_more}",
    ]
    return "\n".join(lines)
