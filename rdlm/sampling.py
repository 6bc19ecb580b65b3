"""From logits to token ids: one vectorised path for the engine, the command line and evaluation.

Rows are independent: each has its own settings, history and uniform number, so a token never depends on its
batch neighbours. ``M`` rows, ``V`` vocabulary. Holds no generator: the caller draws the uniform numbers
(``rdlm.sampling_params.uniform``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rdlm.device import staged
from rdlm.errors import UserError
from rdlm.sampling_params import History, SamplingParams

__all__ = [
    "History", "Kind", "SamplingParams", "Settings", "draw", "drawn", "packed", "process", "read_tokens",
    "sample", "top_logprobs", "unpacked", "verify",
]  # fmt: skip

MINUS_INF = float("-inf")
NO_LIMIT = np.iinfo(np.int32).max
"""top-k that keeps every token."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What decides the operations of a draw; everything else of its settings is data.

    width: tokens whose logits are edited, of the row with the most of them, rounded up; 0: none are. truncates:
    whether top-k, top-p or min-p removes tokens of any row. draws: whether any row draws; otherwise all are greedy.
    """

    width: int
    truncates: bool
    draws: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """Decoding settings of M rows as tensors, so that a step which has been captured can read them.

    scale, min_p, top_p, repetition, presence, frequency fp32 [M, 1]; top_k int32 [M, 1]; greedy bool [M]; uniforms
    fp64 [M]. Of the tokens that are edited, [M, width]: tokens int64, bias fp32, counts (in the output) fp32, seen
    and banned bool.
    """

    scale: Tensor
    min_p: Tensor
    top_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    top_k: Tensor
    greedy: Tensor
    uniforms: Tensor
    tokens: Tensor
    bias: Tensor
    counts: Tensor
    seen: Tensor
    banned: Tensor


NEUTRAL = SamplingParams(temperature=0)
"""Settings of the rows that pad a step to its bucket."""
NUM_COLUMNS = 10
"""Columns of a row's settings; those of its edited tokens follow."""
SEEN, BANNED = 1, 2


def packed(
    params: Sequence[SamplingParams],
    histories: Sequence[History],
    uniforms: Sequence[float],
    size: int | None = None,
) -> tuple[np.ndarray, Kind]:
    """Settings of M rows as int32 [M, columns], which ``unpacked`` reads on any device, for one copy there.

    size: rows of the array; those after the settings' own are neutral.
    """
    size = len(params) if size is None else size
    edits = [_edits(p, h) for p, h in zip(params, histories, strict=True)]
    most = max(map(len, edits), default=0)
    width = 0 if not most else max(16, 1 << (most - 1).bit_length())
    columns = np.zeros((size, NUM_COLUMNS + 4 * width), np.int32)
    floats, idle = columns.view(np.float32), [NEUTRAL] * (size - len(params))
    for row, p in enumerate([*params, *idle]):
        floats[row, :6] = (
            1.0 if p.greedy else 1.0 / p.temperature,
            p.min_p if p.truncates else 0.0,
            p.top_p if p.truncates else 1.0,
            p.repetition_penalty,
            p.presence_penalty,
            p.frequency_penalty,
        )
        columns[row, 6] = min(p.top_k, NO_LIMIT) if p.truncates and p.top_k else NO_LIMIT
        columns[row, 7] = p.greedy
    columns[: len(params), 8:10] = np.asarray(uniforms, np.float64).view(np.int32).reshape(-1, 2)
    for row, edited in enumerate(edits):
        if edited:  # the first one fills the row up: written twice, a token gets the same value twice
            entries = np.array(edited + edited[:1] * (width - len(edited)))
            of_row, of_row_floats = (each[row, NUM_COLUMNS:].reshape(4, width) for each in (columns, floats))
            of_row[0], of_row_floats[1], of_row_floats[2], of_row[3] = entries.T
    return columns, Kind(width, any(p.truncates for p in params), not all(p.greedy for p in params))


def _edits(param: SamplingParams, history: History) -> list[tuple[int, float, int, int]]:
    """Token, bias, count in the output and flags of each token whose logit bans, biases or penalties change."""
    counts = Counter(history.output) if param.presence_penalty or param.frequency_penalty else {}
    seen = {*history.prompt, *history.output} if param.repetition_penalty != 1 else set()
    return [
        (
            token,
            param.logit_bias.get(token, 0.0),
            counts.get(token, 0),
            SEEN * (token in seen) + BANNED * (token in history.banned),
        )
        for token in sorted({*param.logit_bias, *counts, *seen, *history.banned})
    ]


