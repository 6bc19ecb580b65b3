"""Every family of published models: parity with its reference, round trips, memory and work by K.

    python -m benchmarks.zoo --golden ../shared/golden --out docs/results/raw/zoo.json
    python -m benchmarks.zoo --golden ../shared/golden --out zoo.json --speed  # also tokens/s by K, idle machine

Golden sets are small random checkpoints in the published layouts and what the reference implementations computed
from them in fp32. Figures of memory and work are those of the published sizes, from their configs. A run that was
interrupted goes on behind the last golden set that it finished, as long as the commit is the same.
"""

from __future__ import annotations

import re
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

import rdlm
from benchmarks.common import provenance, read_json, write_json
from benchmarks.published_models import MODELS, published_config
from rdlm.checkpoints import folder
from rdlm.checkpoints.convert.hf_export import export_hf
from rdlm.checkpoints.convert.huginn import export_huginn
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.checkpoints.convert.published import export_published
from rdlm.data.tokenizer import Tokenizer, train_tokenizer
from rdlm.errors import UserError
from rdlm.flops import costs_of
from rdlm.inference import Model
from rdlm.objectives import Objective
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import Engine
from serve.engine.sequence import Request, StepBudget
from serve.loading import load_served
from serve.settings import EngineSettings

REFERENCES = {
    "huginn": "seal-rg/recurrent-pretraining 59e0b69, transformers 4.53.3",
    "ouro": "LoopedLMs/ouro_rl 531187b, transformers 4.57.6",
    "retro_llama": "LoopedLMs/retrofitting-recurrence 3797ded, transformers 4.51.0",
    "retro_olmo": "LoopedLMs/retrofitting-recurrence 3797ded, transformers 4.51.0",
    "parcae": "sandyresearch/parcae dee8363",
    "ifm_p2": "ifm-ai/xllm-loop 3af99f4, re-typed",
    "ifm_p2_orthoinj": "ifm-ai/xllm-loop 3af99f4, re-typed",
    "ifm_p2_linear": "ifm-ai/xllm-loop 3af99f4, re-typed",
    "nanbeige": "layers of transformers 4.51.0 in the published loop, composed",
    "loopformer": "armenjeddi/loopformer 706c125",
    "loopus": "Thrillcrazyer/LoopUS 349669d, transformers 4.57.6",
    "hrm_text": "transformers 5.24.0",
}
"""Golden set -> what computed it (README of the golden sets)."""
LAYOUTS = {"huginn": "huginn", "ouro": "ouro", "retro_llama": "retrofit", "retro_olmo": "retrofit"}
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"logits_K(\d+)", {}),
    (r"logits_zero_init_K(\d+)", {"zero_state": True}),
    (r"logits_given_state_K(\d+)", {"states": "input_states"}),
    (r"logits_causal_H(\d+)_L3", {}),
    (r"logits_prefix_H(\d+)_L3", {"token_type_ids": "token_type_ids"}),
)
"""Names of golden logits -> what the model was given."""
SHARD = 1 << 40


def parity(model: Model, expected: dict[str, Tensor]) -> dict[str, float]:
    """Golden logits -> largest absolute difference at each."""
    found = {}
    for pattern, given in KINDS:
        named = {int(match[1]): name for name in expected if (match := re.fullmatch(pattern, name))}
        if not named:
            continue
        options = {key: expected[value] if isinstance(value, str) else value for key, value in given.items()}
        logits = model.logits(expected["input_ids"], list(named), **options)
        found |= {name: (logits[k] - expected[name]).abs().max().item() for k, name in named.items()}
    if "gate_lambda_K4" in expected:
        states = model.states(expected["input_ids"], [1, 2, 3, 4])
        gates = torch.stack([model.gate(states[k]) for k in (1, 2, 3, 4)], -1)
        found["gate_lambda_K4"] = (gates - expected["gate_lambda_K4"]).abs().max().item()
    if "halt_prob_last_position" in expected:
        wanted = expected["halt_prob_last_position"]
        states = model.states(expected["input_ids"], list(range(1, wanted.shape[1] + 1)))
        halts = torch.stack([model.gate(state[:, -1]) for state in states.values()], -1)
        found["halt_prob_last_position"] = (halts - wanted).abs().max().item()
    return found


