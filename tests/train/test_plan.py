"""`rdlm plan` predicts what training allocates, and suggests the least harmful way that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from rdlm.cli import app
from rdlm.config.base import parse
from rdlm.data.batch import Batch
from rdlm.diffusion.targets import frozen_rows
from rdlm.errors import UserError
from rdlm.registry import build
from train.cli import _show, size
from train.memory_plan import Memory, arms, predict
from train.memory_trace import _LiveBytes, trace
from train.settings import TrainConfig

LLAMA = {
    "family": "llama",
    "vocab_size": 64,
    "d_model": 64,
    "num_heads": 2,
    "mlp_width": 96,
    "num_layers": 4,
    "max_seq_len": 32,
}

NOISED = {"evidence": {"corruption": {"share": 1.0}}}
"""The trace takes every row as noised."""


def config(document: Callable[..., dict[str, Any]], **changes: Any) -> TrainConfig:
    base = {
        "model": LLAMA,
        "objective": {"name": "evidence"},
        "data.length": 32,
        "precision": "fp32",
        "deepspeed.zero_stage": 0,
    }
    return parse(
        TrainConfig,
        document(base | {key.replace("__", "."): value for key, value in changes.items()}),
        "test",
    )


@pytest.mark.parametrize(
    "vocab_size", [64, 8192]
)  # 8192: read-out and its chunks decide, two of them with evidence
@pytest.mark.parametrize("objective", ["next_token", "evidence", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trace_equals_what_the_real_objective_allocates(
    document, allocated, objective: str, dtype: torch.dtype, vocab_size: int
) -> None:
    """The same count on real tensors, real loss included: live bytes after the forward pass and the peak of
    both passes."""
    model = {**LLAMA, "vocab_size": vocab_size}
    settings = config(
        document, objective={"name": objective, **NOISED.get(objective, {})}, model=model
    ).checkpoint_config
    traced = trace(build(settings, device="meta"), 4, 32, dtype, 1)
    denoiser = build(settings, seed=0).to(dtype)
    ids = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(4, 32, dtype=torch.bool))
    forward, peak = allocated(denoiser, batch)
    assert traced.forward == pytest.approx(forward, rel=0.05)
    assert traced.peak == pytest.approx(peak, rel=0.05)
    left = sum(p.grad.nbytes for p in denoiser.parameters() if p.grad is not None)
    assert traced.gradients == pytest.approx(left, abs=8), "all but the evidence scale's"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_prediction_equals_the_live_tensors_of_a_real_update(
    document, trainer, stage: int, precision: str
) -> None:
    """Every tensor of DeepSpeed's engine and of the third update, forward pass to optimizer step, of one
    block among two."""
    changes = {
        "model": {**LLAMA, "vocab_size": 512, "d_model": 128, "mlp_width": 320},
        "objective": {"name": "evidence"}, "data.length": 32,
        "precision": precision, "deepspeed.zero_stage": stage, "deepspeed.bucket_elements": 600_000,
        "blocks": {"num_blocks": 2},
        "block": 0,
    }  # fmt: skip
    frozen_rows.cache_clear()
    before = {key: size for key, (_, size) in live_storages().items()}
    running = trainer(changes)
    for step in range(2):
        update(running, step)
    mine = {key: found for key, found in live_storages().items() if key not in before}
    with _LiveBytes() as count:
        for storage, _ in mine.values():
            count._count(storage)
        del mine, storage
        update(running, 2)
    assert predict(running.config, 1).total == pytest.approx(count.peak, rel=0.03)


def update(trainer: Any, step: int) -> None:
    batches = trainer._batches(step)
    trainer.train_step(batches, sum(float(batch.mask.sum()) for batch in batches))


def live_storages() -> dict[int, tuple[torch.UntypedStorage, int]]:
    """What Python can reach, gradients included: address -> (storage, bytes). ZeRO's shapes without data
    (device meta) take no memory."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return {s._cdata: (s, s.nbytes()) for s in (t.untyped_storage() for t in tensors)}


