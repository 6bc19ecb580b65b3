"""The file of the server with tensors: runs one core step over a ragged pack of rows, and what comes before and after it.

Shapes: S sequences in the pack, N rows (their segments one after another), M rows read out, D d_model, V vocabulary.
A sequence's rows between two steps live in ``Live``; the past lives in the KV pool. Nothing here decides who runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import Literal, cast

import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.samplers import Flow, StepPlan, expected_target, sampler_named
from rdlm.nn import kv_cache as cache
from rdlm.nn.layers import Condition
from rdlm.objectives.base import Prediction
from rdlm.objectives.next_token import NextToken, renoise
from rdlm.random_streams import generator
from rdlm.sampling import process, sample
from rdlm.sampling_params import uniform
from serve.engine.exits import LatentDiff, exits_on_predictions, exits_on_states, is_measured
from serve.engine.flops import Cost, costs_of
from serve.engine.rows import Live, length_of, logprobs_of, predicts, score_step, shows, slot_of, step_of
from serve.engine.sequence import Depth, Drawn, Glimpse, Request, Sequence, StepResult, TokenLogprobs

LOGITS_AT_ONCE = 1 << 24
"""Scored prompt rows are read out in chunks of at most this many logits (64 MiB of fp32)."""
NOISE, STATE = 1, 2
"""Which stream of a request's randomness a generator is for."""


