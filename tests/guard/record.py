"""Records what the code computes, so that it can be compared after every step of a refactoring, bit for bit.

    python tests/guard/record.py OUT.json [--only updates,scores] [--adapter ADAPTER.py]
    python tests/guard/record.py --compare OLD.json NEW.json
    python tests/guard/record.py --fixtures FOLDER

Everything runs on a CPU in fp32 with fixed seeds and tiny shapes. All imports from rdlm are in adapter.py, so
the same file records another version of the code with another adapter, started in that version's folder with
that folder as PYTHONPATH.

A tensor is recorded as the hash of its bytes, its shape, and up to 16 of its values. Hashes are equal on one
machine with one build of torch; values are compared with a tolerance where the CPU is another one. Section
``runs`` starts training processes and takes minutes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # no `tests.guard`: this file also records versions of rdlm that have none

from guard_cases import (  # noqa: E402
    BLOCKS,
    BRIDGES,
    CHECKPOINTS,
    FROM_FOLDER,
    GREEDY,
    KS,
    MODELS,
    ORDERS,
    PLANNED,
    RECOMPUTED,
    RUN,
    SERVED_CHECKPOINT,
    SERVED_DOCUMENT,
    TEXTS,
    Document,
    ask,
    batch,
    case,
    inputs_of,
    is_image,
    serving,
)
from guard_values import compare, differences, dump, lists_as_numbers, numbers, weights_hash  # noqa: E402


def load_adapter(path: Path = HERE / "adapter.py") -> Any:
    """The module that knows where things are in the version of rdlm that is on the path."""
    spec = importlib.util.spec_from_file_location("guard_adapter", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def loud(guard: Any, model: Any, scale: float = 0.6) -> Any:
    """The model with noise on every weight: what starts silent, or at zero, would hide mistakes. By names,
    not by order.

    Tables of tokens get twice as much. More on layers that iterate would make them chaotic: rounding errors
    would grow with every step.
    """
    with torch.no_grad():
        for name, weight in guard.weights(model).items():
            rng = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            table = name.endswith(("wte.weight", "lm_head.weight"))
            size = 0.1 if weight.ndim < 2 else scale * (1 + table) / math.sqrt(weight.shape[-1])
            weight.add_(size * torch.randn(weight.shape, generator=rng))
    return model


# Sections ---------------------------------------------------------------------------------------------------


def updates(guard: Any) -> Document:
    """Losses and gradient norms of ten updates with AdamW, of every block."""
    found: Document = {"objectives": guard.objectives(), "drawn blocks": guard.drawn_blocks(3, 12, 7)}
    for name, document in MODELS.items():
        found[name] = _updates(guard, document)
    for name in RECOMPUTED:
        found[f"{name}, recomputed"] = _updates(guard, MODELS[name], recompute=True)
    found["huginn single_pass, another process and micro-batch"] = _updates(
        guard, MODELS["huginn single_pass"], {"rank": 1, "micro": 2}
    )
    return found


def _updates(
    guard: Any, document: Document, keys: Document | None = None, recompute: bool = False
) -> Document:
    torch.manual_seed(0)
    model = guard.build(document, 3)
    found: Document = {"initial weights": weights_hash(guard.weights(model))}
    loud(guard, model)
    for number, part in enumerate(guard.parts(model)):
        if recompute:
            guard.recompute(part)
        # A large eps: gradients that are zero in exact arithmetic (biases of keys) are rounding errors, which
        # Adam would blow up.
        optimizer = torch.optim.AdamW(guard.parameters(part), lr=1e-3, eps=1e-4, weight_decay=0.1)
        losses, norms, last = [], [], {}
        for step in range(10):
            total, count, last = guard.update_loss(
                part, *batch(document, step), step=step, seed=5, **(keys or {})
            )
            optimizer.zero_grad()
            (total / count).backward()
            norms.append(
                torch.nn.utils.get_total_norm([p.grad for p in guard.parameters(part) if p.grad is not None])
            )
            optimizer.step()
            losses.append(total / count)
        found[f"block {number}"] = {
            "losses": numbers(torch.stack(losses)),
            "gradient norms": numbers(torch.stack(norms)),
            "metrics": {name: numbers(value) for name, value in sorted(last.items())},
        }
    found["final weights"] = weights_hash(guard.weights(model))
    return found


def scores(guard: Any) -> Document:
    """Logits, scores and likelihoods at several K."""
    found: Document = {}
    for name, document in MODELS.items():
        torch.manual_seed(0)
        model = loud(guard, guard.build(document, 3), 1.0)
        found[name] = {"facts": guard.facts(model, KS), **outputs(guard, model, document)}
    return found


def outputs(guard: Any, model: Any, document: Document) -> Document:
    """What a network says to the inputs of its family."""
    inputs, targets = inputs_of(document)
    if document["model"]["family"] == "dit":
        z, classes = inputs * 3, targets[:, 0]
        pairs = ((0.05, 1.0), (0.7, 2.0), (30.0, 1.0))
        return {
            f"image at {sigma}, guidance {guidance}": numbers(
                guard.estimated_images(model, z, sigma, classes, guidance)
            )
            for sigma, guidance in pairs
        }
    if document["model"]["family"] == "masked":
        return _masked_outputs(guard, model, targets)
    facts = guard.facts(model, KS)
    thinking = facts["k_meaning"] == "thinking" and facts["max_steps"] > 1
    ks = KS if thinking or (facts["k_meaning"] == "sampling" and not is_image(document)) else (1,)
    found = {
        f"logits at K={k}": numbers(_seeded(guard.logits, model, inputs, k))
        for k in (ks if thinking else (1,))
    }
    if is_image(document):
        logprobs, greedy = _seeded(guard.class_scores, model, inputs, targets)
        return {**found, "class": numbers(logprobs), "class is greedy": greedy.int().flatten().tolist()}
    every = _seeded(guard.token_scores, model, inputs, targets, ks, seed=2, num_draws=3)
    for k, (logprobs, greedy) in every.items():
        found[f"scores at K={k}"] = numbers(logprobs)
        found[f"greedy at K={k}"] = greedy.int().flatten().tolist()
    return found


def _masked_outputs(guard: Any, model: Any, targets: Tensor) -> Document:
    found: Document = {}
    hole = (torch.arange(targets.numel()).view(targets.shape) % 3) > 0
    hidden = targets.masked_fill(hole, guard.mask_id(model))
    for level in (0.1, 0.6, 1.0):
        found[f"logits at {level}"] = numbers(guard.masked_logits(model, hidden, level))
    for k in KS:
        found[f"bound at K={k}"] = numbers(guard.masked_bound(model, targets, k, seed=2, num_draws=3))
        found[f"bound at K={k}, some given"] = numbers(
            guard.masked_bound(model, targets, k, mask=hole, seed=2, num_draws=2)
        )
    found["bound at K=3, always given"] = numbers(
        guard.masked_bound(model, targets, 3, mask=hole, always_given=True, seed=2)
    )
    for name, mask in (("left to right", None), ("left to right, some given", hole)):
        logprobs, greedy = guard.left_to_right(model, targets, mask)
        found[name] = numbers(logprobs)
        found[f"{name}, greedy"] = greedy.int().flatten().tolist()
    return found


def _seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Some first states come from torch's own generator."""
    torch.manual_seed(1)
    return function(*args, **kwargs)


