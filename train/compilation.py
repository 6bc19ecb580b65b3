"""Compiled transformer layers: ``compile: layers``.

Layers are compiled and not the network, because r, how often the core runs, changes from update to update. All
layers of one kind share their graphs: one with gradient and one without, whatever r is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rdlm.nn.attention import AttentionContext, KeepsRope, LaterLayers
from rdlm.nn.layers import TransformerLayer


def compile_layers(network: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
    """Run every transformer layer through ``torch.compile``: whole graphs of fixed shapes, or an error.

    To be called before activations are recomputed (``recompute_layers``): the recomputation is around the
    compiled code. Names of weights stay.
    """
    for layer in (m for m in network.modules() if isinstance(m, TransformerLayer)):
        compiled = torch.compile(layer.forward, fullgraph=True, dynamic=False, backend=backend)
        setattr(layer, "forward", _Compiled(layer, compiled))  # noqa: B010


class _Compiled:
    """A layer's forward: what compiled code should not make is made before it."""

    def __init__(self, layer: TransformerLayer, compiled: Callable[..., Tensor]) -> None:
        self.compiled, self.rope = compiled, layer.attn.config.rope
        self.head_dim = layer.attn.head_dim

    def __call__(self, x: Tensor, ctx: AttentionContext, *others: Any, **named: Any) -> Tensor:
        if self.rope is not None and isinstance(ctx, KeepsRope | LaterLayers):
            ctx.prepare_rope(self.rope.num_dims or self.head_dim, self.rope.base, self.rope.scaling)
        return self.compiled(x, ctx, *others, **named)


def uncompiled() -> AbstractContextManager[None]:
    """Compiled layers run as they are written: for shapes that do not come again, as those of an evaluation."""
    return torch.compiler.set_stance("force_eager")
