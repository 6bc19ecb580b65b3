"""Tensors that claim to be on ``cuda:0`` and hold no data, in a build of torch without CUDA.

The real code runs on them. Mixed devices raise, as on a GPU; operations that would make the host wait, and copies to
the device, are noted with the line of ours that caused them. Not covered: backward passes, which need a device.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
OURS = tuple(str(REPO / package) for package in ("rdlm", "train", "serve", "eval"))
aten = torch.ops.aten
WAITS = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.equal.default: "equal",
    aten.repeat_interleave.Tensor: "repeat_interleave without a size",
    aten._unique2.default: "unique",
}
"""Operations whose output's shape depends on values: the host must know them first."""


def load_guard(folder: Path) -> None:
    """Build the guard in a folder and load it. Raises RuntimeError where that cannot be."""
    if torch.cuda.is_available():
        raise RuntimeError("there is a real GPU: see tests/gpu/test_gpu.py")
    compiler, library = shutil.which("g++"), folder / "libguard.so"
    if compiler is None:
        raise RuntimeError("no C++ compiler to build the device guard with")
    torch_folder = Path(torch.__file__).parent
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", str(HERE / "guard.cpp"),
         f"-L{torch_folder}/lib", "-lc10", "-o", str(library)],
        check=True, capture_output=True,
    )  # fmt: skip
    ctypes.CDLL(str(library))


def our_line() -> str:
    """file:line of the innermost frame of ours."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(OURS):
            return f"{Path(frame.filename).relative_to(REPO)}:{frame.lineno}"
    return "elsewhere"


class Watch(TorchDispatchMode):
    """Runs code on fake CUDA tensors: ``with watch.fake, watch: ...``"""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: Counter[str] = Counter()
        """"what at file:line" -> how often the host would have waited."""
        self.copies: Counter[str] = Counter()
        """file:line -> copies to the device that do not block."""

    def cuda(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        with self.fake:
            return torch.zeros(shape, dtype=dtype, device="cuda")

    def move(self, module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        """Parameters without data on the device."""
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(self.cuda(*parameter.shape, dtype=dtype)))

    def wait(self, what: str) -> None:
        self.waits[f"{what} at {our_line()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        fakes = [t for t in tree_leaves((args, kwargs)) if isinstance(t, FakeTensor)]
        on_device = [t for t in fakes if t.device.type == "cuda"]
        if on_device:
            stand_in = self._of_values(func, args)
            if stand_in is not None:
                return stand_in
        device = kwargs.get("device")
        if not fakes and (device is None or torch.device(device).type != "cuda"):
            with unset_fake_temporarily():
                return func(*args, **kwargs)  # host memory is real
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if func is aten.copy_.default else args[0]
            if source.device.type == "cpu" and out.device.type == "cuda" and source.dim():
                blocks = not kwargs.get("non_blocking", len(args) > 2 and args[2])
                self.wait("blocking copy to the device") if blocks else self.copies.update([our_line()])
            if source.device.type == "cuda" and out.device.type == "cpu":
                self.wait("copy to the host")
                with unset_fake_temporarily():
                    return torch.zeros(out.shape, dtype=out.dtype)
        return out

    def _of_values(self, func: Any, args: Any) -> Any:
        """What stands for values that there are none of; None for other operations."""
        if func is aten._local_scalar_dense.default:
            self.wait("item")
            return True if args[0].dtype == torch.bool else 1.0 if args[0].dtype.is_floating_point else 3
        if func in WAITS:
            self.wait(WAITS[func])
            if func is aten.equal.default:
                return True
            count = max(1, args[0].numel() // 4)
            shape = (count, args[0].dim()) if func is aten.nonzero.default else (count,)
            return torch.empty(shape, dtype=torch.int64, device="cuda")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if masks:
                self.wait("boolean index")
                if func is not aten.index.Tensor:
                    return args[0]
                return args[0].new_empty(max(1, masks[0].numel() // 4), *args[0].shape[masks[0].dim() :])
        return None
