"""Published looped models: what an import computes is what the reference implementation computes (golden
outputs, fp32)."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rdlm
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.cli import app, run
from rdlm.errors import UserError
from rdlm.inference import Model
from rdlm.nn.kv_cache import KVCache, PackedContext, Segment
from rdlm.random_streams import HashedStream
from serve.engine.cpu.modules import use_kernels

FAMILIES = (
    "huginn", "ouro", "retro_llama", "retro_olmo", "parcae", "ifm_p2", "ifm_p2_orthoinj", "ifm_p2_linear", "nanbeige",
    "loopus",
    "loopformer",
)  # fmt: skip
TOLERANCE = 5e-5
"""Rounding is 1e-5, a wrong operation 0.6 or more."""
CHUNKS = (16, 5, 1, 1, 1)


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> Path:
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"no golden outputs at {folder}")
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def case(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    yield Case(golden / f"{request.param}_tiny", tmp_path_factory.mktemp(request.param) / "model")


class Case:
    """An import of a golden folder, and what the reference computed."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.model: Model = rdlm.load(import_checkpoint(str(folder), out))
        self.expected = load_file(folder / "outputs.safetensors")
        self.ids = self.expected["input_ids"]

    def named(self, kind: str) -> dict[int, torch.Tensor]:
        found = {re.fullmatch(rf"{kind}_K(\d+)", name): value for name, value in self.expected.items()}
        return {int(match[1]): value for match, value in found.items() if match}


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=0)


def test_logits_at_every_k_are_the_reference(case: Case) -> None:
    zero, given = case.named("logits_zero_init"), case.named("logits_given_state")
    plain = case.named("logits")
    assert zero or plain
    for expected, options in (
        (zero, {"zero_state": True}),
        (given, {"states": case.expected.get("input_states")}),
        (plain, {}),
    ):
        if expected:
            got = case.model.logits(case.ids, list(expected), **options)
            for k, logits in expected.items():
                assert_near(got[k], logits)


def test_greedy_texts_are_the_reference(case: Case) -> None:
    for kind, zero in (("greedy_zero_init", True), ("greedy", False)):
        for k, expected in case.named(kind).items():
            ids = case.ids
            for _ in range(expected.shape[1]):
                last = case.model.logits(ids, k, zero_state=zero)[k][:, -1]
                ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
            assert torch.equal(ids[:, case.ids.shape[1] :], expected)


