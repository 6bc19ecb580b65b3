"""``rdlm serve``: a checkpoint behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rdlm.config.base import parse
from rdlm.errors import UserError
from serve.api.options import CacheOption, CheckpointOption, DeviceOption, DtypeOption
from serve.settings import EngineSettings, HttpSettings

app = typer.Typer(add_completion=False)


@app.command(epilog="Example: rdlm serve --checkpoint runs/demo/model --port 8000 --default-steps 8")
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
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    kv_cache: CacheOption = "shared",
    max_slots: Annotated[int, typer.Option(help="Sequences in flight at once.")] = 16,
    max_len: Annotated[
        int | None,
        typer.Option(help="Tokens of prompt and answer; by default all the model takes.", show_default=False),
    ] = None,
    default_steps: Annotated[
        int | None,
        typer.Option(help="K of requests that name none; by default the checkpoint's.", show_default=False),
    ] = None,
    max_steps: Annotated[
        int | None,
        typer.Option(help="Largest K of a request; by default the checkpoint's.", show_default=False),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Waiting sequences before the server answers 429.")] = 1024,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="RDLM_API_KEYS",
            help="Accept this bearer key; may be repeated. None: no check.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Accept the keys in this file too, one a line; # begins a comment.", show_default=False
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let pages of this origin call the server; may be repeated, * for all.", show_default=False
        ),
    ] = None,
    max_body_bytes: Annotated[int, typer.Option(help="Larger request bodies are refused.")] = 16
    * 1024
    * 1024,
    request_seconds: Annotated[
        float | None,
        typer.Option(help="End what takes longer, waiting included; by default nothing.", show_default=False),
    ] = None,
    brownout_queue: Annotated[
        int | None,
        typer.Option(
            help="With so many waiting, halve K of requests that name none; by default never.",
            show_default=False,
        ),
    ] = None,
    tracing: Annotated[
        bool, typer.Option(help="OpenTelemetry spans (extra otel; OTEL_* variables say where to).")
    ] = False,
    log_format: Annotated[
        str, typer.Option(help="text: warnings and errors. json: also every answer, one object a line.")
    ] = "text",
    drain_seconds: Annotated[
        float, typer.Option(help="Time for accepted requests to finish after SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve completions and chat with the number of core steps K chosen per request (num_steps, or model alias NAME:kN)."""
    given = {
        "device": device,
        "dtype": dtype,
        "kv_cache": kv_cache,
        "max_slots": max_slots,
        "max_len": max_len,
    }
    given |= {"default_steps": default_steps, "max_steps": max_steps, "max_queue": max_queue}
    engine_settings: EngineSettings = parse(EngineSettings, given, "the options of rdlm serve")
    network = {
        "host": host,
        "port": port,
        "model_name": model_name,
        "api_keys": (*(api_key or ()), *_keys_of(api_key_file)),
        "cors_origins": tuple(cors_origin or ()),
        "max_body_bytes": max_body_bytes,
        "request_seconds": request_seconds,
        "brownout_queue": brownout_queue,
        "tracing": tracing,
        "drain_seconds": drain_seconds,
        "log_format": log_format,
    }
    http_settings: HttpSettings = parse(HttpSettings, network, "the options of rdlm serve")
    from serve.process import run_server

    run_server(checkpoint, engine_settings, http_settings, port_file)


def _keys_of(path: Path | None) -> list[str]:
    """The keys in a file. Raises UserError where it cannot be read or has none: the server would be open to all."""
    if path is None:
        return []
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
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