def round_trips(family: str, golden: Path, ours: Path, scratch: Path) -> dict[str, str]:
    """Layout -> whether what goes out comes in again with the same bits, and equals its source."""
    found = {}
    for layout in ("hf", *([LAYOUTS[family]] if family in LAYOUTS else [])):
        out = scratch / layout
        try:
            if layout == "hf":
                export_hf(ours, out, shard_bytes=SHARD)
            elif layout == "huginn":
                export_huginn(ours, out, shard_bytes=SHARD)
            else:
                export_published(layout, ours, out, shard_bytes=SHARD)
        except UserError as error:
            found[layout] = f"refused: {error.problem}"
            continue
        back = import_checkpoint(str(out), scratch / f"{layout}-back", name="zoo")
        same = _same(load_file(ours / folder.WEIGHTS), load_file(back / folder.WEIGHTS))
        same &= folder.load_config(back) == folder.load_config(ours)
        found[layout] = "bit-equal" if same else "differs"
        if layout != "hf":
            source, made = load_file(golden / "model.safetensors"), load_file(out / "model.safetensors")
            shared = source.keys() & made.keys() - {"freqs_cis"}
            same = _same({n: source[n] for n in shared}, {n: made[n] for n in shared})
            found[layout] += ", tensors of the source" if same else ", other tensors than the source"
    return found


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def cache_bytes(objective: Objective, num_steps: int) -> dict[str, int]:
    """Bytes of keys and values per token in bf16, by policy."""
    model = objective.model
    entry, core = 2 * 2 * model.num_kv_heads * model.head_dim, len(model.core_cache_layers)
    once = model.num_cache_layers - core
    last = entry * (once + core)
    return {"shared": last, "first": last, "full": entry * (once + num_steps * core)}


def work(objective: Objective, num_steps: int) -> int:
    """FLOPs of one token, attention scores aside."""
    costs = costs_of(objective)
    return costs.encode.weights + costs.decode.weights + costs.head + num_steps * costs.core.weights


def speeds_of(checkpoint: Path, ks: list[int]) -> dict[int, float]:
    """Tokens/s of the server's engine: 8 prompts of 16 ids, 24 tokens each, after a warm-up, by K."""
    most = min(max(ks), folder.load_config(checkpoint).max_steps)
    settings = EngineSettings(max_slots=8, max_len=48, max_steps=most, default_steps=most, prefix_cache="off")
    prompts = torch.randint(3, 300, (8, 16), generator=torch.Generator().manual_seed(0)).tolist()
    found = {}
    with Engine(lambda: load_served(checkpoint, settings)) as engine:
        for k in [k for k in ks if k <= most]:
            for max_tokens in (4, 24):
                began = time.perf_counter()
                engine.generate(
                    [
                        Request(tuple(p), StepBudget(k), max_tokens, SamplingParams(temperature=0))
                        for p in prompts
                    ]
                )
                found[k] = 8 * max_tokens / (time.perf_counter() - began)
    return found


def measure_family(
    family: str, reference: str, golden: Path, tokenizer: Tokenizer, ks: list[int]
) -> dict[str, Any]:
    """ks: of tokens/s; empty leaves them out."""
    with tempfile.TemporaryDirectory() as name:
        scratch, source = Path(name), golden / f"{family}_tiny"
        ours = import_checkpoint(str(source), scratch / "ours", name="zoo")
        differences = parity(rdlm.load(ours), load_file(source / "outputs.safetensors"))
        found = {
            "reference": reference,
            "differences": differences,
            "largest": max(differences.values()),
            "round_trips": round_trips(family, source, ours, scratch),
        }
        if ks:
            tokenizer.save(ours / folder.TOKENIZER)
            found["tokens_per_s"] = speeds_of(ours, ks)
        return found


def main(
    golden: Annotated[Path, typer.Option(help="Folder of the golden sets.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    steps: Annotated[str, typer.Option(help="K of memory, work and speed, by commas.")] = "1,2,4,8",
    speeds: Annotated[
        bool, typer.Option("--speed", help="Tokens/s of the golden models and of --checkpoint.")
    ] = False,
    checkpoint: Annotated[
        list[Path] | None, typer.Option(help="With --speed: a checkpoint to measure too.")
    ] = None,
) -> None:
    """Measure every golden set, and count for every published model."""
    ks, families, published = [int(k) for k in steps.split(",")], {}, {}
    words = [" ".join(f"{a}{b}{c}" for a in "abcdefg" for b in "hijk" for c in "lmnop")]
    tokenizer = train_tokenizer("bpe", iter(words), 300)
    about, partial = provenance(), out.with_name(f"{out.name}.partial")
    before = read_json(partial) if partial.is_file() else {}
    if before.get("run") == [about["git_commit"], ks, speeds]:
        families = before["families"]
    for family, reference in REFERENCES.items():
        if family not in families:
            families[family] = measure_family(family, reference, golden, tokenizer, ks if speeds else [])
            write_json(partial, {"run": [about["git_commit"], ks, speeds], "families": families})
            print(family, families[family].get("tokens_per_s", ""), flush=True)
    for name in MODELS:
        config = published_config(name, golden)
        objective = build(config, device="meta")
        published[name] = {
            "parameters": sum(p.numel() for p in objective.parameters()),
            "trained_steps": config.trained_steps,
            "cache_bytes": {k: cache_bytes(objective, k) for k in ks},
            "flops": {k: work(objective, k) for k in ks},
        }
    measured = {}
    for path in checkpoint or [] if speeds else []:
        measured[folder.load_config(path).name] = {"tokens_per_s": speeds_of(path, ks)}
    found = {"families": families, "published": published, "checkpoints": measured}
    write_json(out, {**found, "provenance": about})
    partial.unlink()


if __name__ == "__main__":
    typer.run(main)
