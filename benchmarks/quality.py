"""Quality of text at equal compute: likelihood, generative perplexity at equal diversity, MAUVE and BLiMP of
several runs, against K.

    python -m benchmarks.quality runs/language/next_token-lr0.002-seed1 ... --data data/books-4096 --blimp FOLDER

Every figure comes out of a command of ``rdlm eval``; this script chooses K and sizes, runs the commands one
per core and puts their files into one ``rdlm eval report``. A part whose file exists is not run again, and a
part that was interrupted goes on from its cache.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import at_sigma_max, in_parallel, read_json, run_rdlm, write_json
from rdlm.checkpoints.folder import load_config

LM_EVAL_KEYS = (
    "results",
    "groups",
    "versions",
    "n-shot",
    "n-samples",
    "config",
    "git_hash",
    "lm_eval_version",
    "transformers_version",
)
"""What is kept of lm-eval's results: the rest repeats every task's definition and names folders of the
machine."""


@dataclass(frozen=True)
class Arm:
    """A run to be judged, and the K at which it is."""

    name: str
    model: Path
    scored: list[int]
    """K with a normalised likelihood."""
    written: list[int]
    """K of generated texts."""
    published: bool = False
    """Whether texts are also written by the published sampler."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything; chosen so that four arms take about half an hour on two cores."""

    nll_tokens: int
    prompts: int
    temperatures: str
    mauve_prompts: int
    blimp_pairs: int


def arms_of(folder: Path, ks: list[int]) -> list[Arm]:
    """folder: of a training run, or of a checkpoint. Two arms for a model that is read at a quantile of its
    noise levels: the other one is read at sigma_max."""
    model = folder / "run" / "model" if (folder / "run" / "model").is_dir() else folder
    first, other = arm_of(folder.name, model, ks), at_sigma_max(model)
    return [first] if other is None else [first, arm_of(f"{folder.name}-at-sigma-max", other, ks)]


def arm_of(name: str, model: Path, ks: list[int]) -> Arm:
    """An objective that never runs its core twice is judged at K = 1 alone: its other K are no part of what
    was trained. A sampling one has a likelihood at K = 1 only (``Objective.score``), and texts at every K."""
    objective = load_config(model).objective
    if objective.k_meaning == "sampling":
        published = objective.sampled_from_noise and getattr(objective, "readout_quantile", 1.0) != 1.0
        return Arm(name, model, [1], ks, published)
    loops = not objective.depth_in_training.is_single
    return Arm(name, model, ks if loops else [1], ks if loops else [1])


class Parts:
    """The parts of every arm: each a call that leaves its files in ``out``."""

    def __init__(self, data: Path, blimp: Path, out: Path, root: Path, judge: str, sizes: Sizes) -> None:
        self.data, self.blimp, self.out, self.root, self.judge, self.sizes = (
            data,
            blimp,
            out,
            root,
            judge,
            sizes,
        )
        out.mkdir(parents=True, exist_ok=True)
        root.mkdir(parents=True, exist_ok=True)

    def files(self, part: str, arm: Arm) -> list[Path]:
        """What a part writes."""
        if part.endswith("-published") and not arm.published:
            return []
        ks = [f"-k{k}" for k in arm.scored] if part == "blimp" else [""]
        return [self.out / f"{part}-{arm.name}{k}.json" for k in ks]

    def run(self, part: str, arm: Arm) -> None:
        """Nothing where all of its files exist."""
        files = self.files(part, arm)
        if all(file.exists() for file in files):
            return
        started = time.perf_counter()
        PARTS[part](self, arm, files)
        print(f"{part} of {arm.name}: {time.perf_counter() - started:.0f} s", flush=True)

    def _rdlm(self, arm: Arm, *arguments: str) -> None:
        run_rdlm(["eval", *arguments], self.root / f"{arguments[0]}-{arm.name}.log")

    def nll(self, arm: Arm, files: list[Path]) -> None:
        self._rdlm(arm, "nll", "--checkpoint", str(arm.model), "--data", str(self.data), "--num-steps",
            _listed(arm.scored),
                   "--max-tokens", str(self.sizes.nll_tokens), "--per-window", "--out", str(files[0]))  # fmt: skip

    def _texts(self, arm: Arm, ks: list[int]) -> list[str]:
        """Options of both judges of texts. In bf16 the judge's perplexities are within 0.5 % of those in
        fp32."""
        return ["--checkpoint", str(arm.model), "--data", str(self.data), "--num-steps", _listed(ks),
                "--batch-size", "64", "--judge-dtype", "bfloat16", "--cache", str(self.root / "cache")]  # fmt: skip

    def gen_ppl(self, arm: Arm, files: list[Path]) -> None:
        self._rdlm(arm, "gen-ppl", *self._texts(arm, arm.written), "--temperature", self.sizes.temperatures,
                   "--num-prompts", str(self.sizes.prompts), "--judge", self.judge, "--out", str(files[0]))  # fmt: skip

    def mauve(self, arm: Arm, files: list[Path]) -> None:
        self._rdlm(arm, "mauve", *self._texts(arm, arm.written), "--temperature", "1.0", "--protocol", "standard",
                   "--num-prompts", str(self.sizes.mauve_prompts), "--featuriser", self.judge, "--out",
                   str(files[0]))  # fmt: skip

    def published_gen_ppl(self, arm: Arm, files: list[Path]) -> None:
        """The published protocol: four steps, greedy."""
        self._rdlm(arm, "gen-ppl", *self._texts(arm, [4]), "--sampler", "published", "--temperature", "0",
                   "--num-prompts", str(self.sizes.prompts), "--judge", self.judge, "--out", str(files[0]))  # fmt: skip

    def published_mauve(self, arm: Arm, files: list[Path]) -> None:
        self._rdlm(arm, "mauve", *self._texts(arm, [4]), "--sampler", "published", "--temperature", "0", "--protocol",
            "standard",
                   "--num-prompts", str(self.sizes.mauve_prompts), "--featuriser", self.judge, "--out",
                   str(files[0]))  # fmt: skip

    def blimp_scores(self, arm: Arm, files: list[Path]) -> None:
        folder = self.root / "lm-eval" / arm.name
        shutil.rmtree(folder, ignore_errors=True)  # of an interrupted run
        self._rdlm(arm, "lm-eval", "--model", "rdlm", "--model_args", f"checkpoint={arm.model}", "--num-steps",
            _listed(arm.scored),
                   "--batch_size", "64", "--blimp", str(self.blimp), "--tasks", "blimp_local",
                   "--limit", str(self.sizes.blimp_pairs), "--output_path", str(folder))  # fmt: skip
        for found in folder.rglob("results_*.json"):
            report = read_json(found)
            kept = {key: report[key] for key in LM_EVAL_KEYS if key in report}
            write_json(files[arm.scored.index(report["config"]["num_steps"])], kept)


