"""What one forward and backward pass would allocate, found without computing it: the objective's own code on tensors without data.

Every tensor that an operator returns is counted from its creation until nothing refers to it any more; memory that kernels use
inside (matmul packing, attention workspaces) and what an allocator wastes are not seen.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rdlm import cross_entropy
from rdlm.denoiser import Denoiser
from rdlm.layers.rope import rotary_table
from rdlm.objectives import Noised, in_place_hidden, two_stream_hidden


@dataclass(frozen=True)
class Traced:
    """Bytes that one pass adds to the weights. forward: live when the loss is known, the activations that the backward pass needs.
    peak: the most at any time of both passes, gradients included as they come. gradients: what the pass leaves behind."""

    forward: int
    peak: int
    gradients: int


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
    """Allocates what rdlm.cross_entropy does; its loop over rows depends on data, which there is none of here."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight, dtype=torch.float32)
        rows = min(hidden.shape[0], max(16, cross_entropy.CHUNK_ELEMENTS // weight.shape[0]))
        logits = [torch.empty(rows, weight.shape[0], dtype=torch.float32, device=hidden.device) for _ in range(2)]
        del logits
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * 1.0, (d_weight * 1.0).to(ctx.dtype)


def trace(denoiser: Denoiser, micro_size: int, seq_len: int, dtype: torch.dtype, core_steps: int) -> Traced:
    """One micro-batch of [micro_size, seq_len] through ``denoiser``, built on the meta device and used up here; weights in ``dtype``."""
    rotary_table.cache_clear()  # it must neither serve nor keep tensors without data
    try:
        with FakeTensorMode():
            for module in denoiser.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            ids = torch.empty(micro_size, seq_len, dtype=torch.int64)
            noised = _noised(denoiser, ids, dtype)
            with _LiveBytes() as count:
                hidden = _hidden(denoiser, ids, noised, core_steps)
                loss = denoiser.model.head(use=partial(_ReadOut.apply, hidden.flatten(0, 1)))
                del hidden
                forward = count.live
                loss.backward()
            left = sum(p.grad.nbytes for p in denoiser.parameters() if p.grad is not None)
            return Traced(forward, count.peak, left)
    finally:
        rotary_table.cache_clear()


def _noised(denoiser: Denoiser, ids: Tensor, dtype: torch.dtype) -> Noised | None:
    if not denoiser.objective.noisy:
        return None
    z = torch.empty(*ids.shape, denoiser.model.ln_f.weight.shape[0])
    return Noised(z, torch.ones(ids.shape), torch.ones(ids.shape, dtype=torch.bool))


def _hidden(denoiser: Denoiser, ids: Tensor, noised: Noised | None, core_steps: int) -> Tensor:
    if denoiser.objective.name == "paper":
        assert noised is not None
        return two_stream_hidden(denoiser, ids, noised.z, noised.sigma)
    return in_place_hidden(denoiser, ids, noised, core_steps, torch.Generator())
