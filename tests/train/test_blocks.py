"""Training blocks through the real engine: jointly, alone, and what a block alone must share with the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rdlm.checkpoints.folder import load
from rdlm.objectives.blockwise import drawn_block
from train.export import export_run

BLOCKS: dict[str, Any] = {
    "model": {
        "family": "llama", "vocab_size": 8, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32,
        "num_layers": 3,
        "noise_embed_dim": 16, "noise_conditioning": True,
    },
    "objective": {"name": "evidence"},
    "blocks": {"num_blocks": 2},
    "optimizer.weight_decay": 0.3,
}  # fmt: skip


def snapshot(trainer) -> list[dict[str, torch.Tensor]]:
    """Full-precision weights of each block."""
    weights = trainer.weights()
    return [
        {n: w for n, w in weights.items() if n.startswith(f"blocks.{b}.")}
        for b in range(len(trainer.engines))
    ]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (2, "fp32"), (3, "bf16")]
)
def test_idle_blocks_do_not_move(trainer, stage: int, precision: str) -> None:
    """With weight decay, and momentum from earlier visits: one update moves the drawn block and not a bit of
    the other."""
    run = trainer({**BLOCKS, "deepspeed.zero_stage": stage, "precision": precision, "schedule.steps": 12})
    order = [drawn_block(2, step, seed=3) for step in range(12)]
    first_both = max(order.index(0), order.index(1)) + 1  # from here on both have momentum
    for run.step in range(12):
        before = snapshot(run)
        batches = run._batches(run.step)
        run.train_step(batches, float(sum(batch.mask.sum() for batch in batches)))
        moved = [
            any(not torch.equal(old[n], new[n]) for n in new)
            for old, new in zip(before, snapshot(run), strict=True)
        ]
        assert moved == [order[run.step] == 0, order[run.step] == 1], run.step
    assert first_both < 10 and len(set(order[first_both:])) == 2


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_joint_training_resumes_to_the_bit_and_exports(
    trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    monkeypatch.setattr(
        "train.engines.PERSISTENT_ELEMENTS", 64
    )  # evaluation at K > 1 runs outside any engine: scalars stay whole
    changes = {
        **BLOCKS,
        "deepspeed.zero_stage": stage,
        "evaluation": {"interval_steps": 3, "steps": [1, 2], "max_tokens": 24},
    }
    whole = trainer({**changes, "output": str(tmp_path / "whole")})
    assert whole.fit()
    calls = iter(range(99))
    first = trainer(changes)
    assert not first.fit(lambda: next(calls) >= 3)
    second = trainer(changes)
    assert second.step == 3 and second.fit()
    for name, weight in second.weights().items():
        assert torch.equal(weight, whole.weights()[name]), name
    records = [
        json.loads(line) for line in (Path(second.config.output) / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["block"] for r in records] == [drawn_block(2, step, seed=3) for step in range(6)]
    held_out = [
        json.loads(line) for line in (Path(second.config.output) / "held_out.jsonl").read_text().splitlines()
    ]
    assert held_out[-1].keys() == {"step", "K=1", "K=2"}
    export_run(second.output)
    loaded = load(Path(second.config.output) / "model")
    assert loaded.config.blocks == second.config.blocks and loaded.config.block is None
    ids = torch.randint(0, 8, (1, 9))
    scores = loaded.denoiser.token_logprobs(ids[:, :-1], ids[:, 1:], [1, 2])
    assert all(torch.isfinite(s).all() for s in scores.values())


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_alone_holds_nothing_of_the_others(trainer, block: int) -> None:
    run = trainer(
        {**BLOCKS, "block": block, "evaluation": {"interval_steps": 6, "steps": [1], "max_tokens": 24}}
    )
    whole = trainer({**BLOCKS, "output": run.config.output + "_whole"})
    alone = sum(p.numel() for p in run.network.parameters())
    assert (
        alone
        == sum(p.numel() for p in whole.network.parts[block].parameters())
        < sum(p.numel() for p in whole.network.parameters())
    )
    assert run.fit()
    held_out = json.loads((Path(run.config.output) / "held_out.jsonl").read_text())
    assert held_out.keys() == {"step", "denoising"} and 0 < held_out["denoising"] < 10
    export_run(run.output)
    loaded = load(Path(run.config.output) / "model")
    assert loaded.config.block == block
    for name, weight in run.weights().items():
        assert torch.equal(loaded.denoiser.get_parameter(name), weight)
