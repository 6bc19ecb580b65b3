"""The speed benchmark's sides answer the same: what is timed is the same work."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generate import bytes_per_token, measure, save_model, sides


@pytest.mark.slow
def test_every_side_says_what_the_engine_says() -> None:
    pytest.importorskip("transformers")
    prompts = torch.randint(5, 4000, (2, 8), generator=torch.Generator().manual_seed(0))
    with sides("llama", "float32", False, 2, 24, 1, None) as (found, absent, _), torch.no_grad():
        assert {"engine", "engine, kernels torch", "transformers"} <= {side.name for side in found}
        assert set(absent) <= {"llama.cpp"}
        rates = measure(found, prompts, 8, 1, 1)["tokens_per_s"]
    assert all(rate["equal_tokens"] == 1.0 and 0 < rate["least"] <= rate["most"] for rate in rates.values())


def test_a_step_more_reads_the_core_once_more(tmp_path) -> None:  # type: ignore[no-untyped-def]
    _, config = save_model(tmp_path / "model", "huginn", "float32", 32)
    layer = 4 * 512 * 512 + 3 * 512 * 1792 + 4 * 512 + 2 * 512  # matrices, norms, biases of queries and keys
    step = bytes_per_token(config, "bfloat16", 2) - bytes_per_token(config, "bfloat16", 1)
    assert step == 2 * (4 * layer + 2 * 512 * 512)
    assert bytes_per_token(config, "float32", 1) == 4 * (
        8 * layer + 2 * 512 * 512 + 512 * (config.model.vocab_size + 1)
    )  # type: ignore[union-attr]
