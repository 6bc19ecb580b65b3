"""What the host does for a decode step and for a micro-step of training: calls of operators, kernels, conversions,
copies and waits, counted. The counts depend on neither the machine nor its load, nor on the model's width.

    python -m benchmarks.counts --out counts.json

Tensors claim to be on a GPU and hold no data (benchmarks/fake_cuda.py; needs a C++ compiler, and a build of torch
without CUDA or no GPU). Attention counts as one operator. The backward pass runs on the CPU.

| column | what is counted |
|---|---|
| operators | calls of PyTorch operators with a tensor of the device |
| kernels | those that compute or copy: neither views nor allocations |
| conversions | copies into another dtype on the device |
| launches | kernels that the host launches; what is captured as a CUDA graph is one |
| copies | from the host to the device, none of which it waits for |
| waits | the host waits for the device: a copy to the host, a value, a shape that depends on values |
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

import serve.engine.runner as runner_module
from benchmarks.common import provenance, write_json
from benchmarks.fake_cuda import Watch, load_guard
from benchmarks.gpu import TINY, batch_of, config_of
from benchmarks.tables import table
from rdlm.data.batch import on_device
from rdlm.objectives.base import Keys
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.replay import Key, Pass
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Request, StepBudget, StepResult
from train.trainer import Tally

COLUMNS = ("operators", "kernels", "conversions", "launches", "copies", "waits")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias")
NUM_TOKENS = 4
SETTINGS = {
    "greedy": SamplingParams(temperature=0),
    "top-p, penalty": SamplingParams(temperature=0.7, top_p=0.9, repetition_penalty=1.1),
}
aten = torch.ops.aten


def is_kernel(operator: Any) -> bool:
    returns = operator._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return not is_view and operator.overloadpacket.__name__.strip("_") not in ALLOCATIONS


class Counting(Watch):
    """Counts on top of what the watch notes. device: where tensors count that an operator reads or makes."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self.device, self.counts, self.captured = device, Counter[str](), False

    def note(self, *names: str) -> None:
        for name in names:
            if name != "launches" or not self.captured:
                self.counts[name] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if func.namespace == "prim" or not any(tensor.device.type == self.device for tensor in tensors):
            return out  # prim: a fake tensor is asked for its device
        self.note("operators")
        if is_kernel(func):
            self.note("kernels", "launches")
        if func is aten._to_copy.default and args[0].device == out.device and args[0].dtype != out.dtype:
            self.note("conversions")
        return out

    @contextmanager
    def attention_as_one(self) -> Iterator[None]:
        plain = F.scaled_dot_product_attention

        def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
            before = self.counts.copy()
            out = torch.empty_like(q)
            self.counts = before
            self.note("operators", "kernels", "launches")
            return out

        F.scaled_dot_product_attention = attention  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain

    def found(self) -> dict[str, int]:
        return {**self.counts, "copies": self.copies.total(), "waits": self.waits.total()}


class Captured:
    """A Replayer that runs passes as they come and counts each as one launch."""

    def __init__(self, watch: Counting) -> None:
        self.watch = watch

    def __call__(self, key: Key, run: Pass) -> tuple[Tensor, ...]:
        self.watch.note("launches")
        self.watch.captured = True
        try:
            return run()
        finally:
            self.watch.captured = False

    def forget(self) -> None:
        pass


def decode(
    family: str, num_steps: int, rows: int, params: SamplingParams, is_static: bool, logprobs: int | None
) -> dict[str, float]:
    """Counts of a step of requests of one K that decode together, the mean over tokens after the first two."""
    watch = Counting()
    config = config_of(family, "onestep" if family == "huginn" else "next_token", TINY)
    network = build(config, device="meta").eval()
    watch.move(network)
    run = Runner.run.__wrapped__  # type: ignore[attr-defined]  # tensors of inference mode cannot be fake
    before: dict[str, int] | None = None
    steps = 0
    with watch.fake, watch, torch.no_grad(), watch.attention_as_one():
        runner = Runner(
            network,  # type: ignore[arg-type]
            config,
            num_slots=rows,
            max_len=64,
            max_steps=num_steps,
            num_tokens=TINY.vocab,
            replay=Captured(watch) if is_static else None,
        )
        scheduler = Scheduler(rows, 64 * rows, 16)
        for number in range(rows):
            request = Request(
                (1, 2, 3, 4), StepBudget(num_steps), NUM_TOKENS, params, seed=number, logprobs=logprobs
            )
            scheduler.add(runner.sequence(number, request, 16))
        scheduler.admit()
        while running := scheduler.schedule():
            if before is None and all(len(sequence.output) == 2 for sequence in running):
                before = watch.found()
            results = run(runner, running)
            steps += before is not None
            for sequence in running:
                result = results.get(sequence.id) or StepResult()
                sequence.advance(result)
                sequence.output.extend(result.tokens)
                if not sequence.wants_token:
                    scheduler.remove(sequence)
    assert before is not None and steps == (NUM_TOKENS - 2) * num_steps
    return {name: (watch.found().get(name, 0) - before.get(name, 0)) / steps for name in COLUMNS}


