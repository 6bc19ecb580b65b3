"""What one forward and backward pass would allocate, found without computing it: the objective's own code on
tensors without data.

Every tensor that an operator returns is counted from its creation until nothing refers to it any more; memory
that kernels use inside (matmul packing, attention workspaces) and what an allocator wastes are not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdlm.nn.attention import rotary_table
from rdlm.nn.cross_entropy import rows_at_once
from rdlm.objectives import Objective


@dataclass(frozen=True)
class Traced:
    """Bytes that one pass adds to the weights.

    forward: live when the loss is known, the activations that the backward pass needs. forward_peak,
    backward_peak: the most at any time of each pass, gradients included as they come. gradients: what the
    passes leave behind.
    """

    forward: int
    forward_peak: int
    backward_peak: int
    gradients: int

    @property
    def peak(self) -> int:
        return max(self.forward_peak, self.backward_peak)


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that are alive among those created under it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in old:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


class _ReadOut(torch.autograd.Function):
    """Allocates what rdlm.nn.cross_entropy does for one chunk of rows: its loop depends on data, which there
    is none of here."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, u: Tensor | None, table: Tensor | None, on_gpu: bool
    ) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        rows = min(hidden.shape[0], rows_at_once(weight, on_gpu))
        states = hidden[:rows] if u is None else hidden[:rows].clone()
        logits = F.linear(states, weight).float()
        if u is not None and table is not None:
            known = F.linear(u[:rows], table).float()
            logits.add_(known * 1.0)
        narrow = logits.to(hidden.dtype)
        d_hidden[:rows] = narrow @ weight
        d_weight += narrow.T @ states
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * 1.0, (d_weight * 1.0).to(ctx.dtype), None, None, None


def trace(
    denoiser: Objective,
    micro_size: int,
    seq_len: int,
    dtype: torch.dtype,
    core_steps: int,
    on_gpu: bool = False,
) -> Traced:
    """One micro-batch (of text, [micro_size, seq_len]) through ``denoiser``, built on the meta device and
    used up; weights in ``dtype``."""
    rotary_table.cache_clear()  # it must neither serve nor keep tensors without data
    try:
        with FakeTensorMode():
            for module in denoiser.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    empty = torch.empty(parameter.shape, dtype=dtype)
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
            if denoiser.targets is not None:
                rows = torch.empty(denoiser.model.vocab_size, denoiser.model.ln_f.weight.shape[0])
                denoiser.targets = lambda device: rows
            inputs = denoiser.model.empty_inputs(micro_size, seq_len)

            def read_out(hidden: Tensor, u: Tensor | None, table: Tensor | None) -> Tensor:
                return denoiser.model.head(
                    use=lambda weight: _ReadOut.apply(hidden, weight, u, table, on_gpu)
                )

            with _LiveBytes() as count:
                loss = denoiser.traced_loss(inputs, core_steps, read_out)
                forward, forward_peak = count.live, count.peak
                count.peak = count.live
                loss.backward()
            left = sum(p.grad.nbytes for p in denoiser.parameters() if p.grad is not None)
            return Traced(forward, forward_peak, count.peak, left)
    finally:
        rotary_table.cache_clear()
