"""HRM-Text beside transformers' own class: an import of what it saves computes its logits, in whole and with its
cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'rdlm[serve]'"
)


@pytest.fixture(scope="module")
def theirs() -> Any:
    config = transformers.HrmTextConfig(
        vocab_size=97, hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4, head_dim=14,
        H_cycles=2, L_cycles=2, max_position_embeddings=64, initializer_range=0.125, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = transformers.HrmTextForCausalLM(config).eval().float()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=rng))
    return model


@pytest.fixture(scope="module")
def ours(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> rdlm.Model:
    folder = tmp_path_factory.mktemp("hrm")
    theirs.save_pretrained(folder / "theirs")
    return rdlm.load(import_checkpoint(str(folder / "theirs"), folder / "ours"))


@pytest.mark.parametrize("prefix", [0, 7, 20])
def test_logits_are_those_of_transformers(theirs: Any, ours: rdlm.Model, prefix: int) -> None:
    """Of a text with a prefix that sees itself in both directions, and the tokens after it."""
    ids = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))
    types = (torch.arange(20) < prefix).long().expand(2, 20)
    with torch.no_grad():
        whole = theirs(ids, token_type_ids=types).logits
        first = theirs(ids[:, :12], token_type_ids=types[:, :12], use_cache=True)
        rest = theirs(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True).logits
    found = ours.logits(ids, 2, token_type_ids=types)[2]
    torch.testing.assert_close(found, whole, atol=3e-5, rtol=0)
    if prefix <= 12:
        torch.testing.assert_close(found[:, 12:], rest, atol=3e-5, rtol=0)
    assert ours.config.model.prefix_lm and whole.std() > 0.2
