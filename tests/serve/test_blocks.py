"""Networks of blocks on the engine: each level asks its own block, and each block has its own cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from litestar.testing import TestClient

from rdlm.checkpoints.folder import save
from rdlm.cli import app, run
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.tokenizer import Tokenizer
from rdlm.diffusion.samplers import SAMPLERS, Flow, Noise, Sampler, solve
from rdlm.errors import UserError
from rdlm.objectives.base import Prediction
from rdlm.objectives.next_token import renoise
from rdlm.random_streams import generator
from rdlm.registry import build
from rdlm.sampling import process, sample
from rdlm.sampling_params import History, SamplingParams, check_sampler, uniform
from serve.api.app import create_app
from serve.engine.engine import Engine, Served
from serve.engine.runner import ADDED_NOISE, NOISE
from serve.engine.sequence import Request, StepBudget
from serve.loading import build_served, load_served
from serve.settings import EngineSettings, HttpSettings
from train.export import merge

WARM = SamplingParams(temperature=1.0, top_p=0.9)
SETTINGS = EngineSettings(max_slots=4, chunk=5, prefill_rows=16)


@pytest.fixture(scope="session")
def cut(tokenizer: Tokenizer) -> Callable[..., Served]:
    """``cut("paper", "own")``: a loud random llama of 4 layers in 3 blocks."""

    def make(objective: str, targets: str = "frozen") -> Served:
        shape = {
            "vocab_size": tokenizer.vocab_size,
            "d_model": 32,
            "num_heads": 2,
            "mlp_width": 64,
            "max_seq_len": 64,
        }
        document = {
            "name": "tiny",
            "model": {**shape, "family": "llama", "num_layers": 4, "noise_conditioning": True},
            "objective": {"name": objective},
            "recurrence": {"default_steps": 3, "max_steps": 6},
            "blocks": {"num_blocks": 3, "targets": targets},
        }
        config = CheckpointConfig.model_validate(document)
        denoiser = build(config, seed=1)
        loud = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in denoiser.named_parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.3 if "wte" in name else parameter.shape[1] ** -0.5, generator=loud)
        return build_served(denoiser, config, tokenizer, SETTINGS)

    return make


def request(length: int, k: int, seed: int = 0, **kwargs: object) -> Request:
    ids = tuple((7 * i + 3 * length + seed) % 290 + 5 for i in range(length))
    return Request(ids, StepBudget(k), 5, **{"sampling": WARM, "seed": seed, **kwargs})  # type: ignore[arg-type]


def written_out(served: Served, one: Request) -> list[int]:
    """The answer by whole-sequence forwards without a cache: each level by the block that owns it, the hard
    bridge."""
    denoiser, config = served.runner.denoiser, served.config  # type: ignore[attr-defined]
    ids, out = list(one.prompt), []
    paper = config.objective.name == "paper"
    ks = {one.budget.steps_at(i) for i in range(one.max_tokens)}
    used = {denoiser.partition.block_of(s) for k in ks for s in denoiser.sampling_levels(k)}
    for number in range(one.max_tokens):
        levels, token = denoiser.sampling_levels(one.budget.steps_at(number)), torch.tensor([0])
        fills = len(used) - (not paper)  # every block that some token uses reads every position
        row = torch.tensor([ids])
        for k, level in enumerate(levels):
            step, owner = fills + k, denoiser.at(level)
            z = sigma = None
            if level is not None:
                z, sigma = torch.zeros(1, len(ids), 32), torch.full((1, len(ids)), level)
            if level is not None and k:
                key = generator(one.seed, one.choice, len(ids), step - 1, NOISE)
                last = renoise(owner, token, torch.tensor([level]), torch.randn(1, 32, generator=key))
                z = torch.zeros(1, len(ids), 32)
                z[0, -1], sigma = last[0], torch.full((1, len(ids)), level)
            hidden = owner.two_stream_hidden(row, z, sigma, sees_own_clean=paper)[:, -1]
            prediction = owner.predict(
                hidden, None if z is None else z[:, -1], None if sigma is None else sigma[:, -1]
            )
            draw = uniform(one.seed, one.choice, len(ids), step)
            history = History(one.prompt, out, ())
            token = sample(prediction.prior, [one.sampling], [history], [draw], prediction.evidence)
        out.append(int(token))
        ids.append(int(token))
    return out


@pytest.mark.parametrize(
    ("objective", "targets"), [("evidence", "frozen"), ("evidence", "own"), ("paper", "own")]
)
@torch.no_grad()
def test_the_engine_draws_what_forwards_without_a_cache_draw(
    cut: Callable[..., Served], objective: str, targets: str
) -> None:
    """Several K in one pack, prompts longer than a chunk: every token is that of each level's own block over
    its own cache."""
    served = cut(objective, targets)
    wanted = [request(7, 1, 1), request(12, 2, 2), request(3, 3, 3), request(8, 5, 4)]
    with Engine(lambda: served) as engine:
        answers = engine.generate(wanted)
    found = [[e.token for e in events if e.token is not None] for events in answers]
    assert found == [written_out(served, one) for one in wanted]


@pytest.mark.parametrize(
    ("objective", "targets"), [("evidence", "frozen"), ("evidence", "own"), ("paper", "own")]
)
@torch.no_grad()
def test_a_schedule_leaves_no_holes_in_the_caches_of_blocks(
    cut: Callable[..., Served], objective: str, targets: str
) -> None:
    """A token at K = 1 runs block 0 alone, and the next one at K = 5 reads its position in every block: what
    is there was written for it.

    Slots have had other owners, whose keys would be read instead.
    """
    served = cut(objective, targets)
    schedules = [(5, 1, 1, 5), (1, 4, 1, 2, 6), (2, 1, 3), (1, 1, 1, 6)]
    wanted = [
        replace(request(3 + 2 * i, 6, i), budget=StepBudget(6, schedule=schedule))
        for i, schedule in enumerate(schedules)
    ]
    with Engine(lambda: served) as engine:
        for _ in range(2):
            found = [[e.token for e in events if e.token is not None] for events in engine.generate(wanted)]
            assert found == [written_out(served, one) for one in wanted]


def solved(served: Served, one: Request) -> list[int]:
    """The answer by ``solve`` over whole-sequence forwards: from noise at sigma_max, which the network reads
    as z = 0 unless the sampler starts from noise."""
    denoiser, config = served.runner.denoiser, served.config  # type: ignore[attr-defined]
    ids, out = list(one.prompt), []
    paper, top = config.objective.name == "paper", config.noise.sigma_max
    first, *rest = denoiser.sampling_levels(one.budget.num_steps)
    levels, sees_noise = [top, *rest], SAMPLERS[one.sampling.sampler].starts_from_noise
    for _ in range(one.max_tokens):
        row, history = torch.tensor([ids]), History(one.prompt, out, ())
        fills = len({denoiser.at(None if level == top else level) for level in levels}) - (not paper)

        def predict(z: torch.Tensor, level: float) -> Prediction:
            read = first if level == top and not sees_noise else level
            owner = denoiser.at(read)
            if read is None:
                return owner.predict(owner.two_stream_hidden(row, None, None, sees_own_clean=paper)[:, -1])  # noqa: B023
            zs, sigma = torch.zeros(1, len(ids), 32), torch.full((1, len(ids)), read)
            if level == top and not sees_noise:
                z = torch.zeros_like(z)
            zs[0, -1] = z[0]
            hidden = owner.two_stream_hidden(row, zs, sigma, sees_own_clean=paper)[:, -1]  # noqa: B023
            return owner.predict(hidden, z, sigma[:, -1])

        def denoise(z: torch.Tensor, level: float) -> torch.Tensor:
            logits = predict(z, level)
            total = process(logits.prior, [one.sampling], [history])  # noqa: B023
            total = total if logits.evidence is None else total + logits.evidence
            return total.softmax(-1) @ denoiser.at(level).unit_table()

        start = top * torch.randn(1, 32, generator=generator(one.seed, one.choice, len(ids), fills, NOISE))
        assert one.sampling.sampler != "renoise"

        def added(step: int) -> torch.Tensor:
            draw = generator(one.seed, one.choice, len(ids), fills + step, ADDED_NOISE)  # noqa: B023
            return torch.randn(1, 32, generator=draw)

        last = predict(solve(denoise, start, levels, one.sampling.sampler, added), levels[-1])
        draw = uniform(one.seed, one.choice, len(ids), fills + len(levels) - 1)
        token = sample(last.prior, [one.sampling], [history], [draw], last.evidence)
        out.append(int(token))
        ids.append(int(token))
    return out


class Stochastic(Sampler):
    """A sampler that adds noise at every level."""

    description = "adds noise"

    def step(self, flow: Flow, x0: torch.Tensor, sigma: float, sigma_next: float, noise: Noise) -> Flow:
        return Flow(x0 + sigma_next * (0.6 * (flow.z - x0) / sigma + 0.8 * noise()))


@pytest.mark.parametrize("objective", ["evidence", "paper"])
@torch.no_grad()
def test_a_sampler_goes_the_same_way_in_a_pack_as_over_the_whole_sequence(
    cut: Callable[..., Served], monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    """All samplers in one pack: a row ends where ``solve`` ends, whoever runs beside it."""
    monkeypatch.setitem(SAMPLERS, "stochastic", Stochastic())
    served = cut(objective)
    soft = [
        request(length, k, length, sampling=SamplingParams(temperature, sampler=sampler))
        for length, k, temperature, sampler in (
            (7, 1, 1.0, "euler"),
            (12, 3, 0.7, "euler"),
            (8, 6, 1.0, "multistep"),
            (5, 4, 0.0, "dpmpp_2m"),
            (6, 5, 1.0, "stochastic"),
            (4, 2, 0.0, "stochastic"),
            *[(n, k, 0.0, "published") for n, k in ((6, 1), (9, 4)) if objective == "paper"],
        )
    ]
    with Engine(lambda: served) as engine:
        answers = engine.generate([*soft, request(9, 4)])
    found = [[e.token for e in events if e.token is not None] for events in answers]
    assert found == [*(solved(served, one) for one in soft), written_out(served, request(9, 4))]


def test_the_published_sampler_is_for_models_of_the_published_objective(cut: Callable[..., Served]) -> None:
    with pytest.raises(UserError, match="only models trained with objective paper"):
        check_sampler("published", cut("evidence").config)
    check_sampler("published", cut("paper").config)
    one = request(5, 2, 3, sampling=SamplingParams(0.0, sampler="published"), logprobs=1)
    with Engine(lambda: cut("paper")) as engine, pytest.raises(UserError, match="starts from noise"):
        engine.generate([one])


def test_samplers_lead_to_different_texts(cut: Callable[..., Served]) -> None:
    served = cut("evidence")
    texts = set()
    with Engine(lambda: served) as engine:
        for sampler in ("renoise", "euler", "dpmpp_2m"):
            answers = engine.generate(
                [request(9, 6, seed, sampling=SamplingParams(sampler=sampler)) for seed in range(6)]
            )
            texts.add(tuple(e.token for events in answers for e in events if e.token is not None))
    assert len(texts) == 3


@pytest.mark.parametrize("objective", ["evidence", "paper"])
def test_scores_over_the_engine_are_those_of_block_0(cut: Callable[..., Served], objective: str) -> None:
    served = cut(objective)
    one = request(14, 3, logprobs=1, prompt_logprobs=1)
    with Engine(lambda: served) as engine:
        events = engine.generate([one])[0]
    ids = torch.tensor([one.prompt])
    first = served.runner.denoiser.parts[0]  # type: ignore[attr-defined]
    expected = first.token_logprobs(ids[:, :-1], ids[:, 1:], [1])[1][0]
    found = torch.tensor([entry.logprob for entry in events[0].prompt_logprobs or []])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_block_alone_is_not_served(cut: Callable[..., Served], tokenizer: Tokenizer) -> None:
    config = cut("evidence").config.model_copy(update={"block": 1})
    with pytest.raises(UserError, match="holds block 1 alone"):
        build_served(build(config, seed=0), config, tokenizer, SETTINGS)


def materialised(served: Served) -> set[int]:
    """Blocks of which any weight takes more memory than a placeholder."""
    parts = enumerate(served.runner.denoiser.parts)  # type: ignore[attr-defined]
    return {b for b, part in parts if any(w.untyped_storage().nbytes() > 4 for w in part.model.parameters())}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("objective", "targets"), [("evidence", "own"), ("paper", "frozen")])
def test_one_block_in_memory_draws_what_all_draw(
    cut: Callable[..., Served],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    objective,
    targets,
    dtype,
) -> None:
    made = cut(objective, targets)
    save(tmp_path / "model", made.runner.denoiser, made.config, tokenizer)  # type: ignore[attr-defined]
    # Weights that come and go are not packed: in bf16 the kernels, which round less, draw other tokens.
    settings = SETTINGS.model_copy(update={"dtype": dtype, "kernels": "torch"})
    wanted = [request(7, 1, 1), request(12, 3, 3), request(8, 6, 4)]

    def answers(served: Served) -> list[list[int | None]]:
        with Engine(lambda: served) as engine:
            return [[e.token for one in wanted for e in engine.generate([one])[0]]]

    expected = answers(load_served(tmp_path / "model", settings))
    for limit in (1, 2):
        served = load_served(tmp_path / "model", settings.model_copy(update={"resident_blocks": limit}))
        resident = served.runner.denoiser.resident  # type: ignore[attr-defined]
        assert len(materialised(served)) <= limit
        resident.loads.clear()
        most, fill = [], resident._fill
        monkeypatch.setattr(
            resident, "_fill", lambda block, f=fill, m=most, s=served: (f(block), m.append(materialised(s)))
        )
        with Engine(lambda served=served: served) as engine:
            engine.generate([wanted[0]])
            assert resident.loads == [0] and resident.present[-1] == 0, "K = 1 is block 0"
        assert answers(served) == expected
        assert max(map(len, most)) == limit and set(resident.loads) == {0, 1, 2}
        assert [block in now for block, now in zip(resident.loads, most, strict=True)] == [True] * len(most)


def test_blocks_stay_out_of_memory_only_where_there_are_some(
    cut: Callable[..., Served], tokenizer: Tokenizer, tmp_path: Path, capsys
) -> None:
    made = cut("evidence")
    save(tmp_path / "blocks", made.runner.denoiser, made.config, tokenizer)  # type: ignore[attr-defined]
    whole = CheckpointConfig.model_validate({**made.config.model_dump(), "blocks": None})
    save(tmp_path / "whole", build(whole, seed=0), whole, tokenizer)
    ask = ["--prompt", "in the beginning", "--max-tokens", "4", "--num-steps", "3"]
    texts = []
    for more in ([], ["--resident-blocks", "1"]):
        assert run(app, ["generate", "--checkpoint", str(tmp_path / "blocks"), *ask, *more], "rdlm") == 0
        texts.append(capsys.readouterr().out.partition("\n[")[0])
    assert texts[0] == texts[1]
    for folder, count, problem in (
        ("whole", "1", "not a network of several blocks"),
        ("blocks", "4", "the network has 3 blocks"),
    ):
        command = ["generate", "--checkpoint", str(tmp_path / folder), *ask, "--resident-blocks", count]
        assert run(app, command, "rdlm") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and f"resident_blocks={count}: " in err and problem in err


def test_merged_blocks_answer_over_http(
    cut: Callable[..., Served], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each block saved alone, merged, loaded, served: the answers of the network in memory, at every K."""
    served = cut("evidence")
    for b, part in enumerate(served.runner.denoiser.parts):  # type: ignore[attr-defined]
        save(tmp_path / f"block_{b}", part, served.config.model_copy(update={"block": b}), tokenizer)
    merged = merge([tmp_path / f"block_{b}" for b in (2, 0, 1)], tmp_path / "model")
    body = {"prompt": "in the beginning", "max_tokens": 6, "seed": 3, "temperature": 0.9}
    answers = []
    for load_model in (lambda: served, lambda: load_served(merged, SETTINGS)):
        with Engine(load_model) as engine, TestClient(create_app(engine, HttpSettings())) as client:
            replies = [client.post("/v1/completions", json={**body, "num_steps": k}) for k in (1, 3, 6)]
            assert [reply.status_code for reply in replies] == [200] * 3
            assert client.post("/v1/completions", json={**body, "num_steps": 7}).status_code == 400
            answers.append([reply.json()["choices"][0]["text"] for reply in replies])
    assert answers[0] == answers[1] and len(set(answers[0])) == 3
