"""Documents packed into rows: each stands somewhere, none sees another, and positions start anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdlm.config.base import parse
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.batch import Batch
from rdlm.data.packing import Packed, best_fit
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError
from rdlm.nn.attention import DocumentContext, TwoStreamContext
from rdlm.objectives.base import HeldOut, Keys
from rdlm.registry import build
from train.config_file import _check as check_sections
from train.data.corpus import TokenCorpus
from train.data.prepare import Preparation, prepare
from train.settings import TokensConfig, TrainConfig

LENGTHS = (5, 4, 7)
T = 20
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 7 + [9] * 4])
OBJECTIVES: dict[str, Any] = {
    "next_token": {"name": "next_token", "depth": {"mean": 2, "grad_steps": 2}},
    "onestep": {"name": "onestep"},
    "bptt": {"name": "bptt", "depth": {"mean": 3, "grad_steps": 2}},
    "single_pass": {"name": "single_pass"},
    "evidence": {"name": "evidence"},
    "paper": {"name": "paper"},
}


EVERY_STEP: dict[str, Any] = {
    "per_step": {"name": "per_step", "depth": {"mean": 3, "grad_steps": 2}},
    "exit_gate": {"name": "exit_gate", "depth": {"mean": 3, "per": "sequence", "distribution": "uniform"}},
    "gate_only": {"name": "gate_only", "depth": {"mean": 3}},
}


def network(objective: Any) -> Any:
    noisy = objective["name"] in ("single_pass", "evidence", "paper")
    document = {
        "name": "tiny",
        "objective": objective,
        "model": {
            "family": "huginn", "vocab_size": 40, "d_model": 32, "num_heads": 2, "mlp_width": 48, "max_seq_len": 32,
            "num_prelude_layers": 1, "num_core_layers": 1, "num_coda_layers": 1, "noise_conditioning": noisy,
            "exit_gate": "linear" if "gate" in objective["name"] else "none",
        },
    }  # fmt: skip
    return build(parse(CheckpointConfig, document, "test"), seed=0)


def packed(ids: Tensor) -> Batch:
    """Rows of three documents and padding."""
    mask = (DOCUMENTS < 9).expand(len(ids), T)
    return Batch(ids[:, :-1], ids[:, 1:], mask, DOCUMENTS.expand(len(ids), T))


def losses(objective: Any, batch: Batch, held_out: bool) -> tuple[Tensor, Tensor]:
    """Hidden states and the loss of each position, [B, T, D] and [B, T]."""
    if held_out:
        scores = objective.score(
            batch.inputs, batch.targets, (1, 2), seed=1, num_draws=2, documents=batch.documents
        )
        return torch.cat([scores[k].logprobs for k in (1, 2)], -1).unsqueeze(-1), scores[2].logprobs
    noised = objective.corrupt(batch.targets, torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(2)
    hidden = objective.hidden(batch.inputs, noised, [2] * len(batch.inputs), rng, batch.documents)
    weight = torch.ones(batch.targets.numel())
    _, found = objective.cross_entropy(hidden.flatten(0, 1), batch.targets.flatten(), weight, noised)
    return hidden, found.view(batch.targets.shape)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
@torch.no_grad()
def test_a_document_changes_nothing_in_another_to_the_last_bit(name: str, held_out: bool) -> None:
    objective = network(OBJECTIVES[name])
    ids = torch.randint(0, 40, (2, T + 1), generator=torch.Generator().manual_seed(3))
    # A document's last target is not the first input of the next one: inputs and targets stand apart.
    before = packed(ids)
    for number in range(3):
        own = (DOCUMENTS == number).expand(2, T)
        inputs = torch.where(own, (before.inputs + 7) % 40, before.inputs)
        targets = torch.where(own, (before.targets + 7) % 40, before.targets)
        after = Batch(inputs, targets, before.mask, before.documents)
        for old, new in zip(
            losses(objective, before, held_out), losses(objective, after, held_out), strict=True
        ):
            if old.dim() == 3 and old.shape[1] != T:  # scores at both K beside each other
                old, new = old.view(2, 2, T), new.view(2, 2, T)
                changed = (old != new).any(1)
            else:
                changed = (old != new) if old.dim() == 2 else (old != new).any(-1)
            assert not bool((changed & ~own).any())
            assert bool((changed & own).any())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_row_is_that_of_its_documents_alone(name: str) -> None:
    """The same documents as sequences of their own: another implementation of the same rule. Objectives that
    draw noise draw it by place, and are compared where they draw none."""
    objective = network(OBJECTIVES[name])
    ids = torch.randint(0, 40, (1, T + 1), generator=torch.Generator().manual_seed(4))
    row = packed(ids)
    whole = objective.evaluate(row, HeldOut((1,)))["K=1"]
    alone, start = 0.0, 0
    for length in LENGTHS:
        span = slice(start, start + length)
        part = Batch(row.inputs[:, span], row.targets[:, span], torch.ones(1, length, dtype=torch.bool))
        alone += float(objective.evaluate(part, HeldOut((1,)))["K=1"])
        start += length
    assert float(whole) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("document", [0, 1, 2])
@pytest.mark.parametrize("name", [*OBJECTIVES, *EVERY_STEP])
@torch.no_grad()
def test_the_loss_that_is_trained_on_sees_one_document_alone(name: str, document: int) -> None:
    """Every objective's own loss, of the positions of one document: the others may hold anything."""
    objective = network({**OBJECTIVES, **EVERY_STEP}[name])
    ids = torch.randint(0, 40, (2, T + 1), generator=torch.Generator().manual_seed(3))
    row, own = packed(ids), (DOCUMENTS == document).expand(2, T)

    def loss(changes: Tensor) -> Tensor:
        inputs, targets = (torch.where(changes, (each + 7) % 40, each) for each in (row.inputs, row.targets))
        return objective.loss(Batch(inputs, targets, own, row.documents), Keys(seed=0, step=0)).total

    before = loss(torch.zeros_like(own))
    assert torch.equal(loss(~own), before)
    assert not torch.equal(loss(own), before)