class Runner:
    """A denoiser, its KV pool and the rows in flight. Called by one thread only."""

    def __init__(
        self,
        denoiser: NextToken,
        config: CheckpointConfig,
        *,
        num_slots: int,
        max_len: int,
        max_steps: int,
        num_tokens: int,
        kv_cache: Literal["shared", "full"] = "shared",
    ) -> None:
        """kv_cache: shared keeps the keys of each position's last step; full those of every step (exact, larger).

        num_tokens: ids the tokenizer knows; those a padded vocabulary has beyond them are never drawn.
        """
        model, weight = denoiser.model, next(denoiser.model.parameters())
        self.denoiser, self.config, self.device = denoiser, config, weight.device
        self._blocks = cast(list[NextToken], denoiser.parts)
        self._owner = self._blocks[0]
        """The block whose rows are at work."""
        self._costs = [costs_of(block) for block in self._blocks]
        self._cost = self._costs[0]
        self._spent: Counter[int] = Counter()
        """FLOPs of each sequence so far."""
        self._plans = {k: denoiser.step_plan(k) for k in range(1, max_steps + 1)}
        iterates = config.objective.k_meaning == "thinking"
        self.pool = cache.KVPool(
            model.num_cache_layers, num_slots, max_len, model.num_kv_heads, model.head_dim,
            max_steps if kv_cache == "full" and iterates else 1, weight.dtype, weight.device,
        )  # fmt: skip
        self.position_bytes = self.pool.num_bytes // (num_slots * max_len)
        """Keys and values of one position of one sequence."""
        self._num_tokens = num_tokens
        self._live: dict[int, Live] = {}
        self._seen: dict[int, Tensor] = {}
        self._silent: dict[NextToken, Condition | None] = {}
        self._context: tuple[list[cache.Segment], cache.PackedContext] | None = None

    def depth(self, num_steps: int) -> Depth:
        """Core steps that each kind of position takes at K = num_steps."""
        plan = self._plans[num_steps]
        context = max(i for i, commits in enumerate(plan.commit) if commits) + 1
        return Depth(num_steps, plan.num_core_steps, context, max(context, score_step(plan) + 1))

    def sequence(self, number: int, request: Request, chunk: int) -> Sequence:
        """The request as the engine steps it. chunk: prompt positions of a segment; a sweep's prompt is one."""
        return Sequence(
            number,
            request,
            self.depth(request.budget.steps_at(0)),
            len(request.prompt) if request.sweep else chunk,
        )

    def release(self, sequence_id: int) -> int:
        """Forget the rows of a sequence that left -> the FLOPs it has taken."""
        self._live.pop(sequence_id, None)
        self._seen.pop(sequence_id, None)
        return self._spent.pop(sequence_id, 0)

    def _spend(self, sequences: list[Sequence], cost: Cost) -> None:
        """Charge the rows of the open segments with one pass through a part of the network."""
        for sequence in sequences:
            segment, plan = sequence.segment, self._plan(sequence)
            assert segment is not None
            beside = plan.append_own and not plan.commit[segment.step]  # it sees the position's clean row too
            self._spent[sequence.id] += cost.of(segment.start + beside, segment.length)

    @torch.inference_mode()
    def run(self, batch: list[Sequence]) -> dict[int, StepResult]:
        """One core step for the segment of every sequence in ``batch`` -> what came out, by sequence id.

        Rows at work in different blocks of a network share no forward.
        """
        results: dict[int, StepResult] = {}
        for index, owner in enumerate(self._blocks):
            here = sorted(
                (s for s in batch if self._block(s) == index), key=slot_of
            )  # rdlm/nn/kv_cache.py reads neighbours in place
            if here:
                self._owner, self._cost = owner, self._costs[index]
                results |= self._run(here)
        return results

    def _run(self, batch: list[Sequence]) -> dict[int, StepResult]:
        self._enter([s for s in batch if step_of(s) == 0])
        self._change_block([s for s in batch if step_of(s) and self._block(s, -1) != self._block(s)])
        settled = self._core(batch)
        return self._read(
            [
                s
                for s in batch
                if s.id in settled or self._reads(s) or is_measured(s, "predictions") or shows(s)
            ],
            settled,
        )

    def _plan(self, sequence: Sequence) -> StepPlan:
        return self._plans[sequence.depth.num_steps]

    def _block(self, sequence: Sequence, later: int = 0) -> int:
        return self._plan(sequence).blocks[step_of(sequence) + later]

    def _encode(self, sequences: list[Sequence]) -> Seq[Tensor]:
        """Prelude of the segments' rows: [L, D] each."""
        self._spend(sequences, self._cost.encode)
        ids = [i for s in sequences if s.segment for i in s.token_ids(s.segment)]
        e = self._owner.model.encode(
            torch.tensor([ids], device=self.device), self._pack(sequences, once=True)
        )  # [1, N, D]
        return e[0].split([length_of(s) for s in sequences])

    def _change_block(self, changing: list[Sequence]) -> None:
        """Every block reads the tokens through a stem of its own."""
        if changing:
            for sequence, rows in zip(changing, self._encode(changing), strict=True):
                self._live[sequence.id].e = rows

    def _enter(self, entering: list[Sequence]) -> None:
        """Prelude and initial state of segments that have just opened."""
        if not entering:
            return
        for sequence, rows in zip(entering, self._encode(entering), strict=True):
            self._seen.pop(sequence.id, None)
            request, start = sequence.request, sequence.segment.start if sequence.segment else 0
            draw = generator(request.seed, request.choice, start, STATE)
            self._live[sequence.id] = Live(rows, self._owner.model.initial_state(rows[None], draw)[0])

    def _core(self, batch: list[Sequence]) -> set[int]:
        """One core step -> ids of the sequences whose states have settled."""
        lengths = [length_of(s) for s in batch]
        lives = [self._live[s.id] for s in batch]
        for live, length in zip(lives, lengths, strict=True):
            if (
                max(len(live.e), len(live.state)) > length
            ):  # the segment has shrunk to the position that is drawn from
                live.e, live.state = live.e[-length:], live.state[-length:]
        state, e = (
            torch.cat([getattr(live, name) for live in lives])[None] for name in ("state", "e")
        )  # [1, N, D]
        sigmas = [
            self._plan(s).sigmas[step_of(s)] for s, n in zip(batch, lengths, strict=True) for _ in range(n)
        ]
        self._spend(batch, self._cost.core)
        for sequence, length in zip(batch, lengths, strict=True):
            if self._plan(sequence).sigmas[step_of(sequence)] is not None:
                self._spent[sequence.id] += length * self._cost.condition
        cond = self._condition(sigmas, state)
        after = self._owner.step(state, e, cond, self._pack(batch, once=False))
        for sequence, live, rows in zip(batch, lives, after[0].split(lengths), strict=True):
            live.before = live.state[-1] if shows(sequence) else None
            live.state = rows
        return exits_on_states(batch, lengths, state[0], after[0])

    def _condition(self, sigmas: Seq[float | None], like: Tensor) -> Condition | None:
        """What the core is told about the rows' levels. Where all are z = 0 it is one constant of the block."""
        if any(sigma is not None for sigma in sigmas):
            return self._owner.condition(self._levels(sigmas)[None], like)
        if self._owner not in self._silent:
            self._silent[self._owner] = self._owner.condition(None, like)
        return self._silent[self._owner]

    def _levels(self, sigmas: Seq[float | None]) -> Tensor:
        """fp32 [N]; a row without a noised target reads at sigma_max."""
        top = self.denoiser.noise.sigma_max
        return torch.tensor([top if sigma is None else sigma for sigma in sigmas], device=self.device)

    def _pack(self, sequences: list[Sequence], once: bool) -> cache.PackedContext:
        """The context of the sequences' rows; the last one serves again while no row moves to another position."""
        segments = [segment for s in sequences for segment in self._cache_segments(s, once)]
        if self._context is None or self._context[0] != segments:
            self._context = (segments, cache.PackedContext(self.pool, segments))
        return self._context[1]

    def _cache_segments(self, sequence: Sequence, once: bool) -> list[cache.Segment]:
        """The sequence's rows as the cache sees them. once: a prelude or coda pass, whose keys do not depend on the step."""
        segment, plan = sequence.segment, self._plan(sequence)
        assert segment is not None and sequence.slot is not None
        commit = plan.commit[segment.step]
        step = 0 if once or self.pool.depth == 1 else segment.step
        spans = (
            [(segment.start, segment.length)]
            if commit
            else [(segment.start + i, 1) for i in range(segment.length)]
        )
        return [cache.Segment(sequence.slot, start, n, step, commit, plan.append_own) for start, n in spans]

    def _read(self, readers: list[Sequence], settled: set[int]) -> dict[int, StepResult]:
        """Coda for every row that reads out; head, log-probabilities and a draw for those somebody needs.

        settled: sequences that leave with this step. Those that only compare predictions either join them or go on.
        """
        if not readers:
            return {}
        self._spend(readers, self._cost.decode)
        state = torch.cat([self._live[s.id].state for s in readers])[None]
        hidden = self._owner.model.decode(state, self._pack(readers, once=True))[0].split(
            [length_of(s) for s in readers]
        )
        read = list(zip(readers, hidden, strict=True))
        settled = settled | self._converged(
            [(s, rows[-1]) for s, rows in read if is_measured(s, "predictions")]
        )
        glimpses = self._glimpses([(s, rows[-1]) for s, rows in read if shows(s) and s.id not in settled])
        read = [(s, rows) for s, rows in read if s.id in settled or self._reads(s)]
        results = {s.id: StepResult(exited=s.id in settled) for s, _ in read}
        for sequence, rows in read:
            if sequence.request.prompt_logprobs is not None and self._is_likelihood(sequence, results):
                results[sequence.id].prompt_logprobs = self._score(sequence, rows)
        drawing = [
            (s, rows[-1])
            for s, rows in read
            if s.draws and (s.id in settled or predicts(self._plan(s), step_of(s)))
        ]
        if drawing:
            self._draw([s for s, _ in drawing], torch.stack([row for _, row in drawing]), results)
        for sequence, _ in read:
            self._start_level(sequence)
        for number, glimpse in glimpses.items():
            results.setdefault(number, StepResult()).glimpse = glimpse
        return results

    def _reads(self, sequence: Sequence) -> bool:
        """Whether the step reads out whatever it found: by plan, or for a sweep."""
        return (
            self._plan(sequence).readout[step_of(sequence)] or step_of(sequence) + 1 in sequence.request.sweep
        )

    def _is_likelihood(self, sequence: Sequence, results: dict[int, StepResult]) -> bool:
        """Whether this step's read-out is the normalised likelihood; that of a thinking model always is."""
        if sequence.request.sweep:
            return step_of(sequence) + 1 in sequence.request.sweep
        return results[sequence.id].exited or step_of(sequence) == score_step(self._plan(sequence))

    def _converged(self, watching: list[tuple[Sequence, Tensor]]) -> set[int]:
        """Ids of those whose prediction, read from hidden [D], satisfies their exit criterion."""
        if not watching:
            return set()
        self._spent.update({s.id: self._cost.head for s, _ in watching})
        prior = self._owner.predict(torch.stack([row for _, row in watching])).prior[:, : self._num_tokens]
        return exits_on_predictions([s for s, _ in watching], prior, self._seen)

    def _glimpses(self, showing: list[tuple[Sequence, Tensor]]) -> dict[int, Glimpse]:
        """What rows that go on would say now, by sequence id; from their last hidden [D]."""
        if not showing:
            return {}
        sequences = [s for s, _ in showing]
        prior = self._predict(sequences, torch.stack([row for _, row in showing])).prior
        most = max(s.request.show.top for s in sequences if s.request.show)
        found: dict[int, Glimpse] = {}
        for sequence, entry in zip(sequences, logprobs_of(prior, prior.argmax(-1), most), strict=True):
            live, show = self._live[sequence.id], sequence.request.show
            assert show is not None and live.before is not None
            moved = LatentDiff.measure(live.before[None], live.state[-1:]).item()
            found[sequence.id] = Glimpse(step_of(sequence) + 1, moved, entry.top[: show.top])
        return found

    def _start_level(self, sequence: Sequence) -> None:
        """After a read-out that is not the last, the next level starts from z = 0 unless a bridge set it."""
        plan, step = self._plan(sequence), step_of(sequence)
        if plan.readout[step] and step + 1 < plan.num_core_steps and plan.sigmas[step + 1] is None:
            self._live[sequence.id].state = torch.zeros_like(self._live[sequence.id].state)

    def _score(self, sequence: Sequence, hidden: Tensor) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that follow the segment's rows. hidden [L, D]."""
        segment, request = sequence.segment, sequence.request
        assert segment is not None and request.prompt_logprobs is not None
        targets = request.prompt[segment.start + 1 : segment.start + 1 + segment.length]
        self._spent[sequence.id] += len(targets) * self._cost.head
        found: list[TokenLogprobs] = []
        chunk = max(1, LOGITS_AT_ONCE // self.config.model.vocab_size)
        for start in range(0, len(targets), chunk):
            wanted = torch.tensor(targets[start : start + chunk], device=self.device)
            prior = self._owner.predict(hidden[start : start + len(wanted)]).prior
            found += logprobs_of(prior, wanted, request.prompt_logprobs)
        return found

    def _draw(self, rows: list[Sequence], hidden: Tensor, results: dict[int, StepResult]) -> None:
        """Draw a token for each row: the last step's is the answer, before it a bridge leads on. hidden [M, D]."""
        prediction = self._predict(rows, hidden)
        for i, sequence in enumerate(rows):
            if sequence.request.logprobs is not None and self._is_likelihood(sequence, results):
                self._live[sequence.id].prior = prediction.prior[i]
        uniforms = [uniform(s.request.seed, s.request.choice, s.context_length, step_of(s)) for s in rows]
        params, histories = [s.request.sampling for s in rows], [s.history for s in rows]
        known = slice(0, self._num_tokens)
        evidence = None if prediction.evidence is None else prediction.evidence[:, known]
        ids = sample(prediction.prior[:, known], params, histories, uniforms, evidence)
        again: list[int] = []
        flowing: list[int] = []
        for i, (sequence, token) in enumerate(zip(rows, ids.tolist(), strict=True)):
            if step_of(sequence) + 1 < sequence.depth.drawn and not results[sequence.id].exited:
                (again if params[i].bridge == "hard" else flowing).append(i)
                continue
            prior, count = self._live[sequence.id].prior, sequence.request.logprobs
            logprobs = (
                None if prior is None or count is None else logprobs_of(prior[None], ids[i : i + 1], count)[0]
            )
            results[sequence.id].drawn = (Drawn(token, logprobs),)
        if again:
            self._bridge([rows[i] for i in again], self._renoised([rows[i] for i in again], ids[again]))
        if flowing:
            logits = process(
                prediction.prior[flowing, known],
                [params[i] for i in flowing],
                [histories[i] for i in flowing],
            )
            x0 = expected_target(
                logits if evidence is None else logits + evidence[flowing], self._owner.unit_table()[known]
            )
            self._bridge([rows[i] for i in flowing], self._flowed([rows[i] for i in flowing], x0))

    def _predict(self, rows: list[Sequence], hidden: Tensor) -> Prediction:
        sigmas = [self._plan(s).sigmas[step_of(s)] for s in rows]
        evident = self._owner.evidence_scale is not None  # what z says is a second read-out
        self._spent.update(
            {
                s.id: self._cost.head * (1 + (evident and x is not None))
                for s, x in zip(rows, sigmas, strict=True)
            }
        )
        if all(sigma is None for sigma in sigmas):
            return self._owner.predict(hidden)
        silent = hidden.new_zeros(hidden.shape[1], dtype=torch.float32)
        z = torch.stack([silent if (kept := self._live[s.id].z) is None else kept for s in rows])
        return self._owner.predict(hidden, z, self._levels(sigmas))

    def _bridge(self, rows: list[Sequence], z: Tensor) -> None:
        """Put z [M, D] of each row's next level in the state's place."""
        sigma = self._levels([self._plan(s).sigmas[step_of(s) + 1] for s in rows])
        for sequence, row, state in zip(rows, z, self._owner.inject(z, sigma), strict=True):
            live = self._live[sequence.id]
            live.z, live.state = row, state[None]

    def _noise(self, sequence: Sequence) -> Tensor:
        """Standard normal [D] of the step now taken."""
        draw = generator(
            sequence.request.seed, sequence.request.choice, sequence.context_length, step_of(sequence), NOISE
        )
        return torch.randn(self.config.model.d_model, generator=draw).to(self.device)

    def _renoised(self, rows: list[Sequence], ids: Tensor) -> Tensor:
        """Hard bridge: drawn ids [M] -> z [M, D] at each row's next level."""
        sigma = self._levels([self._plan(s).sigmas[step_of(s) + 1] for s in rows])
        noise = torch.stack([self._noise(s) for s in rows])
        z = torch.empty_like(noise)
        for index in {self._block(s, 1) for s in rows}:
            into = torch.tensor([self._block(s, 1) == index for s in rows], device=self.device)
            z[into] = renoise(self._blocks[index], ids[into], sigma[into], noise[into])
        return z

    def _flowed(self, rows: list[Sequence], x0: Tensor) -> Tensor:
        """Soft bridge: estimates x0 [M, D] -> z [M, D] at each row's next level.

        The first level is read at z = 0; the ODE starts from the noise that this stands for: at sigma_max, far above the unit rows,
        it says nothing about the token.
        """
        top = self.denoiser.noise.sigma_max
        for sequence, estimate in zip(rows, x0, strict=True):
            live, (sigma, below) = (
                self._live[sequence.id],
                self._plan(sequence).sigmas[step_of(sequence) :][:2],
            )
            at = live.flow or Flow(top * self._noise(sequence))
            assert below is not None
            live.flow = sampler_named(sequence.request.sampling.bridge).step(
                at, estimate, sigma or top, below
            )
        return torch.stack([live.flow.z for s in rows if (live := self._live[s.id]).flow])
