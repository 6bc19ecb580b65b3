"""`rdlm eval accuracy`: shares that are known beforehand, noise that no batch decides, and the command from
end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.metrics.accuracy import choose_steps, evaluate_accuracy
from rdlm.checkpoints.folder import Loaded, save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.images import ImageStore, as_batch
from rdlm.objectives import Objective
from rdlm.objectives.base import Draws, Keys
from rdlm.objectives.evidence import Evidence
from rdlm.registry import build
from train.data.image_prepare import ImagePreparation, prepare_images

Image = pytest.importorskip("PIL.Image")
CLASSES = ("north-east", "north-west", "south-east", "south-west")
SHAPE = {
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 4,
    "d_model": 32,
    "num_heads": 2,
    "mlp_width": 64,
    "num_layers": 2,
}


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one bright quadrant, whose number is the class."""
    rng = np.random.default_rng(seed)
    labels, pixels = rng.integers(0, 4, count), rng.normal(110, 40, (count, 8, 8, 3))
    for image, label in zip(pixels, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 90
    return np.clip(pixels, 0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("quadrants")
    for split, (count, seed) in {"train": (40, 1), "test": (90, 2)}.items():
        for i, (pixels, label) in enumerate(zip(*pictures(count, seed), strict=True)):
            folder = root / "in" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{i:03}.png")
    prepare_images(ImagePreparation(str(root / "in"), root / "out", valid_fraction=0.1), progress=False)
    return root / "out"


def config(objective: str, blocks: dict[str, Any] | None = None, **changes: Any) -> CheckpointConfig:
    model = {"family": "vit", **SHAPE, "noise_conditioning": objective != "classify", "noise_embed_dim": 16}
    most = (
        {"default_steps": 1, "max_steps": 1}
        if objective == "classify"
        else {"default_steps": 3, "max_steps": 8}
    )
    document = {
        "name": "tiny",
        "model": model,
        "objective": {"name": objective},
        "recurrence": most,
        "blocks": blocks,
        **changes,
    }
    return CheckpointConfig.model_validate(document)


def learned(shape: CheckpointConfig) -> Objective:
    denoiser = build(shape, seed=0)
    for part in denoiser.parts:
        optimizer = torch.optim.AdamW(part.parameters(), lr=3e-3)
        for step in range(60):
            terms = part.loss(as_batch(*pictures(32, 1000 + step)), Keys(seed=0, step=step))
            optimizer.zero_grad()
            (terms.total / terms.count).backward()
            optimizer.step()
    return denoiser.eval()


def test_figures_are_those_of_a_model_whose_mistakes_are_known(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right at K where the image's number is a multiple of 4 / K, over a soft sampler never; one draw in three
    is wrong."""
    shape, store = config("evidence"), ImageStore(data, "test")
    labels = store.read(np.arange(len(store)))[1]

    def answers(self: Any, inputs: torch.Tensor, ks: Any, draws: Draws) -> dict[int, torch.Tensor]:
        out, numbers = {}, np.arange(draws.first, draws.first + len(inputs))
        for k in ks:
            right = (numbers % (4 // k) == 0) & (draws.sampler == "renoise") & (k == 1 or draws.draw != 2)
            out[k] = torch.from_numpy(np.where(right, labels[numbers], (labels[numbers] + 1) % 4))[:, None]
        return out

    monkeypatch.setattr(Evidence, "answer", answers)
    loaded = Loaded(build(shape, seed=0), shape, None)
    found = evaluate_accuracy(loaded, store, (1, 2, 4), ("renoise", "euler"), num_draws=3, batch_size=7)
    rows = {(r["sampler"], r["K"]): r for r in found["results"]}
    n = len(store)
    shares = {k: len(range(0, n, 4 // k)) / n for k in (1, 2, 4)}
    assert (
        rows["renoise", 1]["accuracy"] == shares[1]
        and rows["renoise", 1]["draws"] == 1
        and rows["renoise", 1]["draw_sd"] is None
    )
    for k in (2, 4):
        row = rows["renoise", k]
        assert row["accuracy"] == pytest.approx(shares[k] * 2 / 3) and row["draws"] == 3
        assert row["delta"] == pytest.approx(row["accuracy"] - shares[1])
        assert row["draw_sd"] == pytest.approx(np.std([shares[k], shares[k], 0], ddof=1))
        assert rows["euler", k]["against_first_sampler"] == pytest.approx(-row["accuracy"])
        assert row["right"] == "".join("2" if i % (4 // k) == 0 else "0" for i in range(n))
    low, high = rows["renoise", 1]["accuracy_interval"]
    assert (high - low) / 2 == pytest.approx(1.96 * (shares[1] * (1 - shares[1]) / n) ** 0.5, rel=0.1)
    assert rows["renoise", 4]["accuracy_interval"] == pytest.approx([2 / 3, 2 / 3]), (
        "every image alike: nothing to resample"
    )
    by_class = [np.mean([i % 4 == 0 for i in range(n) if labels[i] == c]) for c in range(4)]
    assert rows["renoise", 1]["by_class"] == pytest.approx(by_class, abs=1e-4)


@pytest.mark.parametrize("blocks", [None, {"num_blocks": 2}])
def test_noise_depends_on_image_and_draw_alone(data: Path, blocks: dict[str, Any] | None, awake: Any) -> None:
    shape = config("evidence", blocks)
    denoiser = build(shape, seed=0)
    for part in denoiser.parts:
        awake(part)
        with torch.no_grad():
            part.model.adapter.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr]
    loaded, store = Loaded(denoiser.eval(), shape, None), ImageStore(data, "test")

    def right(seed: int = 0, **options: Any) -> list[str]:
        return [
            r["right"]
            for r in evaluate_accuracy(loaded, store, (1, 4), ("renoise", "euler"), seed=seed, **options)[
                "results"
            ]
        ]

    whole = right(batch_size=90)
    assert whole == right(batch_size=7)
    assert [each[:30] for each in whole] == right(batch_size=16, max_images=30)
    other = right(seed=1, batch_size=90)
    assert whole[0] == other[0] and whole[1] != other[1], "K = 1 reads no noise"


def test_steps_that_mean_something() -> None:
    def loaded(*arguments: Any) -> Loaded:
        return Loaded(build(config(*arguments), seed=0), config(*arguments), None)

    assert choose_steps(None, loaded("classify")) == (1,)
    assert choose_steps(None, loaded("paper")) == (1, 2, 3, 4, 8)
    with pytest.raises(ValueError, match="this checkpoint takes 1 to 1"):
        choose_steps([2], loaded("classify"))
    with pytest.raises(ValueError, match="this checkpoint takes 1 to 8"):
        choose_steps([9], loaded("paper"))


def test_from_checkpoints_to_a_report(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, objective, blocks in (("whole", "classify", None), ("cut", "paper", {"num_blocks": 2})):
        shape = config(objective, blocks, name=name)
        save(tmp_path / name, learned(shape), shape, None)
        options = ["--sampler", "renoise,euler", "--num-steps", "1,4", "--num-draws", "2"] if blocks else []
        command = [
            "eval",
            "accuracy",
            "--checkpoint",
            str(tmp_path / name),
            "--data",
            str(data),
            "--per-image",
            *options,
        ]
        assert (
            run(
                app,
                [*command, "--out", str(tmp_path / f"{name}.json"), "--plot", str(tmp_path / "p.png")],
                "rdlm",
            )
            == 0
        )
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    for report in (whole, cut):
        assert (
            all(r["accuracy"] > 0.85 for r in report["results"])
            and report["images"] == 90
            and report["nll"] < 1
        )
        assert report["data"]["classes"] == list(CLASSES) and report["estimator"].startswith("normalised")
    assert [(r["sampler"], r["K"], r["draws"]) for r in cut["results"]] == [
        ("renoise", 1, 1), ("renoise", 4, 2), ("euler", 1, 1), ("euler", 4, 2),
    ]  # fmt: skip
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    files = [str(tmp_path / f"{name}.json") for name in ("whole", "cut")]
    assert run(app, ["eval", "report", *files, "--out", str(tmp_path / "report")], "rdlm") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Classification" in text and "against whole, K = 1" in text and ", paired" in text
    cut["images"] = 89
    (tmp_path / "other.json").write_text(json.dumps(cut))
    assert (
        run(
            app,
            ["eval", "report", files[0], str(tmp_path / "other.json"), "--out", str(tmp_path / "report")],
            "rdlm",
        )
        == 2
    )
    assert "images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({}, ["--num-steps", "2"], "this checkpoint takes 1 to 1"),
        ({}, ["--sampler", "euler"], "has no noise levels"),
        ({}, ["--sampler", "rope"], "no such sampler"),
        ({}, ["--split", "dev"], "dev"),
        ({"model": {**config("classify").model.model_dump(), "num_classes": 10}}, [], "the model was built "
                                                                                      "for 8x8 in 10"),
        ({"model": {**config("classify").model.model_dump(), "image_size": 16}}, [], "the model was built "
                                                                                     "for 16x16 in 4"),
        ({"model": {**config("classify").model.model_dump(), "family": "dit", "noise_conditioning": True},
          "objective": {"name": "edm"}}, [], "family 'dit' is not 'vit'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    options: list[str],
    said: str,
) -> None:
    shape = CheckpointConfig.model_validate({**config("classify").model_dump(), **changes})
    folder = save(tmp_path / "model", build(shape, seed=0), shape, None)
    assert (
        run(app, ["eval", "accuracy", "--checkpoint", str(folder), "--data", str(data), *options], "rdlm")
        == 2
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and "Traceback" not in last