def test_a_layer_of_the_plain_model_keeps_twelve_widths_and_three_mlp_widths(document) -> None:
    """The closed form in docs/training.md, per row and layer in fp32: 4 (12 D + 3 W) bytes, and 4 for each
    head's normaliser."""

    def forward(layers: int) -> int:
        settings = config(
            document, objective={"name": "next_token"}, model={**LLAMA, "num_layers": layers}
        ).checkpoint_config
        return trace(build(settings, device="meta"), 4, 32, torch.float32, 1).forward

    rows = 4 * 32
    assert forward(3) - forward(2) == pytest.approx(4 * rows * (12 * 64 + 3 * 96), rel=0.01)


def test_blocks_and_recomputation_and_zero_lower_what_they_should(document) -> None:
    whole = predict(config(document), 1)
    block = predict(config(document, blocks={"num_blocks": 4}, block=0), 1)
    again = predict(config(document, activation_checkpointing=True), 1)
    assert block.optimizer < 0.4 * whole.optimizer and block.activations < 0.5 * whole.activations
    assert again.optimizer == whole.optimizer and again.activations < 0.6 * whole.activations
    sharded = [
        predict(config(document, deepspeed__zero_stage=stage, precision="bf16"), 2) for stage in (1, 2, 3)
    ]
    alone = [
        predict(config(document, deepspeed__zero_stage=stage, precision="bf16"), 1) for stage in (1, 2, 3)
    ]
    for many, one in zip(sharded, alone, strict=True):
        assert 2 * many.optimizer == pytest.approx(one.optimizer, rel=1e-3)
    weights = [memory.parameters for memory in sharded]
    assert weights[0] == weights[1] == pytest.approx(2 * weights[2], rel=1e-3), "only stage 3 splits weights"


@pytest.mark.parametrize(
    ("text", "expected"), [("24GiB", 24 * 2**30), ("0.5 GB", 5 * 10**8), ("900MiB", 900 * 2**20)]
)
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


def test_suggestion_prefers_whole_networks_and_takes_blocks_when_it_must(document, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config(document).model_dump(mode="json")))

    def plan(memory: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["plan", str(file), "--memory", memory], standalone_mode=False)
        return result.return_value, result.output

    need = predict(config(document), 1).total
    assert "blocks.num_blocks" not in plan("1GiB")[1]
    status, text = plan(f"{0.45 * need / 1e6:.3f}MB")
    assert status == 0 and "blocks.num_blocks=" in text
    assert plan("0.001MB")[0] == 1


def test_every_figure_of_the_table_stands_under_its_heading(document, tmp_path: Path, capsys) -> None:
    """As text, 80 columns wide: the cells of each row are those of the plan, in the order of the headings,
    and none is cut."""
    arm = next(arms(config(document), 1, False))
    figures = [
        arm.memory.parameters,
        arm.memory.optimizer,
        arm.memory.gradients,
        arm.memory.activations,
        arm.memory.total,
    ]
    large = replace(arm, memory=Memory(*(f * 10**6 for f in figures[:4])))
    for one in (arm, large):
        _show([one], one, 2**60)
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80 or "rdlm train CONFIG" in max(lines, key=len)
        heading = next(line for line in lines if "ZeRO" in line)
        row = next(line for line in lines if "suggested" in line and "│" in line)
        names = [cell.strip() for cell in heading.strip("┃ ").split("┃")]
        cells = [cell.strip() for cell in row.strip("│ ").split("│")]
        assert "…" not in heading + row
        assert names == ["B", "recom.", "ZeRO", "micro", "weights", "optim.", "grads", "activ.", "total"]
        m = one.memory
        wanted = [
            f"{part / 2**30:.2f}" for part in (m.parameters, m.optimizer, m.gradients, m.activations, m.total)
        ]
        assert cells == ["1", "no", "0", "4", *wanted, "suggested"]


def test_a_wrong_size_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="--memory='lots'"):
        size("lots")
