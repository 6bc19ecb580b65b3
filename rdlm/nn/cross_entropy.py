"""Fused read-out and cross-entropy: logits exist one chunk of rows at a time, and the gradient is formed in
the same visit.

The idea is known from memory-efficient losses (Wijmans et al. 2024, "Cut Your Losses"; Hsu et al. 2024,
Liger). With a vocabulary of 65,536 the logits of one 4,096-token sequence are 1 GiB in fp32; here they are
those of a chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 17
"""Logits held at once on a CPU: 512 KiB of fp32, which stay in a core's cache."""
MOST_WIDTH_ROWS = 256
"""Of a large vocabulary a chunk has at least as many rows as the network is wide, up to so many: each adds to the
gradient of the whole table, which costs as much as the chunk's own logits then."""
CHUNK_ELEMENTS_GPU = 1 << 26
"""Logits held at once on a GPU, where a chunk must fill the device."""

Evidence = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]
"""(rows [M], others [N - M] int64, u [M, D], table [V, D], scale of one element): adds scale * u @ table^T to
the logits of the M rows named; of all where rows is None.

u and table carry no gradient. Rows without a noised target cost nothing extra."""


def rows_at_once(table: Tensor, on_gpu: bool) -> int:
    """Rows of a chunk with a read-out table [V, D]."""
    vocab_size, width = table.shape
    budget = CHUNK_ELEMENTS_GPU if on_gpu else CHUNK_ELEMENTS
    return max(min(MOST_WIDTH_ROWS, width), budget // vocab_size)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, item_weight: Tensor, marked: Tensor | None,
        others: Tensor | None,
        u: Tensor | None, table: Tensor | None, scale: Tensor | None, needs_grad: bool, z_loss: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        size = rows_at_once(weight, hidden.is_cuda)
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_grad else None
        d_weight = (
            torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
            if needs_grad and weight.requires_grad
            else None
        )
        penalty = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_scale = torch.zeros(1 if scale is None else scale.shape, dtype=torch.float32, device=hidden.device)
        for rows, u_rows in _chunks(hidden.shape[0], marked, others, u, size):
            states = hidden[rows]
            logits = F.linear(states, weight).float()  # [n, V]
            known = None
            if u_rows is not None and table is not None and scale is not None:
                known = F.linear(u_rows, table).float()
                logits.add_(known * scale.float())
            index = targets[rows].unsqueeze(1)
            # One exponential serves loss and gradient: from here on ``logits`` holds exp(logits - max), in
            # place.
            top = logits.amax(1, keepdim=True)
            logits.sub_(top)
            at_target = logits.gather(1, index).squeeze(1)
            total = logits.exp_().sum(1)
            losses[rows] = total.log() - at_target
            row_weight = item_weight[rows]
            through = row_weight
            if z_loss:
                log_z = total.log() + top.squeeze(1)
                penalty += z_loss * (row_weight * log_z.square()).sum()
                through = row_weight * (1 + 2 * z_loss * log_z)
            if d_hidden is None:
                del logits, known  # or they would live on while the next chunk's are made
                continue
            d_logits = logits.mul_((through / total).unsqueeze(1))
            d_logits.scatter_add_(1, index, -row_weight.unsqueeze(1))
            if known is not None:
                d_scale += torch.dot(d_logits.flatten(), known.flatten())
            narrow = d_logits.to(hidden.dtype)
            d_hidden[rows] = narrow @ weight
            if d_weight is not None:
                d_weight += narrow.T @ states
            del logits, known, d_logits, narrow
        ctx.save_for_backward(d_hidden, d_weight, d_scale)
        ctx.dtypes = (weight.dtype, None if scale is None else scale.dtype)
        ctx.mark_non_differentiable(losses)
        total_loss = (losses * item_weight).sum()
        return (total_loss + penalty if z_loss else total_loss), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_scale = ctx.saved_tensors
        upstream = grads[0]
        weight_dtype, scale_dtype = ctx.dtypes
        return (
            d_hidden * upstream.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * upstream).to(weight_dtype),
            None, None, None, None, None, None,
            None if scale_dtype is None else (d_scale * upstream).to(scale_dtype), None, None,
        )  # fmt: skip


def _chunks(
    count: int, marked: Tensor | None, others: Tensor | None, u: Tensor | None, size: int
) -> Iterator[tuple[Tensor | slice, Tensor | None]]:
    """Rows of one chunk at a time with their part of ``u``: marked rows first, so that no chunk mixes both
    kinds."""
    if marked is None or others is None or u is None:
        for start in range(0, count, size):
            span = slice(start, start + size)
            yield span, None if u is None else u[span]
        return
    for part, u_part in zip(marked.split(size), u.split(size), strict=True):
        yield part, u_part
    for part in others.split(size):
        yield part, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    item_weight: Tensor,
    evidence: Evidence | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``targets`` under softmax(hidden W^T [+ scale u table^T on the rows with evidence]).

    z_loss: adds z_loss * (log of the softmax's denominator)^2 to each row's loss (PaLM, Chowdhery et al. 2022,
    Sec. 5).

    hidden [N, D], weight [V, D], targets [N] int64, item_weight [N] fp32 -> (sum of item_weight * loss, a
    differentiable fp32 scalar; the unweighted losses [N] fp32, without gradient and without z-loss).
    """
    total, losses = _LinearCrossEntropy.apply(
        hidden, weight, targets, item_weight, *(evidence or (None,) * 5), torch.is_grad_enabled(), z_loss
    )
    return total, losses
