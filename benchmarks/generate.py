"""Tokens a second of the engine beside what people would use instead, on the same weights and cores.

    python -m benchmarks.generate llama --out docs/results/raw/generate-llama.json
    python -m benchmarks.generate huginn --reference FOLDER --out docs/results/raw/generate-huginn.json

Random weights, greedy, no end of text, so that every side does the same work: prompts of ``--prompt-tokens``,
then ``--num-tokens`` new ones each. Seconds are wall time of the whole call, prompts included; sides take
turns, and medians and the spread over rounds are reported. What a side cannot run is left out by name.

``engine``: serve/engine as ``rdlm serve`` builds it. ``transformers``: ``generate`` of its own class on the
model as ``rdlm export hf`` writes it. ``llama.cpp``: one ``llama_decode`` a step for all sequences (package
llama-cpp-python) on the GGUF that ``rdlm export gguf`` writes. ``reference``: ``generate_minimal`` of the
published Huginn code (raven_modeling_minimal.py and raven_config_minimal.py in FOLDER; it runs under
transformers 4.53). limit: the memory's speed, as the sum of a large buffer shows it, over the bytes of the
weights that a token reads.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.common import provenance, write_json
from rdlm.checkpoints import folder as checkpoint
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import train_tokenizer
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {
        "objective": {"name": "next_token"},
        "model": {"family": "llama", "num_layers": 8},
    },
    "huginn": {
        "objective": {"name": "onestep"},
        "model": {
            "family": "huginn", "num_prelude_layers": 2, "num_core_layers": 4, "num_coda_layers": 2,
            "state_init": "normal",
        },
        "recurrence": {"default_steps": 4, "max_steps": 32},
    },
}  # fmt: skip


SHARD_BYTES = 5_000_000_000


class Side(ABC):
    """One way of generating text."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def generate(self, prompts: Tensor, num_tokens: int, num_steps: int) -> list[list[int]]:
        """prompts [B, T] -> ids of the new tokens."""


class EngineSide(Side):
    """The engine, with a checkpoint loaded as a server loads it."""

    def __init__(self, name: str, engine: Engine) -> None:
        super().__init__(name)
        self.engine = engine

    def generate(self, prompts: Tensor, num_tokens: int, num_steps: int) -> list[list[int]]:
        greedy = SamplingParams(temperature=0)
        requests = [Request(tuple(p), StepBudget(num_steps), num_tokens, greedy) for p in prompts.tolist()]
        return [[int(event.token or 0) for event in events] for events in self.engine.generate(requests)]


