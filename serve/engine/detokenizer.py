"""Tokens of one answer to text as they arrive: incremental decoding and stop strings. No torch, no HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from rdlm.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Text of a growing answer. What could still become a stop string, or half a character, is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stop = stop
        self._pending = ""

    def feed(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is now certain, and whether a stop string has completed (it and all after it are dropped).

        may_stop False lets text pass that would stop it (``min_tokens``).
        """
        return self._release(self._decoder.feed([token]), may_stop)

    def finish(self) -> str:
        """What was held back, at the end of an answer that no stop string ended."""
        text, _ = self._release(self._decoder.flush(), True)
        text, self._pending = text + self._pending, ""
        return text

    def _release(self, delta: str, may_stop: bool) -> tuple[str, bool]:
        text, self._pending = self._pending + delta, ""
        if not may_stop:
            return text, False
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)], True
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
