"""rdlm: recurrent-depth language models, trained in single passes and served with the number of core steps
chosen per request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdlm.inference import Model

__version__ = "0.1.0"


def load(folder: str | Path, device: Any = "cpu", dtype: Any = None) -> Model:
    """A checkpoint folder in memory, weights in ``dtype`` (fp32): see rdlm.inference.Model."""
    import torch

    from rdlm import inference

    return inference.load(folder, device, torch.float32 if dtype is None else dtype)