def test_gradients_of_a_row_are_those_of_its_documents() -> None:
    found = []
    ids = torch.randint(0, 40, (1, T + 1), generator=torch.Generator().manual_seed(5))
    row = packed(ids)
    bounds = np.cumsum([0, *LENGTHS])
    parts = [
        Batch(row.inputs[:, a:b], row.targets[:, a:b], torch.ones(1, b - a, dtype=torch.bool))
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    for batches in ([row], parts):
        objective = network(OBJECTIVES["next_token"])
        for batch in batches:
            objective(batch, Keys(seed=0, step=0))[0].backward()
        found.append({name: p.grad for name, p in objective.named_parameters()})
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-4, atol=1e-6)


def test_attention_is_that_of_a_dense_mask() -> None:
    rng = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, T, 2, 8, generator=rng) for _ in range(3))
    documents = DOCUMENTS.expand(2, T)
    found = DocumentContext(documents).attend(q, k, v, 0)
    for b in range(2):
        for i in range(T):
            seen = [j for j in range(i + 1) if documents[b, j] == documents[b, i]]
            for h in range(2):
                weights = F.softmax(k[b, seen, h] @ q[b, i, h] / 8**0.5, 0)
                torch.testing.assert_close(found[b, i, h], weights @ v[b, seen, h], rtol=1e-5, atol=1e-6)


def test_positions_start_anew_in_every_document() -> None:
    expected = [*range(5), *range(4), *range(7), *range(4)]
    context = DocumentContext(DOCUMENTS)
    assert context.positions().tolist() == [expected]
    assert TwoStreamContext(T, True, "cpu", DOCUMENTS).positions().tolist() == [expected * 2]
    alone = DocumentContext(torch.zeros(1, 7, dtype=torch.int64)).rope(8, 1e4)
    assert torch.equal(context.rope(8, 1e4)[:, 9:16], alone)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 1 to 90 bytes, one token a byte."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": chr(97 + n % 26) * (1 + n * 37 % 90)}) for n in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    prepare(Preparation(str(folder / "text.jsonl"), folder / "out", vocab_size=257), progress=False)
    return folder / "out"


