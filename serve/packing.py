"""Weights in the order that a CPU's matrix products read fastest, arranged once when a model is loaded to be served."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """A linear layer for inference whose weight lies in oneDNN's own blocks, where ``F.linear`` would arrange it in every call.

    The same products summed in another order: outputs differ from those of nn.Linear by rounding alone. It has no parameters, so it
    can be neither trained nor saved. The operators are those that torch.compile uses for frozen weights on a CPU.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has kernels for such a weight on this machine: fp32 on any CPU, bf16 where its instructions are."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weights(model: nn.Module) -> int:
    """Replace every nn.Linear that can be packed, in place -> how many were. The others, and all on a GPU, stay as they are."""
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and can_pack(child.weight)
    ]
    for parent, name in places:  # one at a time: only one weight is in memory twice
        setattr(parent, name, PackedLinear(getattr(parent, name)))
    return len(places)