def answers(guard: Any) -> Document:
    """Greedy answers at several K, over every bridge and in every order, and texts of masked models that are
    drawn."""
    found: Document = {}
    for name, document in MODELS.items():
        family = document["model"]["family"]
        if family == "dit":
            continue
        torch.manual_seed(0)
        model = loud(guard, guard.build(document, 3), 1.0)
        inputs, targets = inputs_of(document)
        options: list[Document] = [{}]
        if family == "masked":
            hole = (torch.arange(targets.numel()).view(targets.shape) % 4) > 0
            inputs = targets.masked_fill(hole, guard.mask_id(model))
            options = [{"order": order} for order in ORDERS]
            warm = {"temperature": 0.9, "top_p": 0.95, "top_k": 30}
            for order in ORDERS:
                drawn = [
                    guard.unmask(model, inputs, k, warm, seed=4, order=order, first=1, num_tokens=60)
                    for k in KS
                ]
                found[f"{name}, drawn, {order}"] = [each.flatten().tolist() for each in drawn]
        elif guard.facts(model, KS)["k_meaning"] == "sampling":
            own = (document.get("blocks") or {}).get("targets") == "own"
            options = [{"bridge": bridge} for bridge in (BRIDGES[:1] if own else BRIDGES)]
        ks = KS if guard.facts(model, KS)["max_steps"] > 1 else (1,)
        for option in options:
            said = _seeded(guard.greedy_answers, model, inputs, ks, seed=3, first=2, **option)
            label = ", ".join([name, *option.values()])
            found[label] = {f"K={k}": answer.flatten().tolist() for k, answer in said.items()}
    return found