def unpacked(columns: Tensor, kind: Kind) -> Settings:
    """The settings that ``packed`` has written, from int32 [M, columns]."""
    floats = columns[:, :6].contiguous().view(torch.float32).unsqueeze(-1)
    scale, min_p, top_p, repetition, presence, frequency = floats.unbind(1)
    tokens, bias, counts, flags = columns[:, NUM_COLUMNS:].unflatten(1, (4, kind.width)).unbind(1)
    return Settings(
        scale,
        min_p,
        top_p,
        repetition,
        presence,
        frequency,
        columns[:, 6:7],
        columns[:, 7] != 0,
        columns[:, 8:10].clone(memory_format=torch.contiguous_format).view(torch.float64)[:, 0],
        tokens.long(),
        bias.contiguous().view(torch.float32),
        counts.contiguous().view(torch.float32),
        flags % 2 == SEEN,
        flags >= BANNED,
    )


def process(logits: Tensor, params: Sequence[SamplingParams], histories: Sequence[History]) -> Tensor:
    """Prior logits [M, V] -> fp32 logits whose softmax is the distribution to draw from (arg-max for greedy
    rows).

    Order: bans, biases, penalties, temperature, then min-p, top-k and top-p on what temperature left. Greedy
    rows skip the last four (temperature included): none of them can change an arg-max.
    """
    columns, kind = packed(params, histories, [0.0] * len(params))
    masks = [(row, h.allowed) for row, h in enumerate(histories) if h.allowed is not None]
    if not (masks or kind.width or kind.draws):
        return logits.float()
    settings = unpacked(staged(torch.from_numpy(columns), logits.device), kind)
    logits = _edited(logits.float(), settings, kind)
    logits = logits.clone() if masks else logits
    for row, mask in masks:
        allowed = staged(torch.frombuffer(mask, dtype=torch.uint8), logits.device)
        logits[row].masked_fill_(allowed == 0, MINUS_INF)
    if kind.draws:
        logits = logits * settings.scale
    rows = [i for i, p in enumerate(params) if p.truncates]
    if len(rows) == len(params):
        return _truncated(logits, settings.min_p, settings.top_k, settings.top_p)
    if rows:  # sorting is what costs most
        index = staged(torch.tensor(rows), logits.device)
        of_rows = (each[index] for each in (logits, settings.min_p, settings.top_k, settings.top_p))
        logits = logits.index_copy(0, index, _truncated(*of_rows))
    return logits


def _edited(logits: Tensor, settings: Settings, kind: Kind) -> Tensor:
    """Apply bans, biases and penalties. [M, V] -> [M, V]."""
    if not kind.width:
        return logits
    values = logits.gather(1, settings.tokens) + settings.bias
    penalised = torch.where(values > 0, values / settings.repetition, values * settings.repetition)
    values = torch.where(settings.seen, penalised, values)
    values = values - (settings.frequency * settings.counts + settings.presence * (settings.counts > 0))
    return logits.scatter(1, settings.tokens, values.masked_fill(settings.banned, MINUS_INF))


def _truncated(logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep min-p, then top-k, then the smallest set with mass >= top-p; the most likely token always stays.
    [M, V] and [M, 1] -> [M, V]."""
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    drop = ranked < ranked[:, :1] + min_p.log()
    drop |= torch.arange(logits.shape[-1], device=logits.device) >= top_k
    probs = ranked.masked_fill(drop, MINUS_INF).softmax(-1)
    drop |= (probs.cumsum(-1) - probs >= top_p) & (top_p < 1)
    drop[:, 0].zero_()
    return torch.full_like(logits, MINUS_INF).scatter(-1, order, ranked.masked_fill(drop, MINUS_INF))


def drawn(prior: Tensor, settings: Settings, kind: Kind, evidence: Tensor | None = None) -> Tensor:
    """``sample`` of rows whose settings are tensors, without anything that the host has to wait for: prior [M, V]
    -> fp64 [M, 2], each row's token and its largest logit, which ``read_tokens`` reads."""
    logits = _edited(prior.float(), settings, kind)
    if kind.draws:
        logits = logits * settings.scale
    if kind.truncates:
        logits = _truncated(logits, settings.min_p, settings.top_k, settings.top_p)
    return _drawn(logits, settings.greedy, settings.uniforms, kind.draws, evidence)


def _drawn(logits: Tensor, greedy: Tensor, uniforms: Tensor, draws: bool, evidence: Tensor | None) -> Tensor:
    ids = logits.argmax(-1)
    total = logits if evidence is None else logits + evidence.float()
    if draws:
        ids = torch.where(greedy, ids, _inverse_cdf(total.double().softmax(-1), uniforms))
    return torch.stack([ids.double(), total.amax(-1).double()], 1)


def sample(
    prior: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[History],
    uniforms: Sequence[float],
    evidence: Tensor | None = None,
) -> Tensor:
    """Draw one id per row. prior [M, V] raw logits, evidence [M, V] or None (added after ``process``) -> ids
    [M] int64.

    Inverse-CDF in fp64 with the row's own uniform; temperature 0 takes the arg-max of the processed prior,
    whatever the evidence. Raises UserError where a row's every id is banned, or where a row's
    logits are not numbers: neither has a token.
    """
    return draw(process(prior, params, histories), params, histories, uniforms, evidence)[0]


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[History],
    uniforms: Sequence[float],
    evidence: Tensor | None = None,
) -> tuple[Tensor, list[int]]:
    """``sample`` of logits that ``process`` has gone over -> the ids, and the same on the host: one copy there."""
    greedy = [p.greedy for p in params]
    numbers = staged(torch.tensor([greedy, uniforms], dtype=torch.float64), logits.device)
    found = _drawn(logits, numbers[0] != 0, numbers[1], not all(greedy), evidence)
    return found[:, 0].long(), read_tokens(found.cpu().tolist(), histories)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """weights [M, V] fp64, of any sum; uniforms fp64 [M] -> ids [M]."""
    cdf = weights.cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp(max=cdf.shape[-1] - 1)


