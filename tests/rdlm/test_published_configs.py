"""The published models' config.json, by the keys and sizes that their authors report: each is read by its
importer, gives a model of the published size, and knows its depth. No weights are needed."""

from __future__ import annotations

import re
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


def test_every_documented_command_is_of_a_model_whose_config_is_read() -> None:
    """And every family that is read has a command, but for LoopFormer, whose repositories are a collection."""
    text = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    named = set(re.findall(r"^\|.*`python -m demo\.chat ([\w./-]+)", text, re.M))
    plain = {"HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert plain < named and named - plain <= MODELS.keys()
    families = {MODELS[name][0] for name in named - plain}
    assert families == {about[0] for about in MODELS.values()} - {
        "loopformer",
        "ifm_p2_linear",
        "ifm_p2_orthoinj",
    }
