"""Training objectives. To add one: a class in a file here, and its config class in rdlm/config/objective.py."""

from __future__ import annotations

import importlib

from rdlm.config.objective import BaseObjectiveConfig
from rdlm.objectives.base import Objective


def objective_class(config: BaseObjectiveConfig) -> type[Objective]:
    """The class that a config names."""
    module, _, name = config.implementation.partition(":")
    found: type[Objective] = getattr(importlib.import_module(module), name)
    return found
