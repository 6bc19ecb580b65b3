"""Small models that answer: an untrained network with a trained tokenizer, built once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer, train_tokenizer
from rdlm.registry import build
from serve.engine.engine import Engine, Served
from serve.loading import build_served
from serve.settings import EngineSettings

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHAPES: dict[str, dict[str, object]] = {
    "huginn": {"num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1},
    "llama": {"num_layers": 2},
    "masked": {"num_layers": 3},
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [
        "in the beginning was the word and the word was with god",
        "and it came to pass in those days — ærlig talt",
    ] * 20
    trained = train_tokenizer("bpe", iter(texts), 300)
    trained.chat_template = TEMPLATE
    return trained


BuildServed = Callable[..., Served]


@pytest.fixture(scope="session")
def make_served(tokenizer: Tokenizer) -> BuildServed:
    """``make_served(objective="onestep", family="huginn", settings=EngineSettings(...), **model)``: a tiny
    loud random model."""

    def make(
        objective: str = "onestep",
        family: str = "huginn",
        settings: EngineSettings | None = None,
        blocks: dict[str, object] | None = None,
        **model: object,
    ) -> Served:
        noisy = objective in ("single_pass", "evidence", "paper", "masked")
        shape = {
            "vocab_size": tokenizer.vocab_size,
            "d_model": 32,
            "num_heads": 2,
            "mlp_width": 64,
            "max_seq_len": 128,
        }
        config = CheckpointConfig.model_validate(
            {
                "name": "tiny",
                "model": {**shape, **SHAPES[family], "family": family, "noise_conditioning": noisy, **model},
                "objective": {"name": objective},
                "recurrence": {"default_steps": 2, "max_steps": 8},
                "blocks": blocks,
            }
        )
        denoiser = build(config, seed=1)
        loud = torch.Generator().manual_seed(2)
        with (
            torch.no_grad()
        ):  # the initialisation is nearly silent: let noise, state and context make a difference
            for name, parameter in denoiser.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3 if "wte" in name else parameter.shape[1] ** -0.5, generator=loud)
        return build_served(
            denoiser, config, tokenizer, settings or EngineSettings(max_slots=4, chunk=16, prefill_rows=32)
        )

    return make


@pytest.fixture
def make_engine(make_served: BuildServed) -> Iterator[Callable[..., Engine]]:
    """Like make_served, but a started engine that is stopped after the test."""
    with ExitStack() as stack:
        yield lambda *args, **kwargs: stack.enter_context(Engine(lambda: make_served(*args, **kwargs)))