def images(guard: Any) -> Document:
    """Images drawn with every solver, with and without guidance."""
    found: Document = {}
    for name, document in MODELS.items():
        if document["model"]["family"] == "dit":
            model = loud(guard, guard.build(document, 3), 1.0)
            for solver in ("euler", "heun", "multistep"):
                for k, guidance in ((1, 1.0), (4, 1.0), (5, 2.0)):
                    drawn = guard.draw_images(
                        model, torch.tensor([0, 3, 1]), k, first=2, guidance=guidance, solver=solver, seed=9
                    )
                    found[f"{name}, {solver}, K={k}, guidance {guidance}"] = numbers(drawn)
    return found


def partitions(guard: Any) -> Document:
    """Edges, layers, training ranges and levels of every way of cutting."""
    curve = [[0.01, 0.1], [0.3, 0.5], [1.0, 1.4], [5.0, 2.8], [70.0, 3.0]]
    ways: dict[str, Document] = {
        "equi_probability": {},
        "uniform": {"partition": "uniform"},
        "log_uniform": {"partition": "log_uniform", "overlap": 0.0},
        "curve": {"partition": "equal_information", "curve": curve},
        "prior_nats": {"partition": "equal_information", "prior_nats": 4.0},
        "explicit": {"partition": "explicit", "edges": [3.0, 0.5], "layers_per_block": [2, 1, 1]},
    }
    found: Document = {}
    for objective in ("evidence", "paper"):
        for name, way in ways.items():
            model = guard.build(case("llama", objective, {"num_blocks": 3, **way}, num_layers=4), 0)
            found[f"{objective}, {name}"] = lists_as_numbers(guard.partition(model, (1, 3, 5)))
    model = guard.build(case("masked", "masked", {"num_blocks": 2}), 0)
    found["masked"] = lists_as_numbers(guard.partition(model, (1, 3, 5)))
    found["dit"] = lists_as_numbers(guard.partition(guard.build(case("dit", "edm"), 0), (1, 3, 5)))
    return found


def served(guard: Any) -> Document:
    """Texts of the engine: requests of several K that are under way together."""
    tokenizer = guard.tokenizer(TEXTS * 20, 300)
    found: Document = {"tokenizer": guard.tokenizer_facts(tokenizer, TEXTS[0] + " zebra — æ")}
    size = found["tokenizer"]["vocab_size"]
    for name, (document, settings, requests) in serving(size).items():
        torch.manual_seed(0)
        model = loud(guard, guard.build(document, 3), 1.0)
        settings = {"max_slots": 5, "chunk": 16, "prefill_rows": 32, **settings}
        found[name] = _spoken(guard.serve(model, tokenizer, settings, requests))
        if name in FROM_FOLDER:
            with tempfile.TemporaryDirectory() as folder:
                guard.save(model, Path(folder) / "model", tokenizer)
                found[f"{name}, from a folder"] = _spoken(
                    guard.serve_folder(Path(folder) / "model", settings, requests)
                )
                if "blocks" in document:
                    few = {**settings, "resident_blocks": 1}
                    found[f"{name}, one block in memory"] = _spoken(
                        guard.serve_folder(Path(folder) / "model", few, requests)
                    )
    return found


