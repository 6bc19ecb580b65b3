"""The order of training rows: a pure function of step and seed, whatever the number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError
from train.data import Corpus, build_corpus
from train.data.corpus import permute, shuffled
from train.data.prepare import Preparation, prepare
from train.settings import (
    DataConfig,
    GroupProductConfig,
    LatinSquareConfig,
    PointerChasingConfig,
    TokensConfig,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards, so that windows cross their ends."""
    root = tmp_path_factory.mktemp("corpus")
    lines = [f"Line {i} tells of {i * i} foxes and {i % 7} dogs.\n\n" for i in range(400)]
    (root / "a.txt").write_text("".join(lines))
    (root / "b.txt").write_text(
        "".join(f"Page {i}: {i * i + i} owls watched.\n\n" for i in range(9000, 9600))
    )
    options = Preparation(
        str(root),
        root / "out",
        vocab_size=300,
        valid_fraction=0.3,
        test_fraction=0.0,
        shard_tokens=1000,
        text_files="pieces",
    )
    prepare(options, progress=False)
    return root / "out"


@pytest.fixture(params=["tokens", "group", "pointer", "latin"])
def corpus(request: pytest.FixtureRequest, folder: Path) -> Corpus:
    configs: dict[str, DataConfig] = {
        "tokens": TokensConfig(path=str(folder), seq_len=16),
        "group": GroupProductConfig(group="s3", length=6),
        "pointer": PointerChasingConfig(nodes=9, hops=4),
        "latin": LatinSquareConfig(side=5, fewest_blanks=13, most_blanks=16),
    }
    corpus = build_corpus(configs[request.param])
    assert corpus.seq_len == configs[request.param].seq_len
    return corpus


def _global_rows(corpus: Corpus, step: int, world: int, micro_size: int, seed: int = 5) -> torch.Tensor:
    return torch.cat(
        [
            corpus.batch(
                step,
                seed=seed,
                global_batch=8,
                rank=rank,
                world=world,
                micro_index=micro,
                micro_size=micro_size,
            ).inputs
            for rank in range(world)
            for micro in range(8 // world // micro_size)
        ]
    )


def test_global_rows_do_not_depend_on_processes_or_micro_batches(corpus: Corpus) -> None:
    for step in (0, 3, 1000):
        alone = _global_rows(corpus, step, 1, 8)
        for world, micro_size in ((1, 2), (2, 4), (2, 1), (4, 2), (8, 1)):
            assert torch.equal(_global_rows(corpus, step, world, micro_size), alone)
    assert not torch.equal(_global_rows(corpus, 0, 1, 8), _global_rows(corpus, 1, 1, 8))
    assert not torch.equal(_global_rows(corpus, 0, 1, 8), _global_rows(corpus, 0, 1, 8, seed=6))


def test_each_window_comes_once_an_epoch_in_another_order(folder: Path) -> None:
    corpus = build_corpus(TokensConfig(path=str(folder), seq_len=16))
    store = TokenStore(folder, "train")
    count = store.num_windows(16)
    rows = torch.cat([_global_rows(corpus, step, 2, 2) for step in range(2 * count // 8 + 1)])
    ordered = store.rows(np.arange(count), 16).inputs
    for epoch in (rows[:count], rows[count : 2 * count]):
        assert sorted(epoch.tolist()) == sorted(ordered.tolist())
    assert not torch.equal(rows[:count], rows[count : 2 * count]) and not torch.equal(rows[:count], ordered)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 1000])
def test_permute_is_a_bijection_that_shuffles(count: int) -> None:
    items = permute(np.arange(count), count, seed=1, epoch=0)
    assert sorted(items) == list(range(count))
    if count == 1000:
        assert abs(np.corrcoef(items, np.arange(count))[0, 1]) < 0.15
        assert (np.diff(items) == 1).mean() < 0.01
    assert (
        shuffled(np.arange(count, 2 * count), count, 1) == permute(np.arange(count), count, 1, epoch=1)
    ).all()


def test_targets_are_the_next_tokens_across_shards(folder: Path) -> None:
    store = TokenStore(folder, "train")
    assert len(store.info.shards) > 3
    stream = np.concatenate([np.fromfile(folder / s.file, dtype="<u2") for s in store.info.shards])
    assert len(stream) == len(store) == store.info.tokens
    windows = list(store.windows(16, None, batch_size=5))
    inputs, targets = (
        torch.cat([getattr(w, name) for w in windows]).flatten() for name in ("inputs", "targets")
    )
    assert (
        inputs.tolist() == stream[: len(inputs)].tolist()
        and targets.tolist() == stream[1 : len(inputs) + 1].tolist()
    )
    assert (len(store) - 1) // 16 * 16 == len(inputs)
    assert sum(w.targets.numel() for w in store.windows(16, 100, batch_size=4)) == 96
    assert sum(w.targets.numel() for w in store.windows(16, 1, batch_size=4)) == 16


def test_held_out_windows_repeat_and_share_nothing_with_training(corpus: Corpus) -> None:
    first, second = ([w.inputs for w in corpus.windows(320, 4)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    trained = {tuple(r) for step in range(20) for r in _global_rows(corpus, step, 1, 8).tolist()}
    held_out = [tuple(r) for w in first for r in w.tolist()]
    assert sum(r in trained for r in held_out) == 0


def test_micro_batches_that_do_not_add_up_are_refused(corpus: Corpus) -> None:
    for world, micro_size, micro_index in ((3, 1, 0), (2, 3, 0), (2, 2, 2)):
        with pytest.raises(UserError, match="do not add up"):
            corpus.batch(
                0, seed=0, global_batch=8, rank=0, world=world, micro_index=micro_index, micro_size=micro_size
            )


def test_too_long_windows_missing_splits_and_damage_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="seq_len=100000"):
        build_corpus(TokensConfig(path=str(folder), seq_len=100_000))
    with pytest.raises(UserError, match="split='test'"):
        TokenStore(folder, "test")
    with pytest.raises(UserError, match="rdlm data prepare"):
        build_corpus(TokensConfig(path=str(tmp_path), seq_len=16))
