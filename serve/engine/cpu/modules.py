"""Modules that take the places of a model's own for inference on a CPU: weights packed in the order in which
the kernels read them, activations in fp32.

``use_kernels(model)`` replaces in place. What is computed is the same up to the order of summation, and in
bf16 more exact, since nothing between the weights is rounded. Packed modules have no parameters: they can be
neither trained nor saved.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from ctypes import POINTER, byref, c_void_p, pointer
from dataclasses import replace
from itertools import groupby
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from rdlm.config.checkpoint import WeightFormat
from rdlm.models.recurrent import Recurrent
from rdlm.nn.attention import AttentionContext, LaterLayers, rotary_table
from rdlm.nn.kv_cache import PackedContext, Pages
from rdlm.nn.layers import Condition, LayerCondition, Layers, RMSNorm, TokenTable, TransformerLayer
from rdlm.nn.quantization import Quantized, formats, quantized
from serve.engine.cpu.library import Cache, CoreStep, Layer, Matrix, Modulation, Rows, library
from serve.engine.cpu.memory import weight_memory

KINDS = {torch.float32: 0, torch.bfloat16: 1}
QUANTIZED_KINDS = {"int8": 2, "int4": 4}
CACHE_KINDS = {torch.float32: 0, torch.bfloat16: 3}
NORMS = {"pre": 0, "post": 1, "sandwich_sum": 2, "sandwich_branch": 3}
MLPS = {"swiglu": 0, "relu2": 1, "gelu": 2}
INJECTIONS = {"none": 0, "replace": 1, "add": 2, "linear": 3}
QK_NORMS = {"none": 0, "full": 1, "head": 2, "head_unweighted": 3}
R = TypeVar("R")
Weight = Tensor | Quantized
Of = Callable[[Tensor], Weight]
"""A weight of the model -> what takes its place."""


def _lib() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "use_kernels asks for the library first"
    return lib


class Packed:
    """A matrix [out, in] as the kernels read it: fp32, bf16, or int8 or int4 with scales."""

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        lib = _lib()
        if isinstance(weight, Quantized):
            inputs, outputs, group = weight.inputs, len(weight.values), weight.group_size
            kind, integers, scales = (
                QUANTIZED_KINDS[weight.weights],
                weight.integers(),
                weight.scales.contiguous(),
            )
            self.data = weight_memory(lib.rdlm_packed_bytes(inputs, outputs, kind, group))
            pointers = integers.contiguous().data_ptr(), scales.data_ptr()
            lib.rdlm_pack_quantised(*pointers, inputs, outputs, kind, group, self.data.data_ptr())
        else:
            (outputs, inputs), group = weight.shape, 0
            kind = KINDS[weight.dtype]
            self.data = weight_memory(lib.rdlm_packed_bytes(inputs, outputs, kind, group))
            wide = weight.detach().float().contiguous()
            lib.rdlm_pack(wide.data_ptr(), inputs, outputs, kind, self.data.data_ptr())
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.inputs, self.outputs = inputs, outputs
        self.struct = Matrix(self.data.data_ptr(), _pointer(self.bias), inputs, outputs, kind, 0, group)
        self.struct.blocks = -(-outputs // (2 * lib.rdlm_vector_width()))

    def product(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] fp32."""
        rows = x.reshape(-1, self.inputs).float()
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        out = torch.empty(len(rows), self.outputs)
        _lib().rdlm_linear(byref(self.struct), rows.data_ptr(), rows.stride(0), len(rows), out.data_ptr())
        return out.view(*x.shape[:-1], self.outputs)


class PackedLinear(nn.Module):
    """A linear layer whose weight is packed."""

    def __init__(self, linear: nn.Linear, of: Of = Tensor.detach) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = Packed(of(linear.weight), linear.bias)
        # Embeddings of levels cast what they compute to the dtype of their weights: here, of activations.
        self.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out] fp32
        return self.packed.product(x)


