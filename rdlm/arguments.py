"""Arguments of the Python interface: numbers of numpy and torch become Python's, and what is of another type is a
UserError that names the argument."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rdlm.errors import UserError


def plain(value: Any) -> Any:
    """Numbers, arrays and tuples as numbers and lists of Python; other values as they are."""
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def listed(field: str, value: Any, remedy: str) -> list[Any]:
    """The items of a list, an array, a generator or whatever else has items in an order. UserError for one value,
    and for texts, bytes and mappings, whose items are another thing."""
    value = plain(value)
    if isinstance(value, str | bytes | Mapping | set | frozenset) or not isinstance(value, Iterable):
        raise UserError(field, value, f"it is of type {type(value).__name__}, not a list", remedy)
    return list(value)


def integer(field: str, value: Any, remedy: str) -> int:
    """UserError for what is no integer: True, 1.0 and "1" are none."""
    found = plain(value)
    if type(found) is not int:
        raise UserError(field, value, f"it is of type {type(value).__name__}, not an integer", remedy)
    return found


def token_ids(field: str, value: Any) -> list[int]:
    """UserError for what is no list of integers."""
    remedy = "give texts, or lists of token ids"
    return [integer(field, item, remedy) for item in listed(field, value, remedy)]
