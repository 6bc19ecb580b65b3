"""How large the state of a pretrained core is beside the prelude's output e, which a new injection reads together.

A core's output is a residual stream that many layers have added to. Read by one matrix with e, its half of the
gradient is as many times larger; ``model.loop.injection_state_scale`` makes the halves alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.safetensors_io import Entry, to_tensor
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import load_tokenizer
from rdlm.models.recurrent import Recurrent
from rdlm.nn.layers import TransformerLayer
from rdlm.random_streams import generator
from rdlm.registry import build

POSITIONS = 128
TEXT = """In the beginning God created the heaven and the earth. And the earth was without form, and void; and
darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters. And God said, Let
there be light: and there was light. And God saw the light, that it was good: and God divided the light from the
darkness. And God called the light Day, and the darkness he called Night. And the evening and the morning were the
first day. And God said, Let there be a firmament in the midst of the waters, and let it divide the waters from the
waters.
"""
"""Genesis 1, King James Version (public domain)."""


def sizes(
    source: Path,
    config: CheckpointConfig,
    stored: Mapping[str, Entry],
    prelude: Sequence[int],
    core: Sequence[int],
) -> tuple[float, float]:
    """Root mean square of e and of the state after one core step, of a plain transformer's layers, in fp32.

    stored: its weights, of which one layer is in memory at a time. Read is TEXT, or where there is no tokenizer
    random ids.
    """
    model = cast(Recurrent, build(config, device="meta").model)
    ids = _ids(source, model.vocab_size, config.model.max_seq_len)
    table = {"weight": to_tensor(stored["model.wte.weight"])}
    model.wte.load_state_dict(table, assign=True)
    found = []
    with torch.no_grad():
        ctx, x = model.context(ids), model.embed(ids).float()
        for part in (prelude, core):
            for number in part:
                layer = cast(TransformerLayer, model.core_layers[number])
                prefix = f"model.{model.core_name}.{number}."
                weights = {name: to_tensor(stored[prefix + name]).float() for name in layer.state_dict()}
                layer.load_state_dict(weights, assign=True)
                x = layer(x, ctx)
                layer.to("meta")
            found.append(float(x.double().square().mean().sqrt()))
    return found[0], found[1]


def balancing_scale(of_e: float, of_state: float) -> float:
    """The power of two next to ``of_e / of_state``: scaling by it rounds nothing in any dtype. 1 where either is
    zero or not finite."""
    ratio = of_e / of_state if of_state > 0 else 0.0
    return 2.0 ** round(math.log2(ratio)) if math.isfinite(ratio) and ratio > 0 else 1.0


def _ids(source: Path, vocab_size: int, most: int) -> Tensor:
    if (source / checkpoint.TOKENIZER).is_dir():
        ids = load_tokenizer(source / checkpoint.TOKENIZER).encode(TEXT)[: min(POSITIONS, most)]
        return torch.tensor([ids])
    return torch.randint(vocab_size, (1, min(POSITIONS, most)), generator=generator(0))