def test_every_document_stands_once_in_the_rows_and_is_whole(data: Path) -> None:
    store = TokenStore(data, "train")
    rows = Packed(store, 32)
    batch = rows.rows(np.arange(len(rows)))
    assert batch.documents is not None and batch.inputs.shape == (len(rows), 32)
    found = []
    for row in range(len(rows)):
        for number in set(batch.documents[row].tolist()) - {32}:
            own = batch.documents[row] == number
            assert bool(batch.mask[row][own].all())
            found.append((*batch.inputs[row][own].tolist(), int(batch.targets[row][own][-1])))
    assert int(batch.mask.sum()) == len(store) - store.info.documents
    starts = [*store.document_starts().tolist(), len(store)]
    expected = []
    for a, b in zip(starts, starts[1:], strict=False):
        ids = store.read(a, b - a).tolist()
        assert ids[-1] == store.manifest.eos_id
        expected += [tuple(ids[i : i + 33]) for i in range(0, len(ids) - 1, 32)]
    assert sorted(found) == sorted(expected)
    least = int(batch.mask.sum()) / 32
    assert len(rows) <= 1.1 * least


def test_best_fit_fills_rows_and_loses_nothing() -> None:
    lengths = np.array([7, 3, 3, 5, 5, 10, 2, 5])
    rows = best_fit(lengths, 10)
    assert sorted(i for row in rows for i in row) == list(range(8))
    assert [int(lengths[row].sum()) for row in rows] == [10, 10, 10, 10]


def test_rows_of_an_update_do_not_depend_on_processes(data: Path) -> None:
    corpus = TokenCorpus(data, 32, packing="documents")
    whole = corpus.batch(3, seed=1, global_batch=8, rank=0, world=1, micro_index=0, micro_size=8)
    parts = [
        corpus.batch(3, seed=1, global_batch=8, rank=r, world=2, micro_index=m, micro_size=2)
        for r in range(2)
        for m in range(2)
    ]
    for name in ("inputs", "targets", "mask", "documents"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_what_cannot_keep_documents_apart_is_refused_by_name(document: Any, data: Path) -> None:
    model = {
        "family": "masked",
        "vocab_size": 257,
        "d_model": 32,
        "num_heads": 2,
        "mlp_width": 48,
        "num_layers": 2,
        "max_seq_len": 32,
    }
    section = {"kind": "tokens", "path": str(data), "seq_len": 32, "packing": "documents"}
    config = parse(TrainConfig, document({"model": model, "objective": "masked", "data": section}), "test")
    with pytest.raises(UserError, match="data.packing.*'masked' cannot keep the documents"):
        check_sections(config)


def test_a_run_on_packed_documents_trains_and_evaluates(trainer: Any, data: Path) -> None:
    section = TokensConfig(path=str(data), seq_len=32, packing="documents").model_dump()
    changes = {
        "model.vocab_size": 257, "data": section, "evaluation": {"interval_steps": 3, "steps": [1, 2],
            "max_tokens": 64},
    }  # fmt: skip
    run = trainer(changes)
    assert run.fit()
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    assert (run.output / "held_out.jsonl").read_text().count("K=2") == 2


def test_evaluation_reads_packed_documents_as_training_does(
    trainer: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of held-out rows are short: without their masks the figures would be others."""
    from eval.metrics.nll import Nll
    from train.export import export_run

    section = TokensConfig(path=str(data), seq_len=32, packing="documents").model_dump()
    run = trainer({
        "model.vocab_size": 257, "data": section, "precision": "fp32", "objective": "onestep",
        "evaluation": {"interval_steps": 6, "steps": [1, 2], "max_tokens": 64},
    })  # fmt: skip
    assert run.fit()
    trained = json.loads((run.output / "held_out.jsonl").read_text().splitlines()[-1])
    given: dict[str, Any] = {
        "checkpoint": export_run(run.output), "data": data, "num_steps": "1,2", "seq_len": 32, "max_tokens": 64,
        "device": "cpu",
    }  # fmt: skip

    def measured(packing: Any) -> list[float]:
        report = Nll().measure(Nll.Options(**given, packing=packing))
        return [row["nll"] for row in report["results"]]

    expected = [trained["K=1"], trained["K=2"]]
    assert measured("documents") == pytest.approx(expected, rel=1e-5)
    assert measured("windows") != pytest.approx(expected, rel=1e-3)
