"""All that the guard asks of rdlm. Every import from it is in this file: when modules move or are redesigned,
this file alone follows.

Names of weights, metrics and config fields are those of version 1 of the checkpoint format; where the code
has other ones, the functions here translate. Configs come in as plain dictionaries, and what comes out are
tensors, numbers, texts and dictionaries.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import VARIANTS, CorruptionConfig, objective_config
from rdlm.data.batch import Batch
from rdlm.data.tokenizer import Tokenizer, train_tokenizer
from rdlm.diffusion.masked_likelihood import bound
from rdlm.diffusion.masked_likelihood import left_to_right as rdlm_left_to_right
from rdlm.diffusion.partition import partition_of
from rdlm.diffusion.unmasking import mask_of
from rdlm.diffusion.unmasking import unmask as rdlm_unmask
from rdlm.exit_criteria import ExitRule
from rdlm.objectives import Objective
from rdlm.objectives.base import Draws, Keys
from rdlm.objectives.blockwise import drawn_block
from rdlm.objectives.edm import Edm
from rdlm.objectives.masked import MaskedDiffusion
from rdlm.registry import build as rdlm_build
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Event, Request, StepBudget, StepPredictions, TokenLogprobs
from serve.loading import build_served, load_served
from serve.settings import EngineSettings


@dataclass(frozen=True)
class Model:
    """A network and the config that describes it."""

    network: Objective
    config: CheckpointConfig


# Models -----------------------------------------------------------------------------------------------------


def objectives() -> dict[str, list[str]]:
    """Which objectives each family can be trained with."""
    tasks = {"huginn": "causal", "llama": "causal", "masked": "masked", "vit": "classify", "dit": "denoise"}
    names = {str(variant.model_fields["name"].default): variant.tasks for variant in VARIANTS}
    order = [
        "single_pass",
        "onestep",
        "evidence",
        "paper",
        "bptt",
        "next_token",
        "masked",
        "classify",
        "paper",
        "evidence",
    ]
    order = list(dict.fromkeys([*order, "forward_forward", "edm"]))
    if_images = ["classify", "paper", "evidence", "forward_forward"]
    return {
        family: [name for name in (if_images if task == "classify" else order) if task in names[name]]
        for family, task in tasks.items()
    }


def build(document: dict[str, Any], seed: int) -> Model:
    """The freshly initialised network of a config with version 1's fields; ``noise_conditioning`` follows the
    objective."""
    objective = objective_config.validate_python(document["objective"])
    if hasattr(objective, "readout_quantile"):  # version 1 read every sampling model at sigma_max
        objective = objective.model_copy(update={"readout_quantile": 1.0})
    model = {**document["model"], "noise_conditioning": objective.noise_conditioned}
    sections = {**document, "model": model, "objective": objective}
    config = CheckpointConfig.model_validate({"name": "guard", **sections})
    return Model(rdlm_build(config, seed=seed), config)


def weights(model: Model) -> dict[str, Tensor]:
    """The live parameters by their names in version 1's ``model.safetensors``."""
    return dict(model.network.named_parameters())


def parts(model: Model) -> list[Any]:
    """What trains on its own: the blocks, or the whole network."""
    return list(model.network.parts)


def parameters(part: Any) -> list[Tensor]:
    return list(part.parameters())


def recompute(part: Any) -> None:
    """Recompute activations in the backward pass."""
    from train.trainer import recompute_layers

    recompute_layers(part)


def drawn_blocks(num_blocks: int, visits: int, seed: int) -> list[int]:
    """Which block is trained at each of so many visits."""
    return [drawn_block(num_blocks, visit, seed) for visit in range(visits)]


def save(model: Model, folder: Path, tokenizer: Any = None) -> None:
    checkpoint.save(folder, model.network, model.config, tokenizer)


def load(folder: Path) -> Model:
    loaded = checkpoint.load(folder)
    return Model(loaded.denoiser, loaded.config)


def facts(model: Model, ks: Sequence[int]) -> dict[str, Any]:
    """What the config says of K, and the plan of each K's steps."""
    config = model.config
    found: dict[str, Any] = {
        "k_meaning": config.objective.k_meaning,
        "max_steps": config.max_steps,
        "default_steps": config.default_steps,
        "estimator": config.objective.estimator,
        "estimators": [config.objective.estimator_at(k) for k in ks],
    }
    if config.objective.left_to_right and config.model.family != "dit":
        plans = [model.network.step_plan(k) for k in ks]
        found["plans"] = [
            {
                "sigmas": list(plan.sigmas),
                "readout": list(plan.readout),
                "commit": list(plan.commit),
                "blocks": list(plan.blocks),
                "append_own": plan.append_own,
                "num_draws_skipped": plan.num_draws_skipped,
            }
            for plan in plans
        ]
    return found


