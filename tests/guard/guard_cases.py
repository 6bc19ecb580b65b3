"""What the guard records: tiny networks of every kind, their batches, requests to an engine, training runs.
Plain data, no rdlm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Document = dict[str, Any]
KS = (1, 2, 4)

TEXT = {
    "vocab_size": 64,
    "d_model": 32,
    "num_heads": 2,
    "mlp_width": 64,
    "max_seq_len": 64,
    "noise_embed_dim": 16,
}
IMAGE = {
    "d_model": 32, "num_heads": 2, "mlp_width": 64, "num_layers": 4, "image_size": 8, "patch_size": 4, "num_classes": 4,
    "noise_embed_dim": 16,
}  # fmt: skip
SHAPES: dict[str, Document] = {
    "huginn": {**TEXT, "num_prelude_layers": 1, "num_core_layers": 2, "num_coda_layers": 1},
    "llama": {**TEXT, "num_layers": 3},
    "masked": {**TEXT, "num_layers": 3},
    "vit": IMAGE,
    "dit": IMAGE,
}
FIXED = {"distribution": "fixed", "mean": 1}
TWO = {"num_blocks": 2}
OBJECTIVES = {
    "huginn": ("single_pass", "onestep", "evidence", "paper", "bptt", "next_token"),
    "llama": ("single_pass", "onestep", "evidence", "paper", "bptt", "next_token"),
    "masked": ("masked",),
    "vit": ("classify", "paper", "evidence", "forward_forward"),
    "dit": ("edm",),
}


def case(
    family: str,
    objective: str | Document,
    blocks: Document | None = None,
    noise: Document | None = None,
    **model: Any,
) -> Document:
    """A checkpoint's config with version 1's fields."""
    settings = {"name": objective} if isinstance(objective, str) else dict(objective)
    if family == "llama" and settings["name"] in ("single_pass", "onestep", "bptt"):
        settings["depth"] = FIXED
    document: Document = {
        "model": {"family": family, **SHAPES[family], **model},
        "objective": settings,
        "recurrence": {"default_steps": 2, "max_steps": 8},
    }
    if blocks is not None:
        document["blocks"] = blocks
    if noise is not None:
        document["noise"] = noise
    return document


PAIRS = {f"{family} {name}": case(family, name) for family, names in OBJECTIVES.items() for name in names}
CUT: dict[str, Document] = {
    "llama paper in 2 blocks": case("llama", "paper", TWO),
    "llama evidence in 2 blocks": case("llama", "evidence", TWO),
    "llama evidence in 3 blocks with rows of their own": case(
        "llama", "evidence", {"num_blocks": 3, "targets": "own"}
    ),
    "llama paper in 2 blocks cut by information": case(
        "llama",
        "paper",
        {"num_blocks": 2, "partition": "equal_information", "prior_nats": 3.0, "layers_per_block": [1, 2]},
    ),
    "masked in 2 blocks": case("masked", "masked", {"num_blocks": 2, "overlap": 0.0}),
    "vit paper in 2 blocks": case("vit", "paper", TWO),
    "vit evidence in 2 blocks": case("vit", "evidence", TWO),
    "dit edm in 2 blocks": case("dit", "edm", {"num_blocks": 2, "overlap": 0.05}),
}
DIALS: dict[str, Document] = {
    "huginn single_pass noised by sequence": case(
        "huginn", {"name": "single_pass", "corruption": {"share": 0.5, "per": "sequence"}}
    ),
    "huginn evidence with lognormal levels": case(
        "huginn",
        {"name": "evidence", "corruption": {"distribution": "lognormal"}},
        noise={"p_mean": 0.3, "sigma_max": 40.0},
    ),
    "huginn evidence weighted by level": case("huginn", {"name": "evidence", "loss_weighting": "edm"}),
    "llama paper weighted by level": case("llama", {"name": "paper", "loss_weighting": "edm"}),
    "llama paper noised by position": case(
        "llama", {"name": "paper", "corruption": {"per": "position", "share": 0.6}}
    ),
    "huginn onestep with uniform depth": case(
        "huginn", {"name": "onestep", "depth": {"distribution": "uniform", "mean": 3}}
    ),
    "huginn bptt through 3 of 4 steps": case(
        "huginn", {"name": "bptt", "depth": {"distribution": "fixed", "mean": 4, "grad_steps": 3}}
    ),
    "huginn single_pass with 2 gradient steps": case(
        "huginn", {"name": "single_pass", "depth": {"mean": 3, "grad_steps": 2}}
    ),
    "huginn single_pass untied from a random state": case(
        "huginn", "single_pass", tie_embeddings=False, state_init="normal", adapter_init="random"
    ),
    "huginn onestep without biases": case(
        "huginn", "onestep", qk_bias=False, residual_init="plain", num_heads=4
    ),
    "llama next_token untied with grouped heads": case(
        "llama", "next_token", tie_embeddings=False, num_heads=4, num_kv_heads=2, rope_base=500.0
    ),
    "llama evidence with grouped heads": case("llama", "evidence", num_heads=4, num_kv_heads=1),
    "masked untied": case("masked", {"name": "masked", "masking": {"t_min": 0.1}}, tie_embeddings=False),
    "vit forward_forward with a threshold": case("vit", {"name": "forward_forward", "goodness": "threshold"}),
    "dit edm without labels or weights": case(
        "dit", {"name": "edm", "label_dropout": 0.5, "loss_weighting": "none"}, noise={"p_mean": 0.5}
    ),
}
MODELS = {**PAIRS, **CUT, **DIALS}
RECOMPUTED = (
    "huginn single_pass",
    "llama evidence",
    "llama evidence in 2 blocks",
    "vit paper",
    "masked masked",
    "dit edm",
)


def is_image(document: Document) -> bool:
    return document["model"]["family"] in ("vit", "dit")


def batch(document: Document, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs, targets, mask) of one update."""
    rng = torch.Generator().manual_seed(100 + step)
    if is_image(document):
        images = 0.5 * torch.randn(4, 3, 8, 8, generator=rng)
        targets = torch.randint(0, 4, (4, 1), generator=rng)
        return images, targets, torch.tensor([[True], [True], [step % 3 > 0], [True]])
    ids = torch.randint(0, 64, (4, 17), generator=rng)
    mask = torch.rand(4, 16, generator=rng) < 0.85
    return (ids[:, 1:] if document["model"]["family"] == "masked" else ids[:, :-1]), ids[:, 1:], mask


