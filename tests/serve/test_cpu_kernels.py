"""The CPU kernels against the modules that they replace, and what they promise beyond them: a row's result
depends on nothing but the row."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rdlm.config.checkpoint import WeightFormat
from rdlm.config.model import LayerConfig, RopeConfig
from rdlm.nn.kv_cache import KVCache, PackedContext, Segment
from rdlm.nn.layers import TokenTable, TransformerLayer
from rdlm.nn.quantization import Quantized, quantized
from serve.engine.cpu import library
from serve.engine.cpu.modules import Packed, PackedLayer, PackedTable, use_kernels

pytestmark = pytest.mark.skipif(library.library() is None, reason="needs a C++ compiler")
WIDTH, HEADS, CACHED = 48, 4, 5
LAYOUTS: dict[str, dict[str, Any]] = {
    "llama": {"num_kv_heads": 2},
    "qwen": {"bias": "qkv", "qk_norm": "head"},
    "olmo": {"norms": "post", "qk_norm": "full"},
    "ouro": {"norms": "sandwich_branch"},
    "huginn": {"norms": "sandwich_sum", "bias": "qk"},
    "parcae": {"mlp": "relu2", "mlp_scale": 0.5, "qk_norm": "head_unweighted",
        "rope": RopeConfig(base=1e4, num_dims=4)},
    "hrm": {"norms": "post", "norm_weights": False, "output_gate": True},
    "gelu": {"mlp": "gelu", "rope": None},
    "odd": {"mlp_width": 37, "head_dim": 10, "num_kv_heads": 1},
}  # fmt: skip


def layer_of(name: str, **more: Any) -> TransformerLayer:
    """A layer with random weights, norms and biases included."""
    torch.manual_seed(0)
    settings = {"num_heads": HEADS, "mlp_width": 96, "rope": RopeConfig(base=1e4), **LAYOUTS[name]}
    layer = TransformerLayer(LayerConfig.model_validate(settings), WIDTH, 1, **more)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return layer


def of(weights: str) -> Callable[[Tensor], Quantized]:
    return lambda weight: quantized(weight, cast(WeightFormat, weights))


def cache_of(layer: TransformerLayer, dtype: torch.dtype = torch.float32, num_steps: int = 1) -> KVCache:
    return KVCache(3, 3, 80, layer.attn.num_kv_heads, layer.attn.head_dim, dtype, num_steps=num_steps)


def run(layer: nn.Module, cache: KVCache, segments: list[Segment], x: Tensor, *more: Any) -> Tensor:
    with torch.inference_mode():
        return layer(x[None], PackedContext(cache, segments), *more)[0]


PACK = [Segment(0, CACHED, 1), Segment(1, 0, 7), Segment(2, CACHED, 1, commit=False)]
PAST = [Segment(0, 0, CACHED), Segment(2, 0, CACHED + 1)]


@pytest.mark.parametrize("append_own", [False, True])
@pytest.mark.parametrize("num_steps", [1, 3], ids=["shared", "full"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_is_the_module_that_it_replaces(name: str, num_steps: int, append_own: bool) -> None:
    """Decoding rows, a prompt and an uncommitted row in one pack, with a past of fewer steps."""
    layer = layer_of(name)
    packed, outs = PackedLayer(layer), []
    segments = [Segment(s.slot, s.start, s.length, 2, s.commit, append_own) for s in PACK]
    for module in (layer, packed):
        torch.manual_seed(1)
        cache = cache_of(layer, num_steps=num_steps)
        run(module, cache, PAST, torch.randn(11, WIDTH))
        outs.append(run(module, cache, segments, torch.randn(9, WIDTH)))
        outs.append(cache.read(1, 0, 2, CACHED + 1))
    torch.testing.assert_close(outs[2], outs[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(outs[3], outs[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "huginn", "olmo", "ouro"])
@pytest.mark.parametrize("each", [True, False], ids=["a level each", "one level"])
def test_modulated_layers(name: str, each: bool) -> None:
    layer = layer_of(name, cond_width=8)
    packed, cond = PackedLayer(layer), torch.randn(1, 9 if each else 1, 8)
    a, b = (run(module, cache_of(layer), PACK, torch.ones(9, WIDTH), cond) for module in (layer, packed))
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


def test_value_embeddings() -> None:
    layer = layer_of("parcae", value_gate_width=12)
    packed, values = PackedLayer(layer), torch.randn(1, 9, WIDTH)
    x = torch.randn(9, WIDTH)
    a, b = (run(module, cache_of(layer), PACK, x, None, values) for module in (layer, packed))
    torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "huginn"])
def test_a_row_does_not_depend_on_its_batch_nor_on_chunks_to_the_bit(name: str, weights: str) -> None:
    layer = layer_of(name)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    layer = layer.to(dtype)
    packed = PackedLayer(layer, of(weights)) if weights in ("int8", "int4") else PackedLayer(layer)
    x, caches = torch.randn(70, WIDTH), [cache_of(layer, dtype) for _ in range(3)]
    whole = run(packed, caches[0], [Segment(1, 0, 70)], x)
    for first, count in ((0, 33), (33, 1), (34, 36)):
        part = run(packed, caches[1], [Segment(0, first, count)], x[first : first + count])
        assert torch.equal(part, whole[first : first + count])
    run(packed, caches[2], [Segment(i, 0, 69) for i in range(3)], torch.cat([x[:69]] * 3))
    together = run(packed, caches[2], [Segment(i, 69, 1) for i in (2, 0, 1)], x[69:].expand(3, -1))
    assert torch.equal(together, whole[69:].expand(3, -1))


@pytest.mark.parametrize("threads", [2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    """In a process of its own: OpenMP reads its number of threads once."""
    code = (
        "import torch, sys; sys.path.insert(0, 'tests/serve'); torch.set_num_threads(int(sys.argv[1]))\n"
        "from test_cpu_kernels import *\n"
        "layer = layer_of('huginn'); x = torch.randn(9, WIDTH)\n"
        "print(run(PackedLayer(layer), cache_of(layer), PACK, x).double().sum().item().hex())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(n)], check=True, capture_output=True, text=True
        ).stdout
        for n in (1, threads)
    }
    assert len(found) == 1 and found != {""}


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1, 3), (33, 17), (777, 1001)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7, 11, 13, 130])
def test_products(inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(rows, inputs)
    expected = x.double() @ weight.double().T + bias.double()
    exact = Packed(weight, bias).product(x)
    torch.testing.assert_close(exact.double(), expected, atol=2e-4, rtol=1e-4)
    rounded = Packed(weight.bfloat16(), bias).product(x)
    reference = x.double() @ weight.bfloat16().double().T + bias.double()
    torch.testing.assert_close(rounded.double(), reference, atol=2e-4, rtol=1e-4)


def rounded(x: Tensor) -> Tensor:
    """Rows as the kernels round them before a product with quantised weights: int8, a scale for each 32 inputs."""
    units = nn.functional.pad(x, (0, -x.shape[1] % 32)).unflatten(1, (-1, 32))
    most = units.abs().amax(2, keepdim=True)
    whole = units * torch.where(most > 0, 127 / most, 0)
    return ((whole + 0.5 * whole.sign()).trunc() * (most / 127)).flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1, 3), (33, 17), (777, 101)])
@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 13])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_products_with_quantised_weights(
    weights: WeightFormat, group_size: int, rows: int, inputs: int, outputs: int
) -> None:
    """Against dequantised weights and the same rounded rows, and against exact rows."""
    torch.manual_seed(0)
    matrix, bias, x = (
        quantized(torch.randn(outputs, inputs), weights, group_size),
        torch.randn(outputs),
        torch.randn(rows, inputs),
    )
    found = Packed(matrix, bias).product(x).double() - bias.double()
    exact = matrix.dequantized(torch.float64).T
    torch.testing.assert_close(found, rounded(x).double() @ exact, atol=1e-4, rtol=1e-4)
    assert (found - x.double() @ exact).norm() <= 0.015 * (x.double() @ exact).norm()


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_sums_of_the_largest_integers_do_not_overflow(weights: WeightFormat) -> None:
    ends = {"int8": (-127, 127), "int4": (-8, 7)}[weights]
    scale = torch.ones(2, 2, dtype=torch.bfloat16)
    for sign in (-1.0, 1.0):
        whole = torch.tensor(ends, dtype=torch.int8)[:, None].repeat(1, 64)
        values = (
            whole
            if weights == "int8"
            else ((whole[:, ::2] + 8) | (whole[:, 1::2] + 8) << 4).view(torch.uint8)
        )
        found = Packed(Quantized(values, scale, 64, 32)).product(torch.full((1, 64), sign))
        torch.testing.assert_close(found, sign * 64.0 * torch.tensor([ends]).float())


def test_a_table_looks_up_exact_rows_and_multiplies() -> None:
    table = TokenTable(50, 24)
    nn.init.normal_(table.weight)
    packed, hidden = PackedTable(table), torch.randn(2, 3, 24)
    assert torch.equal(cast(Tensor, packed(torch.tensor([3, 3, 49]))), table.weight[[3, 3, 49]])
    torch.testing.assert_close(packed(hidden=hidden), hidden @ table.weight.T, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed(use=lambda weight: weight * 2), table.weight * 2)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_nan_stays_with_its_row(weights: str) -> None:
    layer = layer_of("huginn")
    packed, x = (
        PackedLayer(layer) if weights == "fp32" else PackedLayer(layer, of(weights)),
        torch.randn(9, WIDTH),
    )
    clean = run(packed, cache_of(layer), PACK, x)
    x[0] = float("nan")
    out = run(packed, cache_of(layer), PACK, x)
    assert out[0].isnan().all() and torch.equal(out[1:], clean[1:])


def test_without_a_compiler_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.cpu.modules.library", lambda: None)
    layer = layer_of("llama")
    assert not use_kernels(nn.ModuleList([layer]))


def test_a_compiler_that_fails_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.library.cache_clear()
    try:
        assert library.library() is None
        assert "could not be compiled" in caplog.text
    finally:
        library.library.cache_clear()


def test_packing_is_done_once_for_a_shared_module() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.Sequential(shared)])
    assert use_kernels(copy.deepcopy(model)) and use_kernels(model)
    assert model[0] is cast(nn.Sequential, model[1])[0]