def in_chunks(case: Case, k: int, num_steps: int, latent: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of both rows, fed in pieces to a cache; latent: None is zeros."""
    model, rows = case.model.denoiser.model, range(len(case.ids))
    sizes = model.num_cache_layers, len(rows), case.ids.shape[1], model.num_kv_heads, model.head_dim
    pool = KVCache(*sizes, num_steps=num_steps, core_layers=model.core_cache_layers)
    latent = torch.zeros(*case.ids.shape, case.model.config.model.d_model) if latent is None else latent
    parts, start = [], 0
    with torch.no_grad():
        for length in CHUNKS:
            span = slice(start, start + length)
            contexts = [
                PackedContext(
                    pool, [Segment(i, start, length, step=step if pool.keeps_steps else 0) for i in rows]
                )
                for step in range(k)
            ]
            e = model.encode(case.ids[:, span].reshape(1, -1), contexts[0])
            given = latent[:, span].reshape(1, len(rows) * length, -1)
            free = given if case.model.draws_state else None
            state = model.initial_state(e, latent=free, num_steps=k)
            for context in contexts:
                state = model.core(state, e, None, context)
            hidden = model.decode(state, contexts[0])
            parts.append(model.logits(hidden).view(len(rows), length, -1))
            start += length
    return torch.cat(parts, 1)


def test_chunked_prefill_and_decoding_with_the_full_cache_equal_the_whole(case: Case) -> None:
    k = min(3, case.model.config.max_steps)
    assert_near(in_chunks(case, k, 8), case.model.logits(case.ids, k, zero_state=True)[k])
    for name, cached in case.expected.items():
        if match := re.fullmatch(r"logits_cached_full_(zero_init_)?K(\d+)", name):
            assert_near(in_chunks(case, int(match[2]), 64), cached)


def test_the_cpu_kernels_compute_every_family(case: Case) -> None:
    """With fp32 weights as exactly as the modules that they replace; chunks of a prompt and single rows."""
    k, fast = min(3, case.model.config.max_steps), copy.copy(case)
    expected = case.model.logits(case.ids, k, zero_state=True)[k]
    fast.model = copy.deepcopy(case.model)
    if not use_kernels(fast.model.denoiser):
        pytest.skip("needs a C++ compiler")
    assert_near(in_chunks(fast, k, 8), expected)


@pytest.mark.parametrize("family", ["ifm_p2", "ifm_p2_orthoinj", "ifm_p2_linear"])
def test_the_shared_cache_is_the_published_terminal_kv(golden: Path, tmp_path: Path, family: str) -> None:
    case = Case(golden / f"{family}_tiny", tmp_path / "model")
    assert_near(in_chunks(case, 5, 1), case.expected["logits_terminal_kv_zero_init_K5"])
    hashed = in_chunks(case, 5, 1, latent=case.expected["hashed_state_identity"])
    assert_near(hashed, case.expected["logits_terminal_kv_identity_state_K5"])


def test_exit_gates_of_ouro(golden: Path, tmp_path: Path) -> None:
    """lambda after every loop; the exit distribution, whose last loop takes the rest, gives the reference's
    weighted logits."""
    case = Case(golden / "ouro_tiny", tmp_path / "model")
    states = case.model.states(case.ids, [1, 2, 3, 4])
    gates = torch.stack([case.model.gate(states[k]) for k in (1, 2, 3, 4)], -1)
    assert_near(gates, case.expected["gate_lambda_K4"])
    left = torch.cumprod(1 - gates[..., :-1], -1)
    stay = torch.cat([torch.ones_like(left[..., :1]), left], -1)
    pdf = torch.cat([gates[..., :-1] * stay[..., :-1], stay[..., -1:]], -1)
    assert_near(pdf, case.expected["exit_pdf_K4"])
    logits = case.model.logits(case.ids, [1, 2, 3, 4])
    weighted = torch.stack([logits[k] for k in (1, 2, 3, 4)], -1) @ pdf.unsqueeze(-1)
    assert_near(weighted.squeeze(-1), case.expected["logits_weighted_exit_K4"])
    step = (pdf.cumsum(-1) >= case.expected["exit_threshold"]).int().argmax(-1)
    assert torch.equal(step, case.expected["exit_step_threshold_K4"])
    chosen = torch.stack([logits[k] for k in (1, 2, 3, 4)], -2).gather(
        -2, step[..., None, None].expand(*step.shape, 1, logits[1].shape[-1])
    )
    assert_near(chosen.squeeze(-2), case.expected["logits_exit_threshold_K4"])


def hrm(golden: Path, out: Path, **fields: object) -> Case:
    """HRM-Text with some fields of its config changed."""
    source = shutil.copytree(golden / "hrm_text_tiny", out / "source")
    config = json.loads((source / "config.json").read_text())
    kept = {key: value for key, value in {**config, **fields}.items() if value is not None}
    (source / "config.json").write_text(json.dumps(kept))
    return Case(source, out / "model")


def test_hrm_text_at_every_number_of_cycles(golden: Path, tmp_path: Path) -> None:
    """K is the number of high cycles; the prefix sees itself in both directions."""
    case = hrm(golden, tmp_path / "a")
    types, got = case.expected["token_type_ids"], case.model.logits(case.ids, [1, 2, 3, 4])
    prefixed = case.model.logits(case.ids, [1, 2], token_type_ids=types)
    for k in (1, 2, 3, 4):
        assert_near(got[k], case.expected[f"logits_causal_H{k}_L3"])
    for k in (1, 2):
        assert_near(prefixed[k], case.expected[f"logits_prefix_H{k}_L3"])
    again = hrm(golden, tmp_path / "b", L_cycles=1)
    got = again.model.logits(case.ids, [1, 2])
    for k in (1, 2):
        assert_near(got[k], case.expected[f"logits_causal_H{k}_L1"])
    for k in (1, 2):
        ids = case.ids
        for _ in range(16):
            ids = torch.cat([ids, case.model.logits(ids, k)[k][:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(ids[:, 24:], case.expected[f"greedy_causal_H{k}_L3"])
    assert_near(in_chunks(case, 2, 8), case.expected["logits_causal_H2_L3"])


@pytest.mark.parametrize("shape", [(2, 23), (1, 24), (24,), (2, 24, 1)])
def test_types_of_another_shape_are_refused(golden: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    case = hrm(golden, tmp_path)
    with pytest.raises(UserError, match=r"token_type_ids=.*one type an id"):
        case.model.logits(case.ids, 1, token_type_ids=torch.ones(shape, dtype=torch.int64))


def test_both_forms_of_hrm_text_are_read(golden: Path, tmp_path: Path) -> None:
    """transformers writes layers per stack, an inflated number of layers and rope_parameters."""
    resaved = {
        "num_layers_per_stack": 2, "num_hidden_layers": 16, "rope_theta": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "embedding_scale": None,
    }  # fmt: skip
    case = hrm(golden, tmp_path, **resaved)
    assert_near(case.model.logits(case.ids, 2)[2], case.expected["logits_causal_H2_L3"])


def test_step_sizes_of_loopformer(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference's logits for a list of unequal steps, of the command too; equal ones are those of K."""
    case = Case(golden / "loopformer_tiny", tmp_path / "model")
    sizes, expected = case.expected["custom_steps"].tolist(), case.expected["logits_custom_steps"]
    k = len(sizes)
    assert_near(case.model.logits(case.ids, step_sizes=sizes)[k], expected)
    even = case.model.logits(case.ids, step_sizes=[0.25] * 4)[4]
    assert_near(even, case.expected["logits_K4"])
    save_file({"input_ids": case.ids}, tmp_path / "in.safetensors")
    command = ["logits", str(tmp_path / "model"), str(tmp_path / "in.safetensors")]
    command += ["--out", str(tmp_path / "out.safetensors"), "--step-sizes"]
    assert run(app, [*command, ",".join(map(str, sizes))], "rdlm") == 0
    assert_near(load_file(tmp_path / "out.safetensors")[f"logits_K{k}"], expected)
    for wrong in ("0.5,x", "0.5,-0.5", "2"):
        assert run(app, [*command, wrong], "rdlm") == 2
        assert "0.5,0.25,0.25" in capsys.readouterr().err


def test_hashed_states_of_looped_lm(golden: Path, tmp_path: Path) -> None:
    """Those that the reference stored, of an example under a seed and of the first row of its plain forward."""
    case = Case(golden / "ifm_p2_tiny", tmp_path / "model")
    (seed,), width = case.expected["example_seed"].tolist(), case.model.config.model.d_model
    for row, example in enumerate(case.expected["example_ids"].tolist()):
        expected = case.expected["hashed_state_identity"][row]
        later = HashedStream(seed, example, 7).normals(17, width, torch.device("cpu")) / width**0.5
        # The last bit of a sine may differ between machines, and is .003 of a number in [0, 1] here.
        assert ((later - expected[7:]).abs() < 1e-2).float().mean() > 0.98
    plain = case.model.logits(case.ids, 5)[5][0]
    states = case.expected["hashed_state_batch"]
    assert_near(case.model.logits(case.ids, 5, states=states)[5], case.expected["logits_hashed_batch_K5"])
    if torch.equal(HashedStream(0).normals(24, width, torch.device("cpu")) / width**0.5, states[0]):
        assert_near(plain, case.expected["logits_hashed_batch_K5"][0])


def test_states_and_halting_probabilities_of_loopus(golden: Path, tmp_path: Path) -> None:
    case = Case(golden / "loopus_tiny", tmp_path / "model")
    states = case.model.states(case.ids, list(range(1, 9)))
    assert_near(states[6], case.expected["state_K6"])
    halts = torch.stack([case.model.gate(states[k])[:, -1] for k in range(1, 9)], -1)
    assert_near(halts, case.expected["halt_prob_last_position"])


def test_pickled_weights_of_parcae_are_read_without_running_code(golden: Path, tmp_path: Path) -> None:
    """The published form: ``pytorch_model.bin`` with the tied head and a buffer that follows from the config."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copyfile(golden / "parcae_tiny" / name, source / name)
    pickled, safe = (
        load_file(import_checkpoint(str(folder), tmp_path / out) / "model.safetensors")
        for folder, out in ((source, "a"), (golden / "parcae_tiny", "b"))
    )
    assert pickled.keys() == safe.keys() and all(torch.equal(pickled[name], safe[name]) for name in safe)


@pytest.mark.parametrize(
    ("folder", "fields", "word"),
    [
        ("ouro_tiny", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("ouro_tiny", {"use_sliding_window": True}, "use_sliding_window"),
        ("ouro_tiny", {"hidden_act": "gelu"}, "hidden_act"),
        ("ouro_tiny", {"attention_bias": True}, "attention_bias"),
        ("ouro_tiny", {"num_hidden_layers": 4}, "model.layers.3"),
        ("ouro_tiny", {"num_hidden_layers": 2}, "model.layers.2"),
        ("ouro_tiny", {"model_type": "mamba"}, "'mamba'"),
        ("retro_llama_tiny", {"injection_type": "add"}, "injection_type"),
        ("retro_llama_tiny", {"qk_bias": True}, "qk_bias"),
        ("retro_olmo_tiny", {"initial_state_mode": "skip-adapter"}, "initial_state_mode"),
        ("retro_olmo_tiny", {"test_time_noise": 0.1}, "test_time_noise"),
        ("parcae_tiny", {"injection_type": "linear"}, "injection_type"),
        ("parcae_tiny", {"recurrent_embedding_dimension": 96}, "recurrent_embedding_dimension"),
        ("parcae_tiny", {"logit_softcap": 15.0}, "logit_softcap"),
        ("parcae_tiny", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("nanbeige_tiny", {"loop_share_kv": True}, "loop_share_kv"),
        ("nanbeige_tiny", {"ngram_sizes": [2]}, "ngram_sizes"),
        ("nanbeige_tiny", {"pretraining_tp": 2}, "pretraining_tp"),
        ("loopus_tiny", {"q_eval_interval": 2}, "q_eval_interval"),
        ("parcae_tiny", {"clip_qkv": 8.0}, "clip_qkv"),
        ("parcae_tiny", {"nonlin_name": "SiLU"}, "nonlin_name"),
        ("parcae_tiny", {"state_init": "unit"}, "state_init"),
        ("parcae_tiny", {"init_strategy": "takase-scaled"}, "init_strategy"),
        ("loopus_tiny", {"lma_window": 4}, "lma_window"),
        ("ifm_p2_tiny", {"model": {"arch": "huginn"}}, "swiglu"),
        ("loopformer_tiny", {"bias": True}, "c_attn.bias"),
        ("loopformer_tiny", {"model_type": "tmlt"}, "model_type"),
        ("hrm_text_tiny", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("hrm_text_tiny", {"num_layers_per_stack": 3}, "num_layers_per_stack"),
        ("ifm_p2_tiny", {"model": {"arch": "transformer"}}, "arch"),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(
    golden: Path, tmp_path: Path, folder: str, fields: dict, word: str
) -> None:
    source = shutil.copytree(golden / folder, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(UserError) as error:
        import_checkpoint(str(source), tmp_path / "out")
    assert word in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "prefix", "edit"),
    [
        ("parcae", "_orig_mod.module.", str),
        ("loopformer", "gpt.", str),
        (
            "loopus",
            "",
            lambda name: name.replace("reasoning.", "plateau.").replace("layers.0.", "layers.0.module."),
        ),
    ],
)
def test_names_with_known_prefixes_are_read(
    golden: Path, tmp_path: Path, family: str, prefix: str, edit: Callable[[str], str]
) -> None:
    source = shutil.copytree(golden / f"{family}_tiny", tmp_path / "source")
    plain = load_file(import_checkpoint(str(source), tmp_path / "a") / "model.safetensors")
    weights = load_file(source / "model.safetensors")
    save_file({prefix + edit(name): value for name, value in weights.items()}, source / "model.safetensors")
    renamed = load_file(import_checkpoint(str(source), tmp_path / "b") / "model.safetensors")
    assert plain.keys() == renamed.keys() and all(torch.equal(plain[name], renamed[name]) for name in plain)


def test_a_checkpoint_of_our_own_is_not_imported(golden: Path, tmp_path: Path) -> None:
    ours = import_checkpoint(str(golden / "ouro_tiny"), tmp_path / "a")
    with pytest.raises(UserError, match=r"checkpoint of rdlm already.*rdlm inspect"):
        import_checkpoint(str(ours), tmp_path / "b")


def test_loop_loss_weights_of_nanbeige_set_the_number_of_loops(golden: Path, tmp_path: Path) -> None:
    source = shutil.copytree(golden / "nanbeige_tiny", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "loop_loss_weights": [0.1, 0.2, 0.3]}))
    assert rdlm.load(import_checkpoint(str(source), tmp_path / "out")).config.default_steps == 4


def test_the_logits_command_writes_logits_and_gates(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, given, made = tmp_path / "model", tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    assert run(app, ["import", str(golden / "ouro_tiny"), str(out)], "rdlm") == 0
    assert "without a tokenizer" in capsys.readouterr().out
    expected = load_file(golden / "ouro_tiny" / "outputs.safetensors")
    save_file({"input_ids": expected["input_ids"]}, given)
    command = ["logits", str(out), str(given), "--num-steps", "1,4", "--out", str(made)]
    assert run(app, command, "rdlm") == 0
    found = load_file(made)
    assert found.keys() == {"logits_K1", "logits_K4", "gate_K1", "gate_K4"}
    assert_near(found["logits_K4"], expected["logits_K4"])
    assert_near(found["gate_K1"], expected["gate_lambda_K4"][..., 0])
    save_file({"input_ids": expected["input_ids"] + 1_000}, given)
    assert run(app, command, "rdlm") == 2
    assert "the model knows ids 0 to 319" in capsys.readouterr().err
