"""ViT and DiT: patches, what sees what, and that their objectives teach them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.diffusion.corruption import draw_levels
from rdlm.diffusion.schedules import denoise_scalings, edm_weight
from rdlm.errors import UserError
from rdlm.models.vision import assemble, patches
from rdlm.objectives import Objective
from rdlm.objectives.base import Draws, Keys
from rdlm.objectives.edm import Edm, pixels
from rdlm.random_streams import generator
from rdlm.registry import build

SIDE, CLASSES = 8, 4
SHAPE = {
    "d_model": 32,
    "num_heads": 2,
    "mlp_width": 64,
    "num_layers": 4,
    "image_size": SIDE,
    "patch_size": 4,
    "num_classes": CLASSES,
}


def config(
    family: str, objective: str, blocks: dict[str, Any] | None = None, **model: Any
) -> CheckpointConfig:
    shape = {
        "family": family,
        **SHAPE,
        "noise_conditioning": objective != "classify",
        "noise_embed_dim": 16,
        **model,
    }
    return CheckpointConfig.model_validate(
        {"name": "tiny", "model": shape, "objective": {"name": objective}, "blocks": blocks}
    )


def batch(rows: int, seed: int = 0) -> Batch:
    """Noise with one bright quadrant, whose number is the class."""
    rng = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(rows, 3, SIDE, SIDE, generator=rng)
    classes = torch.randint(0, CLASSES, (rows, 1), generator=rng)
    half = SIDE // 2
    for image, label in zip(images, classes[:, 0].tolist(), strict=True):
        y, x = half * (label // 2), half * (label % 2)
        image[:, y : y + half, x : x + half] += 0.8
    return Batch(images, classes, torch.ones_like(classes, dtype=torch.bool))


def learn(denoiser: Objective, updates: int, lr: float = 3e-3) -> Objective:
    for part in denoiser.parts:
        optimizer = torch.optim.AdamW(part.parameters(), lr=lr)
        for step in range(updates):
            terms = part.loss(batch(32, seed=step), Keys(seed=0, step=step))
            optimizer.zero_grad()
            (terms.total / terms.count).backward()
            optimizer.step()
    return denoiser.eval()


def test_patches_are_those_of_unfold_and_come_back() -> None:
    images = torch.randn(2, 3, 12, 12)
    rows = patches(images, 4)
    assert torch.equal(rows, F.unfold(images, 4, stride=4).transpose(1, 2))
    assert torch.equal(assemble(rows, 4, 3), images)


@pytest.mark.parametrize("objective", ["classify", "paper"])
def test_a_vit_knows_the_places_of_patches_by_their_vectors_alone(objective: str) -> None:
    """Patches in another order, their vectors moved along: the same prediction. No order enters through
    attention."""
    denoiser, images = build(config("vit", objective), seed=0), batch(3).inputs
    before = denoiser.score(images, torch.zeros(3, 1, dtype=torch.long), (1,))[1].logprobs
    order = torch.tensor([2, 0, 3, 1])
    moved = assemble(patches(images, 4)[:, order], 4, 3)
    changed = denoiser.score(moved, torch.zeros(3, 1, dtype=torch.long), (1,))[1].logprobs
    with torch.no_grad():
        places = denoiser.model.patches.places  # type: ignore[union-attr]
        places.copy_(places[order])  # type: ignore[operator, index]
    after = denoiser.score(moved, torch.zeros(3, 1, dtype=torch.long), (1,))[1].logprobs
    torch.testing.assert_close(after, before)
    assert (changed - before).abs().max() > 20 * (after - before).abs().max()


def test_a_noised_class_row_moves_its_own_image_only(awake: Any) -> None:
    denoiser, data = awake(build(config("vit", "evidence"), seed=0)), batch(4)
    with torch.no_grad():
        denoiser.model.adapter.weight.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))

    def hidden(targets: torch.Tensor) -> torch.Tensor:

        return denoiser.hidden(data.inputs, denoiser.corrupt(targets, generator(0, 1)), [1] * 4, generator(0))

    denoiser.objective = denoiser.settings.model_copy(
        update={"corruption": denoiser.settings.corruption.model_copy(update={"share": 1.0})}
    )
    other = data.targets.clone()
    other[2] = (other[2] + 1) % CLASSES
    moved = (hidden(data.targets) - hidden(other)).abs().amax((1, 2))
    assert moved[2] > 0 and moved[[0, 1, 3]].max() == 0


@pytest.mark.parametrize(
    ("objective", "blocks"),
    [("classify", None), ("paper", None), ("evidence", None), ("paper", {"num_blocks": 2})],
)
def test_a_vit_learns_to_classify(objective: str, blocks: dict[str, Any] | None) -> None:
    shape = config("vit", objective, blocks)
    denoiser, held_out = learn(build(shape, seed=0), 60), batch(200, seed=10_000)
    ks, names = ([1], ["renoise"]) if objective == "classify" else ([1, 4], ["renoise", "euler", "dpmpp_2m"])
    for sampler in names:
        for answers in denoiser.answer(held_out.inputs, ks, Draws(sampler=sampler)).values():  # type: ignore[arg-type]
            assert (answers == held_out.targets).float().mean() > 0.9, (objective, sampler)
    scores = denoiser.score(held_out.inputs, held_out.targets, (1,))[1]
    assert scores.is_greedy.float().mean() > 0.9 and -scores.logprobs.mean() < 1.0
    every = torch.arange(CLASSES).expand(200, CLASSES)
    whole = torch.stack(
        [denoiser.score(held_out.inputs, every[:, [c]], (1,))[1].logprobs[:, 0] for c in range(CLASSES)], 1
    )
    torch.testing.assert_close(whole.exp().sum(1), torch.ones(200))


def test_the_loss_of_a_dit_is_that_of_karras(awake: Any) -> None:
    """w |D - y|^2 = |F - (y - c_skip z) / c_out|^2 (Karras et al. 2022, Eq. 8 with Table 1), with the draws
    made again by hand."""
    denoiser, data = awake(build(config("dit", "edm"), seed=0)), batch(5)
    with torch.no_grad():
        denoiser.model.pixels.weight.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(2))
    terms = denoiser.loss(data, Keys(seed=7, step=3))
    rng = generator(7, 2, 3, 0, 0)
    sigma = draw_levels(denoiser.settings.corruption, denoiser.noise, denoiser.block, (5, 1), rng)[0][:, 0]
    untold = torch.rand(5, generator=rng) < 0.1
    noise = torch.randn(data.inputs.shape, generator=rng)
    classes = torch.where(untold, CLASSES, data.targets[:, 0])
    c = denoise_scalings(sigma, 0.5)
    skip, out, into = (each.view(-1, 1, 1, 1) for each in (c.c_skip, c.c_out, c.c_in))
    z = data.inputs + sigma.view(-1, 1, 1, 1) * noise
    wanted = (data.inputs - skip * z) / out
    by_hand = (denoiser.model(into * z, c.c_noise, classes) - wanted).square().mean((1, 2, 3))
    torch.testing.assert_close(terms.total, by_hand.sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(edm_weight(sigma, 0.5), 1 / c.c_out.square())
    assert len(sigma.unique()) == 5 and float(terms.count) == 5


class _Gaussian(Edm):
    """The exact denoiser of images drawn from N(mean, s^2) in each value."""

    def __init__(self, mean: float, s: float) -> None:
        super().__init__(config("dit", "edm"), nn.Module())  # type: ignore[arg-type]
        self.mean, self.s, self.asked = mean, s, []  # type: ignore[var-annotated]

    def at(self, sigma: float) -> _Gaussian:
        self.asked.append(sigma)
        return self

    def guided(self, z: torch.Tensor, sigma: float, classes: torch.Tensor, guidance: float) -> torch.Tensor:
        return (self.s**2 * z + sigma**2 * self.mean) / (self.s**2 + sigma**2)


@pytest.mark.parametrize(("sampler", "tolerance"), [("euler", 0.01), ("heun", 0.01), ("dpmpp_2m", 0.003)])
def test_images_follow_the_flow_of_an_exact_denoiser(sampler: str, tolerance: float) -> None:
    """Of Gaussian data the ODE is solved by x = mean + (z - mean) s / sqrt(s^2 + sigma_max^2). Levels at
    equal mass are far apart at the top, so even a second-order sampler needs many."""
    exact, classes = _Gaussian(0.2, 0.3), torch.zeros(16, dtype=torch.int64)
    start = torch.stack([torch.randn((3, SIDE, SIDE), generator=generator(3, 8, i)) for i in range(16)]) * 80
    wanted = 0.2 + (start - 0.2) * 0.3 / (0.3**2 + 80**2) ** 0.5
    few, many = (exact.sample_images(classes, k, sampler=sampler, seed=3) for k in (64, 256))
    assert (many - wanted).abs().max() < tolerance
    assert (few - wanted).abs().max() > 2.5 * (many - wanted).abs().max()
    assert abs(float(many.std()) - 0.3) < 0.01
    assert exact.asked[0] == pytest.approx(80) and min(exact.asked) > 0.002


def test_an_image_does_not_depend_on_its_batch(awake: Any) -> None:
    shape = config("dit", "edm", {"num_blocks": 2})
    denoiser = build(shape, seed=0)
    for block in denoiser.parts:
        with torch.no_grad():
            awake(block).model.pixels.weight.normal_(0.0, 0.3)
    classes = torch.tensor([0, 1, 2, 3])
    whole = denoiser.sample_images(classes, 6, guidance=2.0)
    alone = denoiser.sample_images(classes[2:3], 6, first=2, guidance=2.0)
    torch.testing.assert_close(whole[2:3], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, denoiser.sample_images(classes, 6, guidance=1.0))
    assert pixels(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(5, 1, 1, 1)).flatten().tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_guidance_leads_away_from_no_class(awake: Any) -> None:
    denoiser = awake(build(config("dit", "edm"), seed=0))
    assert isinstance(denoiser, Edm)
    with torch.no_grad():
        denoiser.network.pixels.weight.normal_(0.0, 0.3)
        z, classes = torch.randn(3, 3, SIDE, SIDE), torch.tensor([0, 1, CLASSES])
        one, two, four = (denoiser.guided(z, 1.5, classes, g) for g in (1, 2, 4))
        plain = denoiser.estimate(z, torch.full((3,), 1.5), classes)
    torch.testing.assert_close(one, plain)
    torch.testing.assert_close(four - one, 3 * (two - one), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(two[2], one[2], atol=1e-5, rtol=1e-5)  # it is no class itself
    assert (two[:2] - one[:2]).abs().max() > 1e-4


@pytest.mark.parametrize("blocks", [None, {"num_blocks": 2}])
def test_a_dit_draws_the_class_it_is_asked_for(blocks: dict[str, Any] | None) -> None:
    # At the usual levels the quadrant is plain to see in the noised image: nothing would make the network
    # listen to the class.
    shape = CheckpointConfig.model_validate(
        {**config("dit", "edm", blocks).model_dump(), "noise": {"p_mean": 1.0}}
    )
    denoiser = learn(build(shape, seed=0), 150)
    classes = torch.arange(CLASSES).repeat(8)
    images = denoiser.sample_images(classes, 16)
    half = SIDE // 2
    quadrants = torch.stack(
        [images[:, :, y : y + half, x : x + half].mean((1, 2, 3)) for y in (0, half) for x in (0, half)], 1
    )
    assert (quadrants.argmax(1) == classes).float().mean() > 0.9


@pytest.mark.slow
def test_small_places_and_classes_are_drowned_by_patches() -> None:
    """Why they start at 0.5 and not at 0.02 like other weights: a class is then learned early, by DiT and ViT
    alike."""

    def initial(shape: CheckpointConfig, std: float) -> Objective:
        denoiser = build(shape, seed=0)
        for name, weight in denoiser.named_parameters():
            if name in ("model.patches.places", "model.classes.weight"):
                weight.data.mul_(std / 0.5)
        return denoiser

    drawing = CheckpointConfig.model_validate({**config("dit", "edm").model_dump(), "noise": {"p_mean": 1.0}})
    classes, half, held_out = torch.arange(CLASSES).repeat(16), SIDE // 2, batch(200, seed=10_000)
    right, nats = {}, {}
    for std in (0.02, 0.5):
        images = (learn(initial(drawing, std), 300)).sample_images(classes, 16)
        means = [
            images[:, :, y : y + half, x : x + half].mean((1, 2, 3)) for y in (0, half) for x in (0, half)
        ]
        right[std] = float((torch.stack(means, 1).argmax(1) == classes).float().mean())
        named = learn(initial(config("vit", "classify"), std), 50)
        nats[std] = -float(named.score(held_out.inputs, held_out.targets, (1,))[1].logprobs.mean())
    assert right[0.02] < 0.5 and right[0.5] > 0.9, right
    assert nats[0.02] > 1 and nats[0.5] < 0.3, nats


def test_families_and_objectives_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="use edm"):
        build(config("dit", "paper"))
    with pytest.raises(UserError, match="use evidence or paper or classify"):
        build(config("vit", "single_pass"))
    with pytest.raises(UserError, match="patch_size"):
        from rdlm.config.base import parse

        parse(CheckpointConfig, {"name": "x", "model": {"family": "vit", **SHAPE, "patch_size": 3}}, "test")
    with pytest.raises(UserError, match="a model of images has no tokens"):
        config("vit", "classify").check_next_token("this")
    with pytest.raises(UserError, match="label_dropout"):
        from rdlm.config.base import parse

        parse(
            CheckpointConfig,
            {
                "name": "x",
                "model": {"family": "vit", **SHAPE},
                "objective": {"name": "classify", "label_dropout": 0.1},
            },
            "test",
        )
