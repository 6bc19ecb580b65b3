"""rdlm: recurrent-depth language models, trained in single passes and served with the number of core steps
chosen per request.

This file is the composition root of the Python interface, as rdlm/cli.py is that of the command: the two name
modules of the other packages, as strings, and nothing below them does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdlm.inference import Engine, Model

__version__ = "0.1.0"
ENGINE = "serve.in_process:InProcess"


def load(source: str | Path, device: Any = "cpu", dtype: Any = None) -> Model:
    """A checkpoint in memory: see docs/python.md.

    source: a checkpoint folder, or the name of a published model on the hub, which is imported once into
    ``$XDG_CACHE_HOME/rdlm``. dtype: of the weights, by default torch.float32. UserError where a file or weight
    is not what its config says, or the device cannot be used.
    """
    import torch

    from rdlm import inference

    return inference.load(source, device, torch.float32 if dtype is None else dtype, _engine)


def _engine(model: Model) -> Engine:
    module, _, name = ENGINE.partition(":")
    made: Engine = getattr(importlib.import_module(module), name)(model)
    return made
