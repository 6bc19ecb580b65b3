"""Evaluation code against answers that are known: python -m benchmarks.known_answers --data data/books-4096
--blimp FOLDER

A judge must find real text likelier than its words shuffled, and a loop likelier still; MAUVE must put
human halves near 1 and shuffled words near 0; BLiMP must give one half to a model that knows nothing and far
more to one that knows English.
"""

from __future__ import annotations

import hashlib
import json
import math
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from tqdm import tqdm

from benchmarks.common import provenance, read_json, run_rdlm, write_json
from eval.metrics.gen_ppl import perplexity
from eval.metrics.mauve import PROTOCOLS, evaluate_mauve, shuffled_words
from eval.texts.judge_models import load_judge, where
from eval.texts.samples import Shape, passages, to_text
from rdlm.data.token_shards import TokenStore

SEED = 0


def judge_facts(data: Path, name: str, texts: int, cache: Path) -> dict[str, Any]:
    """Perplexity of real continuations, of their words shuffled, and of a loop; MAUVE of human halves, and of
    shuffled words."""
    store, judge, shape = TokenStore(data, "valid"), load_judge(name), Shape(50, 50)
    tokenizer = store.tokenizer()
    found = list(islice(passages(store, shape), 2 * texts))
    prompts = [to_text(tokenizer, p.prompt) for p in found[:texts]]
    real, others = (
        [to_text(tokenizer, p.continuation) for p in part] for part in (found[:texts], found[texts:])
    )
    sides = {
        "real": real,
        "words shuffled": [f" {text}" for text in shuffled_words(real, SEED)],
        "loop": [" the" * 40] * texts,
    }
    scores = {}
    for side, chosen in sides.items():
        with tqdm(total=texts, desc=f"{name}: {side}") as bar:
            scores[side] = perplexity(judge.score(prompts, chosen, bar.update), SEED)

    def bar_of(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what).update

    halves = [[[text] for text in part] for part in (real, others)]
    bounds = evaluate_mauve(PROTOCOLS["quick"], *halves, [], judge, cache, bar_of, SEED)
    return {
        "judge": judge.described,
        "texts": texts,
        "perplexity": scores,
        "mauve": {k: bounds[k] for k in ("protocol", "ceiling", "floor")},
    }


def blimp_of_judge(name: str, blimp: Path, pairs: int, work: Path) -> dict[str, Any]:
    """Through `rdlm eval lm-eval` and our task files, with lm-eval's own model of transformers in the place
    of ours."""
    source, extra = where(name)
    arguments = ",".join(
        [f"pretrained={source}", "dtype=float32", *(f"{key}={value}" for key, value in extra.items())]
    )
    run_rdlm(["eval", "lm-eval", "--model", "hf", "--model_args", arguments, "--device", "cpu",
    "--batch_size", "32", "--blimp", str(blimp),
              "--tasks", "blimp_local", "--limit", str(pairs), "--output_path", str(work)],
              work / "log.txt")  # fmt: skip
    return blimp_facts(read_json(next(work.rglob("results_*.json"))))


def blimp_of_chance(blimp: Path, pairs: int) -> dict[str, Any]:
    """A model whose log-likelihoods are hashes of the sentences."""
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    from eval.metrics.lm_eval import TASKS

    class Chance(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            digests = [hashlib.sha256(json.dumps(request.args).encode()).digest() for request in requests]
            return [(-int.from_bytes(digest[:6], "big") / 2**48, False) for digest in digests]

        loglikelihood_rolling = generate_until = None  # type: ignore[assignment]

    manager = TaskManager(include_path=str(TASKS), metadata={"blimp": str(blimp)})
    return blimp_facts(
        simple_evaluate(model=Chance(), tasks=["blimp_local"], task_manager=manager, limit=pairs)
    )


def blimp_facts(found: dict[str, Any]) -> dict[str, Any]:
    """The group's accuracy with its standard error, and the accuracy of each paradigm."""
    group = found["results"].pop("blimp_local")
    by_paradigm = {
        task.removeprefix("blimp_"): round(metrics["acc,none"], 4)
        for task, metrics in sorted(found["results"].items())
    }
    return {"accuracy": group["acc,none"], "stderr": group["acc_stderr,none"], "by_paradigm": by_paradigm}


def main(
    data: Annotated[Path, typer.Option(help="Folder of `rdlm data prepare` with English text.")],
    blimp: Annotated[Path, typer.Option(help="Folder of BLiMP's 67 JSONL files.")],
    out: Annotated[Path, typer.Option(help="JSON to write.")] = Path("docs/results/raw/known_answers.json"),
    judge: Annotated[str, typer.Option(help="As in `rdlm eval gen-ppl`.")] = "smollm2",
    texts: Annotated[int, typer.Option(min=20, help="Passages of each side.")] = 200,
    pairs: Annotated[int, typer.Option(min=2, help="First pairs of each paradigm.")] = 30,
) -> None:
    """Measure, write, and fail where an answer is not the known one."""
    with TemporaryDirectory() as work:
        facts = judge_facts(data, judge, texts, Path(work) / "cache")
        scores = {
            "chance": blimp_of_chance(blimp, pairs),
            judge: blimp_of_judge(judge, blimp, pairs, Path(work)),
        }
    origin = provenance()
    origin["command"] = origin["command"].replace(str(blimp), "BLIMP")  # a folder of this machine
    write_json(
        out, {"provenance": origin, "seed": SEED, **facts, "blimp": {"pairs_per_paradigm": pairs, **scores}}
    )
    ppl = {side: found["value"] for side, found in facts["perplexity"].items()}
    for side, value in ppl.items():
        print(f"perplexity of {side}: {value:.1f}")
    for side in ("ceiling", "floor"):
        print(f"MAUVE, {side}: {facts['mauve'][side]['value']:.3f}")
    for side, score in scores.items():
        print(f"BLiMP of {side}: {score['accuracy']:.4f} +- {score['stderr']:.4f}")
    known = [
        ppl["loop"] < ppl["real"] / 5 and ppl["words shuffled"] > 8 * ppl["real"],
        facts["mauve"]["ceiling"]["value"] > 0.85 and facts["mauve"]["floor"]["value"] < 0.2,
        abs(scores["chance"]["accuracy"] - 0.5) < 4 * math.sqrt(0.25 / (67 * pairs)),
        scores[judge]["accuracy"] > 0.7,
    ]
    if not all(known):
        print(f"not as known: {known}")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
