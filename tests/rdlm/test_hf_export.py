"""`rdlm export hf`: transformers computes from the exported folder what rdlm computes, offline, and an import
brings the same bits back."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rdlm
from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.hf_export import export_hf
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.errors import UserError
from rdlm.registry import build

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install 'rdlm[serve]'"
)

WHOLE = 1 << 40
ROUNDING = 3e-5
VOCAB = 262
ROPE = {"base": 10_000.0}
LAYER: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "rope": ROPE, "mlp_width": 48}
PLAIN_LOOP = {"num_core_layers": 2, "iterates": False, "injection": "replace"}
SCALED_ROPE = {
    "base": 10_000.0,
    "scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16},
}


def recurrent(
    layer: dict[str, Any] | None = None, loop: dict[str, Any] | None = None, **model: Any
) -> dict[str, Any]:
    return {
        "family": "recurrent", "d_model": 32, "max_seq_len": 64, "layer": {**LAYER, **(layer or {})},
        "loop": {"num_core_layers": 2, **(loop or {})}, **model,
    }  # fmt: skip


def huginn(**model: Any) -> dict[str, Any]:
    return {
        "family": "huginn", "d_model": 32, "num_heads": 2, "mlp_width": 64, "max_seq_len": 64,
        "num_prelude_layers": 1, "num_core_layers": 2,
        "num_coda_layers": 1, "noise_embed_dim": 16, **model,
    }  # fmt: skip


def llama(**model: Any) -> dict[str, Any]:
    return {
        "family": "llama", "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 48,
        "max_seq_len": 64, "num_layers": 2,
        "noise_embed_dim": 16, **model,
    }  # fmt: skip


YARN = {"factor": 4.0, "original_max_seq_len": 16, "attention_factor": 1.2, "beta_fast": 8.0}
PARTS = {"num_prelude_layers": 1, "num_coda_layers": 1}
LOOPED: dict[str, tuple[dict[str, Any], str]] = {
    "huginn, single_pass": (huginn(noise_conditioning=True), "single_pass"),
    "huginn, bptt, drawn state": (huginn(state_init="normal", tie_embeddings=False), "bptt"),
    "diagonal injection": (
        recurrent(loop={**PARTS, "injection": "diagonal", "readout": "linear", "input_norm": True,
        "core_mlp_width": 40}),
        "onestep",
    ),
    "orthogonal injection, unweighted boundary norm": (
        recurrent(loop={**PARTS, "injection": "diagonal_orthogonal", "boundary_norm": "unweighted"}),
        "next_token",
    ),
    "all layers loop, boundary norm, exit gate": (
        recurrent(
            {"norms": "sandwich_branch"},
            {"state": "embedding", "boundary_norm": "weighted", "final_norm": False, "exit_gate": "linear"},
            tie_embeddings=False,
        ),
        "next_token",
    ),
    "step gate": (recurrent({"qk_norm": "head"}, {**PARTS, "state": "embedding", "step_gate_width": 8}), "next_token"),
    "value embeddings": (
        recurrent(
            {"num_kv_heads": None, "qk_norm": "head_unweighted", "mlp": "relu2", "mlp_scale": 0.5},
            {**PARTS, "injection": "diagonal", "readout": "linear"},
            value_embeddings=[0, 2, 3],
            value_gate_width=8,
        ),
        "next_token",
    ),
    "added input, partial and scaled rotations, gelu": (
        recurrent({"rope": {**SCALED_ROPE, "num_dims": 4}, "mlp": "gelu", "norms": "post", "qk_norm": "full"},
        {"injection": "add"}),
        "next_token",
    ),
    "biases, yarn": (
        recurrent(
            {"bias": "qkvo", "mlp_bias": True, "rope": {"base": 10_000.0, "scaling": YARN}},
            {**PARTS, "injection": "linear"},
        ),
        "next_token",
    ),
    "positions divided, orthogonal injection of another eps": (
        recurrent(
            {"rope": {"base": 10_000.0, "scaling": {"factor": 3.0}}},
            {**PARTS, "injection": "diagonal_orthogonal", "injection_eps": 2.0},
        ),
        "next_token",
    ),
    "steps with a time and a length": (
        {
            "family": "loopformer", "d_model": 32, "max_seq_len": 64, "num_layers": 2,
            "layer": {
                "num_heads": 4, "mlp": "gelu", "mlp_width": 48, "norm_weights": False, "bias": "qkvo", "mlp_bias": True,
            },
        },
        "next_token",
    ),
    "two stacks": (
        {
            "family": "hrm", "d_model": 32, "max_seq_len": 64, "embed_scale": 3.0, "num_stack_layers": 2,
            "num_low_cycles": 2, "prefix_lm": True,
            "layer": {**LAYER, "num_kv_heads": None, "norm_weights": False, "output_gate": True},
        },
        "next_token",
    ),
}  # fmt: skip
PLAIN: dict[str, tuple[dict[str, Any], str]] = {
    "llama of its own family": (llama(), "LlamaForCausalLM"),
    "llama, untied, its own head width": (
        recurrent({"head_dim": 16}, PLAIN_LOOP, tie_embeddings=False),
        "LlamaForCausalLM",
    ),
    "llama with scaled rotations": (recurrent({"rope": SCALED_ROPE}, PLAIN_LOOP), "LlamaForCausalLM"),
    "mistral": (recurrent({}, PLAIN_LOOP, origin="mistral"), "MistralForCausalLM"),
    "qwen2": (recurrent({"bias": "qkv"}, PLAIN_LOOP), "Qwen2ForCausalLM"),
    "qwen3": (recurrent({"qk_norm": "head"}, PLAIN_LOOP), "Qwen3ForCausalLM"),
    "olmo2": (recurrent({"norms": "post", "qk_norm": "full"}, PLAIN_LOOP), "Olmo2ForCausalLM"),
}
SAMPLING: dict[str, tuple[dict[str, Any], Any]] = {
    "llama, evidence": (llama(noise_conditioning=True), "evidence"),
    "huginn, evidence, read below sigma_max": (
        huginn(noise_conditioning=True),
        {"name": "evidence", "readout_quantile": 0.9},
    ),
    "llama, paper": (llama(noise_conditioning=True), "paper"),
    "huginn, paper, read at sigma_max": (
        huginn(noise_conditioning=True),
        {"name": "paper", "readout_quantile": 1.0},
    ),
}


def made(folder: Path, model: dict[str, Any], objective: Any = "next_token", **fields: Any) -> Path:
    """A checkpoint whose every weight is far from its initial value, with a tokenizer and a chat template."""
    settings = {"name": objective} if isinstance(objective, str) else objective
    config = CheckpointConfig.model_validate(
        {
            "name": "tiny", "model": {"vocab_size": VOCAB, **model}, "objective": settings,
            "recurrence": {"default_steps": 3, "max_steps": 8}, "step": 7, **fields,
        }
    )  # fmt: skip
    denoiser = build(config, seed=0)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    tokenizer = train_tokenizer("bpe", iter(["the cat sat on the mat " * 20]), VOCAB)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return checkpoint.save(folder, denoiser, config, tokenizer)


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def exported(tmp_path: Path, model: dict[str, Any], objective: Any = "next_token") -> tuple[Path, Path]:
    ours = made(tmp_path / "ours", model, objective)
    export_hf(ours, tmp_path / "theirs", shard_bytes=WHOLE)
    return ours, tmp_path / "theirs"


def greedy(model: Any, ids: torch.Tensor, count: int, k: int) -> torch.Tensor:
    """The arg max of whole sequences again and again: no cache, every step computed as in training."""
    for _ in range(count):
        ids = torch.cat([ids, model.logits(ids, k, zero_state=True)[k][:, -1:].argmax(-1)], 1)
    return ids


def same_bits(a: Path, b: Path) -> bool:
    x, y = (load_file(folder / "model.safetensors") for folder in (a, b))
    return x.keys() == y.keys() and all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)


@pytest.mark.parametrize("case", LOOPED)
@torch.no_grad()
def test_a_looped_model_computes_the_same_at_every_k(tmp_path: Path, case: str) -> None:
    """Logits within rounding at K = 1, 2, 4; greedy continuations with the cache; the default K; and the bits of
    the round trip."""
    ours, out = exported(tmp_path, *LOOPED[case])
    model, theirs = rdlm.load(ours), loaded(out)
    rounding = 10 * ROUNDING if case.startswith("steps") else ROUNDING  # random gates multiply it
    ids = torch.randint(0, VOCAB, (2, 20))
    for k, expected in model.logits(ids, [1, 2, 4], zero_state=True).items():
        torch.testing.assert_close(theirs(ids, num_steps=k).logits, expected, atol=rounding, rtol=0)
        torch.testing.assert_close(
            theirs(ids, num_steps=k, use_cache=True).logits, expected, atol=rounding, rtol=0
        )
    torch.testing.assert_close(theirs(ids).logits, theirs(ids, num_steps=3).logits, atol=0, rtol=0)
    written = theirs.generate(
        ids, num_steps=4, do_sample=False, max_new_tokens=12, min_new_tokens=12, eos_token_id=None
    )
    assert torch.equal(written, greedy(model, ids, 12, 4))
    back = import_checkpoint(str(out), tmp_path / "back")
    assert same_bits(back, ours) and checkpoint.load_config(back) == checkpoint.load_config(ours)


@pytest.mark.parametrize("case", PLAIN)
@torch.no_grad()
def test_a_plain_transformer_becomes_a_class_of_transformers(tmp_path: Path, case: str) -> None:
    settings, architecture = PLAIN[case]
    ours = made(tmp_path / "ours", settings)
    assert export_hf(ours, tmp_path / "theirs", shard_bytes=WHOLE) == architecture
    assert not list((tmp_path / "theirs").glob("*.py"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs).__name__ == architecture and type(theirs).__module__.startswith(
        "transformers.models."
    )
    ids = torch.randint(0, VOCAB, (2, 20))
    torch.testing.assert_close(theirs(ids).logits, rdlm.load(ours).logits(ids)[1], atol=ROUNDING, rtol=0)
    back = import_checkpoint(str(tmp_path / "theirs"), tmp_path / "back")
    assert same_bits(back, ours) and checkpoint.load_config(back) == checkpoint.load_config(ours)


@pytest.mark.parametrize("case", SAMPLING)
@torch.no_grad()
def test_a_model_that_samples_through_levels_is_exported_as_its_prior(tmp_path: Path, case: str) -> None:
    """K = 1 is the normalised likelihood that rdlm reports; the card says what is missing."""
    ours, out = exported(tmp_path, *SAMPLING[case])
    theirs, ids = loaded(out), torch.randint(0, VOCAB, (2, 20))
    targets = torch.randint(0, VOCAB, (2, 20))
    expected = checkpoint.load(ours).denoiser.score(ids, targets, [1])[1].logprobs
    whole = theirs(ids).logits
    found = whole.log_softmax(-1).gather(2, targets.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
    first = theirs(ids[:, :12], use_cache=True)
    rest = theirs(ids[:, 12:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, atol=ROUNDING, rtol=0)
    assert "sampler is not part of transformers" in (out / "README.md").read_text()
    with pytest.raises(ValueError, match="allows 1 to 1"):
        theirs(ids, num_steps=2)
    back = import_checkpoint(str(out), tmp_path / "back")
    assert same_bits(back, ours) and checkpoint.load_config(back) == checkpoint.load_config(ours)


@torch.no_grad()
def test_a_given_state_is_the_state_before_the_first_step(tmp_path: Path) -> None:
    ours, out = exported(tmp_path, *LOOPED["huginn, bptt, drawn state"])
    ids, states = torch.randint(0, VOCAB, (2, 9)), torch.randn(2, 9, 32)
    expected = rdlm.load(ours).logits(ids, 2, states=states)[2]
    torch.testing.assert_close(
        loaded(out)(ids, num_steps=2, input_states=states).logits, expected, atol=ROUNDING, rtol=0
    )


@torch.no_grad()
def test_padding_changes_nothing(tmp_path: Path) -> None:
    """A row padded on the left writes what it writes alone."""
    _, out = exported(tmp_path, *LOOPED["huginn, single_pass"])
    theirs, long = loaded(out), torch.randint(1, VOCAB, (1, 12))
    short = torch.randint(1, VOCAB, (1, 7))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    options = {
        "num_steps": 4,
        "do_sample": False,
        "max_new_tokens": 8,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    both = theirs.generate(torch.cat([long, padded]), attention_mask=mask, **options)
    assert torch.equal(both[0], theirs.generate(long, **options)[0])
    assert torch.equal(both[1, 5:], theirs.generate(short, **options)[0])


@torch.no_grad()
def test_prefixes_see_themselves(tmp_path: Path) -> None:
    """In a first call, with padding on the left and before cached rows."""
    ours, out = exported(tmp_path, *LOOPED["two stacks"])
    theirs, ids = loaded(out), torch.randint(1, VOCAB, (2, 12))
    types = (torch.arange(12) < torch.tensor([[5], [8]])).long()
    expected = rdlm.load(ours).logits(ids, 2, token_type_ids=types)[2]
    found = theirs(ids, num_steps=2, token_type_ids=types).logits
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)
    assert (found - theirs(ids, num_steps=2).logits).abs().max() > 0.1
    first = theirs(ids[:, :9], num_steps=2, token_type_ids=types[:, :9], use_cache=True)
    rest = theirs(ids[:, 9:], num_steps=2, past_key_values=first.past_key_values)
    cached = torch.cat([first.logits, rest.logits], 1)
    torch.testing.assert_close(cached, expected, atol=ROUNDING, rtol=0)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.int64), torch.ones_like(ids)], 1)
    later = torch.cat([torch.zeros(2, 3, dtype=torch.int64), types], 1)
    found = theirs(padded, num_steps=2, attention_mask=mask, token_type_ids=later).logits[:, 3:]
    torch.testing.assert_close(found, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("case", ["huginn, single_pass", "steps with a time and a length", "two stacks"])
@torch.no_grad()
def test_beams_with_a_cache_are_those_without(tmp_path: Path, case: str) -> None:
    """Beams reorder the keys of every step; rows padded on the left among them. A static cache is refused."""
    _, out = exported(tmp_path, *LOOPED[case])
    theirs, ids = loaded(out), torch.randint(1, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    options: dict[str, Any] = {
        "attention_mask": mask, "num_steps": 3, "num_beams": 3, "do_sample": False, "max_new_tokens": 6,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    cached = theirs.generate(ids, **options)
    assert torch.equal(cached, theirs.generate(ids, **options, use_cache=False))
    assert not torch.equal(cached, theirs.generate(ids, **{**options, "num_beams": 1}))
    with pytest.raises(ValueError, match="a cache that grows"):
        theirs.generate(ids, **options, cache_implementation="static")


@torch.no_grad()
def test_a_cache_of_another_k_is_refused(tmp_path: Path) -> None:
    _, out = exported(tmp_path, *LOOPED["huginn, single_pass"])
    theirs, ids = loaded(out), torch.randint(0, VOCAB, (1, 5))
    for filled, then in ((2, 4), (4, 2)):
        cache = theirs(ids, num_steps=filled, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"filled with {filled}"):
            theirs(ids, num_steps=then, past_key_values=cache)


@torch.no_grad()
def test_transformers_saves_it_again_and_it_can_be_imported(tmp_path: Path) -> None:
    ours, out = exported(tmp_path, *LOOPED["huginn, single_pass"])
    loaded(out).save_pretrained(tmp_path / "saved")
    back = import_checkpoint(str(tmp_path / "saved"), tmp_path / "back")
    assert same_bits(back, ours) and checkpoint.load_config(back) == checkpoint.load_config(ours)


@pytest.mark.parametrize("case", ["huginn, single_pass", "llama"])
def test_the_folder_is_all_that_is_needed(tmp_path: Path, case: str) -> None:
    """Another process without a network and without rdlm runs the card's lines, which ask for nothing: tokenizer,
    chat template and the text that the weights give."""
    ours, out = exported(tmp_path, *(LOOPED[case] if case in LOOPED else (llama(), "next_token")))
    [card] = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    code = (
        f"import sys\n{card}\n"
        "text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'the cat'}], tokenize=False)\n"
        "ids = tokenizer(text, return_tensors='pt')\n"
        "assert 'rdlm' not in sys.modules and 'input_ids' in ids\n"
        "print(); print(model.generate(**ids, max_new_tokens=6, do_sample=False)[0].tolist())\n"
    )
    cache = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=out,
        env={**os.environ, **cache},
    )
    assert done.returncode == 0, done.stderr
    assert "custom code" not in done.stdout, "a question that waits for an answer"
    model = rdlm.load(ours)
    assert model.tokenizer is not None
    ids = torch.tensor([model.tokenizer.encode("the cat")])
    expected = greedy(model, ids, 6, model.config.default_steps)[0].tolist()
    end = model.tokenizer.eos_id
    written = json.loads(done.stdout.splitlines()[-1])
    assert written == expected[: len(written)] and (len(written) == len(expected) or written[-1] == end)


def test_weights_keep_their_dtype_and_shards_are_numbered(tmp_path: Path) -> None:
    ours = made(tmp_path / "ours", *LOOPED["huginn, single_pass"])
    read = checkpoint.load(ours)
    checkpoint.save(tmp_path / "half", read.denoiser.bfloat16(), read.config, read.tokenizer)
    export_hf(tmp_path / "half", tmp_path / "theirs", shard_bytes=20_000)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    assert loaded(tmp_path / "theirs").dtype == torch.bfloat16
    assert same_bits(import_checkpoint(str(tmp_path / "theirs"), tmp_path / "back"), tmp_path / "half")


@pytest.mark.parametrize(
    ("model", "objective", "fields", "words"),
    [
        (
            {"family": "masked", "d_model": 32, "num_heads": 2, "mlp_width": 64, "num_layers": 2,
            "max_seq_len": 64, "noise_conditioning": True},
            "masked",
            {},
            ("no next token", "rdlm serve"),
        ),
        (llama(noise_conditioning=True), "evidence", {"blocks": {"num_blocks": 2}},
        ("blocks.num_blocks", "rdlm serve")),
    ],
)  # fmt: skip
def test_what_has_no_place_in_transformers_is_refused_before_anything_is_written(
    tmp_path: Path,
    capsys: Any,
    model: dict[str, Any],
    objective: str,
    fields: dict[str, Any],
    words: tuple[str, ...],
) -> None:
    ours = made(tmp_path / "ours", model, objective, **fields)
    assert run(app, ["export", "hf", str(ours), str(tmp_path / "theirs")], "rdlm") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in line for word in words)
    assert not (tmp_path / "theirs").exists()


def test_a_refused_huginn_export_names_the_one_that_works(tmp_path: Path, capsys: Any) -> None:
    ours = made(tmp_path / "ours", *LOOPED["huginn, single_pass"])
    assert run(app, ["export", "huginn", str(ours), str(tmp_path / "theirs")], "rdlm") == 2
    assert "rdlm export hf" in capsys.readouterr().err
    assert run(app, ["export", "hf", str(ours), str(tmp_path / "theirs")], "rdlm") == 0


@pytest.mark.parametrize("case", [LOOPED["huginn, single_pass"], (llama(), "next_token")])
def test_an_export_that_was_changed_is_refused_by_field(
    tmp_path: Path, case: tuple[dict[str, Any], str]
) -> None:
    _, out = exported(tmp_path, *case)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(UserError, match=r"hidden_size.*rdlm field"):
        import_checkpoint(str(out), tmp_path / "back")
