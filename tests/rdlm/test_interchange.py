"""Huginn in Hugging Face layout: what goes out comes back, and what cannot be represented is refused in one
line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.huginn import export_huginn
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.cli import app, run
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError

WHOLE = 1 << 40
import_huginn = partial(import_checkpoint, family="huginn")


@pytest.fixture
def ours(tmp_path: Path, tiny, tiny_config) -> Path:
    """A checkpoint of an objective without noise, every weight of it random, with a tokenizer."""
    return make(tmp_path / "ours", tiny, tiny_config)


def make(
    folder: Path, tiny, tiny_config, objective: object = "onestep", family: str = "huginn", **model: object
) -> Path:
    denoiser = tiny(family, objective, **{"vocab_size": 262, **model})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    tokenizer = train_tokenizer("bpe", iter(["the cat sat on the mat " * 20]), 262)
    return checkpoint.save(
        folder, denoiser, tiny_config(family, objective, **{"vocab_size": 262, **model}), tokenizer
    )


def published(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change(folder: Path, **fields: object) -> None:
    """None removes a field."""
    data = {key: value for key, value in {**published(folder), **fields}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(data))


def change_weights(folder: Path, edit: Callable[[dict], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def logprobs(folder: Path) -> dict[int, torch.Tensor]:
    loaded = checkpoint.load(folder)
    ids = torch.arange(20).view(2, 10)
    return loaded.denoiser.token_logprobs(ids, ids + 1, [1, 4])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [WHOLE, 20_000])
@pytest.mark.parametrize("state", ["zero", "normal"])
def test_round_trip_is_exact(
    tmp_path: Path, tiny, tiny_config, tied: bool, shard_bytes: int, state: str
) -> None:
    """Weights bit by bit, the config to the last field, the tokenizer, and the same scores at K = 1 and 4."""
    ours = make(tmp_path / "ours", tiny, tiny_config, tie_embeddings=tied, state_init=state, qk_bias=tied)
    theirs = export_huginn(ours, tmp_path / "theirs", shard_bytes=shard_bytes)
    back = import_huginn(str(theirs), tmp_path / "back")
    assert checkpoint.load_config(back) == checkpoint.load_config(ours)
    before, after = load_file(ours / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    a, b = checkpoint.load(ours).tokenizer, checkpoint.load(back).tokenizer
    assert a is not None and b is not None and a.fingerprint == b.fingerprint
    expected, got = logprobs(ours), logprobs(back)
    assert (
        torch.equal(got[1], expected[1])
        and torch.equal(got[4], expected[4])
        and not torch.equal(got[1], got[4])
    )
    assert (
        len(list(theirs.glob("*.safetensors"))) == (1 if shard_bytes == WHOLE else len(_shards(theirs))) > 0
    )


def _shards(folder: Path) -> set[str]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored = {name: file.name for file in folder.glob("*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == stored and len(set(stored.values())) > 2
    assert index["metadata"]["total_size"] == sum(
        w.numel() * w.element_size()
        for file in folder.glob("*.safetensors")
        for w in load_file(file).values()
    )
    return set(stored.values())


def test_bfloat16_passes_through(tmp_path: Path, tiny, tiny_config) -> None:
    ours = checkpoint.save(
        tmp_path / "ours", tiny("huginn", "bptt").bfloat16(), tiny_config("huginn", "bptt"), None
    )
    theirs = export_huginn(ours, tmp_path / "theirs", shard_bytes=WHOLE)
    assert published(theirs)["torch_dtype"] == "bfloat16"
    stored = load_file(theirs / "model.safetensors")
    assert stored.pop("freqs_cis").dtype == torch.float32 and {w.dtype for w in stored.values()} == {
        torch.bfloat16
    }
    import_huginn(str(theirs), tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (ours / "model.safetensors").read_bytes()


def test_exported_names_are_the_published_ones(ours: Path, tmp_path: Path) -> None:
    """Names, shapes and derived numbers of Huginn-0125 (Geiping et al. 2025) in the proportions of this
    model."""
    theirs = export_huginn(ours, tmp_path / "theirs", shard_bytes=WHOLE)
    c, shapes = (
        published(theirs),
        {name: tuple(w.shape) for name, w in load_file(theirs / "model.safetensors").items()},
    )
    assert shapes["transformer.wte.weight"] == (262, 32) and shapes["transformer.adapter.weight"] == (32, 64)
    assert shapes["transformer.core_block.0.attn.qk_bias"] == (2, 1, 2, 16) and shapes["freqs_cis"] == (
        1,
        64,
        1,
        8,
        2,
    )
    assert shapes["transformer.coda.0.mlp.fc.weight"] == (128, 32) and "lm_head.weight" not in shapes
    assert c["model_type"] == "huginn_raven" and c["n_layers"] == 3 and c["mean_recurrence"] == 8
    assert c["effective_expected_depth"] == 2 + 8 and c["init_values"]["embed_scale"] == 32**0.5
    assert (
        c["init_values"]["std"] == 0 and c["state_init"] == "zero"
    )  # the reference starts where its std says
    assert (theirs / "tokenizer.json").is_file() and json.loads(
        (theirs / "generation_config.json").read_text()
    )["eos_token_id"] == 0


@pytest.fixture
def plain(ours: Path, tmp_path: Path) -> Path:
    """An export as others would publish it: nothing of ours in its config."""
    folder = export_huginn(ours, tmp_path / "plain", shard_bytes=WHOLE)
    change(folder, rdlm=None, state_init="like-init", init_values=None)
    return folder


def test_a_published_config_is_read_for_what_it_means(plain: Path, tmp_path: Path) -> None:
    change(plain, mean_recurrence=16, mean_backprop_depth=4, effective_expected_depth=None, some_flag="x")
    config = checkpoint.load_config(import_huginn(str(plain), tmp_path / "m", name="raven"))
    assert config.name == "raven" and config.objective.name == "bptt" and config.objective.readout == "plain"
    depth = config.objective.depth
    assert (depth.distribution, depth.mean, depth.grad_steps) == ("lognormal_poisson", 16, 4)
    assert config.recurrence.default_steps == 16 and config.model.state_init == "normal"  # type: ignore[union-attr]
    assert '"some_flag": "x"' in (tmp_path / "m" / "README.md").read_text()
    zero = checkpoint.load_config(import_huginn(str(plain), tmp_path / "m", zero_state=True, force=True))
    assert zero.name == "plain" and zero.model.state_init == "zero"  # type: ignore[union-attr]


def test_either_copy_of_a_tied_head_is_enough_and_two_must_agree(plain: Path, tmp_path: Path) -> None:
    expected = load_file(import_huginn(str(plain), tmp_path / "one") / "model.safetensors")
    change_weights(plain, lambda w: w.update({"lm_head.weight": w["transformer.wte.weight"].clone()}))
    import_huginn(str(plain), tmp_path / "both")
    change_weights(plain, lambda w: w.pop("transformer.wte.weight"))
    import_huginn(str(plain), tmp_path / "head")
    for name in ("both", "head"):
        got = load_file(tmp_path / name / "model.safetensors")
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
    change_weights(plain, lambda w: w.update({"transformer.wte.weight": w["lm_head.weight"] + 1}))
    with pytest.raises(UserError, match=r"lm_head.weight.*ties it"):
        import_huginn(str(plain), tmp_path / "m")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"norm_class_name": "LayerNorm"}, ["norm_class_name", "'LayerNorm'", "only 'RMSNorm_llama'"]),
        ({"mlp_class_name": "BaseMLP"}, ["mlp_class_name"]),
        ({"block_class_name": "TransformerPreNormBlock"}, ["block_class_name"]),
        ({"nonlin_name": "GELU"}, ["nonlin_name"]),
        ({"injection_type": "add"}, ["injection_type", "only 'linear'"]),
        ({"bias": True}, ["bias"]),
        ({"test_time_noise": 0.1}, ["test_time_noise"]),
        ({"model_type": "llama"}, ["model_type", "only 'huginn_raven'"]),
        ({"state_init": "embed"}, ["state_init"]),
        ({"sampling_scheme": "sobol"}, ["sampling_scheme", "describes the training"]),
        ({"num_key_value_heads": 1}, ["num_key_value_heads", "the other fields give 2"]),
        ({"n_layers": 9}, ["n_layers", "the other fields give 3"]),
        ({"init_values": {"embed_scale": 1.0}}, ["init_values.embed_scale"]),
        ({"init_values": "x"}, ["init_values"]),
        ({"n_embd": None}, ["n_embd", "is missing"]),
        ({"n_embd": "wide"}, ["d_model", "'wide'"]),
        ({"intermediate_size": 72}, ["mlp.fc.weight", "(144, 32)"]),
        ({"n_layers_in_coda": 2, "n_layers": 4}, ["transformer.coda.1", "is missing"]),
        ({"qk_bias": False}, ["qk_bias", "no such weight"]),
    ],
)
def test_a_config_that_is_not_built_here_is_refused(
    plain: Path, tmp_path: Path, fields: dict, words: list[str]
) -> None:
    change(plain, **fields)
    with pytest.raises(UserError) as error:
        import_huginn(str(plain), tmp_path / "m")
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda w: w.update({"transformer.timestep.weight": torch.ones(2)}),
            ["transformer.timestep.weight", "no such weight"],
        ),
        (lambda w: w.pop("transformer.ln_f.weight"), ["transformer.ln_f.weight", "is missing"]),
        (
            lambda w: w.update({"transformer.ln_f.weight": torch.ones(3)}),
            ["transformer.ln_f.weight", "(3,)", "(32,)"],
        ),
        (
            lambda w: w.update({"transformer.ln_f.weight": torch.ones(32).to(torch.int8)}),
            ["transformer.ln_f.weight", "'I8'"],
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    plain: Path, tmp_path: Path, edit: Callable, words: list[str]
) -> None:
    change_weights(plain, edit)
    with pytest.raises(UserError) as error:
        import_huginn(str(plain), tmp_path / "m")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_damaged_and_missing_files_are_refused(ours: Path, tmp_path: Path) -> None:
    theirs = export_huginn(ours, tmp_path / "theirs", shard_bytes=20_000)
    first = (
        theirs
        / json.loads((theirs / "model.safetensors.index.json").read_text())["weight_map"][
            "transformer.wte.weight"
        ]
    )
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{first.name}.*is damaged"):
        import_huginn(str(theirs), tmp_path / "m")
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name}.*is missing"):
        import_huginn(str(theirs), tmp_path / "m")
    (theirs / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="not an index"):
        import_huginn(str(theirs), tmp_path / "m")
    (theirs / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        import_huginn(str(theirs), tmp_path / "m")
    (theirs / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a JSON object"):
        import_huginn(str(theirs), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_edited_export_is_refused(ours: Path, tmp_path: Path) -> None:
    theirs = export_huginn(ours, tmp_path / "theirs", shard_bytes=WHOLE)
    change(theirs, rope_base=10_000.0)
    with pytest.raises(UserError, match=r"rope_base=10000.0: the rdlm field of the same file says 50000.0"):
        import_huginn(str(theirs), tmp_path / "m")


@pytest.mark.parametrize(
    ("family", "objective", "words"),
    [
        ("huginn", "single_pass", ["noise-conditioned", "z = 0", "onestep"]),
        ("huginn", "paper", ["noise-conditioned"]),
        (
            "huginn",
            {"name": "onestep", "depth": {"distribution": "uniform"}},
            ["depth.distribution", "'uniform'"],
        ),
        ("llama", "next_token", ["model.family", "Huginn models only"]),
    ],
)
def test_what_the_published_layout_cannot_hold_is_not_exported(
    tmp_path: Path, tiny, tiny_config, family: str, objective: object, words: list[str]
) -> None:
    ours = make(tmp_path / "ours", tiny, tiny_config, objective, family)
    with pytest.raises(UserError) as error:
        export_huginn(ours, tmp_path / "theirs", shard_bytes=WHOLE)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not (tmp_path / "theirs").exists()


def test_commands_refuse_in_one_line_with_status_2(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    assert run(app, ["export", "huginn", str(ours), str(theirs)], "rdlm") == 0
    capsys.readouterr()
    for args, words in [
        (["export", "huginn", str(ours), str(theirs)], ["OUT", "holds something already", "--force"]),
        (["export", "huginn", str(theirs), str(tmp_path / "x")], ["published layout", "rdlm import"]),
        (["import", "huginn", str(theirs), str(theirs), "--force"], ["OUT", "replace the source"]),
        (["import", "huginn", str(theirs), str(tmp_path), "--force"], ["OUT", "replace the source"]),
        (["import", "huginn", str(tmp_path / "nowhere"), str(tmp_path / "x")], ["SOURCE", "is not a folder"]),
        (["import", "huginn", str(theirs), str(tmp_path / "x"), "--name", "a b"], ["name", "'a b'"]),
        (["import", "huginn", str(theirs), str(tmp_path / "x"), "--wrong"], ["--wrong"]),
    ]:
        assert run(app, args, "rdlm") == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and all(word in line for word in words), line
    assert run(app, ["import", "huginn", str(theirs), str(tmp_path / "back")], "rdlm") == 0
    assert (
        run(app, ["export", "huginn", str(ours), str(theirs), "--force", "--shard-gb", "0.00002"], "rdlm")
        == 0
    )
    assert (theirs / "model.safetensors.index.json").is_file() and not (theirs / "model.safetensors").exists()


def test_a_hub_id_is_downloaded(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(plain)
    )
    monkeypatch.chdir(tmp_path)
    config = checkpoint.load_config(import_huginn("tomg-group-umd/huginn-0125", tmp_path / "m"))
    assert asked == ["tomg-group-umd/huginn-0125"] and config.name == "huginn-0125"


def test_offline_a_hub_id_is_refused_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert run(app, ["import", "huginn", "tomg-group-umd/huginn-0125", str(tmp_path / "m")], "rdlm") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Name or service not known" in line and "hf download" in line
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, tiny_config) -> None:
    """200 MiB of weights go out and come back in a process that never holds more than a quarter of them
    beyond its imports."""
    config = tiny_config("huginn", "onestep", d_model=1024, mlp_width=2048, vocab_size=16384)
    code = (
        "import resource, sys, json; from pathlib import Path; from rdlm.checkpoints.convert.huginn import *\n"
        "from rdlm.checkpoints.convert.importers import import_checkpoint; from rdlm.registry import build; "
        "from rdlm.checkpoints.safetensors_io import write, Entry\n"
        "config = checkpoint.parse_config(json.loads(sys.argv[2]), 'x'); root = Path(sys.argv[1])\n"
        "def zeros(n):\n    return lambda: (bytes(min(1 << 20, n - i)) for i in range(0, n, 1 << 20))\n"
        "shapes = {k: tuple(p.shape) for k, p in build(config, device='meta').named_parameters()}\n"
        "sizes = {k: 4 * torch.Size(s).numel() for k, s in shapes.items()}\n"
        "fill = lambda f: write(f / 'model.safetensors',"
        " {k: Entry('F32', shapes[k], n, zeros(n)) for k, n in sizes.items()}, lambda n: None)\n"
        "checkpoint.write(root / 'a', config, None, {}, fill, '')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export_huginn(root / 'a', root / 'b', shard_bytes=1 << 25); import_checkpoint(str(root / 'b'), root / 'c')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sum(sizes.values()) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    grown, total = map(int, done.stdout.split())
    assert total > 150 * 1024 and grown < total / 4
