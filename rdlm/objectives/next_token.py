"""Next-token objectives of recurrent-depth models, and of image classifiers, whose one target is a class.

Two settings tell them apart. ``depth``: how often the core runs (r) and how many of these runs record
gradient. ``corruption``: which positions start from a noised copy of their target, and at which level sigma.

| name        | r                          | gradient | noised positions | K at inference | normalised likelihood      |
|-------------|----------------------------|----------|------------------|----------------|----------------------------|
| next_token  | 1                          | all      | none             | thinking (1)   | logits at K                |
| bptt        | 1 + Poisson(LogNormal(32)) | last 8   | none             | thinking       | logits at K                |
| onestep     | 1 + Poisson(LogNormal)     | last 1   | none             | thinking       | logits at K                |
| single_pass | 1 + Poisson(LogNormal)     | last 1   | a share          | thinking       | logits at K with z = 0     |
| evidence    | 1                          | all      | most             | sampling       | logits at sigma_max, z = 0 |
| paper       | 1                          | all      | all, two streams | sampling       | logits at sigma_max, z = 0 |

Each makes one backward pass through at most ``grad_steps`` core runs and minimises the cross-entropy of the
next token given clean context (and, where noised, z = y + sigma eps of that token): a mixture over sigma and
r of proper scoring rules.

Shapes: B sequences, T positions, D width; targets [...] int64; y, z [..., D] fp32; sigma [...] fp32 with the
leading shape of z, or None: z = 0, read at sigma_max. Row i predicts targets[i] and sees targets[j >= i] in
no way but through its own z_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.config.objective import NO_NOISE, CorruptionConfig
from rdlm.data.batch import Batch
from rdlm.device import staged
from rdlm.diffusion.corruption import Noised, add_noise, draw_levels, noised_everywhere
from rdlm.diffusion.partition import Block
from rdlm.diffusion.samplers import (
    run,
)
from rdlm.diffusion.schedules import denoise_scalings, edm_weight
from rdlm.models.base import Backbone
from rdlm.nn.attention import AttentionContext, TwoStreamContext
from rdlm.nn.cross_entropy import linear_cross_entropy
from rdlm.nn.layers import Condition
from rdlm.objectives.base import (
    DEFAULT_DRAWS,
    Draws,
    HeldOut,
    Keys,
    LossTerms,
    Objective,
    Prediction,
    ReadOut,
    TokenScores,
)
from rdlm.objectives.depth import drawn_depths, gradient_window, rows_at_work
from rdlm.random_streams import Stream, counter_stream

_NOISE_KEY, STATE_KEY = 2, 3
EVIDENCE_FLOOR = 0.02
"""Smallest sigma^2 in the evidence term: below it a nearest-neighbour lookup already names the token and
logits only grow."""
LOGITS_AT_ONCE = 1 << 24
"""Rows are read out in chunks of at most this many logits (64 MiB of fp32)."""


class NextToken(Objective):
    """Cross-entropy of the next token after r core runs, with noised targets in the recurrent state's place
    where there are any.

    With clean context and unit targets, p(x | context, z, sigma) is proportional to p(x | context) exp(<y_x,
    z> / sigma^2): the ``evidence`` read-out gives the network this known term with a learned scale instead of
    making it learn to read z.
    """

    noises_rows = True

    sees_own_clean = False
    """Whether a noisy row also sees the clean row of its own position; if not, it stands in its place."""

    @property
    def two_streams(self) -> bool:
        """Whether noised rows run beside the clean ones: only a causal model's targets are its inputs, too."""
        return False

    def __init__(self, config: CheckpointConfig, model: Backbone, block: Block | None = None) -> None:
        super().__init__(config, model, block)
        self.depth = config.objective.depth_in_training
        # One element and not a scalar tensor: DeepSpeed 0.19.8 can neither broadcast nor partition a 0-d
        # parameter.
        evidence = config.objective.readout == "evidence"
        self.evidence_scale = nn.Parameter(torch.ones(1)) if evidence else None

    # Training -----------------------------------------------------------------------------------------------

    @property
    def own_weights(self) -> dict[str, Tensor]:
        return {} if self.evidence_scale is None else {"evidence_scale": torch.ones(1)}

    @property
    def corruption(self) -> CorruptionConfig:
        return getattr(self.settings, "corruption", NO_NOISE)

    def loss(self, batch: Batch, keys: Keys) -> LossTerms:
        noised, depths = self.corrupt(batch.targets, self.noise_stream(keys)), self.depths(batch, keys)
        hidden = self.hidden(batch.inputs, noised, depths, keys.stream(STATE_KEY), batch.documents)
        return self._reduce(hidden, batch, noised, depths)

    def noise_stream(self, keys: Keys) -> Stream:
        """The randomness of ``corrupt``."""
        which = () if self.block is None else (self.block.index,)
        return keys.stream(_NOISE_KEY, *which)

    def depths(self, batch: Batch, keys: Keys) -> list[int]:
        """r of each sequence of a micro-batch, falling."""
        return drawn_depths(self.depth, keys, len(batch.targets))

    def corrupt(self, targets: Tensor, rng: Stream) -> Noised | None:
        """Noise the targets [B, T]; None where the objective noises none."""
        if self.corruption.share == 0:
            return None
        shape = (targets.shape[0], targets.shape[1])
        sigma, is_noised = draw_levels(self.corruption, self.noise, self.block, shape, rng)
        return add_noise(self.clean, targets, self.config.model.d_model, sigma, is_noised, rng)

    def hidden(
        self,
        inputs: Tensor,
        noised: Noised | None,
        depths: list[int],
        rng: Stream,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after ``depths`` core runs of each sequence, the noised target standing in
        the state's place at the start. documents: see Batch.

        z_j of a past position reveals only token j + 1, which position i > j reads in clean form anyway:
        nothing leaks.
        """
        if self.two_streams:
            z, sigma = (None, None) if noised is None else (noised.dense, noised.sigma)
            return self.two_stream_hidden(inputs, z, sigma, documents=documents)
        state, ctx = self.run_core(inputs, noised, depths, rng, documents)
        return self.model.decode(state, ctx)

    def run_core(
        self,
        inputs: Tensor,
        noised: Noised | None,
        depths: list[int],
        rng: Stream,
        documents: Tensor | None = None,
        on_step: Callable[[int, Tensor, AttentionContext], None] | None = None,
    ) -> tuple[Tensor, AttentionContext]:
        """The last states [B, T, S] and their context.

        depths: r of each sequence, falling. All end together, so a sequence of r runs joins in r steps before
        the end, and the last runs, which record gradient, are the same for all. on_step(k, state, ctx) after
        step k = 1, 2, ... with the sequences that are at work.
        """
        model, num_steps = self.model, depths[0]
        at_work = rows_at_work(depths)
        contexts = {
            n: model.context(inputs[:n], None if documents is None else documents[:n])
            for n in sorted(set(at_work))
        }
        ctx = contexts[len(inputs)]
        e = model.encode(inputs, ctx)
        start = self._start(e, noised, depths, rng)
        levels = None if noised is None else noised.sigma
        if levels is not None and self.corruption.per == "sequence":
            levels = levels[
                :, :1
            ]  # one level a sequence: its modulation is computed once, not at every position
        cond = self.condition(levels, e)

        def step(state: Tensor, k: int) -> Tensor:
            n = at_work[k]
            if n > len(state):
                state = torch.cat([state, start[len(state) : n]])
            if n == len(start):
                return self.model.core(state, e, cond, ctx)
            return self.model.core(state, e[:n], first_rows(cond, n), contexts[n])

        def after(k: int, state: Tensor) -> None:
            if on_step is not None:
                on_step(k, state, contexts[at_work[k - 1]])

        grad_steps = gradient_window(self.depth, num_steps)
        return run(step, start[: at_work[0]], num_steps, grad_steps, after), ctx

    def _start(self, e: Tensor, noised: Noised | None, depths: list[int], rng: Stream) -> Tensor:
        """States [B, T, S] before the first step."""
        model = self.model
        if model.depends_on_num_steps:
            rows = [model.initial_state(e[i : i + 1], rng, num_steps=r) for i, r in enumerate(depths)]
            state = torch.cat(rows)
        else:
            state = model.initial_state(e, rng, num_steps=depths[0])
        return state if noised is None else noised.put(self.inject(noised.z, noised.levels), into=state)

    def two_stream_hidden(
        self,
        inputs: Tensor,
        z: Tensor | None,
        sigma: Tensor | None,
        sees_own_clean: bool = True,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] of the noisy stream beside a clean one (DiffusionBlocks App. E.4): one pass
        over 2T rows.

        Both streams inject the same clean prelude states; the clean stream is read at sigma_max with z = 0:
        its keys know no noise. z, sigma: [B, T, D] and [B, T], or None for z = 0 at sigma_max.
        """
        model, length = self.model, inputs.shape[1]
        e = model.encode(inputs, model.context(inputs, documents))
        silent = torch.zeros_like(e)
        noisy = silent if z is None or sigma is None else self.inject(z, sigma)
        ctx = TwoStreamContext(length, sees_own_clean, inputs.device, documents)
        sigma_max = torch.full(inputs.shape, self.noise.sigma_max, device=inputs.device)
        cond = self.condition(torch.cat([sigma_max, sigma_max if sigma is None else sigma], 1), e)
        state = model.core(torch.cat([silent, noisy], 1), torch.cat([e, e], 1), cond, ctx)
        return model.decode(state, ctx)[:, length:]

    def position_weights(self, batch: Batch, noised: Noised | None) -> Tensor:
        """Weight of each position in the loss, [B, T] fp32."""
        weight = batch.mask.float()
        if noised is not None and getattr(self.settings, "loss_weighting", "none") == "edm":
            weight = weight * edm_weight(noised.sigma, self.noise.sigma_data)
        return weight

    def _reduce(self, hidden: Tensor, batch: Batch, noised: Noised | None, depths: list[int]) -> LossTerms:
        weight = self.position_weights(batch, noised)
        total, losses = self.cross_entropy(
            hidden.flatten(0, 1), batch.targets.flatten(), weight.flatten(), noised
        )
        counted = batch.counted.flatten()
        metrics = {"core_steps": mean_depth(depths), "ce": mean_of(losses, counted)}
        if noised is not None:
            flags = noised.is_noised.flatten()
            for name, chosen in (("ce_prior", counted & ~flags), ("ce_noised", counted & flags)):
                if bool(chosen.any()):
                    metrics[name] = mean_of(losses, chosen)
        return LossTerms(total, batch.mask.sum().float(), metrics)

    def traced_loss(self, inputs: Tensor, num_steps: int, read_out: ReadOut) -> Tensor:
        noised = self.noised_without_values(inputs)
        hidden = self.hidden(inputs, noised, [num_steps] * len(inputs), counter_stream(0))  # needs no value
        return self.read_traced(hidden, noised, read_out)

    def noised_without_values(self, inputs: Tensor) -> Noised | None:
        """What ``corrupt`` would give, for ``traced_loss``."""
        if not self.settings.noise_conditioned:
            return None
        shape = self.model.target_shape(inputs)
        z = torch.empty(*shape, self.model.ln_f.weight.shape[0])
        return noised_everywhere(z, torch.ones(shape))

    def read_traced(self, hidden: Tensor, noised: Noised | None, read_out: ReadOut) -> Tensor:
        """The read-out of ``traced_loss``: hidden [B, T, D] -> scalar."""
        hidden = hidden.flatten(0, 1)
        u = table = None
        if noised is not None and self.evidence_scale is not None:
            u = (noised.z / noised.levels.square().unsqueeze(-1)).to(hidden.dtype)
            table = self.unit_table().to(hidden.dtype)
        return read_out(hidden, u, table)

    def evaluate(self, batch: Batch, held_out: HeldOut) -> dict[str, Tensor]:
        if held_out.denoising or self.model.is_causal:
            return super().evaluate(batch, held_out)
        return self.evaluate_classes(batch, held_out)

    # Single steps: what the engine and the loops call -------------------------------------------------------

    def clean(self, targets: Tensor) -> Tensor:
        """Unit-norm target rows of the ids, fp32 [..., D], detached: noise must not train the table to
        collapse."""
        if self.targets is not None:
            return self.unit_table()[targets]
        return self.model.wte(
            use=lambda weight: F.normalize(F.embedding(targets, weight.detach()).float(), dim=-1)
        )

    def unit_table(self) -> Tensor:
        """All unit-norm target rows, fp32 [V, D], detached."""
        if self.targets is not None:
            return self.targets(self.model.ln_f.weight.device)
        return self.model.wte(use=lambda weight: F.normalize(weight.detach().float(), dim=-1))

    def fix_tables(self) -> None:
        if self.targets is None and self.evidence_scale is not None:
            rows = self.unit_table()
            self.targets = lambda device: rows

    def inject(self, z: Tensor, sigma: Tensor) -> Tensor:
        """c_in(sigma) z: the noised target in the place of the recurrent state, in the model's dtype."""
        c_in = denoise_scalings(sigma, self.noise.sigma_data).c_in
        return (c_in.unsqueeze(-1) * z).to(self.model.ln_f.weight.dtype)

    def condition(self, sigma: Tensor | None, like: Tensor) -> Condition | None:
        """The conditioning of the core on levels sigma [B, T]; None means sigma_max for all rows. None if
        unconditioned.

        It does not depend on the core step: compute it once per level, not once per step.
        """
        if sigma is None:
            sigma = torch.full((1, 1), self.noise.sigma_max, device=like.device)
        return self.model.condition(denoise_scalings(sigma, self.noise.sigma_data).c_noise)

    def predict(self, hidden: Tensor, z: Tensor | None = None, sigma: Tensor | None = None) -> Prediction:
        prior = self.model.logits(hidden)
        if z is None or sigma is None or self.evidence_scale is None:
            return Prediction(prior)
        evidence = self.evidence_scale.float() * F.linear(precision_weighted(z, sigma), self.unit_table())
        return Prediction(prior, evidence)

    def cross_entropy(
        self,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        noised: Noised | None = None,
    ) -> tuple[Tensor, Tensor]:
        evidence = None
        if noised is not None and self.evidence_scale is not None:
            u = precision_weighted(noised.z, noised.levels).to(hidden.dtype)
            table = self.unit_table().to(hidden.dtype)
            evidence = (noised.rows, noised.others, u, table, self.evidence_scale)
        return self.model.head(
            use=lambda table: linear_cross_entropy(
                hidden, table, targets, weight, evidence, getattr(self.settings, "z_loss", 0.0)
            )
        )

    # Evaluation ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(
        self,
        inputs: Tensor,
        targets: Tensor,
        num_steps: Sequence[int],
        *,
        seed: int = 0,
        num_draws: int = 8,
        documents: Tensor | None = None,
    ) -> dict[int, TokenScores]:
        """One pass to the largest K; the softmax of the logits is normalised at each."""
        wanted, out = set(num_steps), {}

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            if k in wanted:
                out[k] = self.read_scores(self.model.decode(state, ctx), targets)

        self.iterate(inputs, max(wanted), seed, read, documents)
        return {k: out[k] for k in num_steps}

    @torch.no_grad()
    def answer(
        self, inputs: Tensor, num_steps: Sequence[int], draws: Draws = DEFAULT_DRAWS
    ) -> dict[int, Tensor]:
        """Arg max after K core steps."""
        wanted, out = set(num_steps), {}

        def read(k: int, state: Tensor, ctx: AttentionContext) -> None:
            if k in wanted:
                out[k] = self.predict(self.model.decode(state, ctx)).prior.argmax(-1)

        self.iterate(inputs, max(wanted), draws.seed + draws.first, read)
        return out

    @torch.no_grad()
    def iterate(
        self,
        inputs: Tensor,
        num_steps: int,
        seed: int,
        on_step: Callable[[int, Tensor, AttentionContext], None],
        documents: Tensor | None = None,
    ) -> None:
        """Core steps from z = 0 over whole rows [B, T]; on_step(k, state [B, T, D], ctx) after each, k = 1,
        2, ...

        ``predict(model.decode(state, ctx)).prior`` are the logits at K = k.
        """
        model = self.model
        ctx = model.context(inputs, documents)
        e = model.encode(inputs, ctx)
        cond = self.condition(None, e)

        def step(state: Tensor, k: int) -> Tensor:
            return model.core(state, e, cond, ctx)

        if model.depends_on_num_steps:
            for k in range(1, num_steps + 1):
                start = model.initial_state(e, model.state_stream(seed), num_steps=k)
                on_step(k, run(step, start, k), ctx)
            return
        start = model.initial_state(e, model.state_stream(seed))
        run(step, start, num_steps, on_step=lambda k, state: on_step(k, state, ctx))

    def read_scores(
        self, hidden: Tensor, targets: Tensor, z: Tensor | None = None, sigma: Tensor | None = None
    ) -> TokenScores:
        """Softmax of the prior logits at the targets, a chunk of rows at a time. [B, T, D], [B, T] -> [B, T]."""
        rows, ids = hidden.flatten(0, 1), targets.flatten()
        chunk = max(1, LOGITS_AT_ONCE // self.model.vocab_size)
        parts, hits = [], []
        for start in range(0, len(rows), chunk):
            span = slice(start, start + chunk)
            noised = (
                (None, None) if z is None or sigma is None else (z.flatten(0, 1)[span], sigma.flatten()[span])
            )
            index, logits = ids[span], self.predict(rows[span], *noised).prior
            parts.append(logits.gather(1, index.unsqueeze(1)).squeeze(1) - logits.logsumexp(1))
            hits.append(logits.argmax(1) == index)
        return TokenScores(torch.cat(parts).view(targets.shape), torch.cat(hits).view(targets.shape))


def mean_of(losses: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the losses [N] that are chosen: bool [N] in host memory."""
    if bool(chosen.all()):
        return losses.mean()
    return losses[staged(chosen.nonzero().squeeze(1), losses.device)].mean()


def mean_depth(depths: list[int]) -> Tensor:
    """Mean of r over the sequences of a micro-batch."""
    return torch.tensor(sum(depths) / len(depths))


def first_rows(cond: Condition | None, count: int) -> Condition | None:
    """The conditioning of the first ``count`` sequences."""
    if cond is None:
        return None

    def cut(values: Tensor) -> Tensor:
        return values if values.shape[0] == 1 else values[:count]

    return [cut(layer) if isinstance(layer, Tensor) else tuple(map(cut, layer)) for layer in cond]  # type: ignore[misc]


def renoise(owner: Any, token_ids: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """z = y + sigma * eps of drawn tokens: ids, sigma [...], eps [..., D] standard normal -> z [..., D] fp32.

    owner: the network that owns the level sigma.
    """
    return owner.clean(token_ids) + sigma.unsqueeze(-1) * eps


def precision_weighted(z: Tensor, sigma: Tensor) -> Tensor:
    """z / max(sigma^2, EVIDENCE_FLOOR), what the evidence term multiplies with the target table."""
    return z / sigma.square().clamp_min(EVIDENCE_FLOOR).unsqueeze(-1)
