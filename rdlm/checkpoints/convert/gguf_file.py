"""GGUF files of plain decoders, read and written through the ``gguf`` package: as a source, the file looks
like a folder in transformers' layout.

Format and names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file holds metadata (shape and
tokenizer) and tensors, some in blocks of a few bits; those are dequantised to fp32 row by row. Of a ``llama``
file queries and keys are stored for rotated adjacent pairs, of the other architectures for split halves.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from rdlm.atomic import check_out_file, sync
from rdlm.checkpoints import safetensors_io as tensors
from rdlm.checkpoints.convert import decoder
from rdlm.checkpoints.convert.base import adjacent_pairs, check_source, progress_bar, split_halves
from rdlm.checkpoints.convert.unroll import read_checkpoint
from rdlm.checkpoints.safetensors_io import Entry
from rdlm.config.model import LinearScaling, Llama3Scaling, RecurrentConfig, RopeScaling, YarnScaling
from rdlm.data.tokenizer import BytePairTokenizer, SentencePieceTokenizer, Tokenizer
from rdlm.errors import UserError, reason
from rdlm.nn.attention import rotary_frequencies

SUFFIX = ".gguf"
ROWS = 4096
"""Rows of a matrix that are dequantised at a time."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Values of ``tokenizer.ggml.token_type``; those of sentencepiece too."""
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "olmo2": "olmo2"}
"""``general.architecture`` -> ``model_type`` of transformers. Mistral is a llama."""
SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Field of the metadata, behind the architecture's name -> field of transformers' config."""
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INSIDE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {
    "pre": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "post": {
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
"""Names of a layer's tensors: theirs -> transformers'."""
FREQUENCIES = "rope_freqs.weight"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How the tokenizers of GPT-4 and its successors cut text into words; %s: digits of a number."""
UNUSED_WORD = re.compile(r"\[PAD\d+\]")
"""How rows of a padded vocabulary are called that the tokenizer does not have."""


def find(source: str) -> Path | None:
    """The GGUF file that SOURCE is or holds; None for a folder in another layout, or no path at all. UserError
    for a folder of several."""
    path = Path(source)
    if path.is_file() and path.suffix == SUFFIX:
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        problem = f"holds {len(files)} GGUF files"
        raise UserError("SOURCE", source, problem, f"name one of them, for instance {files[0]}")
    return files[0] if files else None


