"""Answers of a masked diffusion model: all their tokens at once, in K steps. No engine: nothing is cached, no request joins another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rdlm.decoding_types import Order, SamplingParams
from rdlm.errors import UserError
from rdlm.unmasking import unmask
from serve.loading import load_text
from serve.settings import EngineSettings


@dataclass(frozen=True)
class Answer:
    """What stands behind the prompt, up to an end of text."""

    text: str
    num_tokens: int
    seconds: float


class Writer:
    """A masked checkpoint that continues prompts."""

    def __init__(self, folder: Path, settings: EngineSettings) -> None:
        """UserError for a checkpoint that is not text, or not whole."""
        self._loaded, self._tokenizer, self._ends = load_text(folder, settings)
        self._loaded.config.check_whole()

    def answer(
        self, prompt: str, num_steps: int, max_tokens: int, sampling: SamplingParams, seed: int = 0, order: Order = "random"
    ) -> Answer:
        """Fill in ``max_tokens`` tokens behind the prompt, which stays as it is; UserError where both exceed the model's positions."""
        model, tokenizer = self._loaded.config.model, self._tokenizer
        given = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(prompt)
        if len(given) + max_tokens > model.max_seq_len:
            problem = (
                f"its {len(given)} tokens and --max-tokens {max_tokens} do not fit the model's {model.max_seq_len} positions"
            )
            raise UserError("--prompt", prompt, problem, "shorten it, or ask for fewer tokens")
        device = next(self._loaded.denoiser.parameters()).device
        ids = torch.tensor([given + [model.vocab_size] * max_tokens], device=device)
        began = time.monotonic()
        filled = unmask(self._loaded.denoiser, ids, num_steps, sampling, seed=seed, order=order, num_tokens=tokenizer.vocab_size)
        drawn = filled[0, len(given) :].tolist()
        end = next((i for i, token in enumerate(drawn) if token in self._ends), len(drawn))
        return Answer(tokenizer.decode(drawn[:end]), max_tokens, time.monotonic() - began)
