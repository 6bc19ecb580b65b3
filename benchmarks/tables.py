"""Markdown tables of docs/results from the raw JSON: python -m benchmarks.tables
language|depth|cost|cache|quality|blockwise|memory|zoo|speed FILE"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import read_json
from eval.stats import with_interval


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]])


def language(raw: dict[str, Any]) -> str:
    ks = ["1", "2", "4", "8", "16", "32"]
    rows = []
    for run, results, reading in _readings(raw["runs"]):
        nll = {str(r["K"]): r for r in results}
        first = results[0]
        interval = f"{first['nll_interval'][0]:.3f} to {first['nll_interval'][1]:.3f}"
        rows.append([run["arm"] + reading, str(run["seed"]), f"{run['lr']:g}", f"{run['updates']:,}",
                     f"{run['train_tokens'] / 1e6:.2f}", f"{run['cpu_seconds']:.0f}",
                     *(f"{nll[k]['nll']:.4f}" if k in nll else "" for k in ks), interval])  # fmt: skip
    head = [
        "objective",
        "seed",
        "learning rate",
        "updates",
        "M tokens",
        "CPU s",
        *(f"K = {k}" for k in ks),
        "95 % at first K",
    ]
    return table(head, rows)


def _readings(runs: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]], str]]:
    """(run, its results, what to add to its name): two for a model whose likelihood is read at two levels."""
    for run in runs:
        second = run.get("at_sigma_max")
        yield run, run["results"], "" if second is None else ", at its quantile"
        if second is not None:
            yield run, second, ", at sigma_max"


def depth(raw: dict[str, Any]) -> str:
    rows, ks = [], ("1", "2", "4", "8", "16", "32", "64")
    for name in dict.fromkeys(run["arm"] for run in raw["runs"]):
        runs = [run for run in raw["runs"] if run["arm"] == name and run["best_lr"]]
        readings = [("accuracy", "")]
        if "accuracy_at_sigma_max" in runs[0]:
            readings = [("accuracy", ", at its quantile"), ("accuracy_at_sigma_max", ", at sigma_max")]
        for field, reading in readings:
            for length in ("16", "24"):
                cells = []
                for k in ks:
                    values = [run[field][length][k]["all"] for run in runs]
                    cells.append(
                        f"{statistics.mean(values):.3f}"
                        + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")
                    )
                first = name + reading if length == "16" else ""
                rows.append([first, length, f"{runs[0]['lr']:g}", str(runs[0]["updates"]), *cells])
    return table(["objective", "positions", "learning rate", "updates", *(f"K = {k}" for k in ks)], rows)


def cost(raw: dict[str, Any]) -> str:
    rows = [
        [name, f"{r['step_s'] * 1e3:.0f}", f"{r['tokens_per_s']:.0f}", f"{r['bptt_over_this']:.2f}",
            f"{r['flops_bptt_over_this']:.2f}",
         f"{100 * r['share_of_matmul_peak']:.0f} %", f"{r['peak_memory_bytes'] / 2**20:.0f}"]
        for name, r in raw["arms"].items()
    ]  # fmt: skip
    return table(
        [
            "objective",
            "ms an update",
            "tokens/s",
            "time, BPTT / this",
            "FLOPs, BPTT / this",
            "of matmul peak",
            "peak MiB",
        ],
        rows,
    )


def cache(raw: dict[str, Any]) -> str:
    rows = [
        [
            k,
            f"{row['exact']:.5f}",
            *(f"{row[name] - row['exact']:+.5f}" for name in list(row)[1:]),
        ]
        for k, row in raw["nll"].items()
    ]
    names = [f"{name} - exact" for name in list(next(iter(raw["nll"].values())))[1:]]
    return table(["K", "exact (scoring)", *names], rows)


def quality(raw: dict[str, Any]) -> str:
    """report.json of benchmarks.quality: everything against K in one table, then the differences its report
    found."""
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for run in raw["runs"]:
        report, kind = run["report"], run["kind"]
        name = report["config"]["checkpoint"] if kind == "lm-eval" else report["checkpoint"]["name"]
        name += ", published sampler" * ("-published-" in run.get("file", ""))
        for k, text in _quality_cells(kind, report):
            cells.setdefault((name, k), {})[kind] = text
    kinds = ("nll", "gen-ppl", "mauve", "lm-eval")
    order = list(dict.fromkeys(name for name, _ in cells))
    rows = [
        [name, str(k), *(cells[name, k].get(kind, "") for kind in kinds)]
        for name, k in sorted(cells, key=lambda key: (order.index(key[0]), key[1]))
    ]
    head = [
        "objective",
        "K",
        "NLL, nats per token",
        "perplexity at human distinct-2",
        "MAUVE",
        "BLiMP, accuracy",
    ]
    parts = [table([*head[:2], *(f"{name} [95 %]" for name in head[2:])], rows)]
    for section in raw["sections"]:
        for found in section["tables"]:
            if section["title"] != "Provenance":
                shown = [
                    row for row in found["rows"] if section["title"] != "lm-eval" or row[1] == "blimp_local"
                ]
                parts.append(
                    f"### {section['title']}\n\n{table(found['headers'], shown)}\n\n{found['note']}".rstrip()
                )
    return "\n\n".join(parts)


def blockwise(raw: dict[str, Any]) -> str:
    """Rows of benchmarks.blockwise, by objective and number of blocks; "of minutes" is CPU time over that of
    next-token training."""
    budget = next(
        (run["cpu_seconds"] for run in raw["runs"] if run["arm"] == "next_token"), 60 * raw["minutes"]
    )
    rows = []
    for run in raw["runs"]:
        found, second = run["results"][0], run.get("at_sigma_max", [None])[0]
        levels = {point["sigma"]: point["ce"] for point in run.get("curve", [])}
        texts = run.get("texts", [{}])[0]
        perplexity = next(iter(texts.get("perplexity", {}).values()), None)
        rows.append([
            run["arm"], str(run["seed"]), f"{run['lr']:g}", f"{run['updates']:,}",
            f"{run['updates'] / run['num_blocks']:,.0f}",
            f"{run['cpu_seconds']:.0f}", f"{run['cpu_seconds'] / budget:.2f}",
            with_interval(found["nll"], found["nll_interval"]),
            "" if second is None else f"{second['nll']:.3f}",
            *(f"{levels[sigma]:.2f}" if sigma in levels else "" for sigma in (0.3, 0.5, 1.0)),
            "" if perplexity is None else f"{perplexity['value']:.0f}",
            f"{texts['diversity']['distinct_2']['value']:.3f}" if texts else "", *_published(run),
        ])  # fmt: skip
    levels_head = [f"CE at sigma {sigma:g}" for sigma in (0.3, 0.5, 1.0)]
    return table(
        ["arm", "seed", "learning rate", "updates", "of a block", "CPU s", "of end to end", "held-out NLL [95 %]",
            "at sigma_max",
         *levels_head, "generative perplexity", "distinct-2", "perplexity, published sampler",
         "distinct-2, published sampler"], rows,
    )  # fmt: skip


def _published(run: dict[str, Any]) -> list[str]:
    """Perplexity and distinct-2 of what the published sampler wrote."""
    texts = run.get("texts_published", [{}])[0]
    found = next(iter(texts.get("perplexity", {}).values()), None)
    distinct = f"{texts['diversity']['distinct_2']['value']:.3f}" if texts else ""
    return ["" if found is None else f"{found['value']:.0f}", distinct]


def memory(raw: dict[str, Any]) -> str:
    """benchmarks.memory in MiB: arms at ZeRO 0 in fp32 with the layers' share, arms at other stages, and
    appendix G."""

    def mib(row: dict[str, Any], *keys: str) -> list[str]:
        return [f"{row[key] / 2**20:.0f}" for key in keys]

    def predicted(row: dict[str, Any]) -> str:
        total = row["predicted"]["total"]
        return f"{total / 2**20:.0f} ({total / row['peak'] - 1:+.1%})"

    def layers(row: dict[str, Any]) -> int:
        return row["peak"] - 16 * (row["parameter_count"] - row["layer_parameter_count"])

    plain = [row for row in raw["arms"] if (row["precision"], row["zero_stage"]) == ("fp32", 0)]
    whole = {
        row["checkpointing"]: row
        for row in plain
        if row["num_blocks"] == 1 and row["objective"] == "evidence"
    }
    parts = ("parameters_and_optimizer", "activations", "gradients", "peak")
    rows = []
    for row in plain:
        num_blocks, again, own = row["num_blocks"], row["checkpointing"], row["objective"] == "evidence"
        share = layers(row) / layers(whole[again])
        rows.append([
            ("end to end" if num_blocks == 1 else f"one of {num_blocks} blocks")
            + ("" if own else f", {row['objective']}"),
            "yes" if again else "no", *mib(row, *parts), f"{row['peak'] / whole[again]['peak']:.2f}",
            *([f"{share:.3f}", f"{1 / num_blocks:.3f}", f"{share * num_blocks - 1:+.0%}"] if own else ["", "", ""]),
            predicted(row),
        ])  # fmt: skip
    head = ["", "recomputed", "kept", "activations", "gradients", "peak", "peak / end to end", "layers / end to end",
            "1/B", "above 1/B", "predicted"]  # fmt: skip
    stages = [
        [row["precision"], str(row["zero_stage"]), *mib(row, *parts), predicted(row)]
        for row in raw["arms"]
        if row["num_blocks"] == 4 and not row["checkpointing"]
    ]
    standard = raw["appendix_g"]["standard"]
    costs = []
    for name, found in raw["appendix_g"].items():
        ratio, updates = (
            found["seconds_per_update"] / standard["seconds_per_update"],
            1 if name in ("standard", "checkpointing") else 4,
        )
        costs.append([name, f"{found['seconds_per_update']:.2f}", f"{ratio:.2f}", f"{ratio * updates:.2f}",
                *mib(found, "peak"),
                      f"{found['peak'] / standard['peak']:.2f}"])  # fmt: skip
    tables = [
        table(head, rows),
        table(["one of 4 blocks", "ZeRO", "kept", "activations", "gradients", "peak", "predicted"], stages),
        table(
            ["", "CPU s an update", "of standard", "for the whole network", "peak MiB", "of standard"], costs
        ),
    ]
    return "\n\n".join(
        [
            *tables,
            f"limit: {raw['memory_limit']['bytes'] / 2**20:.0f} MiB, {raw['memory_limit']['updates_made_of_two']}",
        ]
    )


def zoo(raw: dict[str, Any]) -> str:
    head = ["golden set", "reference", "golden tensors", "largest difference", "out and in again"]
    speeds = sorted({int(k) for about in raw["families"].values() for k in about.get("tokens_per_s", {})})
    rows = [
        [name, about["reference"], str(len(about["differences"])), f"{about['largest']:.1e}",
         "; ".join(f"{layout}: {what}" for layout, what in about["round_trips"].items()),
         *(f"{about['tokens_per_s'][str(k)]:.0f}" for k in speeds)]
        for name, about in raw["families"].items()
    ]  # fmt: skip
    first = table([*head, *(f"tokens/s, K = {k}" for k in speeds)], rows)
    ks = list(next(iter(raw["published"].values()))["flops"])
    head = [
        "model",
        "parameters",
        "trained at K",
        "KV bytes, shared or first",
        *(f"full, K = {k}" for k in ks),
    ]
    rows = [
        [name, f"{about['parameters'] / 1e9:.2f}e9", str(about["trained_steps"]),
         f"{about['cache_bytes'][ks[0]]['shared']:,}", *(f"{about['cache_bytes'][k]['full']:,}" for k in ks),
         *(f"{about['flops'][k] / 1e9:.2f}" for k in ks)]
        for name, about in raw["published"].items()
    ]  # fmt: skip
    return f"{first}\n\n{table([*head, *(f'GFLOP, K = {k}' for k in ks)], rows)}"


def _quality_cells(kind: str, report: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """(K, figure) of one file; of generated texts what stands at temperature 1 and top-p 1, or at the
    diversity of human text."""
    if kind == "lm-eval":
        group = report["groups"]["blimp_local"]
        value, error = group["acc,none"], 1.96 * group["acc_stderr,none"]
        yield report["config"]["num_steps"], with_interval(value, [value - error, value + error])
    elif kind == "gen-ppl":
        for found in report["at_human_distinct_2"].values():
            for at in found:
                reached = at["perplexity"] is not None
                yield (
                    at["num_steps"],
                    with_interval(at["perplexity"], at["interval"], ".0f") if reached else "not reached",
                )
    else:
        figure = {"nll": "nll", "mauve": "value"}[kind]
        for r in report["results"]:
            between = r["interval" if kind == "mauve" else "nll_interval"]
            yield r.get("K", r.get("num_steps")), with_interval(r[figure], between)


def speed(raw: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in raw["rows"] for name in row["tokens_per_s"]))
    rows = []
    for row in raw["rows"]:
        rates = row["tokens_per_s"]
        own, limit = rates["engine"]["median"], row["limit_at_batch_1"]
        cells = [
            f"{r['median']:.1f} ({r['least']:.1f} to {r['most']:.1f})" if (r := rates.get(name)) else ""
            for name in names
        ]
        peers = [name for name in rates if not name.startswith("engine")]
        ratios = ", ".join(f"{own / rates[name]['median']:.2f}x {name}" for name in peers)
        share = f"{own / limit:.0%}" if row["batch"] == 1 else ""
        rows.append([row["dtype"], str(row["batch"]), str(row["num_steps"]), *cells, ratios, share])
    return table(["weights", "batch", "K", *names, "engine over peers", "of the memory's limit"], rows)


def quantization(raw: dict[str, Any]) -> str:
    ks = list(next(iter(raw["variants"].values()))["nll"])
    rows = [
        [name, f"{row['bytes'] / 1e6:.2f}", f"{row['nll'][ks[-1]]:.4f}"]
        + [f"{row['difference'][k]:+.4f} ± {row['half_width'][k]:.4f}" if i else "" for k in ks]
        for i, (name, row) in enumerate(raw["variants"].items())
    ]
    return table(["weights", "MB", f"NLL at K = {ks[-1]}", *(f"difference at K = {k}" for k in ks)], rows)


RENDER: dict[str, Callable[[dict[str, Any]], str]] = {
    "language": language,
    "depth": depth,
    "cost": cost,
    "cache": cache,
    "quality": quality,
    "blockwise": blockwise,
    "memory": memory,
    "zoo": zoo,
    "speed": speed,
    "quantization": quantization,
}


def main(kind: Annotated[str, typer.Argument(help=" | ".join(RENDER))], file: Path) -> None:
    """Print one table."""
    if kind not in RENDER:
        raise typer.BadParameter(
            f"there is no table {kind!r}; use one of {', '.join(RENDER)}", param_hint="KIND"
        )
    print(RENDER[kind](read_json(file)))


if __name__ == "__main__":
    typer.run(main)