class GgufFile:
    """A GGUF file as the importer of plain decoders reads a folder: ``data`` (config.json), ``entries``
    (tensors) and ``tokenizer``. UserError where it is damaged, or of another architecture."""

    def __init__(self, file: Path) -> None:
        import gguf  # half a second, and only these files need it

        self.file = file
        try:
            self._reader = gguf.GGUFReader(file)
            self.fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except Exception as error:  # the library raises ValueError, IndexError and numpy's own exceptions
            problem = f"is not a readable GGUF file ({reason(error)})"
            raise UserError("SOURCE", str(file), problem, "download it again") from None
        self.architecture = str(self.fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            problem = f"only {', '.join(ARCHITECTURES)} are read"
            raise self._refused("general.architecture", self.architecture, problem)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.data = self._config()
        self.entries = self._entries()

    def _refused(self, field: str, value: object, problem: str) -> UserError:
        return UserError(f"{self.file}: {field}", value, problem, "import another model")

    def _config(self) -> dict[str, Any]:
        """``config.json`` as transformers would write it. UserError for a field that says something else is
        computed."""
        own = {
            name.removeprefix(f"{self.architecture}."): value
            for name, value in self.fields.items()
            if name.startswith(f"{self.architecture}.")
        }
        data: dict[str, Any] = {"model_type": ARCHITECTURES[self.architecture]}
        for field, theirs in SIZES.items():
            value = own.pop(field, None)
            if value is not None:
                data[theirs] = _shortest(value) if isinstance(value, float) else value
        for field in ("embedding_length", "block_count", "attention.head_count", "context_length"):
            if SIZES[field] not in data:
                raise self._refused(f"{self.architecture}.{field}", None, "is missing")
        data.setdefault("num_key_value_heads", data["num_attention_heads"])
        head_dim = data.setdefault("head_dim", data["hidden_size"] // data["num_attention_heads"])
        for field, expected in (("rope.dimension_count", head_dim), ("attention.value_length", head_dim)):
            if own.pop(field, expected) != expected:
                problem = f"only heads whose {head_dim} dimensions are all used are read"
                raise self._refused(f"{self.architecture}.{field}", "...", problem)
        if "token_embd.weight" not in self._tensors:
            raise UserError(f"{self.file}: weight", "token_embd.weight", "is missing", "download it again")
        data["vocab_size"] = int(self._tensors["token_embd.weight"].shape[1])
        data["tie_word_embeddings"] = "output.weight" not in self._tensors
        own.pop("vocab_size", None)
        data["rope_scaling"] = self._scaling(own)
        data["attention_bias"] = "blk.0.attn_output.bias" in self._tensors
        data["mlp_bias"] = "blk.0.ffn_up.bias" in self._tensors
        for field, value in own.items():
            if value and value not in ("none", data["vocab_size"]):
                raise self._refused(f"{self.architecture}.{field}", value, "is not known here")
        if FREQUENCIES in self._tensors:
            data["rope_scaling"] = self._llama3(head_dim, data.get("rope_theta", 10_000.0))
        return data

    def _scaling(self, own: dict[str, Any]) -> dict[str, Any] | None:
        """``rope_scaling`` of the fields that say so, which are taken from ``own``."""
        kind, factor = own.pop("rope.scaling.type", "none"), own.pop("rope.scaling.factor", 1.0)
        original = own.pop("rope.scaling.original_context_length", None)
        own.pop("rope.scaling.finetuned", None)  # whether it was trained with it
        if kind == "none":
            return None
        if kind not in ("linear", "yarn"):
            raise self._refused(
                f"{self.architecture}.rope.scaling.type", kind, "only linear and yarn are read"
            )
        fields = {"rope_type": kind, "factor": _shortest(factor)}
        return fields | ({"original_max_position_embeddings": original} if kind == "yarn" else {})

    def _llama3(self, head_dim: int, base: float) -> dict[str, Any]:
        """``rope_scaling``; the file has each frequency's divisor, of which this is the only known law."""
        divisors = torch.from_numpy(np.array(self._tensors[FREQUENCIES].data, dtype=np.float32))
        factor = float(divisors.max())
        scaling = Llama3Scaling(
            factor=factor, low_freq_factor=1, high_freq_factor=4, original_max_seq_len=8192
        )
        expected = rotary_frequencies(head_dim, base) / rotary_frequencies(head_dim, base, scaling)
        if divisors.shape != expected.shape or not torch.allclose(divisors, expected.float(), rtol=1e-4):
            raise self._refused(FREQUENCIES, "...", "is not the slowing of Llama 3.1")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1,
            "high_freq_factor": 4,
            "original_max_position_embeddings": 8192,
        }

    def _entries(self) -> dict[str, Entry]:
        found = {}
        for name, tensor in self._tensors.items():
            if name == FREQUENCIES:
                continue
            entry, layer = self._entry(tensor), re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
            if layer is None:
                found[OUTSIDE.get(name, name)] = entry
                continue
            number, part, kind = layer.groups()
            if self.architecture == "llama" and part in ("attn_q", "attn_k"):
                entry = split_halves(entry, self.data["head_dim"])
            norms = NORMS["post" if self.architecture == "olmo2" else "pre"]
            theirs = {**INSIDE, **norms}.get(part)
            found[name if theirs is None else f"model.layers.{number}.{theirs}.{kind}"] = entry
        return found

    def _entry(self, tensor: Any) -> Entry:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        kind, data = tensor.tensor_type.name, tensor.data
        if kind in tensors.DTYPES:
            return Entry(kind, shape, data.nbytes, lambda: iter([data.tobytes()]))
        size = 4 * int(np.prod(shape))
        return Entry("F32", shape, size, partial(self._dequantised, data, tensor.tensor_type))

    def _dequantised(self, data: Any, kind: Any) -> Iterator[bytes]:
        from gguf.quants import dequantize

        try:
            for start in range(0, len(data), ROWS):
                yield dequantize(data[start : start + ROWS], kind).astype(np.float32).tobytes()
        except NotImplementedError:
            raise self._refused("tensor type", kind.name, "the gguf package cannot dequantise it") from None

    @property
    def notes(self) -> list[str]:
        """What was dequantised, for the model card."""
        kinds = Counter(tensor.tensor_type.name for tensor in self._tensors.values())
        quantised = [f"{count} of {kind}" for kind, count in kinds.items() if kind not in tensors.DTYPES]
        return [f"Quantised tensors were turned into fp32: {', '.join(quantised)}."] * bool(quantised)

    @property
    def generation(self) -> dict[str, Any]:
        """``generation_config.json``: every id that ends a text."""
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        ends = [i for name in names if (i := self.fields.get(f"tokenizer.ggml.{name}")) is not None]
        return {
            "bos_token_id": self.fields.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": sorted(set(ends)) or None,
        }

    def tokenizer(self) -> Tokenizer | None:
        """None where the file has none. UserError for a kind that is not built here."""
        about = {
            name.removeprefix("tokenizer.ggml."): value
            for name, value in self.fields.items()
            if name.startswith("tokenizer.ggml.")
        }
        if about.get("model") in (None, "none", "no_vocab"):
            return None
        about["token_type"] = about.get("token_type") or [NORMAL] * len(about["tokens"])
        padding = 0
        for word, kind in zip(reversed(about["tokens"]), reversed(about["token_type"]), strict=True):
            if kind != UNUSED or not UNUSED_WORD.fullmatch(word):
                break
            padding += 1
        for name in ("tokens", "token_type", "scores"):
            if name in about:
                about[name] = about[name][: len(about[name]) - padding]
        words = about["tokens"]
        config: dict[str, Any] = {
            "add_bos_token": bool(about.get("add_bos_token", about["model"] == "llama"))
        }
        for name in ("bos", "eos"):
            if (number := about.get(f"{name}_token_id")) is not None:
                config[f"{name}_token"] = words[number]
        config["chat_template"] = self.fields.get("tokenizer.chat_template")
        match about["model"]:
            case "gpt2":
                return BytePairTokenizer(self._byte_pairs(about), config)
            case "llama":
                return SentencePieceTokenizer(_sentence_pieces(about), config)
        raise self._refused("tokenizer.ggml.model", about["model"], "only gpt2 and llama are read")

    def _byte_pairs(self, about: Mapping[str, Any]) -> bytes:
        """tokenizer.json of a byte-level BPE."""
        pre = about.get("pre", "default")
        if pre not in SPLITS:
            raise self._refused("tokenizer.ggml.pre", pre, f"only {', '.join(SPLITS)} are read")
        if "merges" not in about:
            raise self._refused("tokenizer.ggml.merges", None, "is missing")
        words, kinds = about["tokens"], about["token_type"]
        built = tokenizers.Tokenizer(
            models.BPE(
                vocab={word: i for i, word in enumerate(words)},
                merges=[tuple(pair.split(" ")) for pair in about["merges"]],
                ignore_merges=pre in IGNORES_MERGES,
            )
        )
        if pre in NORMALISED:
            built.normalizer = normalizers.NFC()
        built.pre_tokenizer, built.decoder = SPLITS[pre](), decoders.ByteLevel()
        for kind in (CONTROL, USER_DEFINED):
            added = [
                AddedToken(word, special=kind == CONTROL, normalized=False)
                for word, own in zip(words, kinds, strict=True)
                if own == kind
            ]
            (built.add_special_tokens if kind == CONTROL else built.add_tokens)(added)
        return built.to_str().encode()


def _digits_apart() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _gpt4(number: str) -> Any:
    split = pre_tokenizers.Split(Regex(GPT4 % number), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS: dict[str, Callable[[], Any]] = {
    "gpt-2": _gpt2,
    "olmo": _gpt2,
    "smollm": _digits_apart,
    "starcoder": _digits_apart,
    "llama-bpe": partial(_gpt4, r"\p{N}{1,3}"),
    "dbrx": partial(_gpt4, r"\p{N}{1,3}"),
    "qwen2": partial(_gpt4, r"\p{N}"),
    "deepseek-r1-qwen": partial(_gpt4, r"\p{N}"),
}
"""``tokenizer.ggml.pre`` -> how text is cut into words (llama.cpp, llama-vocab.cpp)."""
IGNORES_MERGES, NORMALISED = {"llama-bpe"}, {"qwen2", "deepseek-r1-qwen"}
"""Where a word of the vocabulary is taken whole; where text is first normalised to NFC, as the published
tokenizers do."""


def _sentence_pieces(about: Mapping[str, Any]) -> bytes:
    """tokenizer.model of a sentencepiece BPE."""
    model = _model_proto()
    kinds = about["token_type"]
    for word, score, kind in zip(about["tokens"], about["scores"], kinds, strict=True):
        model.pieces.add(piece=word, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.BPE, len(kinds)
    trainer.byte_fallback = BYTE in kinds
    for name in ("bos", "eos", "pad"):
        setattr(trainer, f"{name}_id", about.get(f"{name}_token_id", -1))
        if (number := about.get(f"{name}_token_id")) is not None:
            setattr(trainer, f"{name}_piece", about["tokens"][number])
    trainer.unk_id = about.get("unknown_token_id", 0)
    trainer.unk_piece = about["tokens"][trainer.unk_id]
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(about.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = bool(about.get("remove_extra_whitespaces", False))
    normalizer.escape_whitespaces = True
    return cast(bytes, model.SerializeToString())


def _model_proto() -> Any:
    """An empty tokenizer.model."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]


def export_gguf(folder: Path, out: Path, *, unroll: int | None = None, force: bool = False) -> str:
    """Write the GGUF file ``out`` from a checkpoint folder -> its architecture. unroll: the K at which a
    looped model's layers are written one behind the other. Vectors are fp32, as ggml wants them; matrices keep
    their dtype. UserError, before anything is written, where GGUF has no form for the model."""
    import gguf

    if out.suffix != SUFFIX:
        raise UserError("OUT", str(out), f"does not end in {SUFFIX}", f"name it for instance {out}{SUFFIX}")
    check_source(out, folder)
    check_out_file(out, "OUT", force)
    config, found, tokenizer = read_checkpoint(folder, unroll, "`rdlm export gguf`")
    kind = decoder.kind_of(config)
    if kind is None:
        problem = f"GGUF has layers of {', '.join(decoder.KINDS)} only, and this model has others"
        raise UserError("checkpoint", config.name, problem, "use `rdlm export hf`, or --unroll K for a loop")
    architecture = {"mistral": "llama"}.get(kind, kind)
    model = cast(RecurrentConfig, config.model.layout())  # type: ignore[union-attr]
    _check_layer(model, architecture)
    entries = _named_for_gguf(decoder.published_weights(found, model), architecture, model)
    temporary = out.with_name(f".{out.name}.partial")
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_name(config.name)
    _write_shape(writer, model)
    if tokenizer is not None:
        _write_tokenizer(writer, tokenizer, model.vocab_size)
    scaling = model.layer.rope.scaling  # type: ignore[union-attr]
    if isinstance(scaling, Llama3Scaling):
        head_dim, base = model.layer.head_width(model.d_model), model.layer.rope.base  # type: ignore[union-attr]
        divisors = rotary_frequencies(head_dim, base) / rotary_frequencies(head_dim, base, scaling)
        entries = {FREQUENCIES: tensors.entry_of(divisors), **entries}
    kinds = {
        name: gguf.GGMLQuantizationType[entry.dtype if len(entry.shape) > 1 else "F32"]
        for name, entry in entries.items()
    }
    for name, entry in entries.items():
        width = gguf.GGML_QUANT_SIZES[kinds[name]][1]
        shape = (*entry.shape[:-1], entry.shape[-1] * width)  # in bytes, as of quantised ones
        size = width * math.prod(entry.shape)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), size, raw_dtype=kinds[name])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress_bar(entries, "export") as bar:
            for name, entry in entries.items():
                value = tensors.to_tensor(entry)
                value = value.float() if kinds[name].name == "F32" else value
                writer.write_tensor_data(np.frombuffer(tensors.to_bytes(value), dtype=np.uint8))
                bar.update(entry.size)
        writer.close()
        sync(temporary)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return architecture


def _check_layer(model: RecurrentConfig, architecture: str) -> None:
    """UserError for settings of a layer that engines of GGUF files do not compute."""
    layer = model.layer
    remedy = "use `rdlm export hf`"
    if layer.bias == "qkvo" and architecture != "llama":
        problem = f"GGUF's {architecture} layers have no bias behind attention"
        raise UserError("model.layer.bias", layer.bias, problem, remedy)
    scaling = None if layer.rope is None else layer.rope.scaling
    if isinstance(scaling, YarnScaling) and scaling != _yarn_of_gguf(scaling):
        problem = "GGUF has YaRN with its usual settings only"
        raise UserError("model.layer.rope.scaling", scaling.model_dump(), problem, remedy)


def _yarn_of_gguf(scaling: YarnScaling) -> YarnScaling:
    """What its factor and original length mean in a GGUF file."""
    size = 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    return YarnScaling(
        factor=scaling.factor, original_max_seq_len=scaling.original_max_seq_len, attention_factor=size
    )


def _write_scaling(writer: Any, scaling: RopeScaling | None) -> None:
    import gguf

    if isinstance(scaling, LinearScaling | YarnScaling):
        kind = gguf.RopeScalingType
        writer.add_rope_scaling_type(kind.LINEAR if isinstance(scaling, LinearScaling) else kind.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
    if isinstance(scaling, YarnScaling):
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_seq_len)


def _named_for_gguf(
    published: Mapping[str, Entry], architecture: str, model: RecurrentConfig
) -> dict[str, Entry]:
    """Transformers' tensors under ggml's names: the inverse of ``GgufFile._entries``."""
    outside = {theirs: name for name, theirs in OUTSIDE.items()}
    norms = NORMS["post" if architecture == "olmo2" else "pre"]
    inside = {theirs: name for name, theirs in {**INSIDE, **norms}.items()}
    found = {}
    for name, entry in published.items():
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer is None:
            found[outside[name]] = entry
            continue
        number, part, kind = layer.groups()
        if architecture == "llama" and inside[part] in ("attn_q", "attn_k"):
            entry = adjacent_pairs(entry, model.layer.head_width(model.d_model))
        found[f"blk.{number}.{inside[part]}.{kind}"] = entry
    return found


def _write_shape(writer: Any, model: RecurrentConfig) -> None:
    layer, head_dim = model.layer, model.layer.head_width(model.d_model)
    assert layer.rope is not None
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(layer.mlp_width)
    writer.add_head_count(layer.num_heads)
    writer.add_head_count_kv(layer.num_kv_heads or layer.num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(layer.rope.base)
    writer.add_layer_norm_rms_eps(layer.norm_eps)
    writer.add_vocab_size(model.vocab_size)
    _write_scaling(writer, layer.rope.scaling)


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """UserError for a tokenizer that GGUF has no name for."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = _model_proto()
        model.ParseFromString(tokenizer.source)
        if model.trainer_spec.model_type != model.trainer_spec.BPE:
            problem = "only sentencepiece models of type BPE have a form in GGUF"
            raise UserError("tokenizer", "tokenizer.model", problem, "use `rdlm export hf`")
        words = [piece.piece for piece in model.pieces]
        kinds = [piece.type for piece in model.pieces]
        scores = [piece.score for piece in model.pieces]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
        writer.add_unk_token_id(max(model.trainer_spec.unk_id, 0))
        writer.add_token_scores(scores + [0.0] * (vocab_size - len(words)))
    else:
        assert isinstance(tokenizer, BytePairTokenizer)
        document = json.loads(tokenizer.source)
        added = {token["id"]: token for token in document["added_tokens"]}
        names = {i: word for word, i in document["model"]["vocab"].items()}
        names |= {i: token["content"] for i, token in added.items()}
        words = [names.get(i, f"[PAD{i}]") for i in range(tokenizer.vocab_size)]
        kinds = [NORMAL if i in names else UNUSED for i in range(len(words))]
        special = set(tokenizer.special_tokens.values())
        for i in added:
            kinds[i] = CONTROL if i in special else USER_DEFINED
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in document["model"]["merges"]]
        if not merges:
            problem = "llama.cpp reads no vocabulary without merges, such as one of single bytes"
            raise UserError("tokenizer", f"{tokenizer.vocab_size} tokens", problem, "use `rdlm export hf`")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_of(document))
        writer.add_token_merges(merges)
    padding = range(len(words), vocab_size)
    writer.add_token_list(words + [f"[PAD{i}]" for i in padding])
    writer.add_token_types(kinds + [UNUSED] * len(padding))
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(bool(tokenizer.start))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _pre_of(document: Mapping[str, Any]) -> str:
    """``tokenizer.ggml.pre`` of a tokenizer.json. UserError where none cuts text as it does."""
    model, normalizer = document["model"], document.get("normalizer")
    for name, split in SPLITS.items():
        like = tokenizers.Tokenizer(models.BPE())
        like.pre_tokenizer = split()
        same = _without_offsets(json.loads(like.to_str())["pre_tokenizer"]) == _without_offsets(
            document["pre_tokenizer"]
        )
        same &= bool(model.get("ignore_merges")) == (name in IGNORES_MERGES)
        if same and (normalizer == {"type": "NFC"} if name in NORMALISED else normalizer is None):
            return name
    problem = "GGUF has no name for the way it splits text into words, or normalises it"
    raise UserError("tokenizer", "pre_tokenizer", problem, "use `rdlm export hf`")


def _without_offsets(value: Any) -> Any:
    """A pre-tokenizer's settings without what changes no id."""
    if isinstance(value, list):
        return [_without_offsets(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return value


def _shortest(value: float) -> float:
    """The shortest decimal that is this fp32 number: 9.999999747378752e-06 was 1e-05."""
    return float(str(np.float32(value)))