class Transformers(Side):
    """transformers' generate."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        super().__init__("transformers")
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def generate(self, prompts: Tensor, num_tokens: int, num_steps: int) -> list[list[int]]:
        out = self.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=num_tokens,
            min_new_tokens=num_tokens, pad_token_id=0,
        )  # fmt: skip
        return out[:, prompts.shape[1] :].tolist()


class LlamaCpp(Side):
    """llama.cpp, all sequences in one batch."""

    def __init__(self, file: Path, threads: int, max_len: int, most: int) -> None:
        super().__init__("llama.cpp")
        import llama_cpp

        self.lib = llama_cpp
        self.log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = max_len * most, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = most, threads, threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def generate(self, prompts: Tensor, num_tokens: int, num_steps: int) -> list[list[int]]:
        lib, count = self.lib, len(prompts)
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        for number, prompt in enumerate(prompts.tolist()):  # a prompt at a time; the last token is left
            for first in range(0, len(prompt) - 1, 2048):
                part = prompt[:-1][first : first + 2048]
                self._decode([(token, first + i, number) for i, token in enumerate(part)], wanted=0)
        last, start = prompts[:, -1].tolist(), prompts.shape[1] - 1
        said: list[list[int]] = [[] for _ in range(count)]
        for step in range(num_tokens):
            self._decode([(token, start + step, i) for i, token in enumerate(last)], wanted=count)
            last = [self._argmax(i) for i in range(count)]
            for i, token in enumerate(last):
                said[i].append(token)
        return said

    def _decode(self, rows: list[tuple[int, int, int]], wanted: int) -> None:
        batch = self.lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, i < wanted
        status = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        assert status == 0, f"llama_decode ended with {status}"

    def _argmax(self, row: int) -> int:
        logits = self.lib.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())


class Reference(Side):
    """The published code of Huginn."""

    def __init__(self, code: Path, folder: Path, dtype: torch.dtype) -> None:
        super().__init__("reference")
        package = "huginn_reference"
        spec = importlib.util.spec_from_loader(package, None, is_package=True)
        assert spec is not None
        spec.submodule_search_locations = [str(code)]
        sys.modules[package] = importlib.util.module_from_spec(spec)
        sys.modules[package].__path__ = [str(code)]
        module = importlib.import_module(f"{package}.raven_modeling_minimal")
        config = importlib.import_module(f"{package}.raven_config_minimal").RavenConfig.from_pretrained(
            folder
        )
        module.RavenForCausalLM._tied_weights_keys = {}  # current transformers takes no list; tied below
        self.model = module.RavenForCausalLM(config)
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found |= load_file(file)
        missing, unexpected = self.model.load_state_dict(found, strict=False)
        assert not unexpected and all("lm_head" in name or "freqs" in name for name in missing), missing
        if config.tie_embeddings:
            self.model.lm_head.weight = self.model.transformer.wte.weight
        self.model.to(dtype).eval()

    @torch.inference_mode()
    def generate(self, prompts: Tensor, num_tokens: int, num_steps: int) -> list[list[int]]:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_length=prompts.shape[1] + num_tokens, do_sample=False, use_cache=True, eos_token_id=None,
            pad_token_id=0,
        )  # fmt: skip
        out = self.model.generate_minimal(prompts, config, num_steps=num_steps)
        return out[:, prompts.shape[1] :].tolist()


def memory_gb_per_s(threads: int) -> float:
    """Bytes read a second when a buffer far larger than the caches is summed, best of five."""
    buffer = torch.ones(64 << 20)
    best = min(_seconds(buffer.sum) for _ in range(5))
    return buffer.numel() * 4 / best / 1e9


def _seconds(call: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - began


@contextmanager
def sides(
    shape: str, dtype: str, quantised: bool, most: int, max_len: int, threads: int, reference: Path | None
) -> Iterator[tuple[list[Side], dict[str, str], CheckpointConfig]]:
    """The sides that can run here, why others cannot, and the model's config."""
    absent: dict[str, str] = {}
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, config = save_model(Path(scratch) / "model", shape, dtype, max_len)
        settings = EngineSettings(max_slots=most, dtype=dtype, prefix_cache="off")
        kinds = {
            "engine": settings,
            "engine, kernels torch": settings.model_copy(update={"kernels": "torch"}),
        }
        if quantised:
            for weights in ("int8", "int4"):
                kinds[f"engine, {weights}"] = settings.model_copy(update={"weights": weights})
        if shape == "huginn":
            kinds["engine, full cache"] = settings.model_copy(update={"kv_cache": "full"})
        found: list[Side] = []
        for name, one in kinds.items():
            engine = stack.enter_context(Engine(lambda one=one: load_served(folder, one)))  # type: ignore[misc]
            found.append(EngineSide(name, engine))
        peers = [("transformers", _transformers), ("llama.cpp", _llama_cpp)] if shape == "llama" else []
        if shape == "huginn":
            peers = [("reference", _reference)]
        for name, make in peers:
            try:
                found.append(make(Path(scratch), folder, dtype, threads, max_len, most, reference))
            except (ImportError, FileNotFoundError) as error:
                absent[name] = str(error)
        yield found, absent, config


def _transformers(scratch: Path, folder: Path, dtype: str, *_: Any) -> Side:
    from rdlm.checkpoints.convert.hf_export import export_hf

    export_hf(folder, scratch / "hf", shard_bytes=SHARD_BYTES)
    return Transformers(scratch / "hf", getattr(torch, dtype))


def _llama_cpp(
    scratch: Path, folder: Path, dtype: str, threads: int, max_len: int, most: int, *_: Any
) -> Side:
    import llama_cpp  # noqa: F401  (before the file is written)

    from rdlm.checkpoints.convert.gguf_file import export_gguf

    export_gguf(folder, scratch / "model.gguf")
    return LlamaCpp(scratch / "model.gguf", threads, max_len, most)


def _reference(scratch: Path, folder: Path, dtype: str, *rest: Any) -> Side:
    from rdlm.checkpoints.convert.huginn import export_huginn

    code = rest[-1]
    if code is None:
        raise FileNotFoundError("give --reference FOLDER, with the published modelling code")
    export_huginn(folder, scratch / "huginn", shard_bytes=SHARD_BYTES)
    return Reference(code, scratch / "huginn", getattr(torch, dtype))


def save_model(folder: Path, shape: str, dtype: str, max_len: int) -> tuple[Path, CheckpointConfig]:
    """A random checkpoint of width 512 with a vocabulary of 4096."""
    rng = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40_000, 6), generator=rng).tolist()
    texts = (" ".join(bytes(word).decode() for word in letters[i::100]) for i in range(100))
    tokenizer = train_tokenizer("bpe", texts, 4096)
    sizes = {"vocab_size": tokenizer.vocab_size, "d_model": 512, "num_heads": 8, "mlp_width": 1792}
    model = {**SHAPES[shape]["model"], **sizes, "max_seq_len": max_len}
    config = CheckpointConfig.model_validate({"name": f"random-{shape}", **SHAPES[shape], "model": model})
    network = build(config, seed=1).to(getattr(torch, dtype))
    checkpoint.save(folder, network, config, tokenizer)
    return folder, config


