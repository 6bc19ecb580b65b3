"""Stop strings and half characters in a stream, against the same on the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve.engine.detokenizer import Detokenizer, StopStrings


class Bytes:
    """A tokenizer of 256 bytes."""

    def token_bytes(self) -> list[bytes]:
        return [bytes([i]) for i in range(256)]


@given(
    text=st.text(alphabet="abcé\u20ac", max_size=30),
    stop=st.lists(st.text(alphabet="abcé", min_size=1, max_size=4), max_size=3),
)
def test_stream_equals_cut_of_the_whole(text: str, stop: list[str]) -> None:
    stream, said, stopped = Detokenizer(Bytes(), StopStrings(stop)), "", False  # type: ignore[arg-type]
    for byte in text.encode():
        delta, stopped = stream.feed(byte)
        said += delta
        assert text.startswith(said)
        if stopped:
            break
    if not stopped:
        said += stream.finish()
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    if not ends:
        assert said == text and not stopped
        return
    first_complete = min(end for end, _ in ends)
    assert stopped and said == text[: min(start for end, start in ends if end == first_complete)]


def test_nothing_is_held_that_cannot_stop() -> None:
    stream = Detokenizer(Bytes(), StopStrings(["abc"]))  # type: ignore[arg-type]
    assert [stream.feed(byte)[0] for byte in b"xaabd"] == ["x", "", "a", "", "abd"]


def test_stop_strings_sleep_until_min_tokens() -> None:
    stream = Detokenizer(Bytes(), StopStrings(["b"]))  # type: ignore[arg-type]
    assert [
        stream.feed(byte, may_stop)
        for byte, may_stop in zip(b"abab", [False, False, True, True], strict=True)
    ] == [
        ("a", False),
        ("b", False),
        ("a", False),
        ("", True),
    ]


@given(
    text=st.text(alphabet="ab", max_size=24),
    stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    least=st.integers(0, 24),
)
def test_a_stop_string_counts_where_it_completes_after_min_tokens(
    text: str, stop: list[str], least: int
) -> None:
    """One token a character: the first completion after ``least`` tokens ends the text, wherever it began."""
    stream, out, stopped = Detokenizer(Bytes(), StopStrings(stop)), "", False  # type: ignore[arg-type]
    for number, byte in enumerate(text.encode(), 1):
        delta, stopped = stream.feed(byte, number > least)
        out += delta
        if stopped:
            break
    if not stopped:
        out += stream.finish()
    ends = [
        (end, end - len(s)) for s in stop for end in range(least + 1, len(text) + 1) if text[:end].endswith(s)
    ]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: min(start for end, start in ends if end == first)]
    assert (out, stopped) == (expected, first is not None)


def test_matching_costs_the_same_for_one_stop_string_and_for_a_thousand() -> None:
    """Counted in transitions of the automaton: at most two a character, whatever the strings."""

    class Counted(StopStrings):
        looked_up = 0

        def step(self, state: int, char: str) -> int:
            while char not in self._next[state]:
                self.looked_up += 1
                if not state:
                    return 0
                state = self._fail[state]
            self.looked_up += 1
            return self._next[state][char]

    text = ("a" * 299 + "c") * 20
    counts = []
    for stop in (["a" * 300], ["a" * n + "b" for n in range(1, 1000)]):
        strings = Counted(stop)
        strings.looked_up = 0
        stream = Detokenizer(Bytes(), strings)  # type: ignore[arg-type]
        out = "".join(stream.feed(byte)[0] for byte in text.encode()) + stream.finish()
        assert out == text
        counts.append(strings.looked_up)
    assert max(counts) <= 2 * len(text)


def test_choices_share_the_automaton_and_not_its_state() -> None:
    strings = StopStrings(["ab"])
    first, second = (Detokenizer(Bytes(), strings) for _ in range(2))  # type: ignore[arg-type]
    assert first.feed(ord("a")) == ("", False)
    assert second.feed(ord("b")) == ("b", False)
    assert first.feed(ord("b")) == ("", True)


def test_unfinished_character_is_replaced_at_the_end() -> None:
    stream = Detokenizer(Bytes(), StopStrings([]))  # type: ignore[arg-type]
    assert stream.feed(0xE2) == ("", False) and stream.feed(0x82) == ("", False)
    assert stream.finish() == "\ufffd"
