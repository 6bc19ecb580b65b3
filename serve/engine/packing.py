"""Weights in the order that a CPU's matrix products read fastest, arranged once when a model is loaded to be
served."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer for inference whose weight lies in oneDNN's own blocks, where ``F.linear`` would arrange
    it in every call.

    The same products summed in another order: outputs differ from those of nn.Linear by rounding alone. It
    has no parameters, so it can be neither trained nor saved. The operators are those that torch.compile uses
    for frozen weights on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer(
            "weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), persistent=False
        )
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = x.numel() // self.in_features
        more = padded(rows) - rows
        if not more:
            return self._product(x)
        out = self._product(F.pad(x.reshape(rows, self.in_features), (0, 0, 0, more)))
        return out[:rows].view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def padded(rows: int) -> int:
    """The number of rows a product is computed with: itself up to 16, above that one of four in each
    doubling.

    oneDNN compiles a kernel for every number of rows and keeps a thousand of them: some 2 MiB a number for a
    model of width 512, which a server under mixed load would go on collecting for hours.
    """
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return rows if rows <= 16 else -(-rows // step) * step


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for such a weight on this machine: fp32 on any CPU, bf16 where its
    instructions are."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack_weights(model: nn.Module) -> int:
    """Replace every nn.Linear that can be packed, in place -> how many were. The others, and all on a GPU,
    stay as they are."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and can_pack(child.weight)
    ]
    for parent, name in places:  # one at a time: only one weight is in memory twice
        setattr(parent, name, PackedLinear(getattr(parent, name)))
    return len(places)
