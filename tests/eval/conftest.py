"""Checkpoints for the tests of the lm-eval model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.checkpoints.folder import save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.registry import build

TEXTS = ["in the beginning was the word and the word was with god", "and it came to pass in those days"] * 20


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folders(objective)`` -> a checkpoint of an untrained loud model, saved once."""
    root, tokenizer = tmp_path_factory.mktemp("harness"), train_tokenizer("bpe", iter(TEXTS), 280)

    def make(objective: str) -> Path:
        if (root / objective).exists():
            return root / objective
        shape = {
            "num_prelude_layers": 1,
            "num_core_layers": 1,
            "num_coda_layers": 1,
            "max_seq_len": 64,
            "noise_embed_dim": 16,
        }
        model = {
            "family": "huginn",
            "vocab_size": 280,
            "d_model": 32,
            "num_heads": 2,
            "mlp_width": 64,
            **shape,
        }
        if objective == "masked":
            model = {
                **{k: v for k, v in model.items() if "layers" not in k},
                "family": "masked",
                "num_layers": 2,
            }
        config = CheckpointConfig.model_validate(
            {
                "name": "tiny",
                "model": {
                    **model,
                    "noise_conditioning": objective in ("single_pass", "evidence", "paper", "masked"),
                },
                "objective": {"name": objective},
                "recurrence": {"default_steps": 2, "max_steps": 8},
            }
        )
        denoiser, loud = build(config, seed=1), torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3 if "wte" in name else parameter.shape[1] ** -0.5, generator=loud)
        return save(root / objective, denoiser, config, tokenizer)

    return make


@pytest.fixture
def make_model(folders: Callable[[str], Path]) -> Callable[..., Any]:
    """``make_model(objective, **model_args)`` -> the lm-eval model of such a checkpoint."""
    from eval.texts.lm_eval_adapter import RecurrentLM

    return lambda objective="onestep", **arguments: RecurrentLM(
        checkpoint=str(folders(objective)), **arguments
    )
