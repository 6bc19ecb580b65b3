"""Tensors of the server: one core step over a ragged pack of rows, and what comes before and after it.

Shapes: S sequences in the pack, N rows (their segments one after another), M rows read out, D d_model, V
vocabulary. The rows of open segments live in ``RowBuffers`` between two steps, the past in the KV cache. Nothing
here decides who runs.

A failed step can be repeated with fewer sequences: ``run`` replaces ``rows`` and ``flops`` of a sequence and
changes nothing else of it, random draws are pure functions of their keys, and a step writes only what it does
not read, or the keys of its own rows, before it reads them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from math import lcm
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.samplers import SAMPLERS, Flow, StepPlan, expected_target
from rdlm.errors import UserError
from rdlm.exit_criteria import LatentDiff
from rdlm.flops import Cost, costs_of
from rdlm.models.base import Backbone
from rdlm.nn.kv_cache import PAGE, KVCache, PackedContext, Segment
from rdlm.objectives.base import Prediction
from rdlm.objectives.next_token import NextToken, renoise
from rdlm.random_streams import HashedStream, generator
from rdlm.sampling import draw, process, read_tokens, sample, top_logprobs, verify
from rdlm.sampling_params import History, SamplingParams, uniform
from serve.engine.exits import check_exit_gate, exits_on_rows, exits_on_states, is_measured, mixes_steps
from serve.engine.prefix_cache import PrefixCache, Source
from serve.engine.replay import Pass, Replayer, SingleRows, StaticPasses, bucket
from serve.engine.rows import (
    Block,
    Inputs,
    Part,
    RowBuffers,
    Rows,
    core,
    draw_tokens,
    encode,
    enter,
    leave,
    rows_of,
)
from serve.engine.sequence import (
    NO_SLOT,
    Request,
    Sequence,
    StepBudget,
    StepCounts,
    StepPrediction,
    StepResult,
    TokenLogprobs,
)

LOGITS_AT_ONCE = 1 << 24
"""Scored prompt rows are read out in chunks of at most this many logits (64 MiB of fp32)."""
NOISE, STATE, ADDED_NOISE, ACCEPTANCE, SECOND_DRAW, FRESH_STATE, HEADWAY = 1, 2, 3, 4, 5, 6, 7
"""Which stream of a request's randomness a draw is from: the noise that a chain of levels starts from, or
that a drawn token gets; the initial state; the noise that a sampler adds on its way; whether a drafted token is
accepted; the token in the place of one that is not; the state that is mixed into that of a wavefront's position;
the token that such a position begins with."""
PACKS = 4
"""Packs of rows that are kept: a step has one of the segments that open, one of the core and one of those
that are read out."""


def reports_step(sequence: Sequence) -> bool:
    """Whether a stream gets an intermediate read-out of the step now taken: of a position that is drawn, and
    not of its last step."""
    wanted, taken = sequence.request.step_predictions, sequence.step + 1
    return (
        wanted is not None and sequence.draws and taken < sequence.counts.drawn and taken % wanted.every == 0
    )


def starts_from_noise(request: Request) -> bool:
    """Whether the first prediction of a token sees pure noise instead of z = 0."""
    return SAMPLERS[request.sampling.sampler].starts_from_noise


def predicts(plan: StepPlan, step: int) -> bool:
    """Whether the step's read-out is a prediction, and not one that only fills the cache."""
    return plan.readout[step] and sum(plan.readout[:step]) >= plan.num_draws_skipped


def score_step(plan: StepPlan) -> int:
    """The step whose read-out is the normalised likelihood: the first prediction (see
    ``Objective.score``)."""
    return next(step for step in range(plan.num_core_steps) if predicts(plan, step))


def logprobs_of(prior: Tensor, chosen: Tensor, count: int, num_tokens: int) -> list[TokenLogprobs]:
    """prior [M, V], chosen [M] -> one entry a row, ``count`` alternatives each, all below ``num_tokens``."""
    picked, values, ids = (part.tolist() for part in top_logprobs(prior, chosen, count, num_tokens))
    return [
        TokenLogprobs(p, tuple(zip(i, v, strict=True))) for p, v, i in zip(picked, values, ids, strict=True)
    ]


