"""Continuations of held-out text: which prompts, the same texts whatever the batch, files that resume."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.texts.samples import Passage, Sampler, Shape, passages, take, to_text
from eval.texts.sweep import Setting
from rdlm.checkpoints.folder import save
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError
from rdlm.objectives import Objective
from rdlm.registry import build
from serve.engine.engine import Engine
from serve.settings import EngineSettings
from train.data.prepare import Preparation, prepare

VOCAB = 300
SHAPE = Shape(prompt_tokens=6, max_tokens=8, continuations=2)
WARM = Setting(2, 1.0, 0.9)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    root = tmp_path_factory.mktemp("data")
    rows = [
        {"text": f"Verse {i}: é and {i * i} foxes ran past {i + 3} hens." * (1 + i % 4)} for i in range(200)
    ]
    (root / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        Preparation(str(root / "d.jsonl"), root / "out", vocab_size=VOCAB, valid_fraction=0.4), progress=False
    )
    return TokenStore(root / "out", "valid")


def _checkpoint(
    folder: Path, store: TokenStore, tiny: Callable[..., Objective], tiny_config: Callable, objective: str
) -> Path:
    denoiser = tiny("huginn", objective, vocab_size=VOCAB)
    with torch.no_grad():  # sharp enough that contexts and steps matter
        for parameter in denoiser.parameters():
            parameter.mul_(3.0)
    return save(folder, denoiser, tiny_config("huginn", objective, vocab_size=VOCAB), store.tokenizer())


@pytest.fixture
def folder(tmp_path: Path, store: TokenStore, tiny: Callable[..., Objective], tiny_config: Callable) -> Path:
    return _checkpoint(tmp_path / "model", store, tiny, tiny_config, "single_pass")


def _sampler(
    folder: Path,
    store: TokenStore,
    cache: Path,
    slots: int = 4,
    seed: int = 0,
    count: int = 5,
    shape: Shape = SHAPE,
) -> Sampler:
    found = take(passages(store, shape), count, shape)
    return Sampler(folder, store, found, shape, EngineSettings(max_slots=slots), cache, seed)


def _texts(*args: object, setting: Setting = WARM, **kwargs: object) -> list[list[str]]:
    with _sampler(*args, **kwargs) as sampler:  # type: ignore[arg-type]
        return sampler.continuations(setting)


def test_passages_do_not_overlap_and_lie_within_a_document(store: TokenStore) -> None:
    found = list(passages(store, SHAPE))
    assert len({p.window for p in found}) == len(found) > 20
    for p in found:
        assert [*p.prompt, *p.continuation] == store.read(p.window * 14, 14).tolist()
        assert store.manifest.eos_id not in (*p.prompt, *p.continuation)
    assert [p.window for p in found] != sorted(p.window for p in found)
    assert take(passages(store, SHAPE), 3, SHAPE) == found[:3]  # asking for more keeps those before
    across = list(passages(store, Shape(6, 8, 2, across_documents=True)))
    assert len(across) == store.num_windows(14) > len(found)


def test_too_few_passages_say_how_many_there_are(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"only \d+ passages of 6 \+ 8 tokens"):
        take(passages(store, SHAPE), 10_000, SHAPE)


def test_prompt_and_human_continuation_join_to_the_original_text(
    store: TokenStore, folder: Path, tmp_path: Path
) -> None:
    with _sampler(folder, store, tmp_path / "c") as sampler:
        whole = [store.tokenizer().decode([*p.prompt, *p.continuation]) for p in sampler.passages]
        assert [a + b[0] for a, b in zip(sampler.prompts, sampler.human, strict=True)] == whole
    tokenizer = store.tokenizer()
    assert (
        to_text(tokenizer, [*tokenizer.encode("one"), tokenizer.eos_id or 0, *tokenizer.encode("two")])
        == "one\n\ntwo"
    )


@pytest.mark.parametrize("objective", ["single_pass", "evidence"])
def test_same_seed_same_texts_whatever_the_batch(
    objective: str, store: TokenStore, tmp_path: Path, tiny: Callable[..., Objective], tiny_config: Callable
) -> None:
    folder = _checkpoint(tmp_path / "m", store, tiny, tiny_config, objective)
    alone, together = (_texts(folder, store, tmp_path / str(slots), slots=slots) for slots in (1, 16))
    assert alone == together
    assert [len(choices) for choices in alone] == [2] * 5 and alone[0][0] != alone[0][1]
    assert _texts(folder, store, tmp_path / "s", seed=1) != alone
    assert _texts(folder, store, tmp_path / "k", setting=Setting(4, 1.0, 0.9)) != alone


def test_prompts_draw_numbers_of_their_own(folder: Path, store: TokenStore, tmp_path: Path) -> None:
    """The same prompt at two places is continued in two ways: its seed depends on its place."""
    first = take(passages(store, SHAPE), 1, SHAPE)[0]
    twins = [first, Passage(first.window + 1, first.prompt, first.continuation)]
    with Sampler(folder, store, twins, SHAPE, EngineSettings(), tmp_path) as sampler:
        one, two = sampler.continuations(WARM)
    assert one != two


def test_every_answer_has_its_full_length_and_no_end_of_text(
    folder: Path, store: TokenStore, tmp_path: Path
) -> None:
    with _sampler(folder, store, tmp_path, count=12) as sampler:
        sampler.continuations(WARM)
        rows = [json.loads(line) for line in sampler.file(WARM).read_text().splitlines()[1:]]
    assert all(len(ids) == 8 and store.manifest.eos_id not in ids for row in rows for ids in row["ids"])
    assert [row["prompt"] for row in rows] == sampler.prompts


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """After the call, an engine fails at its second batch."""

    def arm() -> None:
        calls, generate = [], Engine.generate

        def failing(self: Engine, *args: object) -> object:
            calls.append(1)
            if len(calls) == 2:
                raise Interrupted
            return generate(self, *args)  # type: ignore[arg-type]

        monkeypatch.setattr(Engine, "generate", failing)

    yield arm
    monkeypatch.undo()


@pytest.mark.parametrize("tail", [b"", b'{"window": 3, "te'])
def test_an_interrupted_run_continues_to_the_same_file(
    folder: Path, store: TokenStore, tmp_path: Path, interrupted: Callable[[], None], tail: bytes
) -> None:
    with _sampler(folder, store, tmp_path / "whole") as sampler:
        texts = sampler.continuations(WARM)
        whole = sampler.file(WARM).read_bytes()
    interrupted()
    with _sampler(folder, store, tmp_path / "parts") as sampler, pytest.raises(Interrupted):
        sampler.continuations(WARM)
    part = sampler.file(WARM)
    assert part.name and len(part.read_bytes().splitlines()) == 3  # header and one batch of two prompts
    part.write_bytes(part.read_bytes() + tail)
    done: list[int] = []
    with _sampler(folder, store, tmp_path / "parts") as sampler:
        assert sampler.continuations(WARM, done.append) == texts
    assert part.read_bytes() == whole and done == [2, 2, 1]


def test_complete_files_need_no_engine_and_other_settings_have_files_of_their_own(
    folder: Path, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = _texts(folder, store, tmp_path)
    with _sampler(folder, store, tmp_path) as one, _sampler(folder, store, tmp_path, seed=1) as two:
        with _sampler(folder, store, tmp_path, count=4) as three:
            files = [
                {s.file(x) for x in (WARM, Setting(2, 1.0, 1.0), Setting(3, 1.0, 0.9))}
                for s in (one, two, three)
            ]
    assert len(files[0] | files[1]) == 6 and files[0] == files[2]
    monkeypatch.setattr(Engine, "generate", None)
    assert _texts(folder, store, tmp_path, slots=9) == texts


def test_more_prompts_extend_the_file_of_fewer(
    folder: Path, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _texts(folder, store, tmp_path / "whole")
    for count in (2, 5):
        with _sampler(folder, store, tmp_path / "grown", count=count) as sampler:
            assert sampler.continuations(WARM) == whole[:count]
    monkeypatch.setattr(Engine, "generate", None)
    with _sampler(folder, store, tmp_path / "grown", count=3) as sampler:
        assert sampler.continuations(WARM) == whole[:3]
        file = sampler.file(WARM)
    header, first, *rest = file.read_text().splitlines(keepends=True)
    file.write_text("".join([header, *rest, first]))
    with (
        _sampler(folder, store, tmp_path / "grown") as sampler,
        pytest.raises(UserError, match="other passages"),
    ):
        sampler.continuations(WARM)


def test_what_cuts_the_distribution_changes_the_texts(
    folder: Path, store: TokenStore, tmp_path: Path
) -> None:
    """top-k 1 and a min-p of 1 leave one token each: greedy decoding by other names."""
    greedy, free, first, surest = (
        _texts(folder, store, tmp_path, setting=Setting(2, temperature, top_k=top_k, min_p=min_p))
        for temperature, top_k, min_p in ((0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1))
    )
    assert greedy == first == surest != free


def test_what_does_not_fit_is_refused(folder: Path, store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="64 positions"):
        _sampler(folder, store, tmp_path, shape=Shape(40, 30, across_documents=True), count=1)
    with _sampler(folder, store, tmp_path) as sampler:
        for bad, field in (
            (Setting(65), "--num-steps"),
            (Setting(1, -1.0), "temperature"),
            (Setting(1, 1.0, 0.0), "top_p"),
        ):
            with pytest.raises(UserError) as caught:
                sampler.check([WARM, bad])
            assert caught.value.field == field


def test_a_masked_model_fills_in_continuations_alike_in_any_batch(
    store: TokenStore,
    tmp_path: Path,
    masked_config: Callable[..., CheckpointConfig],
    awake: Callable[[Objective], Objective],
) -> None:
    """Two blocks, so that the steps ask both; texts of full length without an end of text, others at another
    K, resumed from the file."""
    config = masked_config(num_blocks=2, model={"vocab_size": VOCAB})
    denoiser = awake(build(config, seed=0))
    end = store.manifest.eos_id
    with torch.no_grad():
        for (
            block
        ) in denoiser.parts:  # what answers look like to the read-out: it would nearly always be drawn
            hidden = block.hidden(torch.full((1, 14), block.mask_id), torch.ones(1))
            block.model.wte.weight[end] = hidden.mean((0, 1))
    folder = save(tmp_path / "masked", denoiser, config, store.tokenizer())
    texts = _texts(folder, store, tmp_path / "a", 2)
    assert (
        texts == _texts(folder, store, tmp_path / "b", 8)
        and len({text for both in texts for text in both}) > 5
    )
    assert texts != _texts(folder, store, tmp_path / "b", 8, setting=Setting(1, 1.0, 0.9))
    assert texts != _texts(folder, store, tmp_path / "b", 8, setting=replace(WARM, order="confidence"))
    with (
        _sampler(folder, store, tmp_path / "b") as sampler,
        pytest.raises(UserError, match="there is no such order"),
    ):
        sampler.check([replace(WARM, order="backwards")])  # type: ignore[arg-type]
    (file,) = (tmp_path / "a").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert all(len(ids) == 8 and end not in ids for row in rows for ids in row["ids"])
    across = Shape(6, 8, 2, across_documents=True)
    with _sampler(folder, store, tmp_path / "c", shape=across) as sampler:
        sampler.continuations(WARM)
    (free,) = (tmp_path / "c").glob("*.jsonl")
    assert any(end in ids for line in free.read_text().splitlines()[1:] for ids in json.loads(line)["ids"])
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))  # interrupted
    assert texts == _texts(folder, store, tmp_path / "a", 2)
