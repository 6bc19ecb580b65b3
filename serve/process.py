"""The server process: engine thread, uvicorn, signals, the line that says where it is."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from rdlm.checkpoints.folder import load_config
from rdlm.errors import UserError
from serve.api import logs
from serve.api.app import create_app
from serve.engine.engine import Engine
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings


class GracefulServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new work, let accepted requests finish, return. A second SIGINT does not wait."""

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self.engine = engine

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again after shutdown; here a drained server has exit status 0."""
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine.refuse()
        super().handle_exit(sig, frame)


def run_server(
    checkpoint: Path, engine_settings: EngineSettings, settings: HttpSettings, port_file: Path | None
) -> None:
    """Serve until a signal. Raises UserError for a checkpoint that cannot be served or an address that cannot be bound."""
    logs.configure(settings.log_format)
    load_config(checkpoint).check_text(
        "the server"
    )  # the cheap part of loading: mistakes end the command before it listens
    engine = Engine(lambda: load_served(checkpoint, engine_settings), engine_settings.max_queue)
    listener = _bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    config = uvicorn.Config(
        create_app(engine, settings),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        timeout_keep_alive=75,
    )
    server = GracefulServer(config, engine)
    if port_file is not None:
        _write_port(port_file, port)
    engine.start()
    threading.Thread(target=_announce, args=(engine, server, f"http://{host}:{port}"), daemon=True).start()
    try:
        server.run(sockets=[listener])
    finally:
        engine.stop()
        if port_file is not None:
            port_file.unlink(missing_ok=True)
    if engine.error is not None:
        raise engine.error


def _announce(engine: Engine, server: GracefulServer, url: str) -> None:
    """Say when the model is there; end the server when it cannot be."""
    try:
        served = engine.wait_ready()
    except BaseException:  # run_server raises it in the main thread
        server.should_exit = True
        return
    slots = served.scheduler.num_slots
    print(
        f"rdlm: serving {served.config.name} at {url}/v1 (K 1 to {served.max_steps}, default {served.default_steps}; "
        f"{slots} at once, {served.max_len} tokens each; documentation at {url}/schema)",
        flush=True,
    )


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        raise UserError(
            "--port",
            port,
            f"cannot listen on {host} ({error.strerror})",
            "choose another, or 0 for a free one",
        ) from None
    return listener


def _write_port(path: Path, port: int) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(f"{port}\n")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            "--port-file",
            str(path),
            f"cannot be written ({error.strerror})",
            "name a file in an existing folder",
        ) from None
