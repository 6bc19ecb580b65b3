"""``rdlm eval gen-ppl`` and ``rdlm eval mauve``: the quality of a checkpoint's texts over decoding settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from eval.options import SOURCES, Plot, TextOptions, numbers, usable_device, with_options
from eval.output import write_json
from eval.texts.sweep import CELLS, setting_of
from eval.wording import difference, with_interval
from rdlm.errors import UserError

if TYPE_CHECKING:
    from eval.texts.gen_ppl import Bar, Texts
    from eval.texts.judge_models import Teacher
    from eval.texts.samples import Passage, Sampler, Shape
    from eval.texts.sweep import Setting

EXAMPLES = 4
"""Prompts whose texts stand in the report."""


@with_options
def gen_ppl(
    options: TextOptions,
    teacher: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {SOURCES}; by default smollm2.")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Held-out passages to continue.")] = 200,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 50,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a continuation.")] = 50,
    continuations: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    plot: Plot = None,
) -> None:
    """Perplexity of generated texts under other models, with their diversity, beside the same figures of human text."""
    from eval.texts.frontier import at_equal_diversity, plot_frontier
    from eval.texts.gen_ppl import evaluate_gen_ppl, sample_all
    from eval.texts.samples import Shape

    shape = Shape(prompt_tokens, max_tokens, continuations, options.across_documents)
    settings = _settings(options)
    names = list(dict.fromkeys(teacher or ["smollm2"]))
    with _sampler(options, shape, num_prompts, settings) as (sampler, _), bars() as bar:
        teachers = [_teacher(name, options) for name in names]
        generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
        measured = evaluate_gen_ppl(
            sampler.prompts, sampler.human, generated, teachers, options.cache, bar, options.seed
        )
        report = {**sampler.origin("gen-ppl"), **measured, "examples": _examples(sampler, generated)}
    report["at_human_distinct_2"] = {name: at_equal_diversity(report, name, options.seed) for name in names}
    _show_gen_ppl(report, Console())
    if options.out is not None:
        write_json(options.out, report)
    if plot is not None:
        plot_frontier(report, plot)


@with_options
def mauve(
    options: TextOptions,
    protocol: Annotated[
        Literal["paper", "standard", "quick"], typer.Option(help="What is compared with what.")
    ] = "quick",
    featuriser: Annotated[
        str, typer.Option(help=f"Model whose features are compared: {SOURCES}.")
    ] = "smollm2",
    num_prompts: Annotated[int | None, typer.Option(min=20, help="Instead of the protocol's number.")] = None,
    continuations: Annotated[
        int | None, typer.Option(min=1, help="Instead of the protocol's number.")
    ] = None,
    scaling_factor: Annotated[float | None, typer.Option(min=0.01, help="Instead of the protocol's.")] = None,
    num_seeds: Annotated[
        int | None, typer.Option(min=1, help="Runs of k-means, instead of the protocol's.")
    ] = None,
) -> None:
    """Distance of the distribution of generated texts from human ones, with a human ceiling and a shuffled floor."""
    from eval.texts.gen_ppl import sample_all
    from eval.texts.mauve_score import PROTOCOLS, evaluate_mauve, require_mauve
    from eval.texts.samples import Shape, to_text

    require_mauve()
    chosen = PROTOCOLS[protocol].changed(
        prompts=num_prompts, continuations=continuations, scaling_factor=scaling_factor, seeds=num_seeds
    )
    shape = Shape(chosen.prompt_tokens, chosen.max_tokens, chosen.continuations, options.across_documents)
    settings = _settings(options)
    with _sampler(options, shape, chosen.prompts, settings) as (sampler, rest), bars() as bar:
        model = _teacher(featuriser, options)
        others = list(islice(rest, chosen.prompts * chosen.continuations))
        if len(others) < chosen.prompts:
            problem = f"only {len(others)} passages are left for the human ceiling, which needs as many again"
            raise UserError("--num-prompts", chosen.prompts, problem, "ask for fewer, or prepare more text")
        held = [[to_text(sampler.tokenizer, p.continuation)] for p in others]
        generated = list(zip(settings, sample_all(sampler, settings, bar), strict=True))
        measured = evaluate_mauve(
            chosen, sampler.human, held, generated, model, options.cache, bar, options.seed
        )
        report = {**sampler.origin("mauve"), **measured}
    _show_mauve(report, Console())
    if options.out is not None:
        write_json(options.out, report)


def _examples(sampler: Sampler, generated: Sequence[tuple[Setting, Texts]]) -> list[dict[str, Any]]:
    """The first prompts with what the author and each setting wrote."""
    shown = list(zip(sampler.prompts, sampler.human, strict=True))[:EXAMPLES]
    return [
        {"prompt": prompt, "human": human[0], "texts": [texts[i][0] for _, texts in generated]}
        for i, (prompt, human) in enumerate(shown)
    ]


def _settings(options: TextOptions) -> list[Setting]:
    """Every combination, in the order given."""
    from eval.texts.sweep import grid
    from rdlm.checkpoints.folder import load_config

    default = load_config(options.checkpoint).default_steps
    ks = [default] if options.num_steps is None else numbers("--num-steps", options.num_steps, int)
    return grid(
        {
            "num_steps": ks,
            "temperature": numbers("--temperature", options.temperature, float),
            "top_p": numbers("--top-p", options.top_p, float),
            "top_k": numbers("--top-k", options.top_k, int),
            "min_p": numbers("--min-p", options.min_p, float),
            "bridge": options.bridge.split(","),
            "order": options.order.split(","),
        }
    )


def _teacher(name: str, options: TextOptions) -> Teacher:
    import torch

    from eval.texts.judge_models import load_teacher

    return load_teacher(name, options.device, getattr(torch, options.teacher_dtype), options.window)


@contextmanager
def _sampler(
    options: TextOptions, shape: Shape, count: int, settings: Sequence[Setting]
) -> Iterator[tuple[Sampler, Iterator[Passage]]]:
    """-> the sampler, and the passages that are left."""
    from eval.texts.samples import Sampler, passages, take
    from rdlm.config.base import parse
    from rdlm.data.token_shards import TokenStore
    from serve.settings import EngineSettings

    engine = {
        "device": usable_device(options.device), "dtype": options.dtype, "kv_cache": options.kv_cache, "max_slots": options.batch_size,
    }  # fmt: skip
    store = TokenStore(options.data, options.split)
    found = passages(store, shape)
    parsed: EngineSettings = parse(EngineSettings, engine, "the options of rdlm eval")
    chosen = take(found, count, shape)
    with Sampler(options.checkpoint, store, chosen, shape, parsed, options.cache, options.seed) as sampler:
        sampler.check(settings)
        yield sampler, found


@contextmanager
def bars() -> Iterator[Bar]:
    """One progress bar at a time: the next one closes the one before it, the block the last."""
    from tqdm import tqdm

    with ExitStack() as stack:

        def bar(what: str, total: int) -> Callable[[int], object]:
            stack.close()
            return stack.enter_context(tqdm(total=total, desc=what)).update

        yield bar


def _show_gen_ppl(report: dict[str, Any], console: Console) -> None:
    names = [teacher["name"] for teacher in report["teachers"]]
    checkpoint, origin = report["checkpoint"], report["samples"]
    shape = origin["shape"]
    table = Table(
        title=f"{checkpoint['name']} (step {checkpoint['step']:,}) on {report['data']['split']}",
        caption=f"{origin['prompts']['count']:,} prompts of {shape['prompt_tokens']} tokens, {shape['continuations']} x "
        f"{shape['max_tokens']} tokens each; 95 % intervals over prompts; distinct-n and entropy over groups of "
        f"{report['human']['diversity']['group_texts']} texts",
    )
    headers = (*CELLS, *(f"{h} {name}" for name in names for h in ("ppl", "/ human")))
    for name in (*headers, "distinct-1", "-2", "-3", "repetition", "entropy", "words"):
        table.add_column(name, justify="right")
    for row in [*report["results"], report["human"]]:
        table.add_row(
            *_place(row),
            *(cell for name in names for cell in _judged(row["perplexity"][name])),
            *_varied(row["diversity"]),
        )
    console.print(table)
    for name, found in report["at_human_distinct_2"].items():
        for point in found:
            reached = point["perplexity"] is not None
            value = (
                with_interval(point["perplexity"], point["interval"], ".1f")
                if reached
                else "not reached by these temperatures"
            )
            place = ", ".join(filter(None, (f"K = {point['num_steps']}", point["cut"])))
            console.print(
                f"{name}, {place}: perplexity at the distinct-2 of human text: {value}", highlight=False
            )


def _place(row: dict[str, Any]) -> list[str]:
    return setting_of(row).cells if "num_steps" in row else ["human", "", ""]


def _judged(entry: dict[str, Any]) -> tuple[str, str]:
    against = entry.get("against_human")
    ratio = difference(against["ratio"], against["interval"], ".2f", none=1) if against else ""
    return with_interval(entry["value"], entry["interval"], ".1f"), ratio


def _varied(diversity: dict[str, Any]) -> list[str]:
    digits = {
        "distinct_1": 3,
        "distinct_2": 3,
        "distinct_3": 3,
        "repetition": 3,
        "entropy_bits": 2,
        "mean_words": 1,
    }
    return [f"{diversity[name]['value']:.{n}f}" for name, n in digits.items()]


def _show_mauve(report: dict[str, Any], console: Console) -> None:
    protocol, checkpoint = report["protocol"], report["checkpoint"]
    table = Table(
        title=f"MAUVE of {checkpoint['name']} (step {checkpoint['step']:,}), protocol {protocol['name']}",
        caption=f"{report['references']:,} references, scaling factor {protocol['scaling_factor']:g}, features of "
        f"{report['featuriser']['name']}; 95 % intervals over texts and {protocol['seeds']} k-means seeds",
    )
    for name in (*CELLS, "MAUVE", "- ceiling", "- first", "texts", "empty"):
        table.add_column(name, justify="right")
    for label in ("ceiling", "floor"):
        what = {"ceiling": "human", "floor": "shuffled"}[label]
        table.add_row(what, "", "", *_scored(report[label]), style="dim")
    for row in report["results"]:
        table.add_row(*_place(row), *_scored(row))
    console.print(table)
    wanted = protocol["prompts"] * protocol["continuations"]
    if report["ceiling"]["texts"] < wanted:
        console.print(
            f"The ceiling rests on {report['ceiling']['texts']:,} texts instead of {wanted:,}: the split has no more."
        )


def _scored(entry: dict[str, Any]) -> list[str]:
    found = [entry.get(name) for name in ("against_ceiling", "against_first")]
    compared = ["" if each is None else difference(each["difference"], each["interval"]) for each in found]
    return [
        with_interval(entry["value"], entry["interval"]),
        *compared,
        f"{entry['texts']:,}",
        str(entry["empty_texts"]),
    ]
