"""The published looped models once more, from their description and nothing of rdlm: functions of the
published tensors ``w`` and config ``c``, fp32. And random checkpoints of many shapes in the published layouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def angles(length: int, dims: int, base: float, scaling: dict[str, Any] | None) -> Tensor:
    """[T, dims / 2]"""
    f = [base ** (-2 * i / dims) for i in range(dims // 2)]
    if scaling and "low_freq_factor" not in scaling:
        f = [value / scaling["factor"] for value in f]
    elif scaling:
        n, lo, hi = (
            scaling["original_max_position_embeddings"],
            scaling["low_freq_factor"],
            scaling["high_freq_factor"],
        )
        for i, value in enumerate(f):
            wave = 2 * math.pi / value
            t = (n / wave - lo) / (hi - lo)
            slow = value / scaling["factor"]
            f[i] = value if wave < n / hi else slow if wave > n / lo else (1 - t) * slow + t * value
    return torch.arange(length)[:, None] * torch.tensor(f)[None]


def rotate(x: Tensor, angle: Tensor, adjacent: bool) -> Tensor:
    """x: [B, T, H, hd], of which the first 2 * angle.shape[1] dimensions of a head are rotated."""
    dims = 2 * angle.shape[1]
    a, b = (
        (x[..., :dims:2], x[..., 1:dims:2]) if adjacent else (x[..., : dims // 2], x[..., dims // 2 : dims])
    )
    cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, -1).flatten(-2) if adjacent else torch.cat(pair, -1)
    return torch.cat([turned, x[..., dims:]], -1)


def attention(q: Tensor, k: Tensor, v: Tensor, types: Tensor | None = None) -> Tensor:
    """[B, T, H, hd], [B, T, KV, hd] twice -> [B, T, H * hd]; types: 1 where a position is of a prefix."""
    t, group = q.shape[1], q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones(t, t, dtype=torch.bool).tril()[None]
    if types is not None:
        seen = seen | ((types[:, :, None] == 1) & (types[:, None] == 1))
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def decoder_layer(
    w: Weights, p: str, x: Tensor, c: dict[str, Any], kind: str = "llama", rope: Tensor | None = None
) -> Tensor:
    """Of transformers: llama, mistral, nanbeige; qwen2; qwen3; olmo2; ouro."""
    hd = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    eps = c["rms_norm_eps"]
    if rope is None:
        rope = angles(x.shape[1], hd, c["rope_theta"], c.get("rope_scaling"))

    def norm(y: Tensor, name: str) -> Tensor:
        return rms(y, w[f"{p}.{name}.weight"], eps)

    h = x if kind == "olmo2" else norm(x, "input_layernorm")
    q, k, v = (
        F.linear(h, w[f"{p}.self_attn.{n}_proj.weight"], w.get(f"{p}.self_attn.{n}_proj.bias")) for n in "qkv"
    )
    if kind == "olmo2":
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")
    q, k, v = (y.unflatten(-1, (-1, hd)) for y in (q, k, v))
    if kind == "qwen3":
        q, k = norm(q, "self_attn.q_norm"), norm(k, "self_attn.k_norm")

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, w[f"{p}.{name}.weight"], w.get(f"{p}.{name}.bias"))

    a = linear(attention(rotate(q, rope, False), rotate(k, rope, False), v), "self_attn.o_proj")
    if kind == "ouro":
        a = norm(a, "input_layernorm_2")
    if kind == "olmo2":
        a = norm(a, "post_attention_layernorm")
    x = x + a
    h = x if kind == "olmo2" else norm(x, "post_attention_layernorm")
    m = linear(F.silu(linear(h, "mlp.gate_proj")) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    if kind == "ouro":
        m = norm(m, "post_attention_layernorm_2")
    if kind == "olmo2":
        m = norm(m, "post_feedforward_layernorm")
    return x + m


def read_head(w: Weights, x: Tensor, head: str, table: str) -> Tensor:
    return x @ w.get(head, w.get(table)).T  # type: ignore[union-attr]


def ouro(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, **_: Any) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for _u in range(num_steps):
        for i in range(c["num_hidden_layers"]):
            x = decoder_layer(w, f"model.layers.{i}", x, c, "ouro")
        x = rms(x, w["model.norm.weight"], c["rms_norm_eps"])
    return read_head(w, x, "lm_head.weight", "model.embed_tokens.weight")


def nanbeige(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, **_: Any) -> Tensor:
    x, skips = w["model.embed_tokens.weight"][ids], c.get("skip_loop_final_norm", False)
    for u in range(num_steps):
        for i in range(c["num_hidden_layers"]):
            x = decoder_layer(w, f"model.layers.{i}", x, c)
        if not skips or u == num_steps - 1:
            x = rms(x, w["model.norm.weight"], c["rms_norm_eps"])
    return read_head(w, x, "lm_head.weight", "model.embed_tokens.weight")


def loopus(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, **_: Any) -> Tensor:
    base = c["base_config_dict"]
    kind, total = base["model_type"], base["num_hidden_layers"]

    def run(part: str, x: Tensor) -> Tensor:
        indices = c[f"{part}_layer_indices"]
        count = total + indices[0] if len(indices) == 1 and indices[0] < 0 else len(indices)
        for j in range(count):
            x = decoder_layer(w, f"{part}.layers.{j}", x, base, kind)
        return x

    h, g = run("encoder", w["encoder.embed_tokens.weight"][ids]), "reasoning.gate"
    for _step in range(num_steps):
        new = run("reasoning", h)
        step = F.softplus(
            (new - h) @ w[f"{g}.dt_input_proj.weight"].T @ w[f"{g}.delta_proj.weight"].T
            + w[f"{g}.delta_proj.bias"]
        )
        share = torch.exp(-step * w[f"{g}.A_log"].exp())
        h = share * new + (1 - share) * h
    return (
        rms(run("decoder", h), w["decoder.norm.weight"], base["rms_norm_eps"]) @ w["decoder.lm_head.weight"].T
    )


def raven(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, state: Tensor, **_: Any) -> Tensor:
    """Huginn and both retrofits, told apart by their tensors."""
    is_huginn = any(name.endswith("norm_3.weight") for name in w)
    is_olmo = any(name.endswith("attn.q_norm.weight") for name in w)
    heads, eps = c["n_heads"], c["norm_eps"]
    kv, hd = c.get("num_key_value_heads") or heads, c.get("head_dim") or c["n_embd"] // heads
    rope = angles(ids.shape[1], hd, c["rope_base"] if is_huginn else c["rope_theta"], c.get("rope_scaling"))

    def block(p: str, x: Tensor) -> Tensor:
        def norm(y: Tensor, name: str) -> Tensor:
            return rms(y, w[f"{p}.{name}.weight"], eps)

        def attend(h: Tensor) -> Tensor:
            q, k, v = (h @ w[f"{p}.attn.Wqkv.weight"].T).split([heads * hd, kv * hd, kv * hd], -1)
            if is_olmo:
                q, k = norm(q, "attn.q_norm"), norm(k, "attn.k_norm")
            q, k, v = (y.unflatten(-1, (-1, hd)) for y in (q, k, v))
            if is_huginn and c["qk_bias"]:
                bias = w[f"{p}.attn.qk_bias"].view(2, heads, hd)
                q, k = q + bias[0], k + bias[1]
            q, k = rotate(q, rope, is_huginn), rotate(k, rope, is_huginn)
            return attention(q, k, v) @ w[f"{p}.attn.proj.weight"].T

        def mlp(h: Tensor) -> Tensor:
            g, u = (h @ w[f"{p}.mlp.fc.weight"].T).chunk(2, -1)
            return (F.silu(g) * u) @ w[f"{p}.mlp.proj.weight"].T

        if is_huginn:
            x = norm(attend(norm(x, "norm_1")) + x, "norm_2")
            return norm(mlp(norm(x, "norm_3")) + x, "norm_4")
        if is_olmo:
            x = x + norm(attend(x), "norm_1")
            return x + norm(mlp(x), "norm_2")
        x = x + attend(norm(x, "norm_1"))
        return x + mlp(norm(x, "norm_2"))

    def final(x: Tensor) -> Tensor:
        return rms(x, w["transformer.ln_f.weight"], eps)

    e = w["transformer.wte.weight"][ids] * c["init_values"]["embed_scale"]
    for i in range(c["n_layers_in_prelude"]):
        e = block(f"transformer.prelude.{i}", e)
    s = state
    for _step in range(num_steps):
        s = F.linear(
            torch.cat([s, e], -1), w["transformer.adapter.weight"], w.get("transformer.adapter.bias")
        )
        for i in range(c["n_layers_in_recurrent_block"]):
            s = block(f"transformer.core_block.{i}", s)
    if is_huginn:
        s = final(s)
    for i in range(c["n_layers_in_coda"]):
        s = block(f"transformer.coda.{i}", s)
    return read_head(w, final(s), "lm_head.weight", "transformer.wte.weight")


def parcae(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, state: Tensor, **_: Any) -> Tensor:
    heads, eps = c["num_attention_heads"], c["norm_eps"]
    hd = c["n_embd"] // heads
    settings = c.get("rope_settings") or {}
    rope = angles(ids.shape[1], hd, settings.get("rope_base", 50_000), None)
    rope = rope / settings.get("rope_condense_ratio", 1) * settings.get("use_rope", True)
    counts = [c["n_layers_in_prelude"], c["n_layers_in_recurrent_block"], c["n_layers_in_coda"]]

    def block(part: str, i: int, j: int, x: Tensor) -> Tensor:
        p = f"transformer.{part}.{i}"
        h = rms(x, w[f"{p}.norm_1.weight"], eps)
        q, k, v = ((h @ w[f"{p}.attn.c_{n}.weight"].T).unflatten(-1, (-1, hd)) for n in "qkv")
        table, gate = w.get(f"value_embeds.{j}.weight"), w.get(f"{p}.attn.ve_gate.weight")
        if table is not None and gate is not None:
            share = 2 * torch.sigmoid(h[..., : gate.shape[1]] @ gate.T)
            v = v + share[..., None] * table[ids].unflatten(-1, (-1, hd))
        if c.get("qk_bias"):
            q, k = q + w[f"{p}.attn.qk_bias"][0], k + w[f"{p}.attn.qk_bias"][1]
        q, k = rotate(q, rope, True), rotate(k, rope, True)
        if c["qk_norm"]:
            q, k = rms(q, None, 1.19e-7), rms(k, None, 1.19e-7)
        x = x + attention(q, k, v) @ w[f"{p}.attn.c_proj.weight"].T
        h = rms(x, w[f"{p}.norm_2.weight"], eps)
        wide = h @ w[f"{p}.mlp.fc.weight"].T
        if c.get("mlp_class_name") == "GatedMLP":
            inner = F.silu(wide.chunk(2, -1)[0]) * wide.chunk(2, -1)[1]
        else:
            inner = F.gelu(wide) if c["nonlin_name"] == "GELU" else 0.5 * F.relu(wide) ** 2
        return x + inner @ w[f"{p}.mlp.proj.weight"].T

    scale = math.sqrt(c["n_embd"]) if c["init_strategy"] == "takase" else 1.0
    e = w["transformer.wte.weight"][ids] * scale
    for i in range(counts[0]):
        e = block("prelude", i, i, e)
    if c["prelude_norm"]:
        e = rms(e, w["transformer.ln_prelude.weight"], eps)
    kind, j = c.get("injection_type", "diagonal"), "transformer.adapter"
    x = state
    for _step in range(num_steps):
        if kind == "diagonal":
            step = F.softplus(w[f"{j}.dt_bias"])
            x = x * torch.exp(-step * w[f"{j}.A_log"].exp()) + step * (e @ w[f"{j}.B"].T)
        else:
            x = x + e if kind == "add" else torch.cat([x, e], -1) @ w[f"{j}.adapter.weight"].T
        for i in range(counts[1]):
            x = block("core_block", i, counts[0] + i, x)
    x = x @ w["transformer.C.weight"].T
    for i in range(counts[2]):
        x = block("coda", i, counts[0] + counts[1] + i, x)
    return read_head(w, rms(x, w["transformer.ln_f.weight"], eps), "lm_head.weight", "transformer.wte.weight")


def looped_lm(w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, state: Tensor, **_: Any) -> Tensor:
    c = c["model"]
    hd, eps = c["head_dim"], c["rmsnorm_eps"]
    rope = angles(ids.shape[1], c.get("rope_head_dim", hd), c["rope_base"], None)

    def block(i: int, x: Tensor) -> Tensor:
        p = f"layers.{i}"
        h = rms(x, w[f"{p}.attention.norm.weight"] + 1, eps)
        q, k, v = ((h @ w[f"{p}.attention.w{n}.weight"].T).unflatten(-1, (-1, hd)) for n in "qkv")
        x = x + attention(rotate(q, rope, True), rotate(k, rope, True), v) @ w[f"{p}.attention.wo.weight"].T
        h = rms(x, w[f"{p}.nffn.norm.weight"] + 1, eps)
        m = F.silu(h @ w[f"{p}.nffn.fc1.weight"].T) * (h @ w[f"{p}.nffn.fc3.weight"].T)
        return x + m @ w[f"{p}.nffn.fc2.weight"].T

    first, core, last = (c[f"huginn_{part}_layers"] for part in ("prelude", "recurrent", "coda"))
    e, j = w["embed.weight"][ids], "input_injection"
    for i in range(first):
        e = block(i, e)
    if c.get("huginn_prelude_norm") == "rms":
        e = rms(e, w["huginn_prelude_norm_module.weight"] + 1, eps)
    x = e if c.get("huginn_state_init") == "input" else state
    for _step in range(num_steps):
        if c.get("huginn_input_injection", "diagonal") == "linear":
            x = F.linear(torch.cat([x, e], -1), w[f"{j}.adapter.weight"], w.get(f"{j}.adapter.bias"))
        elif c.get("huginn_input_injection") != "none":
            step = F.softplus(w[f"{j}.dt_bias"])
            r = torch.exp(-step * w[f"{j}.A_log"].exp()) * x
            q = step * (e @ w[f"{j}.input_adapter.weight"].T)
            if c.get("huginn_prelude_orthogonal"):
                small = c.get("huginn_ortho_projection_eps", 1e-6)
                r = r - q * (r * q).sum(-1, keepdim=True) / ((q * q).sum(-1, keepdim=True) + small)
            x = r + q
        for i in range(first, first + core):
            x = block(i, x)
        if c.get("huginn_recurrent_exit_norm") == "parameterless_rms":
            x = rms(x, None, eps)
    for i in range(first + core, first + core + last):
        x = block(i, x)
    return rms(x, w["output.final_norm.weight"] + 1, eps) @ w["output.output.weight"].T


def loopformer(
    w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, steps: list[float] | None = None, **_: Any
) -> Tensor:
    """steps: the lengths of the steps; None: all are 1 / num_steps."""
    heads, eps = c["n_head"], torch.finfo(torch.float32).eps
    x = w["transformer.wte.weight"] if "transformer.wte.weight" in w else w["lm_head.weight"]
    table = x
    x = table[ids] + w["transformer.wpe.weight"][: ids.shape[1]]

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def embedded(name: str, t: float) -> Tensor:
        f = torch.tensor([10_000 ** (-i / 128) for i in range(128)])
        s = torch.cat([(t * f).cos(), (t * f).sin()])
        s = F.silu(F.linear(s, w[f"{name}.mlp.0.weight"], w[f"{name}.mlp.0.bias"]))
        return F.linear(s, w[f"{name}.mlp.2.weight"], w[f"{name}.mlp.2.bias"])

    steps, t = steps or [1 / num_steps] * num_steps, 0.0
    for length in steps:
        cond = F.silu(embedded("time_embedder", t) + embedded("dt_embedder", length))
        t += length
        for i in range(c["n_layer"]):
            p = f"transformer.h.blocks.{i}"
            gains = F.linear(cond, w[f"{p}.adaLN_modulation.1.weight"], w[f"{p}.adaLN_modulation.1.bias"])
            g1, g2, s1, s2 = gains.chunk(4)
            h = rms(x, None, eps) * (1 + s1)
            q, k, v = (part.unflatten(-1, (heads, -1)) for part in linear(h, f"{p}.attn.c_attn").chunk(3, -1))
            x = x + g1 * linear(attention(q, k, v), f"{p}.attn.c_proj")
            h = rms(x, None, eps) * (1 + s2)
            x = x + g2 * linear(F.gelu(linear(h, f"{p}.mlp.c_fc")), f"{p}.mlp.c_proj")
    return rms(x, w["transformer.norm_f.weight"], eps) @ table.T


def hrm(
    w: Weights, c: dict[str, Any], ids: Tensor, num_steps: int, types: Tensor | None = None, **_: Any
) -> Tensor:
    heads, eps = c["num_attention_heads"], c["rms_norm_eps"]
    hd = c.get("head_dim") or c["hidden_size"] // heads
    rope = angles(ids.shape[1], hd, c["rope_theta"], None)
    count = 1 + max(int(name.split(".")[3]) for name in w if name.startswith("model.L_module.layers."))

    def stack(name: str, x: Tensor) -> Tensor:
        for i in range(count):
            p = f"model.{name}_module.layers.{i}"
            h = rms(x, None, eps)
            g, q, k, v = (h @ w[f"{p}.attn.gqkv_proj.weight"].T).chunk(4, -1)
            q, k, v = (y.unflatten(-1, (-1, hd)) for y in (q, k, v))
            a = attention(rotate(q, rope, False), rotate(k, rope, False), v, types)
            x = x + (torch.sigmoid(g) * a) @ w[f"{p}.attn.o_proj.weight"].T
            gate, up = (rms(x, None, eps) @ w[f"{p}.mlp.gate_up_proj.weight"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ w[f"{p}.mlp.down_proj.weight"].T
        return rms(x, None, eps)

    scale = c.get("embedding_scale") or 1 / c.get("initializer_range", 0.02)
    high = w["model.embed_tokens.weight"][ids] * scale
    low = w["model.z_L_init"].expand_as(high)
    for _h in range(num_steps):
        for _l in range(c["L_cycles"]):
            low = stack("L", low + high)
        high = stack("H", high + low)
    return high @ w["lm_head.weight"].T


LOGITS: dict[str, Callable[..., Tensor]] = {
    "ouro": ouro, "nanbeige": nanbeige, "loopus": loopus, "huginn": raven, "retro_llama": raven, "retro_olmo": raven,
    "parcae": parcae, "ifm_p2": looped_lm, "ifm_p2_orthoinj": looped_lm, "ifm_p2_linear": looped_lm,
    "loopformer": loopformer, "hrm_text": hrm,
}  # fmt: skip


def decoder_shapes(p: str, c: dict[str, Any], kind: str = "llama") -> dict[str, tuple[int, ...]]:
    d, heads = c["hidden_size"], c["num_attention_heads"]
    kv, hd = c.get("num_key_value_heads") or heads, c.get("head_dim") or d // heads
    widths = {"q": heads * hd, "k": kv * hd, "v": kv * hd}
    attn, mlp = f"{p}.self_attn", f"{p}.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attn}.{n}_proj.weight": (width, d) for n, width in widths.items()
    }
    if kind == "qwen2":
        shapes |= {f"{attn}.{n}_proj.bias": (width,) for n, width in widths.items()}
    if kind in ("qwen3", "olmo2"):
        shapes |= {f"{attn}.{n}_norm.weight": (hd if kind == "qwen3" else widths[n],) for n in "qk"}
    norms = [
        "post_attention_layernorm",
        "post_feedforward_layernorm" if kind == "olmo2" else "input_layernorm",
    ]
    if kind == "ouro":
        norms += ["input_layernorm_2", "post_attention_layernorm_2"]
    inner = c["intermediate_size"]
    return {
        **shapes, f"{attn}.o_proj.weight": (d, heads * hd), f"{mlp}.gate_proj.weight": (inner, d),
        f"{mlp}.up_proj.weight": (inner, d), f"{mlp}.down_proj.weight": (d, inner),
        **{f"{p}.{n}.weight": (d,) for n in norms},
        **({f"{attn}.{n}_proj.bias": (width,) for n, width in {**widths, "o": d}.items()}
           if c.get("attention_bias") else {}),
        **({f"{mlp}.{n}_proj.bias": (width,) for n, width in (("gate", inner), ("up", inner), ("down", d))}
           if c.get("mlp_bias") else {}),
    }  # fmt: skip


def decoder_tensors(c: dict[str, Any], kind: str, gate: bool = False) -> dict[str, tuple[int, ...]]:
    d, v = c["hidden_size"], c["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not c.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    if gate:
        shapes |= {"model.early_exit_gate.weight": (1, d), "model.early_exit_gate.bias": (1,)}
    for i in range(c["num_hidden_layers"]):
        shapes |= decoder_shapes(f"model.layers.{i}", c, kind)
    return shapes


def raven_tensors(c: dict[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    d, heads, inner = c["n_embd"], c["n_heads"], c["intermediate_size"]
    kv, hd = c.get("num_key_value_heads") or heads, c.get("head_dim") or d // heads
    t, v = "transformer", c["padded_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{t}.wte.weight": (v, d),
        f"{t}.ln_f.weight": (d,),
        f"{t}.adapter.weight": (d, 2 * d),
    }
    if c.get("bias"):
        shapes[f"{t}.adapter.bias"] = (d,)
    if not c.get("tie_embeddings"):
        shapes["lm_head.weight"] = (v, d)
    for part, key in (("prelude", "prelude"), ("core_block", "recurrent_block"), ("coda", "coda")):
        for p in (f"{t}.{part}.{i}" for i in range(c[f"n_layers_in_{key}"])):
            shapes |= {f"{p}.norm_{n}.weight": (d,) for n in range(1, 5 if kind == "huginn" else 3)}
            shapes |= {
                f"{p}.attn.Wqkv.weight": ((heads + 2 * kv) * hd, d), f"{p}.attn.proj.weight": (d, heads * hd),
                f"{p}.mlp.fc.weight": (2 * inner, d), f"{p}.mlp.proj.weight": (d, inner),
            }  # fmt: skip
            if kind == "huginn" and c["qk_bias"]:
                shapes[f"{p}.attn.qk_bias"] = (2, 1, heads, hd)
            if kind == "retro_olmo":
                shapes |= {f"{p}.attn.q_norm.weight": (heads * hd,), f"{p}.attn.k_norm.weight": (kv * hd,)}
    return shapes


def parcae_tensors(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, heads, v, t = c["n_embd"], c["num_attention_heads"], c["padded_vocab_size"], "transformer"
    counts = [c["n_layers_in_prelude"], c["n_layers_in_recurrent_block"], c["n_layers_in_coda"]]
    shapes: dict[str, tuple[int, ...]] = {
        f"{t}.wte.weight": (v, d), f"{t}.ln_f.weight": (d,), f"{t}.C.weight": (d, d),
    }  # fmt: skip
    kind = c.get("injection_type", "diagonal")
    if kind == "diagonal":
        shapes |= {f"{t}.adapter.A_log": (d,), f"{t}.adapter.dt_bias": (d,), f"{t}.adapter.B": (d, d)}
    elif kind == "linear":
        shapes[f"{t}.adapter.adapter.weight"] = (d, 2 * d)
    if c["prelude_norm"]:
        shapes[f"{t}.ln_prelude.weight"] = (d,)
    if not c["tie_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    # The reference's two rules: which layers have a table, and which have a gate.
    tables = {j for j in range(sum(counts)) if (j - sum(counts) + 1) % 2 == 0}
    shapes |= {f"value_embeds.{j}.weight": (v, d) for j in tables}
    offsets = [0, counts[0], counts[0] + counts[1] * c["mean_recurrence"]]
    for part, count, offset in zip(("prelude", "core_block", "coda"), counts, offsets, strict=True):
        inner = c[
            "recurrent_intermediation_embedding_dimension" if part == "core_block" else "intermediate_size"
        ]
        for i in range(count):
            p = f"{t}.{part}.{i}"
            shapes |= {f"{p}.attn.c_{n}.weight": (d, d) for n in ("q", "k", "v", "proj")}
            shapes |= {f"{p}.norm_1.weight": (d,), f"{p}.norm_2.weight": (d,)}
            gated = c.get("mlp_class_name") == "GatedMLP"
            shapes |= {f"{p}.mlp.fc.weight": ((1 + gated) * inner, d), f"{p}.mlp.proj.weight": (d, inner)}
            if c.get("qk_bias"):
                shapes[f"{p}.attn.qk_bias"] = (2, 1, heads, d // heads)
            if (offset + i - counts[1] * c["mean_backprop_depth"] + 1) % 2 == 0:
                shapes[f"{p}.attn.ve_gate.weight"] = (heads, 32)
    return shapes


def looped_lm_tensors(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    c = c["model"]
    d, hd, v, inner, j = (
        c["model_dim"],
        c["head_dim"],
        c["vocab_size"],
        c["ffn_hidden_dim"],
        "input_injection",
    )
    q, kv = c["num_heads"] * hd, c["num_kv_heads"] * hd
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (v, d), "output.final_norm.weight": (d,), "output.output.weight": (v, d),
    }  # fmt: skip
    if c.get("huginn_prelude_norm") == "rms":
        shapes["huginn_prelude_norm_module.weight"] = (d,)
    if c["huginn_input_injection"] == "linear":
        shapes |= {f"{j}.adapter.weight": (d, 2 * d), f"{j}.adapter.bias": (d,)}
    elif c["huginn_input_injection"] != "none":
        shapes |= {f"{j}.A_log": (d,), f"{j}.dt_bias": (d,), f"{j}.input_adapter.weight": (d, d)}
    for i in range(sum(c[f"huginn_{part}_layers"] for part in ("prelude", "recurrent", "coda"))):
        attn, mlp = f"layers.{i}.attention", f"layers.{i}.nffn"
        shapes |= {
            f"{attn}.norm.weight": (d,), f"{attn}.wq.weight": (q, d), f"{attn}.wk.weight": (kv, d),
            f"{attn}.wv.weight": (kv, d), f"{attn}.wo.weight": (d, q), f"{mlp}.norm.weight": (d,),
            f"{mlp}.fc1.weight": (inner, d), f"{mlp}.fc3.weight": (inner, d), f"{mlp}.fc2.weight": (d, inner),
        }  # fmt: skip
    return shapes


def loopus_tensors(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    base, g = c["base_config_dict"], "reasoning.gate"
    d, v, inner = base["hidden_size"], base["vocab_size"], math.ceil(base["hidden_size"] / 16)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.embed_tokens.weight": (v, d), "decoder.norm.weight": (d,), "decoder.lm_head.weight": (v, d),
        f"{g}.A_log": (d,), f"{g}.dt_input_proj.weight": (inner, d), f"{g}.delta_proj.weight": (d, inner),
        f"{g}.delta_proj.bias": (d,), "q_head.0.weight": (d,), "q_head.0.bias": (d,), "q_head.1.weight": (1, d),
        "q_head.1.bias": (1,),
    }  # fmt: skip
    for part in ("encoder", "reasoning", "decoder"):
        indices = c[f"{part}_layer_indices"]
        ends = len(indices) == 1 and indices[0] < 0
        for i in range(base["num_hidden_layers"] + indices[0] if ends else len(indices)):
            shapes |= decoder_shapes(f"{part}.layers.{i}", base, base["model_type"])
    return shapes


def loopformer_tensors(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, t = c["n_embd"], "transformer"
    shapes: dict[str, tuple[int, ...]] = {
        f"{t}.wte.weight": (c["vocab_size"], d), f"{t}.wpe.weight": (c["block_size"], d), f"{t}.norm_f.weight": (d,),
    }  # fmt: skip
    for name in ("time_embedder", "dt_embedder"):
        shapes |= {f"{name}.mlp.0.weight": (d, 256), f"{name}.mlp.2.weight": (d, d)}
        shapes |= {f"{name}.mlp.{n}.bias": (d,) for n in (0, 2)}
    for p in (f"{t}.h.blocks.{i}" for i in range(c["n_layer"])):
        shapes |= {
            f"{p}.attn.c_attn.weight": (3 * d, d), f"{p}.attn.c_proj.weight": (d, d),
            f"{p}.mlp.c_fc.weight": (c["intermediate_dim"], d),
            f"{p}.mlp.c_proj.weight": (d, c["intermediate_dim"]), f"{p}.adaLN_modulation.1.weight": (4 * d, d),
            f"{p}.adaLN_modulation.1.bias": (4 * d,),
        }  # fmt: skip
        if c.get("bias"):
            shapes |= {f"{p}.attn.c_attn.bias": (3 * d,), f"{p}.mlp.c_fc.bias": (c["intermediate_dim"],)}
            shapes |= {f"{p}.{part}.c_proj.bias": (d,) for part in ("attn", "mlp")}
    return shapes


def hrm_tensors(c: dict[str, Any], count: int) -> dict[str, tuple[int, ...]]:
    d, v, inner = c["hidden_size"], c["vocab_size"], c["intermediate_size"]
    width = c["num_attention_heads"] * (c.get("head_dim") or d // c["num_attention_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (v, d),
        "lm_head.weight": (v, d),
        "model.z_L_init": (d,),
    }
    for p in (f"model.{stack}_module.layers.{i}" for stack in "LH" for i in range(count)):
        shapes |= {
            f"{p}.attn.gqkv_proj.weight": (4 * width, d), f"{p}.attn.o_proj.weight": (d, width),
            f"{p}.mlp.gate_up_proj.weight": (2 * inner, d), f"{p}.mlp.down_proj.weight": (d, inner),
        }  # fmt: skip
    return shapes


def drawn(shapes: dict[str, tuple[int, ...]], seed: int, offsets: bool = False) -> Weights:
    """Random tensors none of which is trivial; offsets: norms are stored as what is added to one."""
    rng, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=rng)
        is_norm = len(shape) == 1 and name.endswith("weight") and ("norm" in name or "ln_" in name)
        if is_norm or name == "q_head.0.weight":
            value = 0.3 * value + (0 if offsets else 1)
        elif len(shape) > 1 and "embed" not in name.split(".")[-2] and "wte" not in name:
            value = value / math.sqrt(shape[-1])
        found[name] = value * (0.5 if len(shape) == 1 and not is_norm else 1)
    return found
