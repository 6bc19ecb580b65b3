"""The parts of a step over static buffers: recorded once and replayed with other contents they compute what they
compute when they are called. That is all that a CUDA graph needs; tests/gpu has the graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rdlm.checkpoints import folder as checkpoint
from rdlm.checkpoints.convert.importers import import_checkpoint
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import objective_config
from rdlm.errors import UserError
from rdlm.exit_criteria import ExitRule
from rdlm.registry import build
from rdlm.sampling_params import SamplingParams
from serve.engine.engine import run_isolated
from serve.engine.replay import Eager, Replayer, bucket, window
from serve.engine.runner import Runner
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Request, StepBudget, StepResult
from serve.settings import EngineSettings
from tests.guard.guard_cases import CUT, MODELS, PAIRS
from tests.rdlm import zoo_reference as zoo
from tests.rdlm.test_zoo_shapes import CASES, tensors_of
from tests.serve.tape import Signatures, Tape

TEXTS = [name for name in (*PAIRS, *CUT) if name.startswith(("huginn", "llama"))]
SETTINGS = [
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
    SamplingParams(temperature=0, logit_bias={7: 1.5, 9: -100.0}),
    SamplingParams(temperature=1.2, top_k=5, min_p=0.01, logit_bias={3: 2.0}),
]
SLOTS = 4


def network_of(name: str) -> tuple[Any, CheckpointConfig]:
    document = MODELS[name]
    objective = objective_config.validate_python(document["objective"])
    model = {**document["model"], "noise_conditioning": objective.noise_conditioned}
    config = CheckpointConfig.model_validate(
        {"name": "t", **document, "model": model, "objective": objective}
    )
    network = build(config, seed=0).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():  # modulations are zero at first, and would hide the levels
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return network, config


def requests_of(most: int) -> list[Request]:
    """Of different K, lengths and settings."""
    return [
        Request(
            tuple(range(1, 3 + 2 * i)),
            StepBudget(1 + (i * 3) % most),
            5,
            SETTINGS[i % len(SETTINGS)],
            seed=i,
            logprobs=2 if i % 3 == 1 else None,
            min_tokens=3,
            stop_ids=frozenset({5}),
        )
        for i in range(6)
    ]


def answers(
    name: str | tuple[Any, CheckpointConfig],
    requests: list[Request] | None,
    replay: Replayer | None,
    cache: Any = "shared",
    fails: bool = False,
    attention: Any = "gather",
) -> dict[int, Any]:
    """Tokens and log-probabilities of requests, of which two join in every second step. fails: every third step fails
    once all is computed, and is repeated in halves."""
    network, config = network_of(name) if isinstance(name, str) else name
    most = min(4, config.max_steps)
    runner = Runner(
        network,
        config,
        num_slots=SLOTS,
        max_len=64,
        max_steps=most,
        num_tokens=60,
        kv_cache=cache,
        replay=replay,
        attention=attention,
    )
    scheduler, calls = Scheduler(SLOTS, 32, 8), 0
    waiting = list(enumerate(requests or requests_of(most)))
    found: dict[int, Any] = {number: ([], []) for number, _ in waiting}

    def run(batch: list[Any]) -> dict[int, StepResult]:
        nonlocal calls
        results, calls = runner.run(batch), calls + 1
        if fails and len(batch) > 1 and calls % 3 == 0:
            raise RuntimeError("after the step")
        return results

    for step in range(400):
        if step % 2 == 0:
            for number, request in waiting[:2]:
                scheduler.add(runner.sequence(number, request, 8))
            del waiting[:2]
        scheduler.admit()
        running = scheduler.schedule()
        if not running and not waiting:
            return found
        results = run_isolated(run, running)
        for sequence in running:
            result = results.get(sequence.id) or StepResult()
            assert result.error is None
            sequence.advance(result)
            sequence.output.extend(result.tokens)
            found[sequence.id][0].extend(result.tokens)
            found[sequence.id][1].extend(result.logprobs)
            if not sequence.wants_token:
                runner.release(sequence)
                scheduler.remove(sequence)
    raise AssertionError("the requests did not end")


def close(one: dict[int, Any], other: dict[int, Any]) -> bool:
    """The same tokens, with the same log-probabilities but for rounding."""
    for number, (tokens, logprobs) in one.items():
        if other[number][0] != tokens:
            return False
        for a, b in zip(logprobs, other[number][1], strict=True):
            if (a is None) != (b is None) or (a is not None and abs(a.logprob - b.logprob) > 1e-4):
                return False
    return True


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, "shared") for name in TEXTS),
        ("huginn single_pass", "full"),
        ("huginn onestep", "full"),
        ("huginn bptt", "first"),
    ],
)
def test_recorded_parts_replay_with_other_contents(name: str, cache: Any) -> None:
    """Other positions, slots, K, levels and tokens than those that were recorded: equal bits."""
    expected = answers(name, None, Eager(), cache)
    tape = Tape()
    assert answers(name, None, tape, cache) == expected
    assert tape.replays > len(tape.tapes)
    if "evidence" not in name and "paper" not in name:
        assert any(key[0] == "draw_tokens" for key in tape.tapes)
    assert close(answers(name, None, None, cache), expected), "nor does the static form change an answer"


@pytest.mark.parametrize(
    ("case", "cache"),
    [
        ("ouro, grouped heads", "full"), ("parcae", "full"), ("loopus of qwen3", "full"), ("loopformer", "full"),
        ("loopformer", "shared"), ("hrm_text", "full"), ("hrm_text", "shared"),
    ],
)  # fmt: skip
def test_published_families_replay(tmp_path: Path, case: str, cache: Any) -> None:
    """Also those that are a core alone, have two of them or count their steps."""
    family, published = CASES[case]
    network, config = imported(tmp_path, family, published)
    expected = answers((network, config), None, Eager(), cache)
    tape = Tape()
    assert answers((network, config), None, tape, cache) == expected
    assert tape.replays > len(tape.tapes)
    assert close(answers((network, config), None, None, cache), expected)


def imported(folder: Path, family: str, published: dict[str, Any]) -> tuple[Any, CheckpointConfig]:
    """A random checkpoint in the published layout."""
    (folder / "source").mkdir()
    (folder / "source" / "config.json").write_text(json.dumps(published))
    weights = zoo.drawn(tensors_of(family, published), seed=3, offsets=family.startswith("ifm"))
    save_file(weights, folder / "source" / "model.safetensors")
    loaded = checkpoint.load(import_checkpoint(str(folder / "source"), folder / "model"))
    return loaded.denoiser.eval(), loaded.config


def test_every_pass_of_a_key_does_the_same_in_the_same_places() -> None:
    for name, cache in (("huginn evidence", "shared"), ("huginn onestep", "full"), ("llama paper", "shared")):
        found = Signatures()
        answers(name, None, found, cache)
        every = [each for found in (*found.before, found.found) for each in found.values()]
        assert sum(len(each) > 1 for each in every) > 3
        for each in every:
            assert all(signature == each[0] for signature in each[1:])


def test_what_was_captured_over_a_buffer_is_dropped_when_it_moves() -> None:
    """The full cache allocates pages as steps are taken: graphs of the old ones would keep them for ever."""
    requests = [
        replace(one, budget=StepBudget(1 if i < 2 else 4), max_tokens=9)
        for i, one in enumerate(requests_of(4))
    ]
    tape = Tape()
    assert answers("huginn onestep", requests, tape, "full") == answers(
        "huginn onestep", requests, Eager(), "full"
    )
    assert tape.forgotten and any(pool() is None for pool in tape.forgotten)


@pytest.mark.parametrize(("name", "cache"), [("huginn onestep", "full"), ("llama paper", "shared")])
def test_keys_that_are_read_in_place_answer_the_same(name: str, cache: Any) -> None:
    """In parts over buffers and without, whether a position's key is kept or stands beside its clean one."""
    expected = answers(name, None, None, cache)
    for replay in (None, Eager()):
        assert close(answers(name, None, replay, cache, attention="pages"), expected)


