"""Memory of packed weights. It lies in pages of 2 MB where the system has them: a product reads through all of a
model's weights, and with pages of 4 KB the processor spends much of that time on looking them up."""

from __future__ import annotations

import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
BLOCK = 32 * HUGE_PAGE
"""What is asked for at a time: small matrices share pages."""
_LINE = 64
_lock = threading.Lock()
_block = torch.empty(0, dtype=torch.uint8)


def weight_memory(num_bytes: int) -> Tensor:
    """Memory for weights, uint8 [num_bytes], on a cache line's boundary. Its content is undefined."""
    global _block
    with _lock:
        needed = -(-num_bytes // _LINE) * _LINE
        if needed > len(_block):
            made = _huge_pages(max(needed, BLOCK))
            if needed >= BLOCK:  # of its own; the block goes on
                return made[:num_bytes]
            _block = made
        taken, _block = _block[:num_bytes], _block[needed:]
    return taken


def _huge_pages(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], from the start of a huge page; freed with the last tensor that lies in it."""
    size = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them: the memory is as good, and slower
        pass
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    start = -tensor.data_ptr() % HUGE_PAGE
    return tensor[start : start + num_bytes]