class Runner:
    """A denoiser and its key-value cache. Called by one thread only."""

    def __init__(
        self,
        denoiser: NextToken,
        config: CheckpointConfig,
        *,
        num_slots: int,
        max_len: int,
        max_steps: int,
        num_tokens: int,
        kv_cache: Literal["shared", "full", "first"] = "shared",
        prefix_cache: Literal["exact", "any-steps", "off"] = "off",
        prefix_cache_bytes: float = float("inf"),
        chunk: int = 1,
        replay: Replayer | None = None,
        attention: Literal["gather", "pages"] = "gather",
    ) -> None:
        """kv_cache: shared keeps the keys of each position's last step; full those of every step, allocated
        as they are written; first those of the first step. UserError where there is no such.

        prefix_cache: whether prompts may begin with keys that other requests have computed; exact: with those
        that they would compute themselves; any-steps: with those of any K. prefix_cache_bytes: most memory of
        kept keys. chunk: prompt positions of a segment. replay: how passes of single rows are run; None: with the
        others, as they come. attention: gather copies the keys that a row sees; pages reads them where they are
        (rdlm/nn/paged_attention.py).

        num_tokens: ids the tokenizer knows; those a padded vocabulary has beyond them are neither drawn nor
        reported.
        """
        model, weight = denoiser.model, next(denoiser.model.parameters())
        self.denoiser, self.config, self.device = denoiser, config, weight.device
        self.waits = weight.device.type == "cpu"
        self._blocks = [
            Block(i, block, costs_of(block), [], num_tokens)
            for i, block in enumerate(cast(list[NextToken], denoiser.parts))
        ]
        self._plans = {k: denoiser.step_plan(k) for k in range(1, max_steps + 1)}
        self._counts: dict[tuple[int, frozenset[int]], StepCounts] = {}
        keeps_steps = kv_cache == "full" and config.objective.supports_exits
        sizes = (model.num_cache_layers, num_slots, max_len, model.num_kv_heads, model.head_dim)
        self.cache = KVCache(
            *sizes,
            weight.dtype,
            weight.device,
            num_steps=max_steps if keeps_steps else 1,
            core_layers=model.core_cache_layers,
            num_unkept=0 if replay is None else bucket(num_slots),
            by_rows=attention == "pages",
        )
        self._keeps_first = kv_cache == "first"
        if self._keeps_first:
            self._check_first(config)
        self._rows = RowBuffers(num_slots, weight.device)
        top = denoiser.noise.sigma_max
        self._static = None if replay is None else StaticPasses(self.cache, self._rows, top, replay)
        self._num_tokens = num_tokens
        self._any_steps = prefix_cache == "any-steps"
        # Rows of a chunk see each other's keys of the step that they are at. A shared cache shows later ones
        # those of the last step: there a prefix is what whole chunks have computed.
        chunks_matter = (
            not (keeps_steps or self._keeps_first or self._any_steps)
            and max_steps > 1
            and config.objective.supports_exits
        )
        unit = lcm(PAGE, chunk) if chunks_matter or model.state_is_random else PAGE
        # The keys of a coda are those of the last step.
        fewer = keeps_steps and model.core_cache_layers.stop == model.num_cache_layers
        self._prefixes = (
            None if prefix_cache == "off" else PrefixCache(self.cache, unit, prefix_cache_bytes, fewer)
        )
        self._staged: dict[tuple[Part, tuple[int, ...]], Pass] = {}
        """Passes of this step whose rows are on the device already, by part and sequence ids."""
        self._known_indices: tuple[bytes, list[int], tuple[Tensor, Tensor, Tensor, Tensor]] | None = None
        """Rows and tokens of the last pass, and their indices on the device."""
        self._packs: list[tuple[list[Segment], PackedContext]] = []
        """The last ``PACKS`` packs, the newest last."""

    def _check_first(self, config: CheckpointConfig) -> None:
        """Raises UserError where keys of the first step cannot stand for those of later ones."""
        problem = None
        if not config.objective.supports_exits:
            problem = "steps of this model have noise levels of their own, and keep the keys of one already"
        elif not config.model.layout().iterates:  # type: ignore[union-attr]
            problem = "its layers run once, so that all caches are one"
        elif self.denoiser.model.is_prefix_lm:
            problem = "the tokens of a prompt see each other at every step"
        if problem is not None:
            raise UserError("kv_cache", "first", problem, "use shared or full")

    def step_counts(self, num_steps: int, blocks: frozenset[int] = frozenset()) -> StepCounts:
        """Core steps that each kind of position takes at K = num_steps where it fills the cache of
        ``blocks``. Raises UserError."""
        known = self._counts.get((num_steps, blocks))
        if known is not None:
            return known
        if num_steps not in self._plans:
            most = len(self._plans)
            raise UserError("num_steps", num_steps, "is out of range", f"this model takes 1 to {most}")
        plan = self._plan_at(num_steps, blocks)
        context = max(i for i, commits in enumerate(plan.commit) if commits) + 1
        counts = StepCounts(num_steps, plan.num_core_steps, context, max(context, score_step(plan) + 1), plan)
        self._counts[num_steps, blocks] = counts
        return counts

    def sequence(self, number: int, request: Request, chunk: int) -> Sequence:
        """The request as the engine steps it. chunk: prompt positions of a segment; a sweep's prompt is one
        segment."""
        if request.budget.exit is not None:
            check_exit_gate(request.budget.exit.criterion, self.config)
        if starts_from_noise(request) and not (request.logprobs is None and request.prompt_logprobs is None):
            problem = "log-probabilities are read at z = 0, and this sampler starts from noise"
            raise UserError("logprobs", request.logprobs, problem, "leave logprobs out, or sampler")
        if request.budget.step_sizes and not self.denoiser.model.takes_step_sizes:
            problem = "the steps of this model have no lengths"
            raise UserError("step_sizes", "...", problem, "leave it out")
        self._check_guesses(request)
        blocks, first = self._blocks_of(request.budget), request.budget.steps_at(0)
        for k in {request.budget.num_steps, *request.budget.schedule, *request.sweep}:
            self.step_counts(k)  # refused here, not by the step that comes to it
        whole = bool(request.sweep) or self._is_prefix(request)
        chunk = len(request.prompt) if whole else chunk
        return Sequence(number, request, self.step_counts(first, blocks), chunk, blocks)

    @property
    def guesses(self) -> tuple[str, ...]:
        """Ways to guess tokens early that the model and its cache allow: of ``speculation`` and
        ``wavefront``."""
        if not self.config.objective.supports_exits or len(self._plans) == 1:
            return ()
        can_draft = self.cache.keeps_steps or self._keeps_first
        return ("speculation", "wavefront") if can_draft else ("wavefront",)

    def _check_guesses(self, request: Request) -> None:
        """Raises UserError where tokens could not be guessed early, or a draft not be verified exactly."""
        budget = request.budget
        speculation, field = budget.speculation, "speculation" if budget.speculation else "wavefront"
        if speculation is None and budget.wavefront is None:
            return
        if not self.config.objective.supports_exits:
            problem = "every step of this model has a noise level of its own, so no token can be read early"
            raise UserError(field, "...", problem, "leave it out")
        wavefront = budget.wavefront
        if wavefront is not None and wavefront.noise and not self.denoiser.model.draws_state:
            problem = (
                "the states of this model begin with its tokens: there is no law to draw fresh ones from"
            )
            raise UserError("wavefront.noise", wavefront.noise, problem, "leave it out")
        if speculation is not None and not (self.cache.keeps_steps or self._keeps_first):
            problem = "a draft is verified exactly only where later steps do not change what others read"
            raise UserError(field, "...", problem, "serve with --kv-cache full or first, or leave it out")
        if speculation is not None and not 0 < speculation.draft_steps < budget.num_steps:
            problem = f"a draft takes fewer core steps than K = {budget.num_steps}"
            remedy = f"send 1 to {budget.num_steps - 1}" if budget.num_steps > 1 else "raise num_steps"
            raise UserError("speculation.draft_steps", speculation.draft_steps, problem, remedy)
        for name, value in (
            ("exit", budget.exit), ("schedule", budget.schedule), ("max_ms", budget.lowers),
            ("include_steps", request.step_predictions), ("response_format", request.grammar),
            ("wavefront", speculation and budget.wavefront),
        ):  # fmt: skip
            if value:
                problem = "tokens are guessed early at one K, without a form that the answer must have"
                raise UserError(field, "...", problem, f"leave it out, or {name}")

    def _blocks_of(self, budget: StepBudget) -> frozenset[int]:
        """Blocks that every position must fill where K varies: one that a position skipped would be a hole in
        its later context."""
        if len(self._blocks) == 1 or not (budget.schedule or budget.lowers):
            return frozenset()
        highest = {budget.num_steps, *budget.schedule}
        taken = {k for most in highest for k in range(1 if budget.lowers else most, most + 1)}
        return frozenset(block for k in taken if k in self._plans for block in self._plans[k].blocks)

    def _plan_at(self, num_steps: int, blocks: frozenset[int]) -> StepPlan:
        """The plan at K, after a clean pass through those of ``blocks`` that it does not run through anyway."""
        plan = self._plans[num_steps]
        missing = tuple(sorted(blocks - set(plan.blocks), reverse=True))
        if not missing:
            return plan
        count = len(missing)
        return replace(
            plan,
            sigmas=(None,) * count + plan.sigmas,
            readout=(True,) * count + plan.readout,
            commit=(True,) * count + plan.commit,
            blocks=missing + plan.blocks,
            num_draws_skipped=count + plan.num_draws_skipped,
        )

    def _is_prefix(self, request: Request) -> bool:
        """Whether the tokens of a prompt see each other in both directions; not where each is to be predicted
        from those before it."""
        scored = request.prompt_logprobs is not None or bool(request.sweep)
        return self.denoiser.model.is_prefix_lm and not scored

    def attach(self, sequence: Sequence) -> int | None:
        """Begin a sequence that has got its slot with the longest prefix that is known -> its positions; None
        while another sequence computes more of it."""
        request, source = sequence.request, self._source(sequence)
        if self._prefixes is None or source is None or request.prompt_logprobs is not None:
            return 0
        return self._prefixes.attach(sequence.slot, request.prompt, source, self._holds(request))

    def _source(self, sequence: Sequence) -> Source | None:
        """What the keys of the sequence's prompt are computed from; None where other prompts cannot be served
        with them."""
        plan, request, model = self._plan(sequence), sequence.request, self.denoiser.model
        count, rule = sequence.counts.context, request.budget.exit
        if self._is_prefix(request):
            return None
        if self._any_steps:
            return Source(others=(frozenset(plan.blocks[:count]),))
        others: tuple[object, ...] = ()
        if rule is not None and rule.prefill:
            if self.cache.keeps_steps:  # positions of one page may have exited at different steps
                return None
            others += (rule,)
        if model.depends_on_num_steps:
            others += (plan.num_core_steps, request.budget.step_sizes)
        if model.state_is_random:
            others += (request.seed, request.choice)
        return Source(tuple(zip(plan.sigmas[:count], plan.commit, plan.blocks, strict=False)), others)

    def _holds(self, request: Request) -> bool:
        """Whether the keys of a request are what its K says."""
        return self._any_steps or not request.budget.lowers

    def _hold(self, sequence: Sequence) -> None:
        """Make what the sequence has written for good findable."""
        if self._prefixes is None or not self._holds(sequence.request):
            return
        end = sequence.start if sequence.is_open else sequence.next_start
        prompt, output = sequence.request.prompt, sequence.output
        tokens = prompt[:end]
        if end > len(prompt) and self._decodes_like_prefill(sequence):
            tokens = (*prompt, *output)[: min(end, len(prompt) + len(output) - 1)]
        self._prefixes.hold(sequence.slot, prompt, tokens)

    def _decodes_like_prefill(self, sequence: Sequence) -> bool:
        """Whether the keys of an answer are those that a prompt with the same tokens would get."""
        budget = sequence.request.budget
        if budget.wavefront is not None:  # a position may keep a state that began with another token
            return False
        if self._any_steps:
            return True
        varies = budget.exit is not None or bool(budget.schedule)
        if varies or self.denoiser.model.state_is_random:
            return False
        return self.cache.keeps_steps or self._keeps_first or sequence.counts.context == 1

    def release(self, sequence: Sequence) -> int:
        """Free what is kept for a sequence that leaves, while it still has its slot -> bytes of its keys and
        values."""
        sequence.rows, self._packs = None, []
        if sequence.slot == NO_SLOT:
            return 0
        self._rows.own(sequence.slot, 1)
        if self._prefixes is None:
            return self.cache.free(sequence.slot)
        self._hold(sequence)
        return self._prefixes.release(sequence.slot) + self.cache.free(sequence.slot)

    def unread_steps(self, batch: list[Sequence]) -> int:
        """How many core steps ``batch`` takes before one after which a row is read, or a segment changes."""
        if self._static is not None or len(self._blocks) > 1 or not self.config.objective.supports_exits:
            return 0
        return min(map(self._unread_steps, batch))

    def _unread_steps(self, sequence: Sequence) -> int:
        request, budget = sequence.request, sequence.request.budget
        if budget.exit or budget.speculation or budget.wavefront or request.step_predictions or request.sweep:
            return 0
        if budget.step_sizes:  # each step has inputs of its own
            return 0
        plan, first = self._plan(sequence), sequence.step
        last = first + sequence.steps_unchanged - 1
        return next((i for i in range(first, last) if plan.readout[i]), last) - first

    @torch.inference_mode()
    def run_unread(self, batch: list[Sequence], steps: int) -> dict[int, StepResult]:
        """``steps`` core steps of every sequence in ``batch``, at most ``unread_steps`` -> nothing. They can be
        repeated as one step can."""
        for block, part in self._parts(batch):
            self._begin(block, part, [], [])
            self._charge(part, block.costs.core, steps)
            inputs = self._inputs(core, part)
            changes = self.cache.keeps_steps or self._keeps_first
            later = [self._pack(part, False, i) if changes else inputs.context for i in range(1, steps)]
            core(block, self._rows, inputs, later)
            self._turn(part)
        return {}

    @torch.inference_mode()
    def run(self, batch: list[Sequence]) -> dict[int, StepResult]:
        """One core step for the segment of every sequence in ``batch`` -> what came out, by sequence id.

        Rows that are in different blocks of a network share no forward. Whatever is raised, the step can be
        repeated with some of the sequences once their ``rows`` and ``flops`` are what they were.
        """
        results: dict[int, StepResult] = {}
        for block, part in self._parts(batch):
            results |= self._run(block, part)
        return results

    def _parts(self, batch: list[Sequence]) -> list[tuple[Block, list[Sequence]]]:
        """The sequences that share their passes."""
        parts = []
        for block in self._blocks:
            mine = [s for s in batch if self._block_index(s) == block.index]
            longer = [] if self._static is None else [s for s in mine if not self._replays(s)]
            parts += [(block, longer), (block, [s for s in mine if s not in longer] if longer else mine)]
        return [(block, part) for block, part in parts if part]

    def _run(self, block: Block, batch: list[Sequence]) -> dict[int, StepResult]:
        drawing = [s for s in batch if self._draws_in_place(s)]
        ruled = any(s.has_exit_rule for s in batch)  # who is read is known after the core step
        reading = [] if ruled else [s for s in batch if s not in drawing and self._is_read(s)]
        self._begin(block, batch, drawing, reading)
        exiting = self._core(block, batch)
        results = self._draw_in_place(block, drawing)
        readers = [s for s in batch if s.id not in results and (s.id in exiting or self._is_read(s))]
        return results | self._read(block, readers, exiting) if readers else results

    def _begin(
        self, block: Block, batch: list[Sequence], drawing: list[Sequence], reading: list[Sequence]
    ) -> None:
        """Everything before the core step. drawing, reading: who is read after it."""
        self._staged = {}
        entering = [s for s in batch if s.step == 0 and not s.is_wavefront]
        self._open(entering)
        self._enter_wavefronts(block, [s for s in batch if s.is_wavefront and self._changes_wavefront(s)])
        for sequence in batch:
            rows = rows_of(sequence)
            if sequence.length > rows.length:  # the positions of a draft go on together
                sequence.rows = Rows(sequence.length, half=rows.half, proposals=rows.proposals)
        # Every block reads the tokens through a stem of its own.
        changing = [s for s in batch if s.step and self._block_index(s, -1) != block.index]
        parts = [(self._entry(block), entering), (core, batch), (draw_tokens, drawing), (leave, reading)]
        self._stage(block, [(part, sequences) for part, sequences in parts if sequences])
        self._enter(block, entering)
        if changing:
            self._pass(encode, block, changing)

    def _stage(self, block: Block, passes: list[tuple[Part, list[Sequence]]]) -> None:
        """Send what the step's passes of single rows read to the device, where it is known: in one copy."""
        if self._static is None or not all(self._replays(s) for _, sequences in passes for s in sequences):
            return
        ready = self._static.stage(block, [(part, self._single_rows(part, rows)) for part, rows in passes])
        self._staged = {
            (part, tuple(s.id for s in sequences)): run
            for (part, sequences), run in zip(passes, ready, strict=True)
        }

    def _single_rows(self, part: Part, sequences: list[Sequence], stepped: bool = False) -> SingleRows:
        """What a pass of single rows reads. stepped: whether the core step has been taken, which the parts after
        it wait for."""
        once = part is not core
        where = self._rows.where(sequences)
        return SingleRows(
            [segment for s in sequences for segment in self._cache_segments(s, once)],
            [i for s in sequences for i in s.token_ids()],
            where ^ 1 if part in (leave, draw_tokens) and not stepped else where,
            [None if once else self._level(s) for s in sequences],
            self._sampling(sequences) if part is draw_tokens else None,
        )

    def _is_read(self, sequence: Sequence) -> bool:
        """Whether coda and more run for the sequence after this step, unless it exits with it."""
        return (
            self._reads(sequence)
            or reports_step(sequence)
            or (sequence.has_exit_rule and (is_measured(sequence, "predictions") or mixes_steps(sequence)))
        )

    def _replays(self, sequence: Sequence) -> bool:
        """Whether the passes of this step are those of single rows, which can be captured."""
        return self._static is not None and sequence.length == 1 and not sequence.request.budget.step_sizes

    def _draws_in_place(self, sequence: Sequence) -> bool:
        """Whether coda, read-out and draw of this step are one part, which can be captured: where nothing but the
        token is wanted, and the host has no say in it. Otherwise they are run one by one, by ``_read``."""
        request, budget, step = sequence.request, sequence.request.budget, sequence.step
        return (
            self._replays(sequence)
            and sequence.draws
            and step + 1 == sequence.counts.drawn
            and self._level(sequence) is None
            and predicts(self._plan(sequence), step)
            and budget.exit is budget.speculation is budget.wavefront is None
            and request.logprobs is request.prompt_logprobs is None
            and sequence.guide is None
        )

    def _draw_in_place(self, block: Block, drawing: list[Sequence]) -> dict[int, StepResult]:
        """A token of each sequence: one copy to the host."""
        if not drawing:
            return {}
        for sequence in drawing:
            sequence.flops += block.costs.head
        (found,) = self._pass(draw_tokens, block, drawing)
        tokens = read_tokens(found[0].cpu().tolist(), [s.history for s in drawing])
        return {s.id: StepResult((token,), (None,)) for s, token in zip(drawing, tokens, strict=True)}

    def _sampling(self, sequences: list[Sequence]) -> tuple[list[SamplingParams], list[History], list[float]]:
        """Settings, histories and random numbers that the sequences' next tokens are drawn with."""
        uniforms = [self._uniform(s, s.context_length) for s in sequences]
        return [s.request.sampling for s in sequences], [s.history for s in sequences], uniforms

    def _plan(self, sequence: Sequence) -> StepPlan:
        return cast(StepPlan, sequence.counts.plan)

    def _level(self, sequence: Sequence, later: int = 0) -> float | None:
        """Noise level of the step now taken, or of a later one; None: z = 0, read at sigma_max."""
        plan, step = self._plan(sequence), sequence.step + later
        if step == plan.num_draws_skipped and starts_from_noise(sequence.request):
            return self.denoiser.noise.sigma_max
        return plan.sigmas[step]

    def _block_index(self, sequence: Sequence, later: int = 0) -> int:
        return self._plan(sequence).blocks[sequence.step + later]

    def _charge(self, sequences: list[Sequence], cost: Cost, times: int = 1) -> None:
        """Add the FLOPs of passes of the open segments' rows through a part of the network."""
        for sequence in sequences:
            plan = self._plan(sequence)
            appended = (
                plan.append_own and not plan.commit[sequence.step]
            )  # it attends to the position's clean row too
            sequence.flops += times * cost.of(sequence.start + appended, sequence.length)

    def _pass(self, part: Part, block: Block, sequences: list[Sequence]) -> tuple[Tensor, ...]:
        """A part of the network, for the segments' rows."""
        costs: dict[Part, Cost] = {
            core: block.costs.core,
            leave: block.costs.decode,
            draw_tokens: block.costs.decode,
        }
        self._charge(sequences, costs.get(part, block.costs.encode))
        if self._static is not None and all(self._replays(s) for s in sequences):
            ready = self._staged.pop((part, tuple(s.id for s in sequences)), None)
            if ready is None:
                (ready,) = self._static.stage(block, [(part, self._single_rows(part, sequences, True))])
            return ready()
        return part(block, self._rows, self._inputs(part, sequences))

    def _inputs(self, part: Part, sequences: list[Sequence]) -> Inputs:
        once, where = part is not core, self._rows.where(sequences)
        ids = [i for s in sequences for i in s.token_ids()]
        levels = [None if once else self._level(s) for s in sequences for _ in range(s.length)]
        at, other, places, tokens = self._indices(where, ids)
        sigma = self._levels(levels)[None] if any(level is not None for level in levels) else None
        spans = None if once else self._spans(sequences)
        return Inputs(tokens, at, other, places, sigma, self._pack(sequences, once), spans=spans)

    def _spans(self, sequences: list[Sequence]) -> tuple[Tensor, Tensor] | None:
        """Inputs.spans of the step now taken; beside lengths that a request gives, others have equal ones."""
        if not any(s.request.budget.step_sizes for s in sequences):
            return None
        spans = []
        for sequence in sequences:
            count = self._plan(sequence).num_core_steps
            sizes = sequence.request.budget.step_sizes
            for step in (sequence.steps_of(i) - 1 for i in range(sequence.length)):
                spans.append((sum(sizes[:step]), sizes[step]) if sizes else (step / count, 1 / count))
        time, size = torch.tensor(spans, device=self.device).T[:, None]
        return time, size

    def _indices(self, where: np.ndarray, ids: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``at``, ``other``, ``places`` and ``ids`` of Inputs: those of the pass before, where rows and tokens are
        the same, as they are through the passes of one position, whose core steps exchange the halves."""
        known, one, two = self._known_indices, where.tobytes(), (where ^ 1).tobytes()
        if known is None or known[1] != ids or known[0] not in (one, two):
            at, other, places, tokens = self._rows.index(np.stack([where, where ^ 1, where >> 1, ids]))
            known = self._known_indices = (one, ids, (at, other, places, tokens))
        at, other, places, tokens = known[2]
        return (at, other, places, tokens) if known[0] == one else (other, at, places, tokens)

    def _open(self, entering: list[Sequence]) -> None:
        """Places for the rows of segments that have just opened."""
        for sequence in entering:
            if 0 < sequence.start <= len(sequence.request.prompt):
                self._hold(sequence)
            drafted = len(sequence.draft)  # positions that wait for the end of their draft
            self._rows.own(sequence.slot, drafted + sequence.length)
            proposals = rows_of(sequence).proposals if drafted else ()
            sequence.rows = Rows(sequence.length, drafted, proposals=proposals)

    def _entry(self, block: Block) -> Part:
        """The part that segments open with."""
        model = block.denoiser.model
        return encode if model.state_is_random or model.depends_on_num_steps else enter

    def _enter(self, block: Block, entering: list[Sequence]) -> None:
        """Prelude and initial state of segments that have just opened."""
        if not entering:
            return
        model, (e, *_) = block.denoiser.model, self._pass(self._entry(block), block, entering)
        if self._entry(block) is enter:
            return
        parts = zip(entering, e.split([s.length for s in entering], 1), strict=True)
        states = [self._initial_state(model, s, own, s.start) for s, own in parts]
        self._rows.keep(self._rows.where(entering), torch.cat(states, 1))

    def _changes_wavefront(self, sequence: Sequence) -> bool:
        """Whether inputs or states of a wavefront change before the step now taken."""
        rows, wavefront = rows_of(sequence), sequence.request.budget.wavefront
        assert wavefront is not None
        renews = rows.is_read and (wavefront.noise > 0 or wavefront.average > 0)
        return renews or rows.ids != tuple(sequence.token_ids())

    def _enter_wavefronts(self, block: Block, moved: list[Sequence]) -> None:
        """Prelude of wavefronts whose tokens have changed. Their states stay; positions that are new, the last ones,
        get their first ones. Then the averages over inputs and the noise on states that requests ask for."""
        if not moved:
            return
        model, before = block.denoiser.model, [rows_of(s) for s in moved]
        kept = [
            self._rows.places(s.slot, rows)[: len(rows.ids)] for s, rows in zip(moved, before, strict=True)
        ]
        for sequence, rows in zip(moved, before, strict=True):
            # Beside the places of its last step, which this one reads: it may have to be repeated.
            first = 0 if rows.first >= sequence.length else rows.first + len(rows.ids)
            self._rows.own(sequence.slot, max(first + sequence.length, rows.first + len(rows.ids)))
            sequence.rows = Rows(sequence.length, first, ids=tuple(sequence.token_ids()))
        (encoded,) = self._pass(encode, block, moved)
        for sequence, where, e in zip(moved, kept, encoded.split([s.length for s in moved], 1), strict=True):
            wavefront = sequence.request.budget.wavefront
            assert wavefront is not None
            state, known = self._rows.states(where), len(where)
            if wavefront.average and known:
                old = self._rows.e.index_select(1, self._rows.index(where >> 1))
                averaged = torch.lerp(e[:, :known], old, wavefront.average)
                e = torch.cat([averaged, e[:, known:]], 1)
                self._rows.write_e(self._rows.index(self._rows.where([sequence]) >> 1), e)
            if known and model.draws_state:  # of the inputs, a state may carry value embeddings
                state = model.initial_state(e[:, :known], latent=model.latent(state))
            for i in range(known, sequence.length):
                new = self._initial_state(model, sequence, e[:, i : i + 1], sequence.start + i)
                state = torch.cat([state, new], 1) if i else new
            sequence.rows = replace(rows_of(sequence), memory=state)
            if wavefront.noise:
                state = self._with_noise(model, sequence, e, state)
            self._rows.keep(self._rows.where([sequence]), state)

    def _with_noise(self, model: Backbone, sequence: Sequence, e: Tensor, state: Tensor) -> Tensor:
        """The states of a wavefront [1, L, S], each mixed with a fresh initial one."""
        request, wavefront, fresh, shares = sequence.request, sequence.request.budget.wavefront, [], []
        assert wavefront is not None
        for i in range(sequence.length):
            taken = sequence.steps_of(i) - 1
            key = request.seed, request.choice, sequence.start + i, taken, FRESH_STATE
            drawn = model.initial_state(e[:, i : i + 1], generator(*key), num_steps=sequence.counts.drawn)
            fresh.append(model.latent(drawn))
            shares.append(wavefront.noise / (1 + taken) if wavefront.noise_decays else wavefront.noise)
        share = torch.tensor(shares, device=self.device).to(state.dtype)[None, :, None]
        mixed = torch.lerp(model.latent(state), torch.cat(fresh, 1), share)
        return model.initial_state(e, latent=mixed)

    def _initial_state(self, model: Backbone, sequence: Sequence, e: Tensor, start: int) -> Tensor:
        seed, choice = sequence.request.seed, sequence.request.choice
        draw: torch.Generator | HashedStream = generator(seed, choice, start, STATE)
        if model.hashes_state:
            draw = HashedStream(seed, choice, start)
        return model.initial_state(e, draw, num_steps=self._plan(sequence).num_core_steps)

    def _core(self, block: Block, batch: list[Sequence]) -> set[int]:
        """One core step -> ids of the sequences that exit on their states."""
        for sequence in batch:
            if self._level(sequence) is not None:
                sequence.flops += sequence.length * block.costs.condition
        before, after = self._pass(core, block, batch)
        self._turn(batch)
        if not any(s.has_exit_rule for s in batch):
            return set()
        latent = block.denoiser.model.latent
        exiting = exits_on_states(batch, [s.length for s in batch], latent(before), latent(after))
        return exiting | self._exits_on_gate(
            block, [s for s in batch if s.has_exit_rule and is_measured(s, "gate")]
        )

    def _turn(self, batch: list[Sequence]) -> None:
        """Let the states that a core step has written count."""
        for sequence in batch:
            rows, length = rows_of(sequence), sequence.length
            first = rows.first + rows.length - length
            sequence.rows = replace(rows, half=1 - rows.half, first=first, length=length)

    def _exits_on_gate(self, block: Block, measured: list[Sequence]) -> set[int]:
        """Ids of the sequences whose last position the trained gate lets exit."""
        if not measured:
            return set()
        gates = block.denoiser.model.gate(self._rows.states(self._rows.where(measured, last=True)))[0]
        return self._remember(measured, gates)

    def _remember(self, sequences: list[Sequence], measured: Tensor) -> set[int]:
        """Ids of the sequences that exit on what is measured of their last row, [M, ...]; keeps the memory of
        their criteria."""
        exiting, memory = exits_on_rows(sequences, measured, [rows_of(s).memory for s in sequences])
        for sequence, kept in zip(sequences, memory, strict=True):
            sequence.rows = replace(rows_of(sequence), memory=kept)
        return exiting

    def _levels(self, sigmas: Seq[float | None]) -> Tensor:
        """fp32 [N]; a row without a noised target reads at sigma_max."""
        top = self.denoiser.noise.sigma_max
        return torch.tensor([top if sigma is None else sigma for sigma in sigmas], device=self.device)

    def _pack(self, sequences: list[Sequence], once: bool, later: int = 0) -> PackedContext:
        """The context of the sequences' rows, a recent one where it is the same: while no row moves to
        another position."""
        segments = [segment for s in sequences for segment in self._cache_segments(s, once, later)]
        for known, pack in self._packs:
            if known == segments:
                return pack
        pack = PackedContext(self.cache, segments)
        self._packs = [*self._packs, (segments, pack)][-PACKS:]
        return pack

    def _cache_segments(self, sequence: Sequence, once: bool, later: int = 0) -> list[Segment]:
        """The sequence's rows as the cache sees them, at a later step. once: a prelude or coda pass, whose keys do
        not depend on the step."""
        plan, start, length = self._plan(sequence), sequence.start, sequence.length
        at = sequence.step + later
        steps = [sequence.steps_of(i) - 1 for i in range(length)] if sequence.is_wavefront else [at]
        if sequence.is_wavefront and self.cache.keeps_steps and not once:
            return [Segment(sequence.slot, start + i, 1, step) for i, step in enumerate(steps)]
        if self._keeps_first and any(steps) and not once:
            steps = steps if sequence.is_wavefront else steps * length
            return [Segment(sequence.slot, start + i, 1, commit=step == 0) for i, step in enumerate(steps)]
        commit = plan.commit[at]
        step = 0 if once or not self.cache.keeps_steps else at
        spans = [(start, length)] if commit else [(start + i, 1) for i in range(length)]
        is_prompt = start == 0 and length == len(sequence.request.prompt)
        two_way = is_prompt and self._is_prefix(sequence.request)
        return [
            Segment(sequence.slot, first, n, step, commit, plan.append_own, two_way) for first, n in spans
        ]

    def _read(self, block: Block, readers: list[Sequence], exiting: set[int]) -> dict[int, StepResult]:
        """Coda for every row that is read out; head, log-probabilities and a draw where they are needed.

        exiting: sequences that exit on their states. Those that only compare predictions either join them or
        go on.
        """
        (hidden,) = self._pass(leave, block, readers)
        read = list(zip(readers, hidden[0].split([s.length for s in readers]), strict=True))
        ruled = [(s, h[-1]) for s, h in read if s.has_exit_rule]
        exiting = exiting | self._exits(block, [(s, h) for s, h in ruled if is_measured(s, "predictions")])
        step_predictions = self._step_predictions(
            block, [(s, h[-1]) for s, h in read if reports_step(s) and s.id not in exiting]
        )
        read = [(s, self._mixed(s, h) if s.has_exit_rule and mixes_steps(s) else h) for s, h in read]
        read = [(s, h) for s, h in read if s.id in exiting or self._reads(s)]
        results = {s.id: StepResult(exited=s.id in exiting) for s, _ in read}
        for sequence, h in read:
            if sequence.request.prompt_logprobs is not None and self._is_likelihood(
                sequence, sequence.id in exiting
            ):
                results[sequence.id].prompt_logprobs = self._score(block, sequence, h)
        for sequence, h in read:
            if sequence.verifies:
                self._verify(block, sequence, h, results[sequence.id])
            elif sequence.is_wavefront:
                self._read_wavefront(block, sequence, h, results[sequence.id])
        drawing = [
            (s, h[-1])
            for s, h in read
            if s.draws
            and not (s.verifies or s.is_wavefront)
            and (s.id in exiting or s.drafts or predicts(self._plan(s), s.step))
        ]
        if drawing:
            self._draw(block, [s for s, _ in drawing], torch.stack([h for _, h in drawing]), results)
        for sequence, _ in read:
            self._start_level(sequence)
        for number, prediction in step_predictions.items():
            results.setdefault(number, StepResult()).step_prediction = prediction
        return results

    def _mixed(self, sequence: Sequence, hidden: Tensor) -> Tensor:
        """hidden [L, D] of this step; of the last step, its last row is the mixture over all: logits are linear
        in it, so they are mixed with it."""
        rows, last = rows_of(sequence), hidden[-1].float()
        mixed = torch.zeros_like(last) if rows.mixed is None else rows.mixed
        if is_measured(sequence, "gate"):
            assert rows.memory is not None
            sequence.rows = replace(rows, mixed=mixed + rows.memory[1] * last)
            return hidden
        left = 1.0 if rows.memory is None else rows.memory[0]
        return torch.cat([hidden[:-1], (mixed + left * last).to(hidden)[None]])

    def _reads(self, sequence: Sequence) -> bool:
        """Whether the step is read out in any case: by plan, for guesses, or for a sweep."""
        return (
            self._plan(sequence).readout[sequence.step]
            or sequence.drafts
            or sequence.reads_wavefront
            or sequence.step + 1 in sequence.request.sweep
        )

    def _is_likelihood(self, sequence: Sequence, exits: bool) -> bool:
        """Whether this step's read-out is the normalised likelihood; that of a thinking model always is."""
        if sequence.request.sweep:
            return sequence.step + 1 in sequence.request.sweep
        return exits or sequence.step == score_step(self._plan(sequence))

    def _exits(self, block: Block, measured: list[tuple[Sequence, Tensor]]) -> set[int]:
        """Ids of the sequences whose prediction, read from hidden [D], satisfies their exit criterion."""
        if not measured:
            return set()
        for sequence, _ in measured:
            sequence.flops += block.costs.head
        prior = block.denoiser.predict(torch.stack([h for _, h in measured])).prior[:, : self._num_tokens]
        return self._remember([s for s, _ in measured], prior.log_softmax(-1))

    def _step_predictions(
        self, block: Block, reported: list[tuple[Sequence, Tensor]]
    ) -> dict[int, StepPrediction]:
        """Intermediate read-outs of rows that go on, by sequence id; from their last hidden [D]."""
        if not reported:
            return {}
        sequences = [s for s, _ in reported]
        prior = self._predict(block, sequences, torch.stack([h for _, h in reported])).prior
        most = max(s.request.step_predictions.top for s in sequences if s.request.step_predictions)
        best = prior[:, : self._num_tokens].argmax(-1)
        found: dict[int, StepPrediction] = {}
        for sequence, entry in zip(sequences, logprobs_of(prior, best, most, self._num_tokens), strict=True):
            wanted, latent = sequence.request.step_predictions, block.denoiser.model.latent
            assert wanted is not None
            where = self._rows.where([sequence], last=True)
            moved = LatentDiff.measure(
                *(latent(self._rows.states(half)) for half in (where ^ 1, where))
            ).item()
            found[sequence.id] = StepPrediction(sequence.step + 1, moved, entry.top[: wanted.top])
        return found

    def _start_level(self, sequence: Sequence) -> None:
        """After a pass that only fills the cache, the next one starts from z = 0 again, or from pure noise."""
        plan, step = self._plan(sequence), sequence.step
        if plan.readout[step] and step + 1 < sequence.counts.drawn and step < plan.num_draws_skipped:
            self._rows.keep(where := self._rows.where([sequence]), torch.zeros_like(self._rows.states(where)))
            if sequence.draws and step + 1 == plan.num_draws_skipped and starts_from_noise(sequence.request):
                start = self.denoiser.noise.sigma_max * self._noise(sequence, later=1)
                self._enter_level(self._blocks[self._block_index(sequence, 1)], [sequence], start[None])
                sequence.rows = replace(rows_of(sequence), flow=Flow(start))

    def _score(self, block: Block, sequence: Sequence, hidden: Tensor) -> list[TokenLogprobs]:
        """Log-probabilities of the prompt tokens that follow the segment's rows. hidden [L, D]."""
        request, first = sequence.request, sequence.start + 1
        assert request.prompt_logprobs is not None
        targets = request.prompt[first : first + sequence.length]
        sequence.flops += len(targets) * block.costs.head
        found: list[TokenLogprobs] = []
        chunk = max(1, LOGITS_AT_ONCE // self.config.model.vocab_size)
        for start in range(0, len(targets), chunk):
            wanted = torch.tensor(targets[start : start + chunk], device=self.device)
            rows, sigma = hidden[start : start + len(wanted)], self._level(sequence)
            noised = (
                () if sigma is None else (torch.zeros_like(rows).float(), self._levels([sigma] * len(rows)))
            )
            prior = block.denoiser.predict(rows, *noised).prior
            found += logprobs_of(prior, wanted, request.prompt_logprobs, self._num_tokens)
        return found

    def _draw(
        self, block: Block, drawn: list[Sequence], hidden: Tensor, results: dict[int, StepResult]
    ) -> None:
        """Draw a token for each row: the last step's is the answer, before it a sampler leads to the next
        level. hidden [M, D]."""
        prediction = self._predict(block, drawn, hidden)
        for i, sequence in enumerate(drawn):
            if sequence.request.logprobs is not None and self._is_likelihood(
                sequence, results[sequence.id].exited
            ):
                sequence.rows = replace(rows_of(sequence), prior=prediction.prior[i])
        params, histories, uniforms = self._sampling(drawn)
        known = slice(0, self._num_tokens)
        evidence = None if prediction.evidence is None else prediction.evidence[:, known]
        logits = process(prediction.prior[:, known], params, histories)
        ids, tokens = draw(logits, params, histories, uniforms, evidence)
        renoised: list[int] = []
        flowing: list[int] = []
        for i, (sequence, token) in enumerate(zip(drawn, tokens, strict=True)):
            if sequence.drafts:
                results[sequence.id].draft = token
                if not params[i].greedy:
                    rows = rows_of(sequence)
                    sequence.rows = replace(rows, proposals=(*rows.proposals, logits[i].clone()))
                continue
            if sequence.step + 1 < sequence.counts.drawn and not results[sequence.id].exited:
                (renoised if SAMPLERS[params[i].sampler].draws_tokens else flowing).append(i)
                continue
            prior, count = rows_of(sequence).prior, sequence.request.logprobs
            logprobs = (
                None
                if prior is None or count is None
                else logprobs_of(prior[None], ids[i : i + 1], count, self._num_tokens)[0]
            )
            results[sequence.id].tokens, results[sequence.id].logprobs = (token,), (logprobs,)
        if renoised:
            again = [drawn[i] for i in renoised]
            self._enter_level(block, again, self._renoised(again, ids[renoised]))
        if flowing:
            again = [drawn[i] for i in flowing]
            total = logits[flowing] if evidence is None else logits[flowing] + evidence[flowing]
            self._enter_level(
                block, again, self._flowed(again, expected_target(total, block.denoiser.unit_table()[known]))
            )

    def _uniform(self, sequence: Sequence, position: int) -> float:
        """The random number that the token at a position is drawn with; a guess's is that of the last step."""
        request, step = sequence.request, sequence.step
        if request.sampling.greedy:
            return 0.0
        step = sequence.counts.drawn - 1 if sequence.drafts or sequence.is_wavefront else step
        return uniform(request.seed, request.choice, position, step)

    def _verify(self, block: Block, sequence: Sequence, hidden: Tensor, result: StepResult) -> None:
        """Tokens with the law of plain decoding in a draft's place, up to the first that differs. hidden
        [L, D]."""
        request, length = sequence.request, len(hidden)
        if request.sampling.greedy:
            prior, ids, right = self._draw_rows(block, sequence, hidden)
        else:
            prior = self._predict(block, [sequence] * length, hidden).prior
            histories = [sequence.history_after(i) for i in range(length)]
            logits = process(prior[:, : self._num_tokens], [request.sampling] * length, histories)
            keys = [(request.seed, request.choice, sequence.start + i + 1, 0) for i in range(length)]
            uniforms = [(uniform(*key, ACCEPTANCE), uniform(*key, SECOND_DRAW)) for key in keys]
            ids, right = verify(
                logits, torch.stack(rows_of(sequence).proposals), sequence.draft, histories, uniforms
            )
        count = right.index(False) + 1 if False in right else len(ids)
        self._answer(sequence, prior[:count], ids[:count], result)

    def _read_wavefront(self, block: Block, sequence: Sequence, hidden: Tensor, result: StepResult) -> None:
        """Draw all tokens of a wavefront again, and let leading positions go. hidden [L, D].

        One whose token has changed keeps its state, as published, where there is one key a position and the
        state does not begin with the token; otherwise it and those after it begin again, as they do where it has no
        steps left.
        """
        prior, ids, right = self._draw_rows(block, sequence, hidden)
        rows, wavefront, model = rows_of(sequence), sequence.request.budget.wavefront, block.denoiser.model
        assert rows.memory is not None and wavefront is not None
        state = self._rows.states(self._rows.where([sequence]))
        changes = LatentDiff.measure(model.latent(rows.memory), model.latent(state))[0].tolist()
        leaves = [
            given and (change < wavefront.threshold or sequence.steps_of(i) == sequence.counts.drawn)
            for i, (given, change) in enumerate(zip([True, *right], changes, strict=True))
        ]
        gone = [*leaves, False].index(False)
        begins_again = self.cache.keeps_steps or self._keeps_first or not model.draws_state
        end = right.index(False) + 1 if begins_again and False in right else len(ids)
        spent = (i for i in range(gone, end) if sequence.steps_of(i) == sequence.counts.drawn)
        end = next(spent, end)  # a position of the headway has taken all steps with a token that is replaced
        self._answer(sequence, prior[:gone], ids[:gone], result)
        result.guesses = ids[gone:end].tolist()
        request, after = sequence.request, sequence.start + end + 1
        result.headway = [
            int(uniform(request.seed, request.choice, after + i, 0, HEADWAY) * self._num_tokens)
            for i in range(wavefront.headway - 1)
        ]
        sequence.rows = replace(
            rows,
            is_read=True,
            length=end - gone,
            first=rows.first + gone,
            memory=state[:, gone:end],
            ids=rows.ids[gone:end],
        )

    def _draw_rows(
        self, block: Block, sequence: Sequence, hidden: Tensor
    ) -> tuple[Tensor, Tensor, list[bool]]:
        """hidden [L, D] -> log-probabilities [L, V], the tokens drawn after the rows [L], and whether those
        that have been drafted are the same."""
        request, count = sequence.request, len(hidden)
        prior = self._predict(block, [sequence] * count, hidden).prior
        ids = sample(
            prior[:, : self._num_tokens],
            [request.sampling] * count,
            [sequence.history_after(i) for i in range(count)],
            [self._uniform(sequence, sequence.start + i + 1) for i in range(count)],
        )
        return (
            prior,
            ids,
            [token == guess for token, guess in zip(ids.tolist(), sequence.draft, strict=False)],
        )

    def _answer(self, sequence: Sequence, prior: Tensor, ids: Tensor, result: StepResult) -> None:
        """Give out tokens [M], there may be none, with their log-probabilities, from prior [M, V]."""
        count, result.tokens = sequence.request.logprobs, ids.tolist()
        if count is None or not result.tokens:
            result.logprobs = [None] * len(ids)
        else:
            result.logprobs = logprobs_of(prior, ids, count, self._num_tokens)

    def _predict(self, block: Block, rows: list[Sequence], hidden: Tensor) -> Prediction:
        sigmas = [self._level(s) for s in rows]
        has_evidence = block.denoiser.evidence_scale is not None  # a second read-out, of z
        for sequence, sigma in zip(rows, sigmas, strict=True):
            sequence.flops += block.costs.head * (1 + (has_evidence and sigma is not None))
        if all(sigma is None for sigma in sigmas):
            return block.denoiser.predict(hidden)
        zero = hidden.new_zeros(hidden.shape[1], dtype=torch.float32)
        z = torch.stack([zero if (kept := rows_of(s).z) is None else kept for s in rows])
        return block.denoiser.predict(hidden, z, self._levels(sigmas))

    def _enter_level(self, block: Block, rows: list[Sequence], z: Tensor) -> None:
        """Put z [M, D] of each row's next level in the state's place."""
        sigma = self._levels([self._level(s, 1) for s in rows])
        self._rows.keep(self._rows.where(rows, last=True), block.denoiser.inject(z, sigma)[None])
        for sequence, row in zip(rows, z, strict=True):
            sequence.rows = replace(rows_of(sequence), z=row)

    def _noise(self, sequence: Sequence, stream: int = NOISE, later: int = 0) -> Tensor:
        """Standard normal [D] of the step now taken, or of a later one."""
        request = sequence.request
        draw = generator(request.seed, request.choice, sequence.context_length, sequence.step + later, stream)
        return torch.randn(self.config.model.d_model, generator=draw).to(self.device)

    def _renoised(self, rows: list[Sequence], ids: Tensor) -> Tensor:
        """``renoise``: drawn ids [M] -> z [M, D] at each row's next level."""
        sigma = self._levels([self._level(s, 1) for s in rows])
        noise = torch.stack([self._noise(s) for s in rows])
        z = torch.empty_like(noise)
        for index in {self._block_index(s, 1) for s in rows}:
            into = torch.tensor([self._block_index(s, 1) == index for s in rows], device=self.device)
            z[into] = renoise(self._blocks[index].denoiser, ids[into], sigma[into], noise[into])
        return z

    def _flowed(self, rows: list[Sequence], x0: Tensor) -> Tensor:
        """Samplers that follow the mean estimate: x0 [M, D] -> z [M, D] at each row's next level.

        The first level is read at z = 0; the way starts from the noise that this stands for: at sigma_max,
        far above the unit rows, it carries nothing about the token.
        """
        top, flows = self.denoiser.noise.sigma_max, []
        for sequence, estimate in zip(rows, x0, strict=True):
            sigma, below = self._level(sequence), self._level(sequence, 1)
            flow = rows_of(sequence).flow
            at, level = (Flow(top * self._noise(sequence)), top) if flow is None else (flow, sigma or top)
            assert below is not None
            sampler, added = (
                SAMPLERS[sequence.request.sampling.sampler],
                partial(self._noise, sequence, ADDED_NOISE),
            )
            flows.append(sampler.step(at, estimate, level, below, added))
            sequence.rows = replace(rows_of(sequence), flow=flows[-1])
        return torch.stack([flow.z for flow in flows])
