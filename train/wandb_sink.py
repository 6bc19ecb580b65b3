"""Records of a run in Weights & Biases, an optional sink beside ``metrics.jsonl``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from rdlm.errors import UserError
from train.settings import TrainConfig, WandbConfig


def wandb_module() -> Any:
    """UserError where the package is not installed."""
    try:
        import wandb
    except ModuleNotFoundError:
        remedy = "pip install 'rdlm-stack[wandb]', or leave the section out"
        raise UserError("log.wandb", "...", "the package wandb is not installed", remedy) from None
    return wandb


class Wandb:
    """One run of a project. Its id follows from the output folder, so that a resumed run goes on in it."""

    def __init__(self, wanted: WandbConfig, config: TrainConfig, output: Path) -> None:
        identity = hashlib.sha256(f"{output.resolve()}:{config.name}".encode()).hexdigest()[:12]
        self._run = wandb_module().init(
            project=wanted.project, entity=wanted.entity, name=config.name, id=identity, resume="allow",
            dir=str(output), config=config.model_dump(mode="json"),
        )  # fmt: skip

    def log(self, kind: str, record: dict[str, Any]) -> None:
        """kind: ``metrics``, or ``held_out``, whose figures get that prefix."""
        prefix = "" if kind == "metrics" else f"{kind}/"
        figures = {
            prefix + key: value for key, value in record.items() if key != "step" and value is not None
        }
        self._run.log(figures, step=record["step"])

    def close(self) -> None:
        self._run.finish()
