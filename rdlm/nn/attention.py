"""Multi-head attention whose reach (causality, masks, cached keys) is decided by the context passed in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rdlm.nn.context import AttentionContext
from rdlm.nn.rotary import rotate


class Attention(nn.Module):
    """Fused q|k|v projection, optional learned bias on q and k before RoPE (Huginn's qk_bias), grouped key-value heads.

    ``layer`` is the cache index of this layer; the layer itself holds no keys. ``rope_base`` None: rows carry their places themselves.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int,
        rope_base: float | None,
        qk_bias: bool,
        layer: int,
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.num_kv_heads = d_model // num_heads, num_heads, num_kv_heads
        self.rope_base, self.layer = rope_base, layer
        self.Wqkv = nn.Linear(d_model, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, num_heads, self.head_dim)) if qk_bias else None

    def forward(self, x: Tensor, ctx: AttentionContext) -> Tensor:  # [B, T, D] -> [B, T, D]
        heads = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))  # [B, T, H + 2 Hkv, Dh]
        qk, v = heads.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.qk_bias is not None:
            qk = (qk + self.qk_bias.flatten(0, 2)).to(v.dtype)
        if self.rope_base is not None:
            qk = rotate(qk, ctx.rope(self.head_dim, self.rope_base))
        q, k = qk.split([self.num_heads, self.num_kv_heads], dim=2)
        return self.proj(ctx.attend(q, k, v, self.layer).flatten(-2))
