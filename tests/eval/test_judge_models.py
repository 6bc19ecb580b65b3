"""Judges: which tokens are scored, with what context; what is kept; which sources are refused. A tiny
random model stands in."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import torch

from eval.cache import CHUNK_TEXTS, cached
from eval.texts.judge_models import Judge, load_judge, pieces, where
from rdlm.cli import app, run
from rdlm.device import usable_device
from rdlm.errors import UserError
from train.data.prepare import Preparation, prepare

transformers = pytest.importorskip("transformers", reason="judges need transformers")
TEXT = "In the beginning God created the heaven and the earth, and the earth was without form and void."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with a byte-level tokenizer, as a local folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 5, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    path = tmp_path_factory.mktemp("judge")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def judge(folder: Path) -> Judge:
    return load_judge(str(folder))


def _by_hand(judge: Judge, text: str, first: int) -> float:
    ids = torch.tensor([judge.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logp = judge.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -float(logp[torch.arange(len(logp)), ids[0, 1:]][first - 1 :].sum())


@pytest.mark.parametrize(("length", "window"), [(1, 8), (2, 8), (8, 8), (9, 8), (33, 8), (34, 7), (5, 2)])
def test_every_token_but_the_first_is_scored_once_with_half_a_window_of_context(
    length: int, window: int
) -> None:
    scored = []
    for begin, end, first in pieces(length, window):
        assert end - begin <= window and first > begin
        assert begin == 0 or first - begin >= window // 2
        scored += range(first, end)
    assert scored == list(range(1, length))


def test_a_continuation_is_scored_given_its_prompt(judge: Judge) -> None:
    prompt, continuation = TEXT[:32], TEXT[32:60]
    num_prompt = len(judge.tokenizer(prompt)["input_ids"])
    ids = judge.tokenizer(prompt + continuation)["input_ids"]
    assert ids[:num_prompt] == judge.tokenizer(prompt)["input_ids"]  # the cut lies between tokens
    nats, tokens = judge.score([prompt], [continuation])[0]
    assert tokens == len(ids) - num_prompt
    assert nats == pytest.approx(_by_hand(judge, prompt + continuation, num_prompt), rel=1e-5)
    other = judge.score(["Quite another start of it: "], [continuation])[0]
    assert other[0] != pytest.approx(nats, rel=1e-3)


def test_a_token_over_the_border_counts_and_the_first_of_a_text_never(judge: Judge) -> None:
    ids = judge.tokenizer(TEXT[:40])["input_ids"]
    ends = [end for _, end in judge.tokenizer(TEXT[:40], return_offsets_mapping=True)["offset_mapping"]]
    cut = next(e for e, before in zip(ends[1:], ends, strict=False) if e - before > 2) - 1  # inside a token
    assert judge.score([TEXT[:cut]], [TEXT[cut:40]])[0, 1] == sum(end > cut for end in ends)
    assert judge.score([""], [TEXT[:40]])[0, 1] == len(ids) - 1
    assert judge.score([TEXT[:40]], [""])[0].tolist() == [0, 0]


def test_scores_and_features_do_not_depend_on_the_batch(judge: Judge) -> None:
    texts = [TEXT[i : i + 5 + 3 * i] for i in range(12)]
    done: list[int] = []
    together = judge.score(texts, [t[::-1] for t in texts], done.append)
    assert sum(done) == 12
    alone = np.concatenate([judge.score([t], [t[::-1]]) for t in texts])
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    features = judge.features(texts)
    np.testing.assert_allclose(
        features, np.concatenate([judge.features([t]) for t in texts]), rtol=1e-4, atol=1e-5
    )
    ids = torch.tensor([judge.tokenizer(texts[3])["input_ids"]])
    with torch.no_grad():
        last = judge.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
    np.testing.assert_allclose(features[3], last.numpy(), rtol=1e-4, atol=1e-5)


def test_long_texts_are_scored_in_windows(judge: Judge) -> None:
    text = " ".join([TEXT] * 6)
    ids = judge.tokenizer(text)["input_ids"]
    assert len(ids) > 2 * judge.window == 128  # the model's own limit
    nats, tokens = judge.score([text[:1]], [text[1:]])[0]
    assert tokens == len(ids) - 1
    by_hand = 0.0
    for begin, end, first in pieces(len(ids), 64):
        with torch.no_grad():
            logp = judge.model(input_ids=torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
        by_hand -= sum(float(logp[i - 1 - begin, ids[i]]) for i in range(first, end))
    assert nats == pytest.approx(by_hand, rel=1e-5)


def test_equal_weights_have_equal_fingerprints(folder: Path, judge: Judge, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    judge.model.save_pretrained(copy)
    judge.tokenizer.save_pretrained(copy)
    assert load_judge(str(copy)).fingerprint == judge.fingerprint
    with torch.no_grad():
        judge.model.model.norm.weight[0] += 1
    changed = tmp_path / "changed"
    judge.model.save_pretrained(changed)
    judge.tokenizer.save_pretrained(changed)
    with torch.no_grad():
        judge.model.model.norm.weight[0] -= 1
    assert load_judge(str(changed)).fingerprint != judge.fingerprint


def test_another_tokenizer_is_another_key_of_kept_scores(folder: Path, judge: Judge) -> None:
    again = load_judge(str(folder))
    assert again.identity == judge.identity and load_judge(str(folder), window=32).identity != judge.identity
    again.tokenizer.add_tokens(["the heaven"])
    assert again.fingerprint == judge.fingerprint and again.identity != judge.identity


def test_what_was_computed_is_not_computed_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def lengths(texts: list[str], progress: Callable[[int], object] | None) -> np.ndarray:
        calls.append(len(texts))
        return np.array([[len(text)] for text in texts])

    texts = [f"{'x' * (i % 7)}{i}" for i in range(CHUNK_TEXTS + 10)]
    first = cached(tmp_path, ("kind", "a"), texts, lengths)
    assert first[:, 0].tolist() == [len(t) for t in texts] and calls == [CHUNK_TEXTS, 10]
    assert cached(tmp_path, ("kind", "a"), texts, lengths).tolist() == first.tolist() and len(calls) == 2
    cached(tmp_path, ("kind", "b"), texts, lengths)
    cached(tmp_path, ("kind", "a"), [*texts[:-1], "other"], lengths)
    assert calls == [CHUNK_TEXTS, 10, CHUNK_TEXTS, 10, 10]
    assert all(file.name.startswith("kind-") for file in tmp_path.iterdir())


def test_two_runs_at_the_same_texts_compute_them_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def slow(texts: list[str], progress: Callable[[int], object] | None) -> np.ndarray:
        calls.append(len(texts))
        sleep(0.3)
        return np.array([[len(text)] for text in texts])

    with ThreadPoolExecutor(
        3
    ) as pool:  # flock is held by an open file, so threads exclude each other like processes
        found = [pool.submit(cached, tmp_path, ("kind",), ["a", "bb"], slow) for _ in range(3)]
    assert [each.result().tolist() for each in found] == [[[1], [2]]] * 3 and calls == [2]
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]


def test_a_hub_name_out_of_reach_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="smollm2") as caught:
        load_judge("rdlm-stack/there-is-no-such-model")
    assert caught.value.field == "--judge" and "\n" not in str(caught.value)


def test_judges_of_papers_have_short_names() -> None:
    assert where("GPT2-XL") == ("openai-community/gpt2-xl", {})
    assert where("Llama-2-7B") == ("meta-llama/Llama-2-7b-hf", {})


def test_missing_packages_and_empty_folders_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_judge(str(tmp_path))
    monkeypatch.setattr("eval.texts.judge_models.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install transformers==5\.23\.0"):
        load_judge("smollm2")


def test_a_device_is_named_as_everywhere_else(folder: Path) -> None:
    assert load_judge(str(folder), device="auto").model.device == usable_device("auto")
    with pytest.raises(UserError, match="--device='gpu'"):
        load_judge(str(folder), device="gpu")


def test_the_command_judges_texts_with_its_default_device(
    folder: Path, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    checkpoint, source = folders("onestep"), tmp_path / "d.jsonl"
    source.write_text(
        "".join(f'{{"text": "Verse {i}: {i * i} foxes ran past {i} hens."}}\n' for i in range(99))
    )
    prepare(Preparation(str(source), tmp_path / "data", tokenizer=str(checkpoint)), progress=False)
    given = ["--checkpoint", checkpoint, "--data", tmp_path / "data", "--split", "train", "--judge", folder]
    small = ["--num-prompts", 4, "--prompt-tokens", 6, "--max-tokens", 8, "--across-documents"]
    written = ["--cache", tmp_path / "cache", "--out", tmp_path / "r.json", "--plot", tmp_path / "r.png"]
    assert run(app, ["eval", "gen-ppl", *map(str, [*given, *small, *written])], "rdlm") == 0
    [result] = json.loads((tmp_path / "r.json").read_text())["results"]
    assert result["num_steps"] == 2 and (tmp_path / "r.png").stat().st_size > 0
