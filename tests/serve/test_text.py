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


def test_unfinished_character_is_replaced_at_the_end() -> None:
    stream = Detokenizer(Bytes(), StopStrings([]))  # type: ignore[arg-type]
    assert stream.feed(0xE2) == ("", False) and stream.feed(0x82) == ("", False)
    assert stream.finish() == "\ufffd"