def inputs_of(document: Document) -> tuple[Tensor, Tensor]:
    """(inputs, targets) to be scored: a formula, no random numbers."""
    if is_image(document):
        return ((torch.arange(3 * 192).float() * 37 % 101) / 50 - 1).view(3, 3, 8, 8), torch.tensor(
            [[1], [0], [3]]
        )
    ids = (torch.arange(2 * 11).view(2, 11) * 23 + 5) % 64
    return (ids[:, 1:] if document["model"]["family"] == "masked" else ids[:, :-1]), ids[:, 1:]


ORDERS = ("random", "left_to_right", "confidence")
BRIDGES = ("hard", "euler", "multistep")


# Serving

TEXTS = (
    "in the beginning was the word and the word was with god",
    "and it came to pass in those days — ærlig talt",
)
FROM_FOLDER = ("huginn single_pass", "llama next_token", "llama evidence in 2 blocks", "masked in 2 blocks")
GREEDY = {"temperature": 0.0}
WARM = {"temperature": 0.9, "top_p": 0.95}
FEW = {"temperature": 0.7, "top_k": 4}
"""Repeats itself, so that penalties matter."""


def ask(length: int, num_steps: int, seed: int = 0, max_tokens: int = 6, **fields: Any) -> Document:
    prompt = [(7 * i + 3 * length + seed) % 290 + 5 for i in range(length)]
    return {
        "prompt": prompt,
        "num_steps": num_steps,
        "max_tokens": max_tokens,
        "sampling": WARM,
        "seed": seed,
        **fields,
    }


