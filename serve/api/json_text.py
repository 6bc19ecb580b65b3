"""JSON of clients, read in one way wherever it stands: as a body, or as a text in a field of it."""

from __future__ import annotations

import gc
import json
from typing import Any

import msgspec

from serve.errors import invalid, shorten


def decode(text: bytes | str, field: str | None = None) -> Any:
    """The value, without the garbage collector, which would visit every list of a large body again and again.

    field: where the text stands, None for the body. Raises ApiError for what is not JSON in UTF-8 (NaN and half
    of a surrogate pair are not), and for a key that appears twice: libraries differ in which of the two they read.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        value = msgspec.json.decode(text)
        json.loads(text, object_pairs_hook=_check_keys, parse_int=bool, parse_float=bool)
        return value
    except UnicodeError as error:
        problem, param = f"is not UTF-8 ({error.reason})", field  # type: ignore[attr-defined]
    except RecursionError:
        problem, param = "is nested too deeply", field
    except msgspec.MsgspecError as error:
        problem, param = f"is not JSON ({error})", field
    except _Twice as error:
        problem = f"has the key {shorten(error.key)!r} twice in one object"
        param = field or shorten(error.key)
    finally:
        if collects:
            gc.enable()
    raise invalid(f"{field}: it {problem}" if field else f"the body {problem}", param)


class _Twice(Exception):
    def __init__(self, key: str) -> None:
        self.key = key


def _check_keys(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:  # in time proportional to their number: no other thread runs meanwhile
        if key in seen:
            raise _Twice(key)
        seen.add(key)
