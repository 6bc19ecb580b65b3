"""What every route needs: the engine, the name it serves under, and the settings. No torch, no litestar."""

from __future__ import annotations

from functools import cached_property

from serve.engine import Engine
from serve.events import Served
from serve.metrics import Metrics
from serve.replies import TokenNames
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

    @property
    def name(self) -> str:
        return self.settings.model_name or self.served.config.name

    @cached_property
    def token_names(self) -> TokenNames:
        return TokenNames(self.served.tokenizer)