def serving(vocab_size: int) -> dict[str, tuple[Document, Document, list[Document]]]:
    """Name -> (config, settings of the engine, requests)."""
    size = {"vocab_size": vocab_size, "max_seq_len": 128}
    thinking = [
        ask(3, 1, sampling=GREEDY),
        ask(37, 4, 1, sampling=GREEDY, logprobs=1),
        ask(9, 2, 2, logprobs=2, choice=1),
        ask(20, 8, 3, prompt_logprobs=1, sampling={"temperature": 1.1, "top_k": 20, "min_p": 0.02}),
        ask(12, 8, 4, exit={"criterion": "latent-diff", "threshold": 0.35, "min_steps": 2}),
        ask(12, 8, 5, exit={"criterion": "kl", "threshold": 0.05, "prefill": False}),
        ask(14, 8, 6, exit={"criterion": "cosine", "threshold": 0.05, "check_every": 2}),
        ask(8, 8, 7, exit={"criterion": "argmax-stability", "threshold": 2.0}),
        ask(8, 8, 7, exit={"criterion": "entropy-diff", "threshold": 0.05}),
        ask(8, 8, 7, exit={"criterion": "minp-kl", "threshold": 0.05}),
        ask(18, 6, 8, schedule=[6, 1, 3]),
        ask(11, 4, 9, prompt_logprobs=0, sweep=[1, 2, 4]),
        ask(5, 3, 10, show={"every": 1, "top": 2}, max_tokens=3),
        ask(6, 3, 11, 24, sampling={**FEW, "repetition_penalty": 1.3}),
        ask(6, 3, 11, 24, sampling={**FEW, "presence_penalty": 1.5}),
        ask(6, 3, 11, 24, sampling={**FEW, "frequency_penalty": 0.8, "logit_bias": {40: 2.0, 7: -3.0}}),
        ask(6, 2, 12, 12, stop_ids=frozenset(range(0, vocab_size, 3)), min_tokens=3),
        ask(6, 2, 13, 12, stop=["e", "th"]),
    ]  # fmt: skip
    sampling = [
        ask(3, 1, sampling=GREEDY, logprobs=1),
        ask(37, 4, 1, sampling=GREEDY),
        ask(9, 2, 2, logprobs=2, choice=1),
        ask(20, 6, 3, prompt_logprobs=1),
        *(
            ask(12, k, k, sampling={**WARM, "bridge": bridge}, logprobs=0)
            for bridge in BRIDGES
            for k in (1, 3, 5)
        ),
        ask(8, 4, 5, sampling={**GREEDY, "bridge": "euler"}),
        ask(6, 3, 11, 12, sampling={**WARM, "repetition_penalty": 1.3, "logit_bias": {40: 2.0}}),
        ask(18, 6, 8, schedule=[6, 1, 3]),
    ]
    plain = [
        ask(3, 1, sampling=GREEDY),
        ask(37, 1, 1, logprobs=2),
        ask(20, 1, 3, prompt_logprobs=1),
        ask(9, 1, 4, 12, stop=["e"]),
    ]
    filled = [
        # Hidden tokens alone are all alike, and which is the surest would be decided by rounding: by
        # confidence they have a prompt.
        *(ask(length, k, length, order=order) for order in ORDERS for length, k in ((2, 4), (3, 1), (16, 8))),
        *(ask(0, 4, order=order) for order in ORDERS[:2]),
        *(ask(5, 5, 2, 9, order=order, sampling=GREEDY, logprobs=1) for order in ORDERS),
        ask(9, 2, 3, 4, prompt_logprobs=1),
        ask(
            7,
            4,
            5,
            10,
            stop_ids=frozenset(range(0, vocab_size, 4)),
            min_tokens=3,
            sampling={**WARM, "logit_bias": {40: 2.0}},
        ),
    ]
    huginn, llama = (
        (lambda objective, **more: case("huginn", objective, **size, **more)),
        _sized("llama", size),
    )
    whole = {"kv_cache": "full"}
    found = {
        "huginn single_pass": (huginn("single_pass"), {}, thinking),
        "huginn single_pass, full cache": (huginn("single_pass"), whole, thinking),
        "huginn onestep": (huginn("onestep", state_init="normal", tie_embeddings=False), {}, thinking),
        "huginn onestep, full cache": (
            huginn("onestep", state_init="normal", tie_embeddings=False),
            whole,
            thinking,
        ),
        "huginn evidence": (huginn("evidence"), {}, sampling),
        "huginn evidence, full cache": (huginn("evidence"), whole, sampling),
        "huginn paper": (huginn("paper"), {}, sampling),
        "llama next_token": (llama("next_token", num_heads=4, num_kv_heads=2), {}, plain),
        "llama evidence": (llama("evidence", num_heads=4, num_kv_heads=1), {}, sampling),
        "llama evidence in 2 blocks": (llama("evidence", TWO), {}, sampling),
        "llama paper in 2 blocks": (llama("paper", TWO), {}, sampling),
        "masked": (case("masked", "masked", **size), {}, filled),
        "masked in 2 blocks": (
            case("masked", "masked", {"num_blocks": 2, "overlap": 0.0}, **size),
            {},
            filled,
        ),
    }
    return found


