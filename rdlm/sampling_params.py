"""Decoding settings of a request, so that routes and the scheduler may hold them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypedDict, get_args, get_type_hints

from rdlm.config.checkpoint import CheckpointConfig
from rdlm.diffusion.samplers import OLD_NAMES, SAMPLERS
from rdlm.errors import UserError

DEFAULT_SAMPLER = "renoise"
"""The one that every model with noise levels has."""
Order = Literal["random", "left_to_right", "confidence"]
"""Which tokens a masked model unmasks first (rdlm/diffusion/unmasking_plan.py).

random: the sampler that ``rdlm.diffusion.masked_likelihood.bound`` bounds. left_to_right: with as many steps
as masked tokens, the sampler whose likelihood is ``rdlm.diffusion.masked_likelihood.left_to_right``.
confidence: tokens whose draw is the most probable first (MaskGIT, Chang et al. 2022); more certain and less
varied at few steps, and no likelihood is known for it.
"""


def uniform(*key: int) -> float:
    """A uniform number in [0, 1), a pure function of the key (seed, choice, position, step) on every platform
    and device.

    A hash and not a torch generator: one is needed for every token of every request, and this costs a
    microsecond.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


@dataclass(frozen=True, slots=True)
class Range:
    """The values of a number that a request may send, and what some of them mean."""

    low: float
    high: float
    meaning: str
    above_low: bool = False
    """Whether ``low`` itself is no value."""

    def holds(self, value: float) -> bool:
        return (self.low < value if self.above_low else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        return f"{'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Decoding settings of one request; the defaults sample from the model's distribution as it is. Raises
    UserError.

    Numbers with a ``Range`` are fields of every request that generates (serve/api/schemas.py). All act on the
    prior logits W h, never on the evidence of a noised target, so they mean the same at every K.
    repetition_penalty: Keskar et al. 2019, over prompt and output. presence_penalty, frequency_penalty:
    OpenAI's, over the output only. logit_bias: token id -> added logit. sampler: of models that draw a token
    through noise levels (``check_sampler``), a name of rdlm/diffusion/samplers.py; older names (hard,
    multistep) are stored as today's.
    """

    temperature: Annotated[float, Range(0, 100, "0 is greedy, 1 the model's own distribution")] = 1.0
    top_k: Annotated[int, Range(-1, math.inf, "keep so many of the likeliest tokens, 0 and -1 all")] = 0
    top_p: Annotated[
        float, Range(0, 1, "keep the likeliest tokens up to this total probability, 1 all", above_low=True)
    ] = 1.0
    min_p: Annotated[
        float, Range(0, 1, "keep tokens of at least so much of the likeliest one's probability, 0 all")
    ] = 0.0
    repetition_penalty: Annotated[
        float, Range(0.01, 100, "above 1 tokens of prompt and answer get less likely, 1 is none")
    ] = 1.0
    presence_penalty: Annotated[
        float, Range(-2, 2, "taken from the logits of tokens that the answer has, 0 is none")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Range(-2, 2, "the same for each time that the answer has them, 0 is none")
    ] = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    sampler: str = DEFAULT_SAMPLER

    def __post_init__(self) -> None:
        for name, (_, valid) in NUMBERS.items():
            if not valid.holds(value := getattr(self, name)):
                raise UserError(name, value, f"must lie in {valid}", valid.meaning)
        object.__setattr__(self, "top_k", max(0, self.top_k))
        object.__setattr__(self, "sampler", text_sampler(self.sampler))
        if not all(-100 <= value <= 100 for value in self.logit_bias.values()):
            remedy = "-100 bans a token, 100 forces it"
            raise UserError("logit_bias", self.logit_bias, "values must lie in [-100, 100]", remedy)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p removes tokens."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def edits(self) -> bool:
        """Whether penalties or biases change logits one token at a time."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return penalised or bool(self.logit_bias)


NUMBERS: dict[str, tuple[type, Range]] = {
    name: (hint.__origin__, *hint.__metadata__)
    for name, hint in get_type_hints(SamplingParams, include_extras=True).items()
    if hasattr(hint, "__metadata__")
}
"""Field -> its type and range, of the numbers among SamplingParams."""


class Numbers(TypedDict, total=False):
    """NUMBERS for type checkers: what a caller may name, and leave out."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float


def text_samplers() -> list[str]:
    """Names of the samplers that text can be sampled with."""
    return [name for name, sampler in SAMPLERS.items() if sampler.for_text]


def text_sampler(name: str, field: str = "sampler") -> str:
    """Today's name of a sampler that text can be sampled with. Raises UserError for any other name."""
    found = OLD_NAMES.get(name, name)
    if found not in text_samplers():
        known = ", ".join(text_samplers())
        raise UserError(field, name, "text cannot be sampled this way", f"use one of {known}")
    return found


def samplers_of(config: CheckpointConfig) -> list[str]:
    """Names of the samplers that texts of a checkpoint can be sampled with: none without noise levels."""
    if config.objective.supports_exits or not config.objective.left_to_right:
        return []
    usable = []
    for name in text_samplers():
        try:
            check_sampler(name, config)
        except UserError:
            continue
        usable.append(name)
    return usable


def check_sampler(sampler: str, config: CheckpointConfig) -> None:
    """Raises UserError where the checkpoint has no noise levels, or where its blocks share no space for an
    ODE to run in."""
    name = text_sampler(sampler)
    if name == DEFAULT_SAMPLER:
        return
    if SAMPLERS[name].draws_tokens:
        return
    if config.objective.supports_exits:
        problem = "this model iterates its core and reads out once, so it has no noise levels"
    elif not config.objective.left_to_right:
        problem = "this model masks tokens instead of adding noise, so there is no ODE"
    elif SAMPLERS[name].starts_from_noise and not config.objective.sampled_from_noise:
        problem = "it starts from pure noise, which only models trained with objective paper are read at"
    elif config.blocks is not None and config.blocks.num_blocks > 1 and config.blocks.targets == "own":
        problem = (
            "every block of this model has its own target embeddings, so no ODE leads from one to the next"
        )
    else:
        return
    raise UserError("sampler", sampler, problem, "leave sampler out, or send renoise")


def check_masked(params: SamplingParams, order: Order | None, config: CheckpointConfig) -> None:
    """Raises UserError for an unmasking order where the model decodes left to right, and for penalties where
    it does not."""
    if config.objective.left_to_right:
        if order is not None:
            raise UserError("order", order, "this model decodes left to right", "leave order out")
        return
    if order is not None and order not in get_args(Order):
        raise UserError("order", order, "there is no such order", f"use some of {', '.join(get_args(Order))}")
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        value, off = getattr(params, name), float(name == "repetition_penalty")
        if value != off:
            problem = (
                "repetition penalties need left-to-right decoding; "
                "a masked model fills several positions at once"
            )
            raise UserError(name, value, problem, f"leave {name} out")


@dataclass(frozen=True, slots=True)
class History:
    """Tokens of a row so far, for penalties. ``banned`` ids get probability 0 (``min_tokens`` bans end
    tokens), and so do those that are 0 in ``allowed`` (one byte per id), where an answer is constrained."""

    prompt: Sequence[int] = ()
    output: Sequence[int] = ()
    banned: Collection[int] = ()
    allowed: bytearray | None = None
