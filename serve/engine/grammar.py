"""Constrained output: which tokens may come next, so that the whole answer fits a grammar.

Grammars and masks are llguidance's (https://github.com/guidance-ai/llguidance): JSON schemas, regular expressions
and its dialect of Lark. A ``Grammar`` is compiled once, away from the engine, and shared; a ``Guide`` follows one
answer, and computes each mask in a thread while the engine steps. Only tokens of the answer move it on: draws
between noise levels do not. No torch.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from concurrent.futures import Executor, Future
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from rdlm.data.tokenizer import Tokenizer
from rdlm.errors import UserError

MAX_SOURCE = 1 << 17
"""Characters of all schemas, expressions and grammars of one request."""
CHECK_SECONDS = 2
"""Processor time that compiling a grammar may take: a few hundred characters can make it take hours, and a thread
cannot be stopped. Therefore a process compiles it first."""
MASK_SECONDS = 10.0
"""A mask that takes longer ends its request; llguidance's own limits usually end it far sooner."""
CACHED = 64
WHITESPACE = {"whitespace_pattern": r"[ \n\r\t]{1,40}", "lenient": False, "coerce_one_of": False}
"""Options of JSON: the library's own default lets a weak model write spaces for ever."""
_WHERE, _QUOTED = re.compile(r"^(at )?(\d+)\(\d+\): "), re.compile(r"^\d+ \|")
"""Places in a grammar that the client has not written, and lines that repeat it."""
_LIMITS: dict[str, Any] = {"verbose_errors": False, "step_lexer_fuel": 200_000, "step_max_items": 50_000}
_CHECK = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({CHECK_SECONDS}, {CHECK_SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
asked = json.load(sys.stdin)
class Bytes:
    eos_token_id, bos_token_id = 256, None
    tokens = [bytes([i]) for i in range(256)] + [b"\\xff<|end|>"] + [name.encode() for name in asked["special"]]
    special_token_ids = list(range(256, len(tokens)))
    tokens += [b""] * (asked["size"] - len(tokens))
    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())
tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
matcher = LLMatcher(tokenizer, asked["grammar"], log_level=0, limits=LLParserLimits(**asked["limits"]))
if not matcher.is_error():
    matcher.compute_bitmask()
print(json.dumps(matcher.get_error()))
"""


def json_grammar(schema: Any) -> str:
    """Lark that matches exactly the JSON values of a schema (draft 2020-12, without what llguidance lacks)."""
    return f"%llguidance {{}}\nstart: {json_rule(schema)}\n"


def json_rule(schema: Any) -> str:
    """The same as a part of a rule: each has a root of its own, so ``#/$defs`` means the schema's own."""
    document = {"allOf": [schema]} if isinstance(schema, bool) else schema
    return "%json " + json.dumps({**document, "x-guidance": WHITESPACE})


def regex_grammar(expression: str) -> str:
    return str(LLMatcher.grammar_from_regex(expression))


def choice_grammar(choices: Collection[str]) -> str:
    """One lexeme: the parser takes at most 2,000 alternatives of a rule."""
    return "%llguidance {}\nstart: CHOICE\nCHOICE: " + choice_rule(choices) + "\n"


def choice_rule(choices: Collection[str]) -> str:
    return " | ".join(map(json.dumps, choices))


class Grammars:
    """Compiles grammars for one tokenizer. Safe from any thread; not on the engine's or an event loop."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int]) -> None:
        """end_ids: ids that end an answer; allowed where the grammar is complete."""
        self._tokenizer, self._ends = tokenizer, sorted(end_ids)
        self._lock = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._cache: OrderedDict[str, Grammar | str] = OrderedDict()

    def compile(self, source: str, field: str, lines: Mapping[int, str] | None = None) -> Grammar:
        """The grammar of ``source`` (Lark, or JSON of the library's).

        Raises UserError that names ``field``, or what ``lines`` says of the line of ``source`` that is wrong.
        """
        with self._lock:
            known = self._cache.get(source)
            if known is not None:
                self._cache.move_to_end(source)
        if known is None:
            known = self._compiled(source)
            with self._lock:
                self._cache[source] = known
                while len(self._cache) > CACHED:
                    self._cache.popitem(last=False)
        if isinstance(known, str):
            at = _WHERE.match(known)
            named = (lines or {}).get(int(at[2])) if at else None
            raise UserError(named or field, "...", explain(known), "send a simpler one, or one without it")
        return known.named(field)

    def _compiled(self, source: str) -> Grammar | str:
        """The grammar, or what is wrong with it."""
        vocabulary = self._table()
        special = {"special": [*self._tokenizer.special_tokens], "size": self._tokenizer.vocab_size}
        asked = json.dumps({"grammar": source, "limits": _LIMITS, **special})
        command = [sys.executable, "-I", "-c", _CHECK]
        try:
            checked = subprocess.run(
                command, input=asked, capture_output=True, text=True, timeout=10 * CHECK_SECONDS
            )
            problem = json.loads(checked.stdout) if checked.returncode == 0 else None
        except (subprocess.TimeoutExpired, ValueError):
            problem = None
        if problem is None:
            return f"it is too complex to be compiled within {CHECK_SECONDS} s"
        if problem:
            return str(problem)[:4000]
        matcher = LLMatcher(vocabulary, source, log_level=0, limits=LLParserLimits(**_LIMITS))
        try:
            return Grammar(matcher, self._ends, self._tokenizer.vocab_size)
        except UserError as error:
            return error.problem

    def _table(self) -> LLTokenizer:
        """The tokenizer as the library wants it; of a large vocabulary it takes a second, once."""
        with self._lock:
            if self._vocabulary is None:
                wrapped = _Vocabulary(self._tokenizer)
                self._vocabulary = LLTokenizer(wrapped, eos_token=[*self._ends] or [wrapped.eos_token_id])  # type: ignore[arg-type]
            return self._vocabulary


class _Vocabulary:
    """A tokenizer in the form of ``llguidance.TokenizerWrapper``, with one more id that stands for an end of text
    where a model has none."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.vocab_size, tokenizer.bos_id
        self.tokens = [*tokenizer.token_bytes(), b"<|end of answer|>"]
        for name, i in tokenizer.special_tokens.items():
            self.tokens[i] = name.encode()
        self.special_token_ids = sorted({*tokenizer.special_tokens.values(), tokenizer.vocab_size})

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


class Grammar:
    """A compiled grammar. Immutable: requests and choices share it."""

    def __init__(self, matcher: LLMatcher, ends: list[int], num_tokens: int) -> None:
        """num_tokens: ids that can be drawn. Raises UserError where no answer fits it."""
        self._matcher, self._ends, self._num_tokens = matcher, ends, num_tokens
        self.field = "grammar"
        """The field in which the client sent it."""
        self._first = Guide(self).begin()

    def named(self, field: str) -> Grammar:
        """This grammar for a request that has it in another field."""
        made = copy.copy(self)
        made.field = field
        return made

    def start(self, threads: Executor) -> Guide:
        """A guide of a new answer. threads: where its masks are computed. Copying a large grammar takes
        milliseconds, so that happens there too."""
        guide = Guide(self, threads)
        guide.pending = threads.submit(guide.begin)
        return guide


class Guide:
    """The tokens that may come next in one answer.

    ``accept`` and ``ready`` are for the engine's thread; ``begin`` and ``compute`` run in another, and never at
    the same time as ``accept``.
    """

    def __init__(self, grammar: Grammar, threads: Executor | None = None) -> None:
        self._grammar, self._threads = grammar, threads
        self._ends, self._num_tokens = grammar._ends, grammar._num_tokens
        self.allowed: bytearray | None = None
        """One byte per id [num_tokens], 0 where it may not come next; None until it is computed."""
        self.pending: Future[bytearray] | None = None
        self._since = time.monotonic()

    def begin(self) -> bytearray:
        """The mask of the first token, which all answers share."""
        self._matcher = self._grammar._matcher.deep_copy()
        return getattr(self._grammar, "_first", None) or self.compute()

    @property
    def ready(self) -> bool:
        """Whether ``allowed`` is known. Raises what ``compute`` raised, or UserError where it takes too long."""
        if self.allowed is None and self.pending is not None:
            if self.pending.done():
                error = self.pending.exception()
                if error is not None:  # a panic of the library is no Exception, and would end the engine
                    raise error if isinstance(error, Exception) else RuntimeError(repr(error))
                self.allowed, self.pending = self.pending.result(), None
            elif time.monotonic() - self._since > MASK_SECONDS:
                raise self._too_complex("the next token takes too long")
        return self.allowed is not None

    def accept(self, token: int) -> bool:
        """Record a token of the answer -> whether the answer is complete, and nothing can follow."""
        if not self._matcher.consume_token(token):
            problem = explain(self._matcher.get_error())
            if self.allowed is None or not self.allowed[token]:
                raise RuntimeError(f"the grammar does not allow token {token}: {problem}")
            raise self._too_complex(problem)  # a limit of the library
        if self._matcher.is_stopped():
            return True
        self.allowed, self._since = None, time.monotonic()
        assert self._threads is not None
        self.pending = self._threads.submit(self.compute)
        return False

    def compute(self) -> bytearray:
        """The mask of the next token. Raises UserError where the grammar is too complex or has no such token."""
        bias = bytearray(self._matcher.compute_logit_bias()[: self._num_tokens])
        if self._matcher.is_error():
            raise self._too_complex(explain(self._matcher.get_error()))
        if self._matcher.is_stopped():  # found out late: only the end is left
            for end in self._ends:
                bias[end] = 1
        if not any(bias):
            problem = "no token of this model's vocabulary continues the constrained answer"
            raise UserError(self._grammar.field, "...", problem, "allow other texts")
        return bias

    def _too_complex(self, problem: str) -> UserError:
        return UserError(self._grammar.field, "...", f"it is too complex: {problem}", "send a simpler one")


def explain(message: str) -> str:
    """An error of llguidance in one line."""
    lines = [line.strip() for line in message.replace("<non-verbose/>", "").splitlines()]
    text = " ".join(line for line in lines if line.strip("^") and not _QUOTED.match(line))
    text = _WHERE.sub("", text).removeprefix("failed to compile JSON schema: ")
    if text in ("NoExtension", "NoExtensionBias"):
        return "no text fits it"
    if text.startswith("Unimplemented keys: "):
        keys = ", ".join(json.loads(text.removeprefix("Unimplemented keys: ")))
        return f"this server cannot enforce the keyword {keys}"
    return text.strip()[:300]


def special_rule(text: str, special: Mapping[str, int]) -> str:
    """A fixed text as a part of a rule, with the special tokens in it as tokens."""
    found = [(text.find(name), name) for name in special if name and name in text]
    if not found:
        return json.dumps(text) if text else ""
    at, name = min(found, key=lambda place: (place[0], -len(place[1])))
    parts = [
        json.dumps(text[:at]) if at else "",
        f"<[{special[name]}]>",
        special_rule(text[at + len(name) :], special),
    ]
    return " ".join(part for part in parts if part)