def verify(
    logits: Tensor,
    proposed: Tensor,
    drafted: Sequence[int],
    histories: Sequence[History],
    uniforms: Sequence[tuple[float, float]],
) -> tuple[Tensor, list[bool]]:
    """Speculative sampling (Leviathan, Kalman and Matias 2023): token x, drawn from q, is accepted with
    probability min(1, p(x) / q(x)); otherwise a token is drawn from max(0, p - q), normalised. Its law is p.

    logits, proposed [M, V]: of p and q, after ``process``; drafted: M ids drawn from q; uniforms: for each row
    one number to accept with and one to draw again -> ids [M], and whether each is the drafted one. Raises
    what ``sample`` raises.
    """
    _check_drawable(logits.amax(-1).tolist(), histories)
    p, q = logits.double().softmax(-1), proposed.double().softmax(-1)
    x = torch.tensor(drafted, device=p.device)
    p_x, q_x = (law.gather(-1, x[:, None])[:, 0] for law in (p, q))
    first, second = torch.tensor(uniforms, dtype=torch.float64, device=p.device).unbind(1)
    accepted = first * q_x < p_x
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p and q differ by rounding only
    return torch.where(accepted, x, _inverse_cdf(rest, second)), accepted.tolist()


def read_tokens(found: Sequence[Sequence[float]], histories: Sequence[History]) -> list[int]:
    """The tokens among what ``drawn`` returns. Raises what ``sample`` raises."""
    _check_drawable([largest for _, largest in found], histories)
    return [int(token) for token, _ in found]


def _check_drawable(largest: Sequence[float], histories: Sequence[History]) -> None:
    """Raises what ``sample`` raises. largest: the largest logit of each row; it is NaN where any of the row is."""
    for value, history in zip(largest, histories, strict=True):
        if value == MINUS_INF and history.allowed is not None:
            problem = "every token that may come next is banned, so none can be sampled"
            raise UserError("response_format", "...", problem, "ban fewer ids, or leave min_tokens out")
        if value == MINUS_INF:
            problem = "every token of the vocabulary is banned until min_tokens, so none can be sampled"
            raise UserError("stop_token_ids", "...", problem, "ban fewer ids, or leave min_tokens out")
        if not math.isfinite(value):
            problem = f"the model's largest logit is {value}: its numbers overflow, and no token can be drawn"
            raise UserError("num_steps", "...", problem, "take fewer core steps, or float32 weights")


def top_logprobs(
    logits: Tensor, chosen: Tensor, count: int, num_tokens: int | None = None, chunk: int = 256
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities under the raw logits. logits [M, V], chosen [M] -> chosen [M], top values and top ids
    [M, count].

    fp32, ``chunk`` rows at a time, so that memory stays at chunk * V however long the prompt. Values are the
    same floats in both tensors when the chosen token is among the top. num_tokens: ids from there on, which a
    padded vocabulary has, are not among the top.
    """
    parts = []
    for start in range(0, logits.shape[0], chunk):
        logp = logits[start : start + chunk].float().log_softmax(-1)
        picked = logp.gather(-1, chosen[start : start + chunk, None])[:, 0]
        known = logp[:, :num_tokens]
        values, ids = known.topk(min(count, known.shape[-1]), dim=-1)
        parts.append((picked, values, ids))
    chosen_values, top_values, top_ids = (torch.cat(part) for part in zip(*parts, strict=True))
    return chosen_values, top_values, top_ids
