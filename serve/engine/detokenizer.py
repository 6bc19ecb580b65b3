"""Tokens of one answer to text as they arrive: incremental decoding and stop strings. No torch, no HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from functools import cached_property

from rdlm.data.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """The automaton of Aho and Corasick (1975) over all stop strings of a request: one transition a
    character, however many there are.

    A state is the longest end of the text that begins some stop string; 0 is the empty one. Immutable:
    choices share it.
    """

    def __init__(self, stop: Collection[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail, self._longest, self._held = [0], [0], [0]
        for string in stop:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for length, char in enumerate(string, 1):
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._longest.append(0)
                self._held.append(length)
            state = self._next[state][char]
        self._longest[state] = len(string)

    def _link(self) -> None:
        """Breadth first: where a state falls back to, the longest stop string that ends in it, and what it
        keeps back."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            fail = self._fail[state]
            self._longest[state] = self._longest[state] or self._longest[fail]
            if not self._next[state]:  # a whole stop string that begins no other
                self._held[state] = self._held[fail]
            for char, child in self._next[state].items():
                self._fail[child] = self.step(fail, char)
                states.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while char not in self._next[state]:
            if not state:
                return 0
            state = self._fail[state]
        return self._next[state][char]

    def longest(self, state: int) -> int:
        """Length of the longest stop string that is complete in this state; 0 where none is."""
        return self._longest[state]

    def held(self, state: int) -> int:
        """Length of the longest end of the text that may still grow into a stop string."""
        return self._held[state]


class Detokenizer:
    """Text of a growing answer. What could still become a stop string, or half a character, is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: StopStrings, spelt: Collection[int] = ()) -> None:
        """spelt: special tokens that are part of the text."""
        self._decoder = StreamDecoder(tokenizer, spelt)
        self._stop, self._state = stop, 0
        self._pending = ""

    def feed(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string has completed (it and all after it are
        dropped).

        With may_stop False (``min_tokens``) a stop string that completes is ordinary text; one that only
        begins may complete later.
        """
        return self._release(self._decoder.feed([token]), may_stop)

    def finish(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        text, _ = self._release(self._decoder.flush(), True)
        text, self._pending = text + self._pending, ""
        return text

    def _release(self, delta: str, may_stop: bool) -> tuple[str, bool]:
        text, begin = self._pending + delta, None
        for end, char in enumerate(delta, len(self._pending) + 1):
            self._state = self._stop.step(self._state, char)
            complete = self._stop.longest(self._state)
            if complete and may_stop:
                begin = end - complete if begin is None else min(begin, end - complete)
        if begin is not None:
            self._pending = ""
            return text[:begin], True
        certain = len(text) - self._stop.held(self._state)
        self._pending = text[certain:]
        return text[:certain], False


class TokenNames:
    """Readable text of single tokens; special tokens by name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._table = tokenizer.token_bytes()
        self.special = {i: text for text, i in tokenizer.special_tokens.items()}

    def name(self, token: int) -> str:
        if token in self.special:
            return self.special[token]
        return self.raw(token).decode("utf-8", errors="replace")

    def raw(self, token: int) -> bytes:
        return self._table[token] if token < len(self._table) else b""

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(max(map(len, self._table)), *(len(text.encode()) for text in self.special.values()), 1)