class PackedTable(nn.Module):
    """A token table with a packed copy for products with hidden states; rows are looked up in the table itself."""

    def __init__(self, table: TokenTable, of: Of = Tensor.detach) -> None:
        super().__init__()
        self.table = of(table.weight)
        self.packed: Packed | None = None

    def forward(
        self,
        ids: Tensor | None = None,
        use: Callable[[Tensor], R] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | R:
        table = self.table
        if use is not None:
            return use(table.dequantized() if isinstance(table, Quantized) else table)
        if ids is not None:
            return (
                table[ids].dequantized()
                if isinstance(table, Quantized)
                else nn.functional.embedding(ids, table).float()
            )
        assert hidden is not None
        if self.packed is None:  # of a model's tables only the read-out is multiplied
            with torch.inference_mode(False), torch.no_grad():
                self.packed = Packed(self.table)
        return self.packed.product(hidden)


class PackedNorm(nn.Module):
    """An RMS norm in one pass."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight: Tensor
        self.register_buffer("weight", norm.weight.detach().float().contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D] fp32
        rows = x.float().contiguous()
        out = torch.empty_like(rows)
        width = rows.shape[-1]
        _lib().rdlm_rms_norm(
            rows.data_ptr(), self.weight.data_ptr(), rows.numel() // width, width, self.eps, out.data_ptr()
        )
        return out


class PackedLayer(nn.Module):
    """A transformer layer as one call of a kernel; its context must be a PackedContext."""

    def __init__(self, layer: TransformerLayer, of: Of = Tensor.detach) -> None:
        super().__init__()
        lib, attn, mlp, config = _lib(), layer.attn, layer.mlp, layer.attn.config
        self.layer, self.config, self.head_dim = attn.layer, config, attn.head_dim
        self.modulation = layer.modulation
        qkv = of(attn.Wqkv.weight)
        bias: Tensor | None = attn.Wqkv.bias
        if attn.output_gate is not None:
            qkv = _rows(lambda *both: torch.cat(both), qkv, of(attn.output_gate.weight))
            bias = None if bias is None else torch.cat([bias, bias.new_zeros(attn.output_gate.out_features)])
        fc = of(mlp.fc.weight)
        fc_bias: Tensor | None = mlp.fc.bias
        width = mlp.proj.in_features
        if mlp.kind == "swiglu":
            fc = _rows(lambda rows: _interleaved(rows, lib.rdlm_vector_width()), fc)
            if fc_bias is not None:
                fc_bias = _interleaved(fc_bias[:, None], lib.rdlm_vector_width())[:, 0]
        self.matrices = [
            Packed(qkv, bias),
            Packed(of(attn.proj.weight), attn.proj.bias),
            Packed(fc, fc_bias),
            Packed(of(mlp.proj.weight), mlp.proj.bias),
        ]
        norms = (layer.norm_1, layer.norm_2, layer.norm_3, layer.norm_4)
        self.norms = [_vector(getattr(norm, "weight", None)) for norm in norms]
        gate = attn.value_gate
        self.vectors = [
            _vector(attn.qk_bias), _vector(getattr(attn.q_norm, "weight", None)),
            _vector(getattr(attn.k_norm, "weight", None)), None if gate is None else _vector(gate.weight),
        ]  # fmt: skip
        self.rope_dims = 0 if config.rope is None else config.rope.num_dims or attn.head_dim
        self.rope = torch.empty(0)
        self.struct = Layer(
            attn.proj.out_features, attn.num_heads, attn.num_kv_heads, attn.head_dim, self.rope_dims,
            NORMS[layer.norms], MLPS[mlp.kind], width, QK_NORMS[config.qk_norm], attn.output_gate is not None,
            0 if gate is None else gate.in_features, config.norm_eps, attn.qk_eps, mlp.scale,
        )  # fmt: skip
        self.struct.norm = (c_void_p * 4)(*map(_pointer, self.norms))
        names = ("qk_bias", "q_norm", "k_norm", "value_gate")
        for name, vector in zip(names, self.vectors, strict=True):
            setattr(self.struct, name, _pointer(vector))
        for name, matrix in zip(("qkv", "proj", "fc", "down"), self.matrices, strict=True):
            setattr(self.struct, name, matrix.struct)

    def forward(
        self,
        x: Tensor,
        ctx: AttentionContext,
        cond: LayerCondition | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """As TransformerLayer.forward: x [1, N, D] -> [1, N, D] fp32."""
        return PackedLayers([self]).through(
            x, ctx, None if cond is None else [cond], None if values is None else [values]
        )

    def read_rotations(self, length: int) -> None:
        """Have the rotations of so many positions at hand."""
        rope = self.config.rope
        if rope is None or len(self.rope) >= length:
            return
        table = rotary_table(self.rope_dims, rope.base, length, torch.device("cpu"), rope.scaling)
        self.rope = torch.view_as_real(table).contiguous()
        self.struct.rope = self.rope.data_ptr()

    def modulation_of(self, cond: LayerCondition, kept: list[Tensor]) -> Modulation:
        """The modulation of each row; ``kept`` gets the tensors that it points to."""
        if isinstance(cond, Tensor):
            assert self.modulation is not None
            cond = self.modulation(cond)
        found = Modulation()
        for i, part in enumerate(cond):
            part = part.float()
            part = part if part.stride(-1) == 1 else part.contiguous()
            found.part[i], found.stride[i] = part.data_ptr(), part.stride(-2) if part.shape[-2] > 1 else 0
            kept.append(part)
        return found


class PackedLayers(Layers):
    """Transformer layers as one call of the kernels; their context must be a PackedContext."""

    def __init__(self, layers: Iterable[PackedLayer]) -> None:
        super().__init__(layers)
        self._layers = list(cast(Iterable[PackedLayer], self))
        self._structs = (POINTER(Layer) * len(self))(*(pointer(layer.struct) for layer in self._layers))
        self._length = 0
        """Positions whose rotations all layers have."""

    def through(
        self,
        x: Tensor,
        ctx: AttentionContext,
        cond: Condition | None = None,
        values: Seq[Tensor | None] | None = None,
    ) -> Tensor:
        """As Layers.through: x [1, N, D] -> [1, N, D] fp32."""
        return self.steps(x, ctx, cond, values) if self._layers else x

    def steps(
        self,
        x: Tensor,
        ctx: AttentionContext,
        cond: Condition | None = None,
        values: Seq[Tensor | None] | None = None,
        e: Tensor | None = None,
        around: CoreStep | None = None,
        count: int = 1,
    ) -> Tensor:
        """``through``, ``count`` times; e [1, N, D], around: injection and norm of each
        core step."""
        pack, first = _pack_of(ctx, self._layers[0].layer)
        store = pack.cache.store(first)
        view: RowView | None = pack.views.get(id(store))
        if view is None:
            view = pack.views[id(store)] = RowView(pack, store)
        if self._length < pack.cache.max_len:
            self._length = pack.cache.max_len
            for layer in self._layers:
                layer.read_rotations(self._length)
        out = x.float().clone(memory_format=torch.contiguous_format)
        kept: list[Tensor] = []
        modulations = embeddings = None
        if cond is not None:
            parts = [layer.modulation_of(one, kept) for layer, one in zip(self._layers, cond, strict=True)]
            modulations = (Modulation * len(parts))(*parts)
        width = 0
        if values is not None:
            rows = [None if one is None else one.float().contiguous() for one in values]
            embeddings = (c_void_p * len(rows))(*map(_pointer, rows))
            width = next((one.shape[-1] for one in rows if one is not None), 0)
        e = None if e is None else e.float().contiguous()
        cache, k_bytes, v_bytes = view.cache(first)
        _lib().rdlm_layers(
            self._structs, len(self._layers), byref(view.rows), byref(cache), k_bytes, v_bytes, out.data_ptr(),
            modulations, embeddings, width, None if around is None else byref(around), _pointer(e), count,
        )  # fmt: skip
        return out


class PackedCore:
    """Core steps of a recurrent model as one call of the kernels."""

    def __init__(self, model: Recurrent) -> None:
        loop = model.config.loop
        self.layers = cast(PackedLayers, model.core_layers)
        adapter = model.adapter
        self.around = CoreStep(INJECTIONS[loop.injection], loop.injection_state_scale)
        if adapter is not None:
            self.around.adapter = cast(PackedLinear, adapter).packed.struct
        self.around.norms, self.around.eps = loop.boundary_norm != "none", model.config.layer.norm_eps
        if loop.boundary_norm == "weighted":
            self.around.norm = cast(PackedNorm, model.ln_f).weight.data_ptr()

    @classmethod
    def of(cls, model: nn.Module) -> PackedCore | None:
        """None where a core step has a part that the kernels do not have, or the model is not packed."""
        if not isinstance(model, Recurrent) or not isinstance(model.core_layers, PackedLayers):
            return None
        loop, config = model.config.loop, model.config
        if loop.injection not in INJECTIONS or model.step_gate is not None or config.value_embeddings:
            return None
        return cls(model) if model.adapter is None or isinstance(model.adapter, PackedLinear) else None

    def steps(
        self, state: Tensor, e: Tensor, cond: Condition | None, contexts: Seq[AttentionContext]
    ) -> Tensor:
        """A core step with each of the contexts: state and e [1, N, D] -> [1, N, D]."""
        for _, group in groupby(contexts, id):
            same = list(group)
            state = self.layers.steps(state, same[0], cond, None, e, self.around, len(same))
        return state


def _pack_of(ctx: AttentionContext, layer: int) -> tuple[PackedContext, int]:
    """The pack that a context stands for, and the cache index that a layer has in it."""
    if isinstance(ctx, LaterLayers):
        return _pack_of(ctx.inner, layer + ctx.shift)
    assert isinstance(ctx, PackedContext), "a packed layer reads a packed context"
    return ctx, layer


class RowView:
    """A pack's rows as the kernels see them, for the layers of one store."""

    def __init__(self, ctx: PackedContext, store: Pages) -> None:
        lengths: list[int] = []
        writes: list[int] = []
        tables: list[int] = []
        slot_bytes, step_bytes, _ = store.places.strides
        base, last = store.places.ctypes.data, store.num_steps - 1
        for s in ctx.segments:
            table = base + s.slot * slot_bytes + min(s.step, last) * step_bytes
            if s.commit:
                store.reserve(s)
                own = store.row(s)[s.start : s.end].tolist()
                lengths += [s.end] * s.length if s.two_way else range(s.start + 1, s.end + 1)
            else:
                own = [-1]
                lengths.append(s.start + s.append_own)
            writes += own
            tables += [table] * s.length
        self.store = store
        self.arrays = [
            ctx.row_positions, np.array(lengths, np.int32), np.array(writes, np.int32), np.array(tables, np.int64),
        ]  # fmt: skip
        self.rows = Rows(len(lengths), *(array.ctypes.data for array in self.arrays))
        self._cache = Cache(0, 0, store.v.shape[-1], CACHE_KINDS[store.k.dtype])

    def cache(self, layer: int) -> tuple[Cache, int, int]:
        """Where the keys and values of a layer begin, and how many bytes later those of the next layer do."""
        index, found, of_layer = layer - self.store.layers.start, self._cache, []
        for name, pool in (("k", self.store.k), ("v", self.store.v)):
            of_layer.append(pool.stride(0) * pool.element_size())
            setattr(found, name, pool.data_ptr() + index * of_layer[-1])
        return found, of_layer[0], of_layer[1]


def use_kernels(model: nn.Module, weights: WeightFormat | Mapping[str, Quantized] | None = None) -> bool:
    """Replace layers, linear layers, norms and token tables of a network on the CPU, in place -> whether it
    was done: there must be a compiler, and weights in fp32 or bf16.

    weights: how matrices are quantised, or those that are quantised already, by name.
    """
    if library() is None or any(
        p.device.type != "cpu" or p.dtype not in (torch.float32, torch.bfloat16) for p in model.parameters()
    ):
        return False
    known = weights if isinstance(weights, Mapping) else {}
    chosen = formats(model, weights) if isinstance(weights, str) else {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def of(weight: Tensor) -> Weight:
        name = names[id(weight)]
        return (
            known[name]
            if name in known
            else quantized(weight, chosen[name])
            if name in chosen
            else weight.detach()
        )

    with torch.inference_mode(False), torch.no_grad():
        _replace(model, of, {})
    return True


def _replace(parent: nn.Module, of: Of, done: dict[int, nn.Module]) -> None:
    """done: by id of the original, so that a shared module is packed once."""
    for name, child in list(parent.named_children()):
        packed = done.get(id(child))
        if packed is None:
            match child:
                case Layers():
                    _replace(child, of, done)
                    packed = PackedLayers(cast(Iterable[PackedLayer], child))
                case TransformerLayer():
                    packed = PackedLayer(child, of)
                    _replace(packed, of, done)
                case TokenTable():
                    packed = PackedTable(child, of)
                case RMSNorm():
                    packed = PackedNorm(child)
                case nn.Linear() if child.in_features and child.out_features > 1:
                    packed = PackedLinear(child, of)
                case _:
                    _replace(child, of, done)
                    continue
            done[id(child)] = packed
        setattr(parent, name, packed)


def _rows(make: Callable[..., Tensor], *parts: Weight) -> Weight:
    """What ``make`` makes of the rows of matrices, of one kind."""
    first = parts[0]
    if not isinstance(first, Quantized):
        return make(*parts)
    of = [part for part in parts if isinstance(part, Quantized)]
    return replace(first, values=make(*[q.values for q in of]), scales=make(*[q.scales for q in of]))


def _interleaved(fc: Tensor, width: int) -> Tensor:
    """[gate | up] rows -> ``width`` gates and their ups by turns; zeros fill the last turn."""
    gate, up = fc.chunk(2)
    pad = -len(gate) % width
    both = [
        torch.cat([part, part.new_zeros(pad, part.shape[1])]).unflatten(0, (-1, width)) for part in (gate, up)
    ]
    return torch.stack(both, 1).flatten(0, 2)


def _vector(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach().float().flatten().contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