def partition(model: Model, num_steps: Sequence[int]) -> dict[str, Any]:
    """How layers and noise levels are cut, and the levels of several K."""
    cut = partition_of(model.config)
    return {
        "edges": list(cut.edges),
        "layers": [[each.start, each.stop] for each in cut.layers],
        "training_ranges": [list(cut.training_range(block)) for block in range(cut.num_blocks)],
        "grids": [cut.grid(k) for k in num_steps],
    }


# Training ---------------------------------------------------------------------------------------------------


def update_loss(
    part: Any,
    inputs: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    step: int,
    seed: int,
    rank: int = 0,
    micro: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of weighted losses, positions that count, metrics) of one micro-batch."""
    terms = part.loss(Batch(inputs, targets, mask), Keys(seed, step, rank, micro))
    return terms.total, terms.count, terms.metrics


def command(name: str, *arguments: str) -> list[str]:
    """The command line of ``rdlm train`` and ``rdlm merge``."""
    return [sys.executable, "-m", "rdlm", name, *arguments]


def run_files(output: Path) -> dict[str, Path]:
    """Where a run leaves its weights, its log and its checkpoints."""
    return {
        "weights": output / "model" / "model.safetensors",
        "metrics": output / "metrics.jsonl",
        "held out": output / "held_out.jsonl",
        "checkpoints": output / "checkpoints",
    }


def memory_plan(path: Path, overrides: Sequence[str], world: int, on_gpu: bool) -> dict[str, int]:
    """Bytes that ``rdlm plan`` predicts, by part."""
    from train.config_file import load as load_settings
    from train.memory_plan import predict

    memory = predict(load_settings(path, list(overrides)), world, on_gpu)
    return {
        name: getattr(memory, name)
        for name in ("parameters", "optimizer", "gradients", "activations", "total")
    }


def train_config(path: Path) -> dict[str, Any]:
    """The resolved training config of a YAML file as JSON, its objective with version 1's fields; newer fields
    are among them."""
    from train.config_file import load as load_settings

    document = load_settings(path).model_dump(mode="json")
    return {**document, "objective": _objective_v1(document["objective"])}


NEW_IN_DEPTH = {"per", "curriculum"}


def _objective_v1(section: dict[str, Any]) -> dict[str, Any]:
    """An objective section with the fields that version 1 wrote for every objective."""
    config = objective_config.validate_python(section)
    absent = {
        "depth": config.depth_in_training.model_dump(mode="json", exclude=NEW_IN_DEPTH),
        "corruption": CorruptionConfig().model_dump(mode="json"),
        "readout": config.readout,
        "loss_weighting": "none",
        "label_dropout": 0.0,
        "goodness": None,
        "masking": None,
    }
    kept = {key: value for key, value in section.items() if key not in ("readout_quantile", "depth")}
    return {**absent, **kept}


# Scores and answers -----------------------------------------------------------------------------------------


@torch.no_grad()
def logits(model: Model, inputs: Tensor, num_steps: int) -> Tensor:
    """Logits after K core steps of thinking models, at sigma_max with z = 0 of sampling ones (K = 1)."""
    network = model.network
    if hasattr(network, "iterate") and model.config.objective.k_meaning == "thinking":
        found: list[Tensor] = []

        def keep(k: int, state: Tensor, ctx: Any) -> None:
            if k == num_steps:
                found.append(network.predict(network.model.decode(state, ctx)).logits())

        network.iterate(inputs, num_steps, 0, keep)
        return found[0]
    if hasattr(network, "class_logits"):
        return network.class_logits(inputs)
    assert num_steps == 1
    first = network.at(None)
    return first.predict(
        first.hidden(inputs, None, [1] * len(inputs), torch.Generator().manual_seed(0))
    ).logits()


@torch.no_grad()
def masked_logits(model: Model, ids: Tensor, level: float) -> Tensor:
    """Of a masked model: logits of every place, from the block that owns the level."""
    owner = model.network.at(level)
    assert isinstance(owner, MaskedDiffusion)
    return owner.predict(owner.hidden(ids, torch.full((len(ids),), level))).logits()


@torch.no_grad()
def estimated_images(model: Model, z: Tensor, sigma: float, classes: Tensor, guidance: float) -> Tensor:
    """Of a model that denoises images: the image it sees in z."""
    owner = model.network.at(sigma)
    assert isinstance(owner, Edm)
    return owner.guided(z, sigma, classes, guidance)


def mask_id(model: Model) -> int:
    return mask_of(model.network)


def token_scores(
    model: Model, inputs: Tensor, targets: Tensor, ks: Sequence[int], *, seed: int, num_draws: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """K -> (log-probabilities, whether they are the largest)."""
    found = model.network.score(inputs, targets, ks, seed=seed, num_draws=num_draws)
    return {k: (scores.logprobs, scores.is_greedy) for k, scores in found.items()}


def class_scores(model: Model, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    scores = model.network.score(images, classes, (1,))[1]
    return scores.logprobs, scores.is_greedy


def masked_bound(model: Model, targets: Tensor, num_steps: int, **options: Any) -> Tensor:
    return bound(model.network, targets, num_steps, **options)


def left_to_right(model: Model, targets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return rdlm_left_to_right(model.network, targets, mask)


def _sampling(fields: dict[str, Any]) -> SamplingParams:
    """Decoding settings with version 1's names."""
    renamed = {("sampler" if name == "bridge" else name): value for name, value in fields.items()}
    return SamplingParams(**renamed)


