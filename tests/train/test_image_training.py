"""ViT and DiT as a user meets them: trained, resumed, cut into blocks, planned, and refused where data and
family do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from rdlm.checkpoints.folder import load
from rdlm.cli import app, run
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.registry import build
from train.config_file import load as load_config
from train.data.image_prepare import ImagePreparation, prepare_images
from train.export import export_run, merge
from train.memory_plan import block_counts, predict
from train.memory_trace import trace
from train.pretrain import check
from train.settings import TrainConfig

Image = pytest.importorskip("PIL.Image")

SHAPE = {
    "image_size": 8, "patch_size": 4, "num_classes": 3,
    "d_model": 32, "num_heads": 2, "mlp_width": 48, "num_layers": 4, "noise_embed_dim": 16,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {
        "model": {"family": "vit", **SHAPE},
        "objective": {"name": "paper"},
        "recurrence": {"default_steps": 2, "max_steps": 8},
    },
    "dit": {
        "model": {"family": "dit", **SHAPE},
        "objective": {"name": "edm"},
        "recurrence": {"default_steps": 2, "max_steps": 8},
    },
}
both = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of three classes, prepared."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(60):
        folder = root / "in" / "abc"[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    prepare_images(ImagePreparation(str(root / "in"), root / "out", valid_fraction=0.2), progress=False)
    return root / "out"


@pytest.fixture
def job(trainer: Callable[..., Any], pictures: Path) -> Callable[..., Any]:
    """``job("vit", {"blocks": ..})`` -> a Trainer of the tiny model on the pictures."""
    data = {"kind": "images", "path": str(pictures)}
    return lambda family, changes=None: trainer({**FAMILIES[family], "data": data, **(changes or {})})


@both
def test_a_run_resumes_to_the_bit(job, tmp_path: Path, family: str) -> None:
    changes = {"schedule.steps": 8, "activation_checkpointing": True, "batch.micro_size": 2,
    "checkpoint.interval_steps": 100,
               "blocks": {"num_blocks": 2},
               "evaluation": {"interval_steps": 4, "steps": [1, 4], "max_tokens": 12}}  # fmt: skip
    whole = job(family, {**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    calls = iter(range(99))
    assert not job(family, changes).fit(lambda: next(calls) >= 5)
    second = job(family, changes)
    assert second.step == 5 and second.fit()
    for name, weight in second.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name
    held_out = [json.loads(line) for line in (tmp_path / "whole" / "held_out.jsonl").read_text().splitlines()]
    names = (
        {"step", "denoising"} if family == "dit" else {"step", "K=1", "accuracy at K=1", "accuracy at K=4"}
    )
    assert [record.keys() for record in held_out] == [names] * 2
    assert "images_per_s" in json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])


@both
@pytest.mark.parametrize("stage", [0, 3])
def test_joint_blocks_stay_idle_until_drawn_and_export(
    job, only_drawn_blocks_move, stage: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.engines.PERSISTENT_ELEMENTS", 64)
    changes = {
        "blocks": {"num_blocks": 2},
        "deepspeed.zero_stage": stage,
        "optimizer.weight_decay": 0.3,
        "schedule.steps": 4,
    }
    running = job(family, changes)
    only_drawn_blocks_move(running, 2, 4)
    running.step = 3
    assert running.fit()
    export_run(running.output)
    _usable(Path(running.config.output) / "model")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_layers_that_learn_each_for_itself_train_resume_and_export(job, tmp_path: Path, stage: int) -> None:
    """Forward-Forward: no gradient reaches the last norm, in no stage of ZeRO."""
    changes = {"objective": {"name": "forward_forward"}, "deepspeed.zero_stage": stage, "schedule.steps": 6,
    "batch.micro_size": 2,
               "activation_checkpointing": True, "checkpoint.interval_steps": 100,
               "evaluation": {"interval_steps": 3, "steps": [1], "max_tokens": 12}}  # fmt: skip
    whole = job("vit", {**changes, "output": str(tmp_path / "whole")})
    before = {name: weight.clone() for name, weight in whole.weights().items()}
    assert whole.fit()
    calls = iter(range(99))
    assert not job("vit", changes).fit(lambda: next(calls) >= 4)
    second = job("vit", changes)
    assert second.step == 4 and second.fit()
    for name, weight in second.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name
    still = {name for name, weight in whole.weights().items() if torch.equal(weight, before[name])}
    assert all("ln_f" in name for name in still), still
    export_run(second.output)
    loaded = load(Path(second.config.output) / "model")
    assert loaded.denoiser.answer(torch.rand(5, 3, 8, 8), [1])[1].shape == (5, 1)


def _usable(folder: Path) -> None:
    loaded = load(folder)
    if loaded.config.model.family == "dit":
        assert torch.isfinite(loaded.denoiser.sample_images(torch.tensor([0, 2]), 4, guidance=2.0)).all()
        assert "rdlm images" in (folder / "README.md").read_text()
    else:
        answers = loaded.denoiser.answer(torch.rand(5, 3, 8, 8), [1, 4])
        assert all(found.shape == (5, 1) and found.max() < 3 for found in answers.values())
        assert "rdlm eval accuracy" in (folder / "README.md").read_text()


@both
def test_blocks_trained_alone_merge_and_resident_ones_are_the_joint_run(
    job, tmp_path: Path, family: str
) -> None:
    folders = []
    for b in range(2):
        alone = job(family, {"blocks": {"num_blocks": 2}, "block": b, "schedule.steps": 2,
        "output": str(tmp_path / f"b{b}"),
                             "evaluation": {"interval_steps": 2, "steps": [1], "max_tokens": 12}})  # fmt: skip
        assert alone.fit()
        export_run(alone.output)
        folders.append(tmp_path / f"b{b}")
    assert json.loads((folders[1] / "held_out.jsonl").read_text()).keys() == {"step", "denoising"}
    _usable(merge(folders, tmp_path / "merged"))
    pair = []
    for name, section in (("joint", None), ("resident", {"visit_steps": 1})):
        running = job(
            family,
            {
                "blocks": {"num_blocks": 2},
                "resident": section,
                "schedule.steps": 4,
                "output": str(tmp_path / name),
            },
        )
        assert running.fit()
        pair.append(running.weights())
    assert all(torch.equal(weight, pair[1][name]) for name, weight in pair[0].items())


@pytest.mark.parametrize("objective", ["classify", "paper", "evidence", "forward_forward", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_planned_from_what_the_objective_allocates(
    document, allocated, objective: str, dtype: torch.dtype
) -> None:
    family = FAMILIES["dit" if objective == "edm" else "vit"]
    model = {**family["model"], "d_model": 128, "mlp_width": 256, "image_size": 32}
    corruption = {"corruption": {"share": 1.0}} if objective == "evidence" else {}
    changes = {
        **family,
        "model": model,
        "objective": {"name": objective, **corruption},
        "data": {"kind": "images", "path": "none"},
    }
    settings = TrainConfig.model_validate(document(changes)).checkpoint_config
    traced = trace(build(settings, device="meta"), 8, 1, dtype, 1)
    denoiser = build(settings, seed=0).to(dtype)
    batch = Batch(torch.randn(8, 3, 32, 32), torch.randint(0, 3, (8, 1)), torch.ones(8, 1, dtype=torch.bool))
    forward, peak = allocated(denoiser, batch)
    assert traced.forward == pytest.approx(forward, rel=0.05)
    assert traced.peak == pytest.approx(peak, rel=0.05)


@both
def test_blocks_and_batches_are_planned(document, family: str) -> None:
    def planned(**changes: Any) -> Any:
        known = {**deepcopy(FAMILIES[family]), "data": {"kind": "images", "path": "none"}}
        return TrainConfig.model_validate(document({**known, **changes}))

    whole, block = predict(planned(), 1), predict(planned(blocks={"num_blocks": 2}, block=0), 1)
    assert block.parameters < whole.parameters and block.activations < whole.activations
    assert predict(planned(batch={"global_size": 64}), 1).activations > 4 * whole.activations
    assert block_counts(planned()) == [1, 2, 4]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"data": {"kind": "tokens", "path": "d", "seq_len": 4}}, "data.kind"),
        ({"data": {"kind": "group_product", "group": "s3", "length": 4}}, "data.kind"),
        ({"model": {"family": "llama", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 8,
        "num_layers": 1, "max_seq_len": 4},
          "objective": {"name": "evidence"}}, "data.kind"),
        ({"objective": {"name": "classify"}, "evaluation": {"interval_steps": 2, "steps": [1, 4]}}, "evaluation.steps"),
        ({"model.patch_size": 3}, "model"),
        ({"objective": {"name": "classify", "label_dropout": 0.1}}, "objective.label_dropout"),
        ({"objective": {"name": "edm", "depth": {"mean": 2}}}, "objective.depth"),
    ],
)  # fmt: skip
def test_a_config_that_does_not_fit_names_its_field(
    document, tmp_path: Path, pictures: Path, changes: dict[str, Any], field: str
) -> None:
    known = {**deepcopy(FAMILIES["vit"]), "data": {"kind": "images", "path": str(pictures)}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(document({**known, **changes})))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.yaml")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.image_size": 16},
            "model.image_size=16: the data's images are 8x8 in 3 channels and 3 classes",
        ),
        ({"model.num_classes": 10}, "set model.num_classes=3"),
        ({"model.num_channels": 1}, "set model.num_channels=3"),
        ({"objective": {"name": "edm"}}, "use evidence or paper or classify"),
        ({"data.path": "nowhere"}, "nowhere"),
    ],
)
def test_data_that_does_not_fit_is_named_before_anything_starts(
    document, pictures: Path, changes: dict[str, Any], said: str
) -> None:
    known = {**deepcopy(FAMILIES["vit"]), "data": {"kind": "images", "path": str(pictures)}}
    config = parse(TrainConfig, document({**known, **changes}), "test")
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        check(config, 1)


@pytest.mark.multiproc
@both
def test_from_a_config_to_a_model_through_the_launcher(
    document, pictures: Path, tmp_path: Path, family: str
) -> None:
    known = {
        **deepcopy(FAMILIES[family]),
        "data": {"kind": "images", "path": str(pictures), "augment": "flip_crop"},
    }
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(document({**known, "blocks": {"num_blocks": 2}, "schedule.steps": 4}))
    )
    assert run(app, ["train", str(tmp_path / "c.yaml"), "--num-procs", "2"], "rdlm") == 0
    _usable(tmp_path / "run" / "model")
    assert "images" in (tmp_path / "run" / "model" / "README.md").read_text()
