"""Compiles kernels.cpp for this machine, once, and describes its functions and structures to ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger("rdlm.serve")
SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: it would let NaN pass as a number, and links code that changes the whole process's rounding.
FLAGS = (
    "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-std=c++17", "-pthread", "-shared", "-fPIC",
)  # fmt: skip
SECONDS_TO_COMPILE = 300


class Matrix(Structure):
    """``struct Matrix`` of kernels.cpp."""

    _fields_ = (
        ("data", c_void_p), ("bias", c_void_p), ("inputs", c_int32), ("outputs", c_int32), ("kind", c_int32),
        ("blocks", c_int32), ("group", c_int32),
    )  # fmt: skip


class Rows(Structure):
    """``struct Rows`` of kernels.cpp."""

    _fields_ = (
        ("count", c_int32), ("positions", c_void_p), ("lengths", c_void_p), ("writes", c_void_p),
        ("tables", c_void_p),
    )  # fmt: skip


class Cache(Structure):
    """``struct Cache`` of kernels.cpp."""

    _fields_ = (("k", c_void_p), ("v", c_void_p), ("value_width", c_int32), ("kind", c_int32))


class Layer(Structure):
    """``struct Layer`` of kernels.cpp."""

    _fields_ = (
        *((name, c_int32) for name in (
            "width", "heads", "kv_heads", "head_dim", "rope_dims", "norms", "mlp", "mlp_width", "qk_norm",
            "output_gate", "value_gate_width",
        )),
        ("norm_eps", c_float), ("qk_eps", c_float), ("mlp_scale", c_float),
        ("norm", c_void_p * 4), ("qk_bias", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        ("value_gate", c_void_p), ("rope", c_void_p),
        ("qkv", Matrix), ("proj", Matrix), ("fc", Matrix), ("down", Matrix),
    )  # fmt: skip


class CoreStep(Structure):
    """``struct CoreStep`` of kernels.cpp."""

    _fields_ = (
        ("injection", c_int32), ("state_scale", c_float), ("norms", c_int32), ("eps", c_float), ("norm", c_void_p),
        ("adapter", Matrix),
    )  # fmt: skip


class Modulation(Structure):
    """``struct Modulation`` of kernels.cpp."""

    _fields_ = (("part", c_void_p * 6), ("stride", c_int64 * 6))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one line in the log, where there is no C++ compiler or it fails."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        logger.warning(
            "no C++ compiler was found: inference runs on PyTorch's own CPU kernels, several times slower"
        )
        return None
    try:
        return _declared(ctypes.CDLL(str(_compiled(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        logger.warning("the CPU kernels could not be compiled, PyTorch's own are used: %s", detail)
        return None


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdlm"


def _compiled(compiler: str) -> Path:
    """The shared library, compiled unless the cache has it for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256(
        "\0".join([SOURCE.read_text(encoding="utf-8"), *FLAGS, version, _processor()]).encode()
    ).hexdigest()[:16]
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="rdlm-"))
    target = folder / f"kernels-{key}.so"
    if not target.is_file():
        logger.info("compiling the CPU kernels for this machine, once: a few seconds")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / "kernels.so"
            subprocess.run(
                [compiler, *FLAGS, str(SOURCE), "-o", str(made)],
                check=True, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE,
            )  # fmt: skip
            os.replace(made, target)
    return target


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.rdlm_set_threads(torch.get_num_threads())
    lib.rdlm_packed_bytes.restype = c_int64
    lib.rdlm_packed_bytes.argtypes = (c_int, c_int, c_int, c_int)
    lib.rdlm_pack.argtypes = (c_void_p, c_int, c_int, c_int, c_void_p)
    lib.rdlm_pack_quantised.argtypes = (c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_void_p)
    lib.rdlm_linear.argtypes = (POINTER(Matrix), c_void_p, c_int64, c_int, c_void_p)
    lib.rdlm_rms_norm.argtypes = (c_void_p, c_void_p, c_int, c_int, c_float, c_void_p)
    lib.rdlm_layers.argtypes = (
        c_void_p, c_int, POINTER(Rows), POINTER(Cache), c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64,
        POINTER(CoreStep), c_void_p, c_int,
    )  # fmt: skip
    for name in ("rdlm_pack", "rdlm_pack_quantised", "rdlm_linear", "rdlm_rms_norm", "rdlm_layers"):
        getattr(lib, name).restype = None
    return lib
