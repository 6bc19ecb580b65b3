"""Settings of a server, validated before anything is loaded."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from rdlm.config.base import Strict

YEAR = 366 * 86_400.0
"""Seconds; threads cannot wait for much longer ones."""


def _named(value: str) -> str:
    """A name that requests can have in their field ``model``, logs on one line, and no alias can be taken for."""
    if not 0 < len(value) <= 200 or not value.isprintable() or re.search(r":k[0-9]+$", value):
        raise ValueError("it has 1 to 200 printable characters and does not end like an alias (:kN)")
    return value


class EngineSettings(Strict):
    """How a checkpoint is run; shared by ``rdlm serve``, ``rdlm generate`` and evaluation."""

    device: str = "auto"
    """auto: the GPU where there is one, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    resident_blocks: int | None = Field(None, ge=1)
    """Most blocks of a network of blocks whose weights are in memory at once; None is all."""
    kv_cache: Literal["shared", "full", "first"] = "shared"
    """shared: a position keeps the keys of its last core step, whatever K is. full: those of every step
    (exact, larger). first: those of its first step, which all later steps read."""
    prefix_cache: Literal["exact", "any-steps", "off"] = "exact"
    """exact: prompts that begin like earlier ones reuse those of their keys that they would compute themselves.
    any-steps: also those of another K or random initial state (shared cache only). off: none."""
    prefix_cache_gb: float = Field(2.0, gt=0)
    """Most memory of kept prefixes, in GB."""
    kernels: Literal["auto", "torch", "graphs"] = "auto"
    """auto: on a CPU, those of serve/engine/cpu, compiled for the machine. torch: PyTorch's own. graphs: these,
    captured as CUDA graphs for rows that decode (GPUs only)."""
    weights: Literal["auto", "int8", "int4"] = "auto"
    """auto: as they are stored. int8, int4: matrices are quantised when they are loaded (CPU kernels only)."""
    max_slots: int = Field(16, ge=1, le=1024)
    """Sequences in flight at once; each owns max_len positions of the cache."""
    max_len: int | None = Field(None, ge=2)
    """Positions of prompt and answer together; None is the model's max_seq_len."""
    chunk: int = Field(256, ge=1)
    """Prompt positions that step together. Part of what a text is computed from in the shared cache, so fixed
    for a server."""
    prefill_rows: int = Field(512, ge=1)
    """Prompt positions in one core step, in addition to the decoding rows."""
    max_queue: int = Field(1024, ge=0)
    """Sequences that may wait for a slot before the server answers 429."""
    default_steps: int | None = Field(None, ge=1)
    """K where a request names none; None is the checkpoint's."""
    max_steps: int | None = Field(None, ge=1)
    """Largest K a request may ask for; None is the checkpoint's."""
    generation_config: Literal["auto", "none"] = "auto"
    """auto: requests that name no temperature, top_p, ... take those of the checkpoint's generation_config.json,
    as in vLLM. none: they sample from the model as it is."""
    forbid_beyond_trained: bool = False
    """Whether the largest K is that of training, where the checkpoint's is larger."""


class HttpSettings(Strict):
    """How the server meets the network."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free one."""
    model_name: Annotated[str, AfterValidator(_named)] | None = None
    """Name in /v1/models; None is the checkpoint's."""
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Bearer tokens that are accepted; none means no check."""
    log_format: Literal["text", "json"] = "text"
    """text: warnings and errors. json: every answer, one object a line, with request ids."""
    max_body_bytes: int = Field(16 * 1024 * 1024, ge=1024)
    """Larger bodies are refused with 413."""
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header that are answered; "*" or none: all. `rdlm serve` on a loopback address
    without keys fills it in."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server; "*" for all. None: browsers allow the server's own page only.
    """
    request_seconds: float | None = Field(None, gt=0, le=YEAR)
    """Longest time a request may take, waiting included; then it ends with what there is. None: no limit."""
    brownout_queue: int | None = Field(None, ge=1)
    """With so many sequences waiting, requests that name no K get half the default; with twice as many a
    third, and so on."""
    tracing: bool = False
    """A span of OpenTelemetry for every request; needs the extra ``otel``, and its OTEL_* variables say where
    spans go."""
    drain_seconds: float = Field(30.0, ge=0, le=YEAR)
    """How long accepted requests may take to finish after SIGTERM."""
