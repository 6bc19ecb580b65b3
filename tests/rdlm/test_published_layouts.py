"""Published layouts, out: an import that is exported again has the tensors of its source, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdlm
from rdlm.checkpoints import folder
from rdlm.checkpoints.convert.huginn import export_huginn
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.convert.published import export_published
from rdlm.checkpoints.retrofit import convert
from rdlm.errors import UserError
from rdlm.registry import build

LAYOUTS = {"huginn": "huginn", "ouro": "ouro", "retro_llama": "retrofit", "retro_olmo": "retrofit"}
"""Golden set -> layout."""


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_was_imported_goes_out_with_the_tensors_of_its_source(
    shared_data: Path, tmp_path: Path, family: str
) -> None:
    golden = shared_data.parent / "golden" / f"{family}_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    ours, out = import_checkpoint(str(golden), tmp_path / "ours", name="x"), tmp_path / "out"
    if family == "huginn":
        export_huginn(ours, out, shard_bytes=1 << 30)
    else:
        export_published(LAYOUTS[family], ours, out, shard_bytes=1 << 30)
    theirs, made = load_file(golden / "model.safetensors"), load_file(out / "model.safetensors")
    if family == "huginn":
        theirs.pop("lm_head.weight", None)  # tied: the copy that the reference saves
    assert theirs.keys() == made.keys()
    for name, tensor in theirs.items():
        if name == "freqs_cis":  # a table of cosines, computed again
            torch.testing.assert_close(made[name], tensor, atol=1e-5, rtol=0)
        else:
            assert torch.equal(made[name], tensor), name
    again = import_checkpoint(str(out), tmp_path / "again", name="x")
    assert folder.load_config(again) == folder.load_config(ours)
    first, second = (load_file(path / "model.safetensors") for path in (ours, again))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    config = json.loads((out / "config.json").read_text())
    for field, value in json.loads((golden / "config.json").read_text()).items():
        if field in config and field not in BOOKKEEPING:
            assert config[field] == value, field


BOOKKEEPING = {
    "auto_map", "init_values", "padding_multiple", "effective_expected_depth", "torch_dtype", "mean_backprop_depth",
    "init_strategy", "init_orthogonal",
}  # fmt: skip


def test_without_the_field_rdlm_the_published_fields_alone_give_the_same_model(
    shared_data: Path, tmp_path: Path
) -> None:
    golden = shared_data.parent / "golden" / "ouro_tiny"
    if not golden.is_dir():
        pytest.skip(f"no golden outputs at {golden}")
    ours = import_checkpoint(str(golden), tmp_path / "ours", name="x")
    out = export_published("ouro", ours, tmp_path / "out", shard_bytes=1 << 30)
    config = json.loads((out / "config.json").read_text())
    del config["rdlm"]
    (out / "config.json").write_text(json.dumps(config))
    again = import_checkpoint(str(out), tmp_path / "again", name="x")
    assert folder.load_config(again) == folder.load_config(ours)


def plain(out: Path) -> Path:
    layer = {"num_heads": 4, "num_kv_heads": 2, "rope": {"base": 10_000.0}, "mlp_width": 80}
    loop = {"num_core_layers": 3, "iterates": False, "injection": "replace"}
    shape = {"vocab_size": 300, "d_model": 64, "max_seq_len": 64, "layer": layer, "loop": loop}
    document = {"name": "plain", "model": {"family": "recurrent", **shape}, "objective": "next_token"}
    config = folder.parse_config(document, "test")
    return folder.save(out, build(config, seed=0), config, None)


def test_what_convert_makes_of_a_llama_has_the_retrofitted_form(tmp_path: Path) -> None:
    source = convert(
        plain(tmp_path / "plain"), tmp_path / "looped", prelude=1, core=1, coda=1, state_scale=1 / 16
    )
    trained = load_file(source / "model.safetensors")
    trained["model.adapter.weight"] += 0.1  # or the state would not count
    save_file(trained, source / "model.safetensors", metadata={"format": "pt"})
    out = export_published("retrofit", source, tmp_path / "out", shard_bytes=1 << 30)
    ids = torch.randint(0, 300, (2, 20))
    back = rdlm.load(import_checkpoint(str(out), tmp_path / "back"))
    logits = back.logits(ids, 3)[3]
    assert torch.equal(logits, rdlm.load(source).logits(ids, 3)[3])
    assert not torch.equal(logits, back.logits(ids, 1)[1])


def test_what_a_layout_does_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    source = convert(
        plain(tmp_path / "plain"), tmp_path / "looped", prelude=1, core=1, coda=1, injection="none"
    )
    with pytest.raises(UserError, match=r"model.loop.injection='none': the layout of .* has 'linear' there"):
        export_published("retrofit", source, tmp_path / "out", shard_bytes=1 << 30)
    with pytest.raises(UserError, match=r"norm_3.*needs this weight"):
        export_published("ouro", source, tmp_path / "out", shard_bytes=1 << 30)
    assert not (tmp_path / "out").exists()
