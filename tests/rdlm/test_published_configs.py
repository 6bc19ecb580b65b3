"""The published models' config.json, by the keys and sizes that their authors report: each is read by its
importer, gives a model of the published size, and knows its depth. No weights are needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.published_models import MODELS, published_config
from rdlm.registry import build


@pytest.mark.parametrize("name", MODELS)
def test_a_published_config_is_read_as_the_published_model(shared_data: Path, name: str) -> None:
    golden = shared_data.parent / "golden"
    if not golden.is_dir():
        pytest.skip(f"no golden configs at {golden}")
    config = published_config(name, golden)
    _, _, _, billions, depth = MODELS[name]
    count = sum(p.numel() for p in build(config, device="meta").parameters())
    assert count == pytest.approx(billions * 1e9, rel=0.2)
    assert (config.default_steps, config.trained_steps) == (depth, depth)
    assert config.depth_warning(depth) is None and config.depth_warning(depth + 1)