def test_k_is_in_no_part() -> None:
    keys = []
    for num_steps in (1, 4):
        requests = [replace(one, budget=StepBudget(num_steps), seed=0) for one in requests_of(4)]
        found = Signatures()
        answers("huginn onestep", requests, found)
        keys.append({key[:5]: value[0] for key, value in found.found.items()})
    both = keys[0].keys() & keys[1].keys()
    assert len(both) > 3
    for key in both:
        assert [each[0] for each in keys[0][key]] == [each[0] for each in keys[1][key]]


@pytest.mark.parametrize("name", ["huginn onestep", "huginn evidence"])
def test_a_step_that_fails_is_repeated_with_fewer_sequences(name: str) -> None:
    expected = answers(name, None, Eager())
    assert close(answers(name, None, Tape(), fails=True), expected)


def test_exits_are_decided_as_without_buffers() -> None:
    requests = [
        replace(one, budget=StepBudget(4, ExitRule(criterion, threshold)), seed=i)
        for i, (one, (criterion, threshold)) in enumerate(
            zip(requests_of(4), [("latent-diff", 0.6), ("kl", 0.05)] * 3, strict=True)
        )
    ]
    plain = answers("huginn onestep", requests, None)
    assert close(answers("huginn onestep", requests, Tape()), plain)


@pytest.mark.parametrize(("objective", "family"), [("bptt", "huginn"), ("masked", "masked")])
def test_graphs_are_refused_where_nothing_can_be_captured(
    make_served: Callable[..., Any], objective: str, family: str
) -> None:
    with pytest.raises(UserError, match="kernels"):
        make_served(objective, family, settings=EngineSettings(kernels="graphs"))


def test_buckets_hold_what_they_are_for() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 8, 9, 17)] == [1, 2, 4, 8, 8, 16, 24]
    assert [window(n) for n in (1, 64, 65, 129, 256, 257)] == [64, 64, 128, 256, 256, 512]


def test_a_tape_notices_a_number_of_the_host() -> None:
    """A test that could not fail would prove nothing."""
    tape, data, number = Tape(), torch.ones(2), [1.0]
    tape(("a",), lambda: (data + number[0],))
    data.fill_(2.0)
    number[0] = 2.0
    (out,) = tape(("a",), lambda: (data + number[0],))
    assert out.tolist() == [3.0, 3.0], "the number of the recording"
    with pytest.raises(AssertionError, match="captured"):
        tape(("b",), lambda: (data * float(data.sum()),))
