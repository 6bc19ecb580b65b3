"""Fixtures for every test: global state put back, optional shared data, tiny models."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.objectives import Objective
from rdlm.registry import build

REPO = Path(__file__).resolve().parent.parent

TINY_SHAPES: dict[str, dict[str, object]] = {
    "huginn": {"num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1},
    "llama": {"num_layers": 2},
    "masked": {"num_layers": 2},
}


@pytest.fixture(autouse=True)
def restored_globals() -> Iterator[None]:
    """Fixed seeds before each test; default dtype, threads and determinism flags as they were after it."""
    dtype, threads, deterministic = (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The optional folder of larger corpora: $RDLM_SHARED, or ``shared`` beside the repository."""
    path = Path(os.environ.get("RDLM_SHARED", REPO.parent / "shared")) / "data"
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set RDLM_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., CheckpointConfig]:
    """``tiny_config(family="huginn", objective="single_pass", **model)`` -> a config: d_model 32, V 64,
    length 64."""

    def make(family: str = "huginn", objective: object = "single_pass", **model: object) -> CheckpointConfig:
        settings = {"name": objective} if isinstance(objective, str) else objective
        if (
            family == "huginn"
            and isinstance(settings, dict)
            and settings["name"] in ("exit_gate", "gate_only")
        ):
            model = {"exit_gate": "linear", **model}
        noisy = CheckpointConfig.model_validate(
            _document({"family": family}, settings, model)
        ).objective.noise_conditioned
        return CheckpointConfig.model_validate(
            _document({"family": family, "noise_conditioning": noisy}, settings, model)
        )

    return make


def _document(family: dict[str, object], objective: object, model: dict[str, object]) -> dict[str, object]:
    common = {
        "vocab_size": 64,
        "d_model": 32,
        "num_heads": 2,
        "mlp_width": 64,
        "max_seq_len": 64,
        "noise_embed_dim": 16,
    }
    return {
        "name": "tiny",
        "model": {**common, **TINY_SHAPES[str(family["family"])], **family, **model},
        "objective": objective,
    }


@pytest.fixture(scope="session")
def tiny(tiny_config: Callable[..., CheckpointConfig]) -> Callable[..., Objective]:
    """``tiny(family="huginn", objective="single_pass", **model)`` -> a freshly initialised Objective, the
    same at every call."""

    def make(family: str = "huginn", objective: object = "single_pass", **model: object) -> Objective:
        return build(tiny_config(family, objective, **model), seed=0)

    return make


@pytest.fixture(scope="session")
def masked_config(tiny_config: Callable[..., CheckpointConfig]) -> Callable[..., CheckpointConfig]:
    """``masked_config(num_blocks=2)`` -> a tiny masked model of 4 layers, in blocks where asked for."""

    def make(
        block: int | None = None, model: dict[str, Any] | None = None, **blocks: Any
    ) -> CheckpointConfig:
        whole = tiny_config("masked", "masked", num_layers=4, **(model or {}))
        return CheckpointConfig.model_validate(
            {**whole.model_dump(), "blocks": blocks or None, "block": block}
        )

    return make


@pytest.fixture(scope="session")
def awake() -> Callable[[Objective], Objective]:
    """``awake(denoiser)`` -> the same with AdaLN that does something: it starts at zero."""

    def wake(denoiser: Objective) -> Objective:
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                if "modulation" in name:
                    parameter.normal_(0.0, 0.2, generator=rng)
        return denoiser

    return wake


@pytest.fixture(autouse=True)
def no_handler_stays() -> Iterator[None]:
    """A handler that a test leaves behind writes to its captured stream, which is closed for later ones."""
    loggers = [logging.getLogger(name) for name in (None, "rdlm", "rdlm.serve")]
    before = [(logger, list(logger.handlers), logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        for handler in [h for h in logger.handlers if h not in handlers]:
            logger.removeHandler(handler)
        logger.setLevel(level)
