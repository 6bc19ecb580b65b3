"""Every metric of ``rdlm eval``: a line each. A metric is imported when it is run, or when a report holds
its results."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.metric import Metric

METRICS: dict[str, tuple[str, str]] = {
    "nll": ("eval.texts.nll:Nll", "Held-out NLL per token, perplexity and bits per byte against K."),
    "gen-ppl": (
        "eval.texts.gen_ppl:GenPpl",
        "Perplexity of generated texts under judge models, with their diversity.",
    ),
    "mauve": ("eval.texts.mauve:Mauve", "Distance of the distribution of generated texts from human ones."),
    "lm-eval": ("eval.texts.lm_eval:LmEval", "Tasks of lm-evaluation-harness, in process."),
    "depth": (
        "eval.texts.depth:Depth",
        "Accuracy on generated tasks that need serial computation, against K.",
    ),
    "convergence": (
        "eval.texts.convergence:Convergence",
        "What one more core step changes in state and top tokens.",
    ),
    "ce-by-sigma": (
        "eval.texts.noise_curve:NoiseCurve",
        "Cross-entropy against the noise level, compared with the best possible.",
    ),
    "accuracy": (
        "eval.images.accuracy:Accuracy",
        "Classification of images by a ViT, against K and sampler.",
    ),
    "fid": ("eval.images.fid:Fid", "Distance between two sets of images in a network's features."),
}
"""Command -> (``module:class``, one line of help), in the order of the sections of a report."""


def load_metric(name: str) -> Metric:
    """The metric of a name in METRICS."""
    module, _, attribute = METRICS[name][0].partition(":")
    found: Metric = getattr(importlib.import_module(module), attribute)()
    return found


def metric_of(report: Any) -> str | None:
    """The metric that wrote a file of results; None for a file that is none. lm-eval's own files name no
    evaluation."""
    if not isinstance(report, dict):
        return None
    if "lm_eval_version" in report and "results" in report:
        return "lm-eval"
    name = report.get("evaluation")
    return name if name in METRICS else None