def bytes_per_token(config: CheckpointConfig, dtype: str, num_steps: int) -> int:
    """Of the weights that one token reads: those of the core ``num_steps`` times, the others once."""
    model = build(config, seed=1).model
    core = sum(p.numel() for part in (model.core_layers, getattr(model, "adapter", None)) if part is not None
               for p in part.parameters())  # fmt: skip
    every = sum(p.numel() for p in model.parameters())
    looked_up = 0 if model.lm_head is None else model.wte.weight.numel()
    return (every - looked_up + (num_steps - 1) * core) * torch.finfo(getattr(torch, dtype)).bits // 8


def main(
    shape: Annotated[str, typer.Argument(help="llama or huginn.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    reference: Annotated[Path | None, typer.Option(help="Folder of the published Huginn code.")] = None,
    dtypes: Annotated[str, typer.Option(help="Of weights, comma-separated.")] = "float32,bfloat16",
    batches: Annotated[str, typer.Option(help="Sequences at once.")] = "1,16",
    num_steps: Annotated[str, typer.Option(help="K of huginn.")] = "4,32",
    prompt_tokens: int = 16,
    num_tokens: int = 48,
    rounds: int = 3,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    only: Annotated[str, typer.Option(help="Sides to leave out all others, by semicolons.")] = "",
) -> None:
    """Measure, print, write."""
    torch.set_num_threads(threads)
    sizes = [int(n) for n in batches.split(",")]
    ks = [1] if shape == "llama" else [int(k) for k in num_steps.split(",")]
    rows: list[dict[str, Any]] = []
    bandwidth = memory_gb_per_s(threads)
    for dtype in dtypes.split(","):
        max_len = prompt_tokens + num_tokens + 1
        setting = sides(shape, dtype, dtype == "bfloat16", max(sizes), max_len, threads, reference)
        with setting as (every, absent, config), torch.no_grad():
            found = [side for side in every if not only or side.name in only.split(";")]
            for k in ks:
                for batch in sizes:
                    rng = torch.Generator().manual_seed(2)
                    prompts = torch.randint(5, 4000, (batch, prompt_tokens), generator=rng)
                    tokens = max(8, num_tokens // (1 if k < 8 else 4))
                    row = measure(found, prompts, tokens, k, rounds)
                    row |= {
                        "dtype": dtype,
                        "batch": batch,
                        "num_steps": k,
                        "absent": absent,
                    }
                    row["limit_at_batch_1"] = 1e9 * bandwidth / bytes_per_token(config, dtype, k)
                    rows.append(row)
                    print(describe(row), flush=True)
    versions = {}
    for name in ("torch", "transformers", "llama-cpp-python"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    facts = {"prompt_tokens": prompt_tokens, "num_tokens": num_tokens, "rounds": rounds, "threads": threads}
    write_json(
        out,
        {"provenance": provenance(), "shape": shape, "seed": 1, "versions": versions, **facts,
         "memory_gb_per_s": bandwidth, "rows": rows},
    )  # fmt: skip


def measure(found: list[Side], prompts: Tensor, tokens: int, k: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each side: median, least and most over the rounds, and the share of its tokens that
    are the engine's. processor_seconds: median of what all threads used, which a busy machine changes less."""
    seconds: dict[str, list[float]] = {side.name: [] for side in found}
    used: dict[str, list[float]] = {side.name: [] for side in found}
    said = {side.name: side.generate(prompts, tokens, k) for side in found}  # and warm
    for _ in range(rounds):
        for side in found:
            before = time.process_time()
            seconds[side.name].append(_seconds(side.generate, prompts, tokens, k))
            used[side.name].append(time.process_time() - before)
    count, first = len(prompts) * tokens, said[found[0].name]
    rates = {
        name: {
            "median": count / statistics.median(s), "least": count / max(s), "most": count / min(s),
            "equal_tokens": float(np.mean(np.array(said[name]) == np.array(first))),
        }
        for name, s in seconds.items()
    }  # fmt: skip
    processor = {name: statistics.median(s) for name, s in used.items()}
    return {"tokens_per_s": rates, "seconds": seconds, "processor_seconds": processor, "new_tokens": tokens}


def describe(row: dict[str, Any]) -> str:
    rates = row["tokens_per_s"]
    own = rates["engine"]["median"]
    parts = [f"{n} {r['median']:.1f} [{r['least']:.1f}, {r['most']:.1f}]" for n, r in rates.items()]
    ratios = [f"{own / r['median']:.2f}x {n}" for n, r in rates.items() if not n.startswith("engine")]
    return (
        f"{row['dtype']}, batch {row['batch']}, K {row['num_steps']}: {'; '.join(parts)}. Engine: "
        f"{', '.join(ratios)}"
    )


if __name__ == "__main__":
    typer.run(main)
