"""The server under Ray Serve: replicas of the same ASGI application on one or many machines. Needs the extra
``ray``.

serve run serve.ray_app:build checkpoint=/models/demo replicas=2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litestar import Litestar
from pydantic import Field
from ray import serve as ray_serve

from rdlm.config.base import Strict, parse
from serve.api.app import create_app
from serve.engine.engine import Engine
from serve.settings import EngineSettings, HttpSettings


class RaySettings(Strict):
    """What ``build`` takes; the rest of Ray's options belong into its own config file."""

    checkpoint: Path
    """The same folder on every machine."""
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1.0, gt=0)
    """Of each replica."""
    gpus: float = Field(0.0, ge=0)
    engine: EngineSettings = EngineSettings()
    http: HttpSettings = HttpSettings()
    """Host, port and drain_seconds are Ray's business and have no effect here."""


def build(args: dict[str, Any]) -> ray_serve.Application:
    """A Ray Serve application. Raises UserError for settings that cannot be used.

    Each replica loads the checkpoint before Ray sends it anything, and bounds its own queue; Ray spreads
    requests by their number.
    """
    settings: RaySettings = parse(RaySettings, args, "the arguments of serve.ray_app")

    def application() -> Litestar:  # in each replica: neither application nor model can be sent there
        from serve.loading import load_served

        engine = Engine(lambda: load_served(settings.checkpoint, settings.engine), settings.engine.max_queue)
        engine.start()
        engine.wait_ready()
        return create_app(engine, settings.http)

    most = settings.engine.max_slots + settings.engine.max_queue
    deployment = ray_serve.deployment(
        ray_serve.ingress(application)(),
        name="rdlm",
        num_replicas=settings.replicas,
        max_ongoing_requests=most,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind()