def _spoken(said: list[Document]) -> list[Document]:
    for answer in said:
        for told in answer.values():
            if isinstance(told, dict) and "values" in told:
                told["values"] = numbers(told["values"])
                told["tokens"] = " ".join(map(str, told["tokens"]))
        answer["tokens"] = " ".join(map(str, answer["tokens"]))
        answer["steps"] = " ".join(map(str, answer["steps"]))
    return said


def plans(guard: Any) -> Document:
    """Memory that ``rdlm plan`` predicts."""
    found: Document = {}
    for name in PLANNED:
        path = HERE / "configs_v1" / f"{name}.yaml"
        for stage in range(4):
            plain = [
                "batch.global_size=2",
                f"deepspeed.zero_stage={stage}",
                "deepspeed.bucket_elements=1000000",
            ]
            again = [*plain, "batch.micro_size=1", "activation_checkpointing=true", "precision=fp32"]
            found[f"{name}, stage {stage}"] = guard.memory_plan(path, plain, 1, False)
            found[f"{name}, stage {stage}, recomputed on 2 GPUs"] = guard.memory_plan(
                path, [*again, "batch.global_size=4"], 2, True
            )
    return found


# Training runs ----------------------------------------------------------------------------------------------

CLOCKS = ("seconds", "cpu_seconds", "step_s", "tokens_per_s", "targets_per_s", "peak_memory_bytes")


def runs(guard: Any) -> Document:
    """``rdlm train`` in one process: a whole run, the same resumed at update 4, and two blocks that are
    trained alone and merged."""
    found: Document = {}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        whole = _train(guard, base / "whole", RUN)
        found["whole"] = _run_facts(guard, whole)
        newest = guard.run_files(whole)["checkpoints"] / "step_000006"
        shutil.rmtree(newest)
        shutil.rmtree(whole / "model")
        found["resumed"] = _run_facts(guard, _train(guard, base / "whole", RUN))
        rounded = {**RUN, "precision": "bf16", "deepspeed": {"zero_stage": 2}}
        found["in bf16"] = _run_facts(guard, _train(guard, base / "bf16", rounded))
        alone = [
            _train(guard, base / "alone", {**RUN, **BLOCKS}, "--block", str(block)) for block in range(2)
        ]
        for block in range(2):
            found[f"block {block}"] = _run_facts(guard, alone[block] / f"block_{block}")
        merged = base / "merged"
        _call(guard.command("merge", *(str(alone[0] / f"block_{b}") for b in (1, 0)), "--out", str(merged)))
        found["merged"] = {"weights": _file_facts(merged / "model.safetensors")}
    return found


def _train(guard: Any, folder: Path, document: Document, *options: str) -> Path:
    folder.mkdir(exist_ok=True)
    config, output = folder / "config.yaml", folder / "run"
    config.write_text(yaml.safe_dump({**document, "output": str(output)}))
    _call(guard.command("train", str(config), "--num-procs", "1", *options))
    return output