def _sized(family: str, size: Document) -> Callable[..., Document]:
    return lambda objective, blocks=None, **more: case(family, objective, blocks, **size, **more)


# Training

PLANNED = ("huginn_70m", "ar_lm1b_blocks", "masked_text8", "dit_cifar10")
"""Configs whose memory is predicted, at small batches: the time that takes grows with them."""
RUN: Document = {
    "name": "tiny",
    "seed": 3,
    "model": {**TEXT, "vocab_size": 8, "max_seq_len": 32, "family": "huginn", "num_prelude_layers": 1,
    "num_core_layers": 1,
              "num_coda_layers": 1},
    "objective": {"name": "single_pass"},
    "data": {"kind": "group_product", "group": "s3", "length": 12},
    "batch": {"global_size": 4, "micro_size": 2},
    "optimizer": {"lr": 0.003, "weight_decay": 0.1, "eps": 1.0e-4},
    "schedule": {"kind": "cosine", "steps": 6, "warmup_steps": 2},
    "precision": "fp32",
    "checkpoint": {"interval_steps": 2, "keep": 5},
    "evaluation": {"interval_steps": 3, "steps": [1, 2], "max_tokens": 48},
    "log": {"tensorboard": False},
}  # fmt: skip
BLOCKS: Document = {
    "model": {**TEXT, "vocab_size": 8, "max_seq_len": 32, "family": "llama", "num_layers": 3},
    "objective": {"name": "paper"},
    "blocks": {"num_blocks": 2, "layers_per_block": [2, 1]},
}


# Checkpoints


def _small(document: Document) -> Document:
    """The same with few weights: these are committed."""
    few = {
        name: min(value, 2) if name == "num_layers" else 1
        for name, value in document["model"].items()
        if name.endswith("_layers")
    }
    return {**document, "model": {**document["model"], "mlp_width": 16, "noise_embed_dim": 8, **few}}


LARGER: dict[str, Document] = {
    "huginn_single_pass": MODELS["huginn single_pass"],
    "huginn_paper": MODELS["huginn paper"],
    "huginn_bptt": MODELS["huginn bptt"],
    "huginn_normal_state_untied": MODELS["huginn single_pass untied from a random state"],
    "llama_next_token_grouped": MODELS["llama next_token untied with grouped heads"],
    "llama_evidence_2_blocks": MODELS["llama evidence in 2 blocks"],
    "llama_paper_own_rows": case("llama", "paper", {"num_blocks": 2, "targets": "own"}),
    "masked": MODELS["masked masked"],
    "masked_2_blocks": MODELS["masked in 2 blocks"],
    "vit_classify": MODELS["vit classify"],
    "vit_paper": MODELS["vit paper"],
    "vit_forward_forward": MODELS["vit forward_forward"],
    "dit_edm": MODELS["dit edm"],
}
CHECKPOINTS = {name: _small(document) for name, document in LARGER.items()}
SERVED_CHECKPOINT = "huginn_onestep_text"
"""The one with a tokenizer."""
SERVED_DOCUMENT = _small(case("huginn", "onestep", vocab_size=300))
