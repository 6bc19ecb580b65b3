"""Held-out negative log-likelihood against the number of core steps K, from one pass to the largest K (rdlm/scoring.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from eval.stats import interval, resamples
from rdlm.checkpoints.folder import Loaded
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.errors import UserError

PER_WINDOW = ("window_nll", "window_tokens")
"""Entries of the result with a number for every window: what a paired comparison of two checkpoints needs."""
USUAL_STEPS = (1, 2, 4, 8, 16, 32)
USUAL_BOUNDS = (1, 4, 16, 64, 256, 1024)
"""K of bounds: each costs the same, and the limit is what continuous time would give."""


MOST_STEPS = 1024
"""Largest K of measurements that go beyond what a checkpoint offers its users; more is a slip of the pen."""


def check_steps(
    steps: Sequence[int] | None, config: CheckpointConfig, beyond: bool = False
) -> tuple[int, ...]:
    """The K to evaluate, ascending; UserError for one out of range.

    beyond: iterations of one state may go past ``recurrence.max_steps``, up to MOST_STEPS. None takes those with a normalised
    likelihood: K = 1 of a sampling model, else USUAL_STEPS as far as the checkpoint goes. A masked model's bound takes any K up to
    MOST_STEPS, by default USUAL_BOUNDS.
    """
    limit, thinking = config.max_steps, config.objective.k_meaning == "thinking"
    if not config.objective.left_to_right:
        steps, limit = steps or USUAL_BOUNDS, MOST_STEPS
    if beyond and thinking and config.model.iterates:
        limit = max(limit, MOST_STEPS)
    if steps is None:
        return tuple(k for k in USUAL_STEPS if k <= limit) if thinking else (1,)
    for k in steps:
        if not 1 <= k <= limit:
            raise UserError("--steps", k, "is out of range", f"this checkpoint takes 1 to {limit}")
    return tuple(sorted(set(steps)))


def evaluate_nll(
    loaded: Loaded,
    corpus_windows: Iterable[Batch],
    steps: Sequence[int],
    *,
    seed: int = 0,
    num_draws: int = 8,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """NLL (nats per token), perplexity, bits per byte and per character at each K, with bootstrap 95 % intervals over windows.

    corpus_windows: batches [B, T]; a row is one window, the unit that is resampled. ``progress`` is told the rows done.
    -> {"tokens", "windows", "bytes", "characters", "results": [{"K", "nll", "delta_nll", both with "..._interval", "perplexity",
    "bits_per_byte", "bits_per_character", "estimator"}], "window_nll": {K: [nats per window]}, "window_tokens"}.
    delta_nll is against the smallest K, its interval is paired. Bits per byte and character leave out special tokens.
    """
    num_bytes, num_characters = _text_tables(loaded)
    nats: dict[int, list[torch.Tensor]] = {k: [] for k in steps}
    text_nats = dict.fromkeys(steps, 0.0)
    tokens, bytes_, characters = [], 0, 0
    device = next(loaded.denoiser.parameters()).device
    for batch in corpus_windows:
        inputs, targets, mask = (t.to(device) for t in (batch.inputs, batch.targets, batch.mask))
        scores = loaded.denoiser.token_logprobs(inputs, targets, steps, seed=seed, num_draws=num_draws)
        widths = num_bytes.to(device)[targets] * mask
        for k in steps:
            nll = -scores[k].double() * mask
            nats[k].append(nll.sum(1).cpu())
            text_nats[k] += float(nll[widths > 0].sum())
        tokens.append(mask.sum(1).cpu())
        bytes_ += int(widths.sum())
        characters += int((num_characters.to(device)[targets] * mask).sum())
        if progress:
            progress(len(targets))
    sums = {k: torch.cat(parts).numpy() for k, parts in nats.items()}
    counts = torch.cat(tokens).numpy()
    results = _summarise(sums, counts, seed)
    for result in results:
        k = result["K"]
        bits = text_nats[k] / math.log(2)
        result["bits_per_byte"] = bits / bytes_ if bytes_ else None
        result["bits_per_character"] = bits / characters if characters else None
        result["estimator"] = loaded.config.objective.estimator_at(k, num_draws)
    return {
        "tokens": int(counts.sum()),
        "windows": len(counts),
        "bytes": bytes_,
        "characters": characters,
        "results": results,
        "window_nll": {str(k): [round(x, 4) for x in sums[k].tolist()] for k in steps},
        "window_tokens": counts.tolist(),
    }


def _text_tables(loaded: Loaded) -> tuple[torch.Tensor, torch.Tensor]:
    """UTF-8 bytes of each id, and how many characters begin in it, int64 [V] each; zeros where the ids are not text."""
    tables = torch.zeros((2, loaded.config.model.vocab_size), dtype=torch.int64)
    if loaded.tokenizer is not None:
        for i, content in enumerate(loaded.tokenizer.token_bytes()):
            tables[0, i] = len(content)
            tables[1, i] = sum(byte & 0xC0 != 0x80 for byte in content)  # continuation bytes are 10xxxxxx
    return tables[0], tables[1]


def _summarise(sums: dict[int, np.ndarray], counts: np.ndarray, seed: int) -> list[dict[str, Any]]:
    """sums: nats per window at each K; counts: tokens per window. The same resamples of windows for every K."""
    base = next(iter(sums))
    draws = resamples(len(counts), seed)
    resampled = {k: draws @ values / (draws @ counts) for k, values in sums.items()}
    results = []
    for k, values in sums.items():
        nll = float(values.sum() / counts.sum())
        results.append(
            {
                "K": k,
                "nll": nll,
                "nll_interval": interval(resampled[k]),
                "delta_nll": nll - float(sums[base].sum() / counts.sum()),
                "delta_nll_interval": interval(resampled[k] - resampled[base]),
                "perplexity": math.exp(min(nll, 700.0)),
            }
        )
    return results
