"""The server process: engine thread, uvicorn, signals, the line that says where it is."""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import uvicorn

from rdlm.checkpoints.folder import load_config
from rdlm.errors import UserError
from serve.api import observability
from serve.api.app import create_app
from serve.api.chat_template import ChatTemplate
from serve.connection import BoundedConnection
from serve.engine.engine import Engine, Served
from serve.loading import load_served
from serve.settings import EngineSettings, HttpSettings

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
GRACE_SECONDS = 5
"""Time for clients to read what the drained or stopped engine has sent; connections still open after it are
cut.
"""


class GracefulServer(uvicorn.Server):
    """A server that ends gracefully on SIGTERM, SIGINT or SIGHUP: new requests get 503, accepted ones finish.
    A second SIGINT does not wait.

    The port stays open while the engine drains, or clients would see refused connections in place of the 503.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.drain_seconds = engine, drain_seconds
        self._is_draining = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again after shutdown; here a drained server has exit status 0."""
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup makes it
            signals.append(signal.SIGHUP)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._is_draining and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        if not self._is_draining:
            self._is_draining = True
            self.engine.refuse()
            threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        """Wait until the engine is idle, or stop it when time is over (its requests end with 503 then), and
        close the port.
        """
        deadline = time.monotonic() + self.drain_seconds
        try:
            tell(f"rdlm: draining for at most {self.drain_seconds:g} s")
            if not self.engine.drain(self.drain_seconds):
                self.engine.stop()
            self.config.timeout_graceful_shutdown = round(max(GRACE_SECONDS, deadline - time.monotonic()))
        finally:
            self.should_exit = True


def run_server(
    checkpoint: Path, engine_settings: EngineSettings, settings: HttpSettings, port_file: Path | None
) -> None:
    """Serve until a signal. Raises UserError for a checkpoint that cannot be served or an address that cannot
    be bound.
    """
    observability.configure(settings.log_format)
    load_config(checkpoint).check_text(
        "the server"
    )  # the cheap part of loading: mistakes end the command before it listens
    listener = _bind(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    if not settings.allowed_hosts and not settings.api_keys and ipaddress.ip_address(host).is_loopback:
        names = (*LOOPBACK_NAMES, host, settings.host.lower())
        settings = settings.model_copy(update={"allowed_hosts": names})
    engine = Engine(lambda: _load(checkpoint, engine_settings), engine_settings.max_queue)
    config = uvicorn.Config(
        create_app(engine, settings),
        http=BoundedConnection,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=75,
    )
    server = GracefulServer(config, engine, settings.drain_seconds)
    if port_file is not None:
        _write_port(port_file, port)
    tell(f"rdlm: loading {checkpoint}")
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


def _load(checkpoint: Path, settings: EngineSettings) -> Served:
    """The model, and what a request would find wrong with it otherwise. Raises UserError."""
    served = load_served(checkpoint, settings)
    ChatTemplate.of(served.tokenizer)
    known, vocabulary = served.tokenizer.vocab_size, served.config.model.vocab_size
    if known < vocabulary:
        problem = f"the tokenizer has {known} ids and the model {vocabulary}"
        tell(f"rdlm: {problem}: ids from {known} on are never drawn", is_warning=True)
    return served


def _announce(engine: Engine, server: GracefulServer, url: str) -> None:
    """Print where the server is when the model is there; end the server when it cannot be."""
    try:
        served = engine.wait_ready()
    except BaseException:  # run_server raises it in the main thread
        server.should_exit = True
        return
    gc.collect()
    gc.freeze()  # what has been loaded stays: the collector need not visit it between tokens
    if served.sampling_defaults:
        named = ", ".join(f"{name} {value:g}" for name, value in served.sampling_defaults.items())
        tell(f"rdlm: requests that name none take {named} (generation_config.json)")
    slots = served.scheduler.num_slots
    tell(
        f"rdlm: serving {served.config.name} at {url}/v1 (K 1 to {served.max_steps}, default {served.default_steps}; "
        f"{slots} at once, {served.max_len} tokens each); a page to try it at {url}/, documentation at {url}/schema",
    )


def tell(line: str, is_warning: bool = False) -> None:
    """Print a line, whether or not somebody still reads there: a terminal or pipe may be gone, a disk full."""
    try:
        print(line, file=sys.stderr if is_warning else sys.stdout, flush=True)
    except OSError:
        if not is_warning:
            sys.stdout = None  # what it holds would fail again at the end of the process


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
        partial.write_text(f"{port}\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            "--port-file",
            str(path),
            f"cannot be written ({error.strerror})",
            "name a file in an existing folder",
        ) from None
