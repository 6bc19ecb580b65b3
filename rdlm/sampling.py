"""From logits to token ids: one vectorised path for the engine, the command line and evaluation.

Rows are independent: each has its own settings, history and uniform number, so a token never depends on its
batch neighbours. ``M`` rows, ``V`` vocabulary. Holds no generator: the caller draws the uniform numbers
(``rdlm.sampling_params.uniform``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rdlm.errors import UserError
from rdlm.sampling_params import History, SamplingParams

__all__ = ["History", "SamplingParams", "draw", "process", "sample", "top_logprobs", "verify"]

MINUS_INF = float("-inf")


def process(logits: Tensor, params: Sequence[SamplingParams], histories: Sequence[History]) -> Tensor:
    """Prior logits [M, V] -> fp32 logits whose softmax is the distribution to draw from (arg-max for greedy
    rows).

    Order: bans, biases, penalties, temperature, then min-p, top-k and top-p on what temperature left. Greedy
    rows skip the last four (temperature included): none of them can change an arg-max.
    """
    logits = logits.float()
    if any(p.edits or h.banned or h.allowed is not None for p, h in zip(params, histories, strict=True)):
        logits = logits.clone()
        for row, (param, history) in enumerate(zip(params, histories, strict=True)):
            _edit(logits[row], param, history)
    scale = [1.0 if p.greedy else 1.0 / p.temperature for p in params]
    if any(s != 1.0 for s in scale):
        logits = logits * torch.tensor(scale, device=logits.device)[:, None]
    rows = [i for i, p in enumerate(params) if p.truncates]
    if rows:
        index = torch.tensor(rows, device=logits.device)
        logits = logits.index_copy(0, index, _truncate(logits[index], [params[i] for i in rows]))
    return logits


def _edit(row: Tensor, param: SamplingParams, history: History) -> None:
    """Apply bans, biases and penalties to one row [V] in place."""
    vocab = row.shape[-1]
    for token, bias in param.logit_bias.items():
        row[token] += bias
    if param.repetition_penalty != 1:
        seen = torch.tensor(sorted({*history.prompt, *history.output}), device=row.device, dtype=torch.long)
        values = row[seen]
        row[seen] = torch.where(
            values > 0, values / param.repetition_penalty, values * param.repetition_penalty
        )
    if history.output and (param.presence_penalty or param.frequency_penalty):
        counts = torch.bincount(torch.tensor(history.output, device=row.device), minlength=vocab).float()
        row -= param.frequency_penalty * counts + param.presence_penalty * (counts > 0)
    if history.banned:
        row[torch.tensor(sorted(history.banned), device=row.device)] = MINUS_INF
    if history.allowed is not None:
        allowed = torch.frombuffer(history.allowed, dtype=torch.uint8).to(row.device)
        row.masked_fill_(allowed == 0, MINUS_INF)


def _truncate(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keep min-p, then top-k, then the smallest set with mass >= top-p; the most likely token always stays.
    [m, V] -> [m, V]."""
    vocab, device = logits.shape[-1], logits.device
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    min_p = torch.tensor([p.min_p for p in params], device=device)[:, None]
    top_k = torch.tensor([min(p.top_k or vocab, vocab) for p in params], device=device)[:, None]
    top_p = torch.tensor([p.top_p for p in params], device=device)[:, None]
    drop = ranked < ranked[:, :1] + min_p.log()
    drop |= torch.arange(vocab, device=device) >= top_k
    probs = ranked.masked_fill(drop, MINUS_INF).softmax(-1)
    drop |= (probs.cumsum(-1) - probs >= top_p) & (top_p < 1)
    drop[:, 0] = False
    return torch.full_like(logits, MINUS_INF).scatter(-1, order, ranked.masked_fill(drop, MINUS_INF))


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
    return draw(process(prior, params, histories), params, histories, uniforms, evidence)


def draw(
    logits: Tensor,
    params: Sequence[SamplingParams],
    histories: Sequence[History],
    uniforms: Sequence[float],
    evidence: Tensor | None = None,
) -> Tensor:
    """``sample`` of logits that ``process`` has gone over."""
    greedy = [p.greedy for p in params]
    best = logits.argmax(-1)
    total = logits if evidence is None else logits + evidence.float()
    _check_drawable(total.amax(-1), histories)
    if all(greedy):
        return best
    drawn = _inverse_cdf(total.double().softmax(-1), uniforms)
    return torch.where(torch.tensor(greedy, device=drawn.device), best, drawn)


def _inverse_cdf(weights: Tensor, uniforms: Sequence[float]) -> Tensor:
    """weights [M, V] fp64, of any sum -> ids [M]."""
    cdf = weights.cumsum(-1)
    target = torch.tensor(uniforms, dtype=torch.float64, device=cdf.device)[:, None] * cdf[:, -1:]
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
    _check_drawable(logits.amax(-1), histories)
    p, q = logits.double().softmax(-1), proposed.double().softmax(-1)
    x = torch.tensor(drafted, device=p.device)
    p_x, q_x = (law.gather(-1, x[:, None])[:, 0] for law in (p, q))
    first = torch.tensor([u for u, _ in uniforms], dtype=torch.float64, device=p.device)
    accepted = first * q_x < p_x
    rest = (p - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p and q differ by rounding only
    return torch.where(accepted, x, _inverse_cdf(rest, [u for _, u in uniforms])), accepted.tolist()


def _check_drawable(largest: Tensor, histories: Sequence[History]) -> None:
    """``largest``: the largest logit of each row [M]; it is NaN where any of the row is."""
    for value, history in zip(largest.tolist(), histories, strict=True):
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
