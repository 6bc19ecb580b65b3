"""Every shipped config parses and builds; the published sizes come out to the last parameter."""

from __future__ import annotations

from pathlib import Path

import pytest

from rdlm.registry import build
from train.config_file import load
from train.engines import ds_config
from train.settings import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARAMETERS = {
    "debug": None,
    "demo": None,
    "huginn_70m": None,
    "huginn_lm1b_bptt": None,
    "huginn_lm1b_paper": None,
    "ar_lm1b": 109_529_856,
    "ar_lm1b_blocks": None,
    "masked_demo": None,
    "masked_latin": None,
    "masked_text8": None,
    "huginn_3b5": 3_573_221_921,
    "vit_cifar10": None,
    "dit_cifar10": None,
    "small_parent": None,
}


def count(config: TrainConfig) -> int:
    return sum(p.numel() for p in build(config.checkpoint_config, device="meta").parameters())


def test_every_file_is_listed_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == PARAMETERS.keys()


@pytest.mark.parametrize("name", PARAMETERS)
def test_preset_parses_and_builds(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml")
    assert Path(config.output).name == name
    assert ds_config(config, 2)["train_micro_batch_size_per_gpu"] >= 1
    assert PARAMETERS[name] in (None, count(config))


def test_llama_size_by_hand() -> None:
    """Embedding, 12 layers of 4 d^2 + 3 d m + 2 d, final norm."""
    d, m = 768, 2048
    assert PARAMETERS["ar_lm1b"] == 32_000 * d + 12 * (4 * d * d + 3 * d * m + 2 * d) + d


def test_huginn_0125_has_its_published_size() -> None:
    """3,564,976,800 without noise conditioning; with it, AdaLN of the four core layers, the level's MLP and
    the evidence scale."""
    plain = load(CONFIGS / "huginn_3b5.yaml", ["objective.name=bptt"])
    assert count(plain) == 3_564_976_800
    conditioning = 4 * (64 * 6 * 5280 + 6 * 5280) + 2 * (64 * 64 + 64) + 1
    assert PARAMETERS["huginn_3b5"] == 3_564_976_800 + conditioning
