"""GGUF files: what is written reads back bit for bit, quantised tensors are what the gguf package makes of
them, and transformers computes from the same file what rdlm computes."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rdlm
from rdlm.checkpoints import folder
from rdlm.checkpoints.convert.gguf_file import export_gguf
from rdlm.checkpoints.convert.hf_export import export_hf
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.retrofit import convert
from rdlm.data.tokenizer import load_tokenizer, train_tokenizer
from rdlm.errors import UserError
from rdlm.registry import build

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

LAYER: dict[str, Any] = {
    "norm_eps": 1e-5, "num_heads": 4, "num_kv_heads": 2, "rope": {"base": 10_000.0}, "mlp_width": 80,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 8192}
YARN = {"factor": 4.0, "original_max_seq_len": 16, "attention_factor": 0.1 * log(4.0) + 1}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama 3.1": ("llama", {"rope": {"base": 500_000.0, "scaling": LLAMA3}, "head_dim": 32}),
    "llama, positions divided": ("llama", {"rope": {"base": 10_000.0, "scaling": {"factor": 2.5}}}),
    "llama, yarn": ("llama", {"rope": {"base": 10_000.0, "scaling": YARN}, "bias": "qkvo", "mlp_bias": True}),
    "qwen2": ("qwen2", {"bias": "qkv"}),
    "qwen3": ("qwen3", {"qk_norm": "head", "head_dim": 16}),
    "olmo2": ("olmo2", {"norms": "post", "qk_norm": "full"}),
}
TEXTS = ["In 2026 it cost 12,345.67 don't", "  spaces\n\nand\tlines ", "æøå — 日本語 🦙", "<|endoftext|> x"]


def plain(
    out: Path, kind: str = "llama", tokenizer: str | None = "bpe", num_tokens: int = 290, **shape: Any
) -> Path:
    """A plain transformer as an import writes it, every parameter far from its initial value."""
    origin, layer = KINDS[kind]
    model = {
        "family": "recurrent", "origin": origin, "vocab_size": 300, "d_model": 64, "max_seq_len": 64,
        "tie_embeddings": kind == "qwen2", "layer": {**LAYER, **layer},
        "loop": {"num_core_layers": 3, "iterates": False, "injection": "replace"}, **shape,
    }  # fmt: skip
    document = {
        "name": "plain",
        "model": model,
        "objective": "next_token",
        "recurrence": {"default_steps": 1},
    }
    config = folder.parse_config(document, "test")
    objective, rng = build(config, seed=0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=rng))
    words = ["a text of words, and words again æ 日本 it was the best of times"] * 20
    trained = None if tokenizer is None else train_tokenizer(tokenizer, iter(words), num_tokens)  # type: ignore[arg-type]
    folder.save(out, objective, config, trained)
    return out


def ids() -> torch.Tensor:
    return torch.randint(0, 280, (2, 33), generator=torch.Generator().manual_seed(2))


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_out_and_in_again_is_the_same_model_bit_for_bit(tmp_path: Path, kind: str) -> None:
    source = plain(tmp_path / "model", kind)
    assert export_gguf(source, tmp_path / "model.gguf") == KINDS[kind][0]
    back = import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back", name="plain")
    assert_same(load_file(source / "model.safetensors"), load_file(back / "model.safetensors"))
    ours, theirs = (folder.load_config(path).model.model_dump() for path in (source, back))
    for each in (ours, theirs):
        each["layer"]["head_dim"] = each["layer"]["head_dim"] or 16
    assert ours == theirs


@pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers reads GGUF with accelerate only"
)
@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind != "olmo2"]
)  # which transformers lacks there
def test_transformers_computes_the_same_from_the_file(tmp_path: Path, kind: str) -> None:
    import transformers

    ignored = {
        "llama 3.1": "rope_freqs",
        "llama, positions divided": "rope.scaling",
        "llama, yarn": "rope.scaling",
        "qwen3": "attention.key_length",
    }
    if (fault := ignored.get(kind)) is not None:
        pytest.skip(f"transformers ignores {fault} in GGUF files")
    source = plain(tmp_path / "model", kind)
    export_gguf(source, tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(ids()).logits
    torch.testing.assert_close(rdlm.load(source).logits(ids())[1], expected, atol=2e-5, rtol=0)


class LlamaCpp:
    """llama.cpp on a file of fp32, with keys of fp32."""

    def __init__(self, file: Path) -> None:
        self.lib = lib = pytest.importorskip(
            "llama_cpp",
            reason="llama-cpp-python is not installed (it is built from source: docs/checkpoints.md)",
        )
        self.log = lib.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        lib.llama_log_set(self.log, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        assert self.model, "llama.cpp does not load the file"
        self.vocab = lib.llama_model_get_vocab(self.model)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
        params.type_k = params.type_v = params.flash_attn_type = 0  # keys of fp32, attention as in the others
        self.context = lib.llama_init_from_model(self.model, params)

    def logits(self, ids: list[int], start: int = 0) -> torch.Tensor:
        """[T, V] of tokens that follow ``start`` others."""
        lib, batch = self.lib, self.lib.llama_batch_init(len(ids), 0, 1)
        if not start:
            lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, True
        assert lib.llama_decode(self.context, batch) == 0
        size = lib.llama_vocab_n_tokens(self.vocab)
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, i), (size,)).copy()
            for i in range(len(ids))
        ]
        lib.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    def encode(self, text: str) -> list[int]:
        raw = text.encode()
        found = (self.lib.llama_token * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), found, len(found), False, True)
        return list(found[:count])


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same_from_the_file(tmp_path: Path, kind: str) -> None:
    """Logits of a prompt and of single tokens after it; ids of texts."""
    source = plain(tmp_path / "model", kind)
    export_gguf(source, tmp_path / "model.gguf")
    theirs, model = LlamaCpp(tmp_path / "model.gguf"), rdlm.load(source)
    row = ids()[0].tolist()
    expected = model.logits(torch.tensor([row]))[1][0]
    found = torch.cat([theirs.logits(row[:30]), *(theirs.logits([row[i]], i) for i in range(30, 33))])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    assert [theirs.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_greedy_text_of_an_unrolled_loop_is_the_same_in_llama_cpp(tmp_path: Path, num_steps: int) -> None:
    looped = convert(
        plain(tmp_path / "plain"), tmp_path / "looped", prelude=1, core=1, coda=1, injection="none"
    )
    export_gguf(looped, tmp_path / "model.gguf", unroll=num_steps)
    theirs, model = LlamaCpp(tmp_path / "model.gguf"), rdlm.load(looped)
    said = theirs.encode("the best of times")
    expected = model.generate([said], num_steps, max_tokens=24, temperature=0, kv_cache="full")[0].tokens
    start, tokens = 0, said
    for _ in range(24):
        logits = theirs.logits(tokens, start)[-1]
        start, tokens = start + len(tokens), [int(logits.argmax())]
        said = [*said, *tokens]
    assert said[-24:] == expected


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_the_tokenizer_goes_along_with_equal_ids_and_texts(tmp_path: Path, kind: str) -> None:
    source = plain(tmp_path / "model", tokenizer=kind)
    export_gguf(source, tmp_path / "model.gguf")
    back = import_checkpoint(str(tmp_path), tmp_path / "back", name="plain")  # a folder that holds the file
    ours, theirs = (load_tokenizer(path / "tokenizer") for path in (source, back))
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert ours.token_bytes() == theirs.token_bytes()
    assert (ours.start, ours.eos_id, ours.vocab_size) == (theirs.start, theirs.eos_id, theirs.vocab_size)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "F16", "BF16"])
def test_quantised_tensors_are_what_the_gguf_package_makes_of_them(tmp_path: Path, kind: str) -> None:
    source = plain(tmp_path / "model", tokenizer=None)
    export_gguf(source, tmp_path / "whole.gguf")
    reader, quantisation = gguf.GGUFReader(tmp_path / "whole.gguf"), gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    for name, field in reader.fields.items():
        if name.startswith("llama."):
            writer.add_key_value(name, field.contents(), field.types[0])
    expected = {}
    for tensor in reader.tensors:
        whole = np.array(tensor.data)
        if whole.ndim == 2 and whole.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(whole, quantisation)
            expected[tensor.name] = gguf.quants.dequantize(packed, quantisation)
            writer.add_tensor(tensor.name, packed, raw_dtype=quantisation)
        else:
            writer.add_tensor(tensor.name, whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    back = import_checkpoint(str(tmp_path / "small.gguf"), tmp_path / "back", name="small")
    made = load_file(back / "model.safetensors")
    table = made["model.wte.weight"]
    assert torch.equal(table.float(), torch.from_numpy(expected["token_embd.weight"]).float())
    up = made["model.layers.2.mlp.fc.weight"][80:]
    assert torch.equal(up.float(), torch.from_numpy(expected["blk.2.ffn_up.weight"]).float())
    assert (kind in (back / "README.md").read_text()) == kind.startswith("Q")


@pytest.mark.parametrize("num_steps", [1, 3])
def test_an_unrolled_loop_computes_what_the_loop_computes_at_that_k(tmp_path: Path, num_steps: int) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source = plain(tmp_path / "plain")
    looped = convert(source, tmp_path / "looped", prelude=1, core=1, coda=1, injection="none")
    assert export_hf(looped, tmp_path / "hf", shard_bytes=1 << 30, unroll=num_steps) == "LlamaForCausalLM"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    assert theirs.config.num_hidden_layers == 2 + num_steps
    expected = rdlm.load(looped).logits(ids(), num_steps)[num_steps]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids()).logits, expected, atol=2e-5, rtol=0)
    export_gguf(looped, tmp_path / "model.gguf", unroll=num_steps)
    back = rdlm.load(import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back"))
    assert torch.equal(back.logits(ids())[1], expected)


def test_what_has_no_such_form_is_refused_by_name(tmp_path: Path) -> None:
    source = plain(tmp_path / "plain")
    looped = convert(source, tmp_path / "looped", prelude=1, core=1, coda=1, injection="linear")
    with pytest.raises(UserError, match="injection='linear'"):
        export_gguf(looped, tmp_path / "model.gguf", unroll=2)
    with pytest.raises(UserError, match="GGUF has layers of"):
        export_gguf(looped, tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"does not end in \.gguf"):
        export_gguf(source, tmp_path / "model.bin")
    with pytest.raises(UserError, match="tokenizer='257 tokens': .* no vocabulary without merges"):
        export_gguf(plain(tmp_path / "bytes", num_tokens=257), tmp_path / "model.gguf")
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_a_tokenizer_without_merges_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = plain(tmp_path / "model")
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_merges", lambda *_: None)
    export_gguf(source, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="tokenizer.ggml.merges=None: is missing"):
        import_checkpoint(str(tmp_path / "model.gguf"), tmp_path / "back")


def test_files_that_are_not_read_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(UserError, match="is not a readable GGUF file"):
        import_checkpoint(str(tmp_path / "broken.gguf"), tmp_path / "out")
    for name, field, value in (("other", "general.architecture", "mamba"), ("more", "llama.expert_count", 8)):
        source = plain(tmp_path / "model", tokenizer=None)
        export_gguf(source, tmp_path / "whole.gguf", force=True)
        reader = gguf.GGUFReader(tmp_path / "whole.gguf")
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "mamba" if name == "other" else "llama")
        for known, about in reader.fields.items():
            if known.startswith("llama."):
                writer.add_key_value(known, about.contents(), about.types[0])
        if name == "more":
            writer.add_uint32(field, value)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=field):
            import_checkpoint(str(tmp_path / f"{name}.gguf"), tmp_path / "out")
