"""``rdlm images``: what it writes does not depend on how it was asked, and mistakes are one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from rdlm.checkpoints.folder import save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.registry import build
from serve.images_cli import tiled

SHAPE = {
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 3,
    "d_model": 32,
    "num_heads": 2,
    "mlp_width": 48,
    "num_layers": 2,
}
DOCUMENT = {
    "name": "tiny-dit",
    "model": {"family": "dit", **SHAPE, "noise_embed_dim": 16},
    "objective": {"name": "edm"},
    "recurrence": {"default_steps": 3, "max_steps": 20},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = CheckpointConfig.model_validate(DOCUMENT)
    denoiser = build(config, seed=0)
    for name, weight in denoiser.named_parameters():  # which start at zero
        if name == "model.pixels.weight" or "modulation" in name:
            weight.data.normal_(0.0, 0.3)
    return save(tmp_path_factory.mktemp("dit") / "model", denoiser, config, None)


@pytest.fixture
def draw(checkpoint: Path, tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    def call(*options: str) -> dict[str, np.ndarray]:
        out = tmp_path / "images.npz"
        assert run(app, ["images", "--checkpoint", str(checkpoint), "--out", str(out), *options], "rdlm") == 0
        with np.load(out) as found:
            return dict(found)

    return call


def test_images_are_the_same_whatever_the_batch(draw: Callable[..., dict[str, np.ndarray]]) -> None:
    whole = draw("--num-images", "7")
    assert whole["arr_0"].shape == (7, 8, 8, 3) and whole["arr_0"].dtype == np.uint8
    assert whole["classes"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    parts = draw("--num-images", "7", "--batch-size", "3")
    assert np.abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1
    few = draw("--num-images", "2")
    assert np.abs(whole["arr_0"][:2].astype(int) - few["arr_0"]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [
        ("--seed", "1"),
        ("--num-steps", "5"),
        ("--guidance", "3"),
        ("--sampler", "heun"),
        ("--sampler", "renoise"),
        ("--classes", "1"),
    ],
)
def test_every_option_changes_images(
    draw: Callable[..., dict[str, np.ndarray]], options: tuple[str, str]
) -> None:
    assert not np.array_equal(
        draw("--num-images", "4")["arr_0"], draw("--num-images", "4", *options)["arr_0"]
    )


def test_a_picture_holds_every_image(checkpoint: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    out = tmp_path / "p" / "images.png"
    assert (
        run(app, ["images", "--checkpoint", str(checkpoint), "--out", str(out), "--num-images", "10"], "rdlm")
        == 0
    )
    assert imread(out).shape[:2] == (2 * 9 - 1, 8 * 9 - 1) and [
        each.name for each in out.parent.iterdir()
    ] == ["images.png"]
    found = np.arange(10 * 8 * 8 * 3, dtype=np.uint8).reshape(10, 8, 8, 3)
    picture = tiled(found, 4)
    assert (
        np.array_equal(picture[9:17, 9:17], found[5])
        and (picture[:, 8] == 255).all()
        and (picture[18:, 18:] == 255).all()
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.jpg"], "neither a picture nor an array"),
        (["--out", "x.png", "--classes", "0,3"], "this model knows 0 to 2"),
        (["--out", "x.png", "--classes", "cat"], "not a number"),
        (["--out", "x.png", "--num-steps", "21"], "this model takes 1 to 20"),
        (["--out", "x.png", "--num-steps", "0"], "this model takes 1 to 20"),
        (["--out", "x.png", "--dtype", "int8"], "no such precision"),
        (["--out", "x.png", "--guidance", "-1"], "guidance"),
        (
            ["--out", "x.png", "--num-images", "1" + "0" * 30],
            "one .png file, which holds 1,398,101 of this size",
        ),
        (["--out", "x.npz", "--num-images", "1" + "0" * 12], "are too many for one .npz file"),
        (["--out", "x.npz", "--batch-size", "1" + "0" * 12], "--batch-size"),
        (["--out", "/dev/null/x.npz"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(app, ["images", "--checkpoint", str(checkpoint), *options], "rdlm") == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["generate", "--prompt", "a"], ["images", "--out", "x.png"], ["serve"]])
def test_a_family_is_refused_where_it_has_no_business(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """A ViT neither draws nor writes; a DiT does not write."""
    document = {**DOCUMENT, "model": {"family": "vit", **SHAPE}, "objective": {"name": "classify"}}
    config = CheckpointConfig.model_validate(document)
    vit = save(tmp_path / "vit", build(config, seed=0), config, None)
    for folder in [vit] if command[0] == "images" else [vit, checkpoint]:
        assert run(app, [command[0], "--checkpoint", str(folder), *command[1:]], "rdlm") == 2
        assert "Traceback" not in capsys.readouterr().err


FOR_TEXT = [
    ["serve", "--checkpoint", "MODEL"],
    ["generate", "--checkpoint", "MODEL", "--prompt", "a"],
    ["chat", "--checkpoint", "MODEL"],
    ["logits", "MODEL", "IDS", "--out", "OUT"],
    ["convert", "MODEL", "OUT", "--prelude", "1", "--core", "1", "--coda", "0"],
    ["export", "hf", "MODEL", "OUT"],
    ["export", "ouro", "MODEL", "OUT"],
    ["export", "retrofit", "MODEL", "OUT"],
    ["export", "gguf", "MODEL", "OUT.gguf"],
    ["eval", "depth", "--checkpoint", "MODEL"],
    ["eval", "nll", "--checkpoint", "MODEL", "--data", "DATA"],
    ["eval", "convergence", "--checkpoint", "MODEL", "--data", "DATA"],
    ["eval", "gen-ppl", "--checkpoint", "MODEL", "--data", "DATA"],
    ["eval", "mauve", "--checkpoint", "MODEL", "--data", "DATA"],
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of a small text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("\n\n".join(f"{i} was the word of {i * i}" for i in range(40_000)))
    command = [
        "data",
        "prepare",
        str(folder / "text.txt"),
        "--out",
        str(folder / "out"),
        "--vocab-size",
        "300",
    ]
    assert run(app, command, "rdlm") == 0
    return folder / "out"


@pytest.mark.parametrize("command", FOR_TEXT, ids=" ".join)
def test_commands_for_text_name_the_ones_for_images(
    command: list[str], checkpoint: Path, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {
        "MODEL": checkpoint,
        "OUT": tmp_path / "out",
        "OUT.gguf": tmp_path / "out.gguf",
        "IDS": tmp_path / "ids",
        "DATA": prepared,
    }
    save_file({"input_ids": torch.zeros(1, 2, dtype=torch.int64)}, tmp_path / "ids")
    assert run(app, [str(places.get(word, word)) for word in command], "rdlm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "a model of images has no tokens" in error and "`rdlm images`" in error
    assert not (tmp_path / "out").exists()
