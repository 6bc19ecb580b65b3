"""`rdlm convert --keep-tokens`: ids, logits and texts of the kept tokens are those of the source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.retrofit import convert
from rdlm.data.token_shards import TokenStore
from rdlm.data.tokenizer import load_tokenizer, train_tokenizer
from rdlm.errors import UserError
from rdlm.registry import build
from train.data.prepare import Preparation, prepare

WIDE = [
    f"the {a}{b} of {c} is {a}{c} and not {b}"
    for a in ("cat", "tree", "moon")
    for b in ("ing", "ed", "ly")
    for c in ("night", "water", "stone")
]
NARROW = [f"the moon of water is {i} and not the water of moon\n" for i in range(40)]


def prepared(folder: Path, tokenizer: Path) -> Path:
    (folder / "text.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("".join(NARROW))
    options = Preparation(
        str(folder / "text.txt"),
        folder / "out",
        tokenizer=str(tokenizer),
        valid_fraction=0.0,
        test_fraction=0.0,
    )
    prepare(options, progress=False)
    return folder / "out"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformer with a BPE vocabulary that is larger than what NARROW uses, and padded."""
    tokenizer = train_tokenizer("bpe", iter(WIDE), 315)
    document = {
        "name": "plain", "objective": "next_token",
        "model": {"family": "llama", "vocab_size": tokenizer.vocab_size + 6, "d_model": 32, "num_heads": 2,
            "mlp_width": 48,
                  "num_layers": 3, "max_seq_len": 64},
    }  # fmt: skip
    config, out = checkpoint.parse_config(document, "test"), tmp_path_factory.mktemp("source") / "plain"
    checkpoint.save(out, build(config, seed=0), config, tokenizer)
    ends = {"eos_token_id": [tokenizer.eos_id], "temperature": 0.5}
    (out / checkpoint.GENERATION).write_text(json.dumps(ends))
    return out


@torch.no_grad()
def test_kept_tokens_have_the_ids_in_order_and_the_logits_of_the_source(source: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path / "before", source / "tokenizer")
    cut = convert(source, tmp_path / "cut", prelude=1, core=1, coda=1, keep_tokens=[data])
    old, new = load_tokenizer(source / "tokenizer"), load_tokenizer(cut / "tokenizer")
    assert 256 < new.vocab_size < old.vocab_size
    again = prepared(tmp_path / "after", cut / "tokenizer")
    texts = [store.read(0, len(store)) for store in (TokenStore(data, "train"), TokenStore(again, "train"))]
    assert texts[0].shape == texts[1].shape
    pairs = dict(zip(texts[1].tolist(), texts[0].tolist(), strict=True))
    assert len(pairs) == len(set(texts[0].tolist())) and new.decode(texts[1]) == old.decode(texts[0])
    assert [pairs[i] for i in sorted(pairs)] == sorted(pairs.values())
    models = [checkpoint.load(folder).denoiser for folder in (source, cut)]
    length = 48
    logits = []
    for model, ids in zip(models, texts, strict=True):
        found: list[torch.Tensor] = []
        inputs = torch.from_numpy(ids[:length])[None]
        model.iterate(
            inputs, 1, 0, lambda k, s, c, m=model, f=found: f.append(m.predict(m.model.decode(s, c)).prior)
        )
        logits.append(found[0][0])
    kept = sorted(pairs)
    torch.testing.assert_close(
        logits[1][:, kept], logits[0][:, [pairs[i] for i in kept]], rtol=1e-6, atol=1e-6
    )
    assert logits[1].shape[1] == new.vocab_size == models[1].config.model.vocab_size
    generation = json.loads((cut / checkpoint.GENERATION).read_text())
    assert generation == {"eos_token_id": [new.eos_id], "temperature": 0.5}


def test_any_text_can_still_be_written(source: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path, source / "tokenizer")
    cut = convert(source, tmp_path / "cut", prelude=1, core=1, coda=1, keep_tokens=[data])
    new = load_tokenizer(cut / "tokenizer")
    for text in ("treeing <|endoftext|> stones", "Größe 日本", "catlynight"):
        assert new.decode(new.encode(text)) == load_tokenizer(source / "tokenizer").decode(
            load_tokenizer(source / "tokenizer").encode(text)
        )


def test_data_of_another_tokenizer_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train_tokenizer("bpe", iter(NARROW), 270).save(other)
    data = prepared(tmp_path / "data", other)
    with pytest.raises(UserError, match="not made with the checkpoint's tokenizer"):
        convert(source, tmp_path / "cut", prelude=1, core=1, coda=1, keep_tokens=[data])
