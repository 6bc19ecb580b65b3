"""Files of others that are damaged, or say what no model has: one line, before anything is read or built."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.quantize import quantize
from rdlm.config.checkpoint import CheckpointConfig, QuantizationConfig
from rdlm.errors import UserError
from rdlm.registry import build

MODEL = {
    "name": "m", "objective": {"name": "next_token"},
    "model": {"family": "llama", "vocab_size": 8, "d_model": 8, "num_heads": 2, "mlp_width": 8, "num_layers": 1,
        "max_seq_len": 8},
}  # fmt: skip


def _with(section: str, **fields: Any) -> CheckpointConfig:
    return checkpoint.parse_config({**MODEL, section: {**MODEL.get(section, {}), **fields}}, "config.json")  # type: ignore[dict-item]


@pytest.mark.parametrize("fields", [{"num_layers": 10**9}, {"d_model": 10**15}])
def test_sizes_beyond_what_can_be_built_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match="model="):
        build(_with("model", **fields), device="meta")


@pytest.mark.parametrize(
    "fields",
    [
        {"default_steps": 10**20, "max_steps": 10**20},
        {"max_steps": 10**20},
        {"exit_thresholds": {"gate": True}},
    ],
)
def test_settings_of_the_recurrence_have_bounds(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        _with("recurrence", **fields)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
        (lambda f: (f / "model.safetensors").mkdir(), "cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    spoil(tmp_path)
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("layer_types", 5), ("early_exit_threshold", "x")])
def test_a_field_of_another_kind_is_one_line(
    tmp_path: Path, shared_data: Path, field: str, value: object
) -> None:
    source = shutil.copytree(shared_data.parent / "golden" / "ouro_tiny", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(UserError, match="of another kind"):
        import_checkpoint(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("index", [{"a": 5}, {"a": ["x"]}])
def test_an_index_names_files(tmp_path: Path, index: object) -> None:
    from rdlm.checkpoints.safetensors_io import INDEX, stored_in

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match="not an index of shards"):
        stored_in(tmp_path)


def _set(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def spoil(weight: Tensor) -> Tensor:
        weight.view(-1)[index] = value
        return weight

    return spoil


@pytest.mark.parametrize("stored", ["floats", "int8"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_set(0, torch.nan), "not finite"),
        (_set(-1, -torch.inf), "not finite"),
        (lambda weight: weight.to(torch.int8), "has floats"),
        (lambda weight: weight.bool(), "has floats"),
    ],
)
def test_weights_and_scales_that_are_no_numbers_are_named(
    stored: str, spoil: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    """They loaded, and every token that was asked for was a traceback."""
    folder, config = tmp_path / "model", _with("model")
    checkpoint.save(folder, build(config, seed=0), config, None)
    if stored == "int8":
        quantize(folder, tmp_path / "int8", QuantizationConfig(weights="int8"))
        folder = tmp_path / "int8"
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in sorted(weights) if n.endswith("_scale") or stored == "floats")
    checkpoint.load(folder)
    weights[name] = spoil(weights[name])
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load(folder)
    assert name in str(error.value)
