"""What the measurement scripts share: provenance, atomic JSON, and running `rdlm` commands one per core."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import yaml

from eval.provenance import provenance, write_json
from rdlm.checkpoints.folder import CONFIG, load_config
from rdlm.data.token_shards import TokenStore
from rdlm.errors import UserError

__all__ = [
    "at_sigma_max",
    "check_same_corpus",
    "in_parallel",
    "provenance",
    "read_json",
    "run_rdlm",
    "tokenizers_of",
    "train",
    "with_earlier_runs",
    "write_json",
]

T = TypeVar("T")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def held_out_prompts(data: Path, count: int, length: int) -> list[tuple[int, ...]]:
    """The first ``count`` windows of the valid split of a folder of `rdlm data prepare`, ``length`` tokens each."""
    batch = next(iter(TokenStore(data, "valid").windows(length, length * count, count)))
    return [tuple(ids) for ids in batch.inputs.tolist()]


def run_rdlm(arguments: Sequence[str], log: Path) -> None:
    """`rdlm ARGUMENTS` with one thread, output to ``log``; raises CalledProcessError with the log's path in
    its command."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as stream:
        subprocess.run(
            [sys.executable, "-m", "rdlm", *arguments], check=True, stdin=subprocess.DEVNULL, stdout=stream,
            stderr=stream, env=environment
        )  # fmt: skip


def train(folder: Path, config: dict[str, Any]) -> None:
    """Train ``config`` in ``folder`` with one process; goes on where an interrupted call stopped, returns at
    once if it is done."""
    if (folder / "run" / "model").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**config, "output": str(folder / "run")}, sort_keys=False))
    run_rdlm(["train", str(file), "--num-procs", "1"], folder / "log.txt")


def at_sigma_max(model: Path) -> Path | None:
    """The checkpoint ``model`` again, read at sigma_max instead of at the level that its training covers
    (``objective.readout_quantile``), in a folder beside it; None where it is read there anyway. Tables of
    ``paper`` show both readings."""
    config = load_config(model)
    if getattr(config.objective, "readout_quantile", 1.0) == 1.0:
        return None
    other = model.with_name(f"{model.name}-at-sigma-max")
    if not other.is_dir():
        temporary = other.with_name(f".{other.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(model, temporary)
        document = read_json(model / CONFIG)
        document["name"] += "-at-sigma-max"
        document["objective"]["readout_quantile"] = 1.0
        write_json(temporary / CONFIG, document)
        temporary.replace(other)
    return other


def last_metrics(folder: Path) -> dict[str, Any]:
    """The final record of a finished run."""
    return json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def with_earlier_runs(out: Path, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows``, after the runs in ``out`` that none of them replaces: those of another arm, seed or learning
    rate."""
    earlier = read_json(out)["runs"] if out.exists() else []
    new = {(row["arm"], row["seed"], row["lr"]) for row in rows}
    return [run for run in earlier if (run["arm"], run["seed"], run["lr"]) not in new] + list(rows)


def tokenizers_of(out: Path) -> set[str]:
    """Fingerprints of the tokenizers of the runs in ``out``, which may be missing."""
    runs = read_json(out)["runs"] if out.exists() else []
    return {
        run["data"]["tokenizer_fingerprint"]
        for run in runs
        if run.get("data", {}).get("tokenizer_fingerprint")
    }


def check_same_corpus(out: Path, data: Path) -> None:
    """UserError, before anything is trained, where the runs in ``out`` are of data with another tokenizer: they would
    be no rows of one table."""
    own = TokenStore(data, "train").manifest.tokenizer_fingerprint
    if tokenizers_of(out) - {own}:
        problem = "the runs in it are of data with another tokenizer"
        raise UserError("out", str(out), problem, "prepare the data as they had it, or give another file")


def in_parallel(jobs: int, calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run the calls ``jobs`` at a time (each starts a process of its own); the first failure is raised once
    all have ended."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(call) for call in calls]
    return [future.result() for future in futures]
