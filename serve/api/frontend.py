"""What every route needs: the engine, the name it serves under, and the settings. No torch, no litestar."""

from __future__ import annotations

from functools import cached_property

from serve.api.depth import Terms
from serve.api.metrics import Metrics
from serve.api.openai_format import TokenNames
from serve.api.request_parsing import Job
from serve.engine.engine import Engine
from serve.engine.events import Served
from serve.settings import HttpSettings


class Frontend:
    """Engine, HTTP settings and metrics, seen from a request."""

    def __init__(self, engine: Engine, settings: HttpSettings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)

    @property
    def served(self) -> Served:
        """Raises EngineClosed (503) while the model loads."""
        return self.engine.served

    def terms(self, header_steps: int | None = None) -> Terms:
        """What a request that arrives now is checked against; header_steps: of its X-Num-Steps."""
        served, waiting, limit = self.served, self.engine.num_waiting, self.settings.brownout_queue
        pressure = 0 if limit is None else waiting // limit
        seconds = self.settings.request_seconds
        limit_ms = None if seconds is None else round(1000 * seconds)
        return Terms(
            self.name, served, max(1, served.default_steps // (1 + pressure)), limit_ms, header_steps
        )

    def note(self, job: Job) -> None:
        """Count what the metrics say of a request that is about to be submitted."""
        self.metrics.brownouts += job.depth.browned_out

    @property
    def name(self) -> str:
        return self.settings.model_name or self.served.config.name

    @cached_property
    def token_names(self) -> TokenNames:
        return TokenNames(self.served.tokenizer)
