"""Architectures: the reference implementation's numbers, causality, caching, recurrence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rdlm.config.model import HuginnConfig, LlamaConfig
from rdlm.diffusion.samplers import run
from rdlm.errors import UserError
from rdlm.nn.attention import CausalContext, rotary_table
from rdlm.nn.kv_cache import KVCache, PackedContext, Segment
from rdlm.objectives import Objective
from rdlm.registry import build_model

T, V = 12, 64


def test_huginn_matches_the_reference_implementation(shared_data) -> None:
    """seal-rg/recurrent-pretraining computed these logits in fp32 from a random checkpoint; 5e-6 is fp32
    rounding over 16 steps."""
    folder = shared_data.parent / "golden" / "huginn_tiny"
    if not folder.is_dir():
        pytest.skip(f"no golden outputs at {folder}")
    c = json.loads((folder / "config.json").read_text())
    model = build_model(
        HuginnConfig(
            vocab_size=c["padded_vocab_size"],
            d_model=c["n_embd"],
            num_heads=c["n_heads"],
            mlp_width=c["intermediate_size"],
            max_seq_len=c["block_size"],
        )
    )
    weights = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({k: v for k, v in weights.items() if k not in ("freqs_cis", "lm_head.weight")})
    golden = load_file(folder / "outputs.safetensors")
    ids = golden["input_ids"]
    ctx = CausalContext(ids.shape[1])
    with torch.no_grad():
        e = model.encode(ids, ctx)
        for start, name in ((torch.zeros_like(e), "zero_init"), (golden["input_states"], "given_state")):
            seen: dict[int, torch.Tensor] = {}

            def keep(k: int, state: torch.Tensor, seen: dict[int, torch.Tensor] = seen) -> None:
                seen[k] = model.logits(model.decode(state, ctx))

            run(lambda s, _: model.core(s, e, None, ctx), start, 16, on_step=keep)
            for k in (1, 2, 4, 8, 16):
                torch.testing.assert_close(seen[k], golden[f"logits_{name}_K{k}"], atol=5e-6, rtol=0)


def test_huginn_3b5_has_the_published_parameter_count() -> None:
    """The shapes of Huginn-0125 (serving shapes 5280 x 55 heads x 17920, 65536 tokens) sum to 3,564,976,800."""
    config = HuginnConfig(vocab_size=65536, d_model=5280, num_heads=55, mlp_width=17920, max_seq_len=4096)
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config).parameters()) == 3_564_976_800


@pytest.mark.parametrize("state_init", ["zero", "normal"])
def test_identity_adapter_makes_one_step_a_plain_transformer(tiny, state_init: str) -> None:
    """At initialisation [0, I] passes e and silences the state: the first step cannot depend on how the state
    starts."""
    denoiser = tiny("huginn", "onestep", state_init=state_init)
    model, ctx = denoiser.model, CausalContext(T)
    e = model.encode(torch.randint(0, V, (2, T)), ctx)
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(
        model.core(model.initial_state(e, rng), e, None, ctx),
        model.core(torch.randn_like(e), e, None, ctx),
        atol=0,
        rtol=0,
    )


def test_like_init_state_has_huginns_scale(tiny) -> None:
    """Truncated normal of std sqrt(2/5D) times sqrt(D): 0.632 before the cut at three standard deviations."""
    state = tiny("huginn", "onestep", state_init="normal").model.initial_state(torch.empty(64, 64, 32))
    assert (
        state.std().item() == pytest.approx((2 / 5) ** 0.5, rel=0.03)
        and state.abs().max() <= 3 * (2 / 5) ** 0.5 + 1e-6
    )


def test_adaln_starts_as_the_plain_layer(tiny) -> None:
    plain, conditioned = tiny("huginn", "onestep"), tiny("huginn", "single_pass")
    missing, unexpected = conditioned.model.load_state_dict(plain.model.state_dict(), strict=False)
    assert not unexpected and all("modulation" in name or "noise_embedding" in name for name in missing)
    ids, ctx = torch.randint(0, V, (2, T)), CausalContext(T)
    e = plain.model.encode(ids, ctx)
    cond = conditioned.condition(torch.full((2, T), 0.3), e)
    torch.testing.assert_close(
        conditioned.model.core(torch.zeros_like(e), e, cond, ctx),
        plain.model.core(torch.zeros_like(e), e, None, ctx),
        atol=0,
        rtol=0,
    )


def test_grouped_heads_equal_repeated_heads() -> None:
    """Two key-value heads shared by four query heads compute what four repeated ones do."""
    shape = {
        "vocab_size": V,
        "d_model": 32,
        "num_heads": 4,
        "mlp_width": 64,
        "num_layers": 2,
        "max_seq_len": 64,
    }
    grouped = build_model(LlamaConfig.model_validate({**shape, "num_kv_heads": 2}))
    grouped.init_weights(torch.Generator().manual_seed(0))
    full = build_model(LlamaConfig.model_validate(shape))
    weights = grouped.state_dict()
    for name in [n for n in weights if n.endswith("Wqkv.weight")]:
        q, k, v = weights[name].split([32, 16, 16])
        wide = [part.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for part in (k, v)]
        weights[name] = torch.cat([q, *wide])
    full.load_state_dict(weights)
    ids, ctx = torch.randint(0, V, (2, T)), CausalContext(T)

    def forward(model):
        e = model.encode(ids, ctx)
        return model.logits(model.decode(model.core(torch.zeros_like(e), e, None, ctx), ctx))

    torch.testing.assert_close(forward(grouped), forward(full), atol=1e-6, rtol=1e-5)


def pool_for(denoiser: Objective, depth: int, slots: int = 3) -> KVCache:
    m = denoiser.model
    sizes = m.num_cache_layers, slots, 32, m.num_kv_heads, m.head_dim
    return KVCache(*sizes, num_steps=depth, core_layers=m.core_cache_layers)


def through_cache(
    denoiser: Objective,
    pool: KVCache,
    ids: torch.Tensor,
    num_steps: int,
    spans: list[int],
    slot: int,
) -> torch.Tensor:
    """Logits [T, V] of one sequence fed in pieces of the given lengths, each piece iterated num_steps times."""
    model, start, rows = denoiser.model, 0, []
    for length in spans:
        once = PackedContext(pool, [Segment(slot, start, length)])
        e = model.encode(ids[:, start : start + length], once)
        cond = denoiser.condition(None, e)

        def step(state, k, e=e, cond=cond, start=start, length=length):
            return denoiser.model.core(
                state, e, cond, PackedContext(pool, [Segment(slot, start, length, step=k)])
            )

        state = run(step, model.initial_state(e), num_steps)
        rows.append(denoiser.predict(model.decode(state, once)).prior[0])
        start += length
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("family", "objective", "num_steps"),
    [("huginn", "single_pass", 4), ("huginn", "bptt", 1), ("llama", "next_token", 1)],
)
@pytest.mark.parametrize("spans", [[T], [1] * T, [5, 1, 1, 5], [3, 4, 5]])
@torch.no_grad()
def test_prefill_equals_decode_with_the_full_cache(
    tiny, family: str, objective: str, num_steps: int, spans: list[int]
) -> None:
    """Any split of a sequence gives the logits of the whole, to fp32 rounding (2e-5), when every step keeps
    its keys."""
    denoiser, ids = tiny(family, objective), torch.randint(0, V, (1, T))
    ctx = CausalContext(T)
    e = denoiser.model.encode(ids, ctx)
    cond = denoiser.condition(None, e)
    state = run(lambda s, _: denoiser.model.core(s, e, cond, ctx), denoiser.model.initial_state(e), num_steps)
    expected = denoiser.predict(denoiser.model.decode(state, ctx)).prior[0]
    got = through_cache(denoiser, pool_for(denoiser, num_steps), ids, num_steps, spans, slot=1)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_shared_cache_is_exact_at_one_step_and_differs_beyond(tiny) -> None:
    denoiser, ids = tiny("huginn", "onestep"), torch.randint(0, V, (1, T))
    with torch.no_grad():
        denoiser.model.adapter.weight.add_(0.3 * torch.randn_like(denoiser.model.adapter.weight))
    for num_steps, equal in ((1, True), (4, False)):
        full = through_cache(denoiser, pool_for(denoiser, num_steps), ids, num_steps, [1] * T, 0)
        shared = through_cache(denoiser, pool_for(denoiser, 1), ids, num_steps, [1] * T, 0)
        assert torch.allclose(full, shared, atol=2e-5) is equal


@torch.no_grad()
def test_a_ragged_pack_equals_each_sequence_alone(tiny) -> None:
    """Rows of different sequences, steps and lengths in one forward: each as if it were alone (2e-5)."""
    denoiser = tiny("huginn", "single_pass")
    model, depth = denoiser.model, 4
    a, b, c = (torch.randint(0, V, (1, n)) for n in (6, 4, 3))
    alone, packed = pool_for(denoiser, depth), pool_for(denoiser, depth)
    for pool in (alone, packed):  # b and c have a past; a is prefilled beside them
        through_cache(denoiser, pool, b[:, :3], 4, [3], 1)
        through_cache(denoiser, pool, c[:, :2], 2, [2], 2)  # fewer steps: its last keys serve the deeper ones
    plans = [(a, 0, 0, 6, 0), (b, 1, 3, 1, 2), (c, 2, 2, 1, 3)]  # ids, slot, start, length, step
    e_alone, outs = [], []
    for ids, slot, start, length, step in plans:
        e = model.encode(ids[:, start : start + length], PackedContext(alone, [Segment(slot, start, length)]))
        e_alone.append(e)
        outs.append(
            denoiser.model.core(
                torch.ones_like(e),
                e,
                denoiser.condition(None, e),
                PackedContext(alone, [Segment(slot, start, length, step)]),
            )
        )
    segments = [Segment(slot, start, length) for _, slot, start, length, _ in plans]
    e = model.encode(
        torch.cat([ids[:, s : s + n] for ids, _, s, n, _ in plans], 1), PackedContext(packed, segments)
    )
    torch.testing.assert_close(e, torch.cat(e_alone, 1), atol=2e-5, rtol=1e-4)
    stepped = [Segment(slot, start, length, step) for _, slot, start, length, step in plans]
    got = denoiser.model.core(
        torch.ones_like(e), e, denoiser.condition(None, e), PackedContext(packed, stepped)
    )
    torch.testing.assert_close(got, torch.cat(outs, 1), atol=2e-5, rtol=1e-4)
    for _, slot, start, length, step in plans:
        for layer in range(model.num_cache_layers):
            kept = [pool.read(layer, slot, step, start + length) for pool in (packed, alone)]
            torch.testing.assert_close(*kept, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("objective", "append_own"), [("evidence", False), ("paper", True)])
@torch.no_grad()
def test_uncommitted_rows_equal_the_two_stream_forward(tiny, objective: str, append_own: bool) -> None:
    """A noise level served from the cache must compute what the clean-and-noisy forward computes, and leave
    the cache alone."""
    denoiser = tiny("huginn", objective)
    model, ids = denoiser.model, torch.randint(0, V, (1, T))
    z, sigma = torch.randn(1, T, 32), torch.full((1, T), 0.5)
    expected = denoiser.predict(
        denoiser.two_stream_hidden(ids, z, sigma, sees_own_clean=append_own), z, sigma
    ).logits()[0, -1]
    pool = pool_for(denoiser, 1)
    through_cache(denoiser, pool, ids[:, :-1], 1, [T - 1], 0)
    if append_own:
        through_clean_row(denoiser, pool, ids)
    (store,) = pool.stores
    before = store.k.clone()
    noisy = PackedContext(pool, [Segment(0, T - 1, 1, commit=False, append_own=append_own)])
    e = model.encode(ids[:, -1:], PackedContext(pool, [Segment(0, T - 1, 1)]))
    committed = store.k.clone()
    state = denoiser.model.core(
        denoiser.inject(z[:, -1:], sigma[:, -1:]), e, denoiser.condition(sigma[:, -1:], e), noisy
    )
    got = denoiser.predict(model.decode(state, noisy), z[:, -1:], sigma[:, -1:]).logits()[0, -1]
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(store.k, committed) and torch.allclose(before[1:], committed[1:], atol=1e-6)


def through_clean_row(denoiser: Objective, pool: KVCache, ids: torch.Tensor) -> None:
    context = PackedContext(pool, [Segment(0, T - 1, 1)])
    e = denoiser.model.encode(ids[:, -1:], context)
    denoiser.model.decode(
        denoiser.model.core(torch.zeros_like(e), e, denoiser.condition(None, e), context), context
    )


def test_llama_refuses_to_recur(tiny) -> None:
    with pytest.raises(UserError, match="^objective.depth="):
        tiny("llama", "onestep")


def test_tables_that_serving_has_made_can_be_trained_with() -> None:
    with torch.inference_mode():
        table = rotary_table(6, 123.0, 5, torch.device("cpu"))
    assert not table.is_inference() and table is rotary_table(6, 123.0, 5, torch.device("cpu"))
