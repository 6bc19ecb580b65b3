"""``rdlm serve``: a checkpoint behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rdlm.command_line import new_app
from rdlm.config.base import parse
from rdlm.errors import UserError
from serve.settings import EngineSettings, HttpSettings

app = new_app()
CheckpointOption = Annotated[
    Path,
    typer.Option(help="Checkpoint folder, for instance OUTPUT/model of `rdlm train`.", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="auto (the GPU where there is one), cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="auto (bfloat16 on a GPU), float32 or bfloat16, which is faster where the CPU has AMX."
    ),
]
CacheOption = Annotated[
    str,
    typer.Option(
        help="shared: keep the keys of the last core step of a position. full: keep those of every step (exact, "
        "larger). first: keep those of the first step."
    ),
]
KernelOption = Annotated[
    str,
    typer.Option(
        help="auto: on a CPU, kernels compiled for the machine (needs g++ once). torch: PyTorch's own, slower. "
        "graphs: these as CUDA graphs."
    ),
]
WeightOption = Annotated[
    str,
    typer.Option(
        help="auto: as stored. int8, int4: quantised when loaded, smaller and faster (CPU kernels only)."
    ),
]
"""These options are those of `rdlm generate` and `rdlm images` too."""


@app.command(epilog="Example: rdlm serve --checkpoint runs/demo/model --port 8000 --num-steps 8")
def serve(
    checkpoint: CheckpointOption,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    port_file: Annotated[
        Path | None, typer.Option(help="Write the port here once it is bound.", show_default=False)
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="Name in /v1/models; by default the checkpoint's.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    kv_cache: CacheOption = "shared",
    prefix_cache: Annotated[
        str,
        typer.Option(
            help="exact: prompts reuse keys of earlier ones where these are what they would compute. any-steps: "
            "keys of any K. off: none."
        ),
    ] = "exact",
    prefix_cache_gb: Annotated[float, typer.Option(help="Most memory of kept prefixes, in GB.")] = 2.0,
    kernels: KernelOption = "auto",
    weights: WeightOption = "auto",
    max_slots: Annotated[int, typer.Option(help="Sequences that run at once; more wait.")] = 16,
    max_len: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of prompt and answer together; by default the context of the model.",
            show_default=False,
        ),
    ] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(help="K of requests that name none; by default the checkpoint's.", show_default=False),
    ] = None,
    max_num_steps: Annotated[
        int | None,
        typer.Option(help="Largest K of a request; by default the checkpoint's.", show_default=False),
    ] = None,
    forbid_beyond_trained: Annotated[
        bool,
        typer.Option(
            "--forbid-beyond-trained", help="Refuse a K above those that the model was trained with."
        ),
    ] = False,
    generation_config: Annotated[
        str,
        typer.Option(
            help="auto: the checkpoint's generation_config.json has the temperature, top_p, ... of requests that name "
            "none. none: 1, the model as it is."
        ),
    ] = "auto",
    max_queue: Annotated[
        int, typer.Option(help="Sequences that may wait; beyond, the server answers 429.")
    ] = 1024,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RDLM_API_KEYS",
            help="Accept this bearer key; may be repeated. Without any, no key is needed.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Also accept the keys in this file, one per line; # begins a comment.", show_default=False
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer requests with this Host header; may be repeated; * means all. By default a server without "
            "keys "
            "on a loopback address answers loopback names only, any other server all names.",
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let web pages of this origin call the server; may be repeated; * means all.",
            show_default=False,
        ),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Refuse larger request bodies.")] = 16 * 1024 * 1024,
    request_seconds: Annotated[
        float | None,
        typer.Option(
            help="Most seconds for an answer, waiting included; by default no limit.", show_default=False
        ),
    ] = None,
    brownout_queue: Annotated[
        int | None,
        typer.Option(
            help="While this many sequences wait, halve K of requests that name none; by default never.",
            show_default=False,
        ),
    ] = None,
    tracing: Annotated[
        bool, typer.Option(help="Send OpenTelemetry spans (extra otel; the OTEL_* variables say where to).")
    ] = False,
    log_format: Annotated[
        str,
        typer.Option(help="text: warnings and errors. json: also every answer, one JSON object per line."),
    ] = "text",
    drain_seconds: Annotated[
        float, typer.Option(help="Seconds for accepted requests to finish after SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve completions and chat with the number of core steps K chosen per request (num_steps, or model
    alias NAME:kN).
    """
    engine_options = {
        "device": device,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "prefix_cache": prefix_cache,
        "prefix_cache_gb": prefix_cache_gb,
        "kernels": kernels,
        "weights": weights,
        "max_slots": max_slots,
        "max_len": max_len,
        "default_steps": num_steps,
        "max_steps": max_num_steps,
        "forbid_beyond_trained": forbid_beyond_trained,
        "generation_config": generation_config,
        "max_queue": max_queue,
    }
    engine_settings: EngineSettings = parse(EngineSettings, engine_options, "the options of rdlm serve")
    http_options = {
        "host": host,
        "port": port,
        "model_name": model_name,
        "api_keys": (*(api_key or ()), *_keys_of(api_key_file)),
        "allowed_hosts": tuple(name.lower() for name in allowed_host or ()),
        "cors_origins": tuple(cors_origin or ()),
        "max_body_bytes": max_body_bytes,
        "request_seconds": request_seconds,
        "brownout_queue": brownout_queue,
        "tracing": tracing,
        "drain_seconds": drain_seconds,
        "log_format": log_format,
    }
    http_settings: HttpSettings = parse(HttpSettings, http_options, "the options of rdlm serve")
    from serve.process import run_server

    run_server(checkpoint, engine_settings, http_settings, port_file)


def _keys_of(path: Path | None) -> list[str]:
    """The keys in a file. Raises UserError where it cannot be read or has none: the server would be open to
    all.
    """
    if path is None:
        return []
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        raise UserError(
            "--api-key-file", str(path), problem, "name a text file with one key a line"
        ) from None
    keys = [line for line in lines if line]
    if not keys:
        raise UserError(
            "--api-key-file", str(path), "has no key", "write at least one, or leave the option out"
        )
    return keys