def unmask(model: Model, ids: Tensor, num_steps: int, sampling: dict[str, Any], **options: Any) -> Tensor:
    return rdlm_unmask(model.network, ids, num_steps, _sampling(sampling), **options)


def greedy_answers(model: Model, inputs: Tensor, ks: Sequence[int], **options: Any) -> dict[int, Tensor]:
    if "bridge" in options:
        options["sampler"] = options.pop("bridge")
    return model.network.answer(inputs, ks, Draws(**options))


def draw_images(model: Model, classes: Tensor, num_steps: int, **options: Any) -> Tensor:
    if "solver" in options:
        options["sampler"] = options.pop("solver")
    return model.network.sample_images(classes, num_steps, **options)


# Serving ----------------------------------------------------------------------------------------------------


def tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    return train_tokenizer("bpe", iter(texts), vocab_size)


def tokenizer_facts(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    return {
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "ids": list(ids),
        "text": tokenizer.decode(ids),
    }


def serve(
    model: Model, tokenizer: Any, settings: dict[str, Any], requests: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Answers of an engine over a network in memory to requests that are all submitted at once."""
    served = build_served(model.network, model.config, tokenizer, EngineSettings(**settings))
    with Engine(lambda: served) as engine:
        return [_answer(events) for events in engine.generate([_request(one) for one in requests])]


def serve_folder(
    folder: Path, settings: dict[str, Any], requests: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The same over a checkpoint folder, as ``rdlm serve`` reads it."""
    served = load_served(folder, EngineSettings(**settings))
    with Engine(lambda: served) as engine:
        return [_answer(events) for events in engine.generate([_request(one) for one in requests])]


def _request(fields: dict[str, Any]) -> Request:
    known = dict(fields)
    depth = {name: known.pop(name) for name in ("num_steps", "exit", "schedule") if name in known}
    if "exit" in depth:
        depth["exit"] = ExitRule(**depth["exit"])
    if "show" in known:
        known["step_predictions"] = StepPredictions(**known.pop("show"))
    known |= {"prompt": tuple(known["prompt"]), "sampling": _sampling(known.get("sampling", {}))}
    return Request(budget=StepBudget(**depth), **known)


def _answer(events: Sequence[Event]) -> dict[str, Any]:
    last = events[-1]
    assert last.usage is not None
    counted = (
        "num_steps",
        "prefill_core_steps",
        "decode_core_steps",
        "saved_core_steps",
        "flops",
        "kv_bytes",
        "token_steps",
        "exits",
    )
    answer: dict[str, Any] = {
        "tokens": [event.token for event in events if event.token is not None],
        "text": "".join(event.text for event in events),
        "steps": [event.steps for event in events if event.token is not None],
        "finish": last.finish,
        "usage": {name: getattr(last.usage, name) for name in counted},
    }
    told = {
        "logprobs": [event.logprobs for event in events if event.logprobs is not None],
        "prompt_logprobs": [entry for event in events for entry in event.prompt_logprobs or []],
        **{f"sweep {k}": entries for k, entries in (last.sweep or {}).items()},
    }
    answer |= {name: _logprobs(entries) for name, entries in told.items() if entries}
    glimpses = [event.step_prediction for event in events if event.step_prediction is not None]
    if glimpses:
        answer["glimpses"] = {
            "steps": [each.step for each in glimpses],
            "tokens": [token for each in glimpses for token, _ in each.top],
            "values": [
                value for each in glimpses for value in (each.delta, *(logprob for _, logprob in each.top))
            ],
        }
    return answer


def _logprobs(entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """Tokens, and beside them their log-probabilities: of what was said, then of the likeliest."""
    return {
        "tokens": [token for entry in entries for token, _ in entry.top],
        "values": [
            value for entry in entries for value in (entry.logprob, *(logprob for _, logprob in entry.top))
        ],
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run's log."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    newer = ("tflops", "epoch", "tokens_seen", "images_seen")
    return [{k: v for k, v in record.items() if k not in newer} for record in records]