PARTS: dict[str, Callable[[Parts, Arm, list[Path]], None]] = {
    "gen-ppl": Parts.gen_ppl,
    "mauve": Parts.mauve,
    "gen-ppl-published": Parts.published_gen_ppl,
    "mauve-published": Parts.published_mauve,
    "blimp": Parts.blimp_scores,
    "nll": Parts.nll,
}
"""Longest first, so that the last ones fill the gaps."""


def _listed(ks: list[int]) -> str:
    return ",".join(map(str, ks))


def main(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of benchmarks.equal_compute, or checkpoints; the first is the baseline."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare`.")],
    blimp: Annotated[Path, typer.Option(help="Folder of BLiMP's 67 JSONL files.")],
    out: Annotated[Path, typer.Option(help="Folder of the JSON files and figures.")] = Path(
        "docs/results/raw/quality"
    ),
    root: Annotated[Path, typer.Option(help="Caches, logs and the report.")] = Path("runs/quality"),
    steps: Annotated[str, typer.Option(help="K with commas.")] = "1,4,16",
    judge: Annotated[str, typer.Option(help="Judge of perplexity and featuriser of MAUVE.")] = "smollm2",
    nll_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 65_536,
    prompts: Annotated[int, typer.Option(help="Prompts of generative perplexity; 50 make a block.")] = 250,
    temperatures: Annotated[str, typer.Option(help="Of generative perplexity, with commas.")] = "0.8,1.0,1.3",
    mauve_prompts: Annotated[int, typer.Option(help="Samples and references of MAUVE.")] = 1000,
    blimp_pairs: Annotated[
        int, typer.Option(min=2, help="First so many of the 1,000 pairs of each of BLiMP's 67 paradigms.")
    ] = 100,
    jobs: Annotated[int, typer.Option(min=1, help="Commands at a time, one core each.")] = 2,
) -> None:
    """Run what is missing, then write the report and copy its figures to ``out``."""
    arms = [arm for folder in runs for arm in arms_of(folder, [int(k) for k in steps.split(",")])]
    parts = Parts(
        data, blimp, out, root, judge, Sizes(nll_tokens, prompts, temperatures, mauve_prompts, blimp_pairs)
    )
    calls: list[Callable[[], Any]] = [partial(parts.run, part, arm) for part in PARTS for arm in arms]
    try:
        in_parallel(jobs, calls)
    except subprocess.CalledProcessError as error:
        print(f"{' '.join(map(str, error.cmd))}\nended with {error.returncode}; see the logs in {root}")
        raise typer.Exit(1) from None
    files = [
        str(file)
        for part in ("nll", "gen-ppl", "gen-ppl-published", "mauve", "mauve-published", "blimp")
        for arm in arms
        for file in parts.files(part, arm)
    ]
    run_rdlm(
        ["eval", "report", *files, "--out", str(root / "report"), "--title", "Quality at equal compute"],
        root / "report.log",
    )
    for figure in (root / "report").glob("*.png"):
        shutil.copyfile(figure, out / figure.name)
    print(root / "report" / "report.md")


if __name__ == "__main__":
    typer.run(main)