def _call(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def _run_facts(guard: Any, output: Path) -> Document:
    files = guard.run_files(output)
    records = [
        {name: value for name, value in record.items() if name not in CLOCKS}
        for record in guard.read_metrics(files["metrics"])
    ]
    names = sorted({name for record in records for name in record})
    logged = {name: numbers([float(record[name]) for record in records if name in record]) for name in names}
    held_out = guard.read_metrics(files["held out"])
    told = {
        name: numbers([float(record[name]) for record in held_out])
        for name in (held_out[0] if held_out else {})
    }
    return {"weights": _file_facts(files["weights"]), "log": logged, "held out": told}


def _file_facts(path: Path) -> Document:
    return weights_hash(load_file(path))


SECTIONS: dict[str, Callable[[Any], Document]] = {
    "updates": updates, "scores": scores, "answers": answers, "images": images, "partitions": partitions,
    "served": served,
    "plans": plans, "runs": runs,
}  # fmt: skip
FAST = tuple(name for name in SECTIONS if name != "runs")


def record(
    guard: Any, sections: Sequence[str] = tuple(SECTIONS), say: Callable[[str], None] = lambda line: None
) -> Document:
    """What the code computes, by section."""
    torch.set_num_threads(1)
    machine = {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }
    found: Document = {"machine": machine}
    for name in sections:
        began = time.perf_counter()
        found[name] = json.loads(json.dumps(SECTIONS[name](guard)))
        say(f"{name}: {time.perf_counter() - began:.1f} s")
    return found


# Fixtures ---------------------------------------------------------------------------------------------------


def expected(guard: Any, model: Any, document: Document) -> Document:
    """What a loaded checkpoint must say."""
    found: Document = {"facts": guard.facts(model, KS), **outputs(guard, model, document)}
    if document["model"]["family"] == "dit":
        found["drawn"] = numbers(guard.draw_images(model, torch.tensor([2, 0]), 2, guidance=2.0, seed=1))
    return found


def spoken(guard: Any, folder: Path) -> list[Document]:
    """What the served checkpoint says."""
    settings = {"max_slots": 3, "chunk": 16, "prefill_rows": 32}
    requests = [
        ask(3, 1, sampling=GREEDY, logprobs=1),
        ask(20, 4, 1),
        ask(9, 8, 2, prompt_logprobs=1, logprobs=0),
    ]
    return _spoken(guard.serve_folder(folder, settings, requests))


def write_fixtures(guard: Any, folder: Path, configs: Path) -> None:
    """Checkpoints of this version with what they say, and its configs with what they resolve to."""
    torch.set_num_threads(1)
    for name, document in CHECKPOINTS.items():
        torch.manual_seed(0)
        model, place = loud(guard, guard.build(document, 3), 1.0), folder / "checkpoints_v1" / name
        guard.save(model, place)
        said = {"document": document, **expected(guard, guard.load(place), document)}
        (place / "expected.json").write_text(json.dumps(said) + "\n")
    tokenizer = guard.tokenizer(TEXTS * 20, 300)
    model, place = loud(guard, guard.build(SERVED_DOCUMENT, 3), 1.0), folder / "checkpoints_v1"
    guard.save(model, place / SERVED_CHECKPOINT, tokenizer)
    said = {"said": spoken(guard, place / SERVED_CHECKPOINT)}
    (place / SERVED_CHECKPOINT / "expected.json").write_text(json.dumps(said) + "\n")
    (folder / "configs_v1").mkdir(exist_ok=True)
    for path in sorted(configs.glob("*.yaml")):
        shutil.copy(path, folder / "configs_v1" / path.name)
        text = json.dumps(guard.train_config(path), indent=1)
        (folder / "configs_v1" / f"{path.stem}.json").write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--only", help=f"sections, with commas: {','.join(SECTIONS)}")
    parser.add_argument("--fast", action="store_true", help="all sections but runs")
    parser.add_argument("--adapter", type=Path, default=HERE / "adapter.py", help="what imports rdlm")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two records")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of --compare")
    parser.add_argument(
        "--fixtures", type=Path, metavar="FOLDER", help="write checkpoints_v1 and configs_v1 there"
    )
    options = parser.parse_args()
    if options.compare:
        old, new = (json.loads(path.read_text()) for path in options.compare)
        return compare(old, new, options.tolerance)
    guard = load_adapter(options.adapter)
    if options.fixtures:
        write_fixtures(guard, options.fixtures, Path("configs"))
        return 0
    if options.out is None:
        parser.error("name a file to write")
    sections = options.only.split(",") if options.only else FAST if options.fast else tuple(SECTIONS)
    found = record(guard, sections, lambda line: print(line, file=sys.stderr, flush=True))
    options.out.write_text(dump(found))
    return 0


__all__ = [
    "CHECKPOINTS",
    "FAST",
    "HERE",
    "SERVED_CHECKPOINT",
    "compare",
    "differences",
    "expected",
    "load_adapter",
    "record",
    "spoken",
]
"""What the tests use."""

if __name__ == "__main__":
    sys.exit(main())
