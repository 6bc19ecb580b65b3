"""Forward-Forward: layers that learn each for itself, and classes judged by their goodness."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import objective_config
from rdlm.data.batch import Batch
from rdlm.errors import UserError
from rdlm.objectives.base import Keys
from rdlm.objectives.forward_forward import ForwardForward, goodness_loss
from rdlm.registry import build

SHAPE: dict[str, Any] = {
    "family": "vit", "image_size": 8, "patch_size": 4, "num_classes": 4, "d_model": 32, "num_heads": 2,
    "mlp_width": 48, "num_layers": 3,
}  # fmt: skip


def config(**document: Any) -> CheckpointConfig:
    objective = {"name": "forward_forward", **document.pop("objective", {})}
    return CheckpointConfig.model_validate(
        {"name": "tiny", "model": SHAPE, "objective": objective, **document}
    )


@pytest.fixture
def model(awake) -> Any:
    return awake(build(config(), seed=0))


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_no_gradient_goes_from_layer_to_layer(model: ForwardForward) -> None:
    classes = torch.tensor([0, 1, 3])
    for index in range(3):
        model.zero_grad()
        model.goodness(images(3), classes)[index].sum().backward()
        moved = {name for name, p in model.model.named_parameters() if p.grad is not None and p.grad.any()}
        own = {name for name, _ in model.model.named_parameters() if name.startswith(f"layers.{index}.")}
        stem = {name for name in moved if not name.startswith("layers.")}
        assert own & moved and moved - stem <= own
        assert bool(stem) == (index == 0), "patches and classes are the first layer's"


def test_a_layer_cannot_read_how_good_the_one_before_was(model: ForwardForward) -> None:
    before = model.goodness(images(3), torch.tensor([0, 1, 3]))
    handle = model.model.layers[0].register_forward_hook(lambda module, given, out: out * 7)  # type: ignore[union-attr,index]
    after = model.goodness(images(3), torch.tensor([0, 1, 3]))
    handle.remove()
    torch.testing.assert_close(after[0], 49 * before[0])
    torch.testing.assert_close(after[1:], before[1:])


def test_classes_are_judged_by_all_layers_but_the_first(model: ForwardForward) -> None:
    found = model.class_logits(images(5))
    for number in range(4):
        alone = torch.cat([model.goodness(image[None], torch.tensor([number])) for image in images(5)], 1)
        torch.testing.assert_close(found[:, number], alone[1:].sum(0))
    scores = model.score(images(5), torch.tensor([[0], [1], [2], [3], [0]]), (1,))[1]
    assert torch.equal(model.answer(images(5), [1])[1][:, 0], found.argmax(1))
    torch.testing.assert_close(scores.logprobs[3, 0], found[3].log_softmax(0)[3])
    assert "goodness" in config().objective.estimator_at(1) and config().max_steps == 1


def test_the_losses_by_hand() -> None:
    right, wrong = torch.tensor([[3.0], [1.0]]), torch.tensor([[0.5], [2.0]])
    by_threshold = sum(math.log1p(math.exp(x)) for x in (2 - 3, 0.5 - 2, 2 - 1, 2 - 2))
    assert float(goodness_loss(right, wrong, "threshold")) == pytest.approx(by_threshold)
    by_difference = sum(math.log1p(math.exp(4 * x)) for x in (0.5 - 3, 2 - 1))
    assert float(goodness_loss(right, wrong, "difference")) == pytest.approx(by_difference)


def test_every_wrong_class_is_drawn_and_the_right_one_never(
    model: ForwardForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Tensor] = []
    real = ForwardForward.goodness
    monkeypatch.setattr(ForwardForward, "goodness", lambda self, x, c: asked.append(c) or real(self, x, c))
    right = torch.tensor([[0], [1], [2], [3]] * 16)
    batch = Batch(images(64), right, torch.ones_like(right, dtype=torch.bool))
    terms = model.loss(batch, Keys(seed=0, step=0))
    given, drawn = asked[0].split(64)
    assert torch.equal(given, right[:, 0]) and not (drawn == given).any()
    assert {(int(a), int(b)) for a, b in zip(given, drawn, strict=True)} == {
        (a, b) for a in range(4) for b in range(4) if a != b
    }
    assert float(terms.count) == 64 and torch.equal(
        terms.total, model.loss(batch, Keys(seed=0, step=0)).total
    )
    half = Batch(batch.inputs, right, torch.arange(64).unsqueeze(1) < 32)
    first = Batch(batch.inputs[:32], right[:32], half.mask[:32])
    assert (
        float(model.loss(half, Keys(seed=0, step=0)).count)
        == 32
        == float(model.loss(first, Keys(seed=0, step=0)).count)
    )


@pytest.mark.parametrize("goodness", ["threshold", "difference"])
def test_it_learns_which_quarter_is_bright(goodness: str) -> None:
    learner: Any = build(config(objective={"goodness": goodness}), seed=0)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)

    def batch(count: int) -> Batch:
        classes = torch.randint(0, 4, (count,), generator=rng)
        x = torch.randn(count, 3, 8, 8, generator=rng) * 0.3
        for i, c in enumerate(classes.tolist()):
            x[i, :, 4 * (c // 2) :, 4 * (c % 2) :][:, :4, :4] += 1
        return Batch(x, classes.unsqueeze(1), torch.ones(count, 1, dtype=torch.bool))

    for step in range(250):
        terms = learner.loss(batch(32), Keys(seed=0, step=step))
        optimizer.zero_grad()
        (terms.total / terms.count).backward()
        optimizer.step()
    test = batch(200)
    accuracy = (learner.answer(test.inputs, [1])[1] == test.targets).float().mean()
    assert accuracy > 0.9


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValidationError, match="forward_forward.corruption\\n.*not permitted"):
        objective_config.validate_python(
            {"name": "forward_forward", "corruption": {"share": 0.5}, "readout": "evidence"}
        )
    with pytest.raises(ValidationError, match="goodness\\n.*not permitted"):
        objective_config.validate_python({"name": "classify", "goodness": "threshold"})
    with pytest.raises(UserError, match="no noise levels to divide among blocks"):
        build(config(blocks={"num_blocks": 2}))
    with pytest.raises(UserError, match="cannot be trained with it"):
        model = {
            "family": "llama",
            "vocab_size": 9,
            "d_model": 32,
            "num_heads": 2,
            "mlp_width": 48,
            "max_seq_len": 9,
            "num_layers": 1,
        }
        build(
            config().model_copy(
                update={"model": CheckpointConfig.model_validate({"name": "x", "model": model}).model}
            )
        )