def micro_step(objective: str, source: Any) -> dict[str, float]:
    """Counts of the forward pass of a micro-step, from rows in host memory to sums on the device."""
    watch = Counting()
    config = config_of("huginn", objective, TINY)
    network, batch, tally = build(config, device="meta"), batch_of(config, TINY), Tally()
    watch.move(network)
    with watch.fake, watch, watch.attention_as_one():
        for part in network.parts:
            if part.targets is not None:
                part.targets(part.model.ln_f.weight.device)
        for _ in range(2):  # the first one makes tables
            before = watch.found()
            (there,) = on_device([batch], torch.device("cuda", 0))
            terms = network.loss(there, Keys(0, 3, source=source))
            tally.add(terms.total, terms.count, terms.metrics)
    found = {name: float(watch.found().get(name, 0) - before.get(name, 0)) for name in COLUMNS}
    return {**found, "core_steps": float(terms.metrics["core_steps"])}


def whole_micro_step(objective: str, source: Any) -> dict[str, float]:
    """Counts of forward and backward pass on the CPU, in bf16; nothing is copied, and no wait is noticed."""
    watch = Counting("cpu")
    config = config_of("huginn", objective, TINY)
    network, batch = build(config, seed=0).to(torch.bfloat16), batch_of(config, TINY)
    with watch:
        terms = network.loss(batch, Keys(0, 3, source=source))
        terms.total.backward()
    found = {name: float(watch.counts[name]) for name in COLUMNS[:4]}
    return {**found, "core_steps": float(terms.metrics["core_steps"])}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--rows", type=int, default=4, help="requests that decode together")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        load_guard(Path(folder))
    runner_module.costs_of = runner_module.costs_of.__wrapped__  # type: ignore[attr-defined]  # no cached tensors
    steps: list[dict[str, Any]] = []
    for family, num_steps, name, logprobs in (
        ("huginn", 4, "greedy", None), ("huginn", 4, "top-p, penalty", None), ("huginn", 4, "greedy", 2),
        ("llama", 1, "greedy", None),
    ):  # fmt: skip
        for is_static in (False, True):
            wanted = {"family": family, "num_steps": num_steps, "rows": options.rows, "settings": name,
                      "logprobs": logprobs, "graphs": is_static}  # fmt: skip
            counts = decode(family, num_steps, options.rows, SETTINGS[name], is_static, logprobs)
            steps.append({**wanted, **counts})
            print(steps[-1], file=sys.stderr, flush=True)
    training: list[dict[str, Any]] = []
    for objective in ("onestep", "single_pass"):
        for passes, count in (("forward", micro_step), ("forward and backward", whole_micro_step)):
            training.append({"objective": objective, "passes": passes, **count(objective, "counter")})
    write_json(options.out, {"provenance": provenance(), "decode": steps, "training": training})
    print(render({"decode": steps, "training": training}))


def render(raw: dict[str, Any]) -> str:
    """The tables of a result."""
    steps = [
        [row["family"], f"{row['num_steps']}", f"{row['rows']}", row["settings"], "yes" if row["logprobs"] else "",
         "graphs" if row["graphs"] else "as they come", *(f"{row[name]:.4g}" for name in COLUMNS)]
        for row in raw["decode"]
    ]  # fmt: skip
    training = [
        [row["objective"], row["passes"], f"{row['core_steps']:g}",
         *(f"{row[name]:g}" if name in row else "" for name in COLUMNS)]
        for row in raw["training"]
    ]  # fmt: skip
    head = ["family", "K", "rows", "settings", "log-probabilities", "passes"]
    return "\n\n".join(
        [table([*head, *COLUMNS], steps), table(["objective", "passes", "r", *COLUMNS], training)]
    )


if __name__ == "__main__":
    main()
