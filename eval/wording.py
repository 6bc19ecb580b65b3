"""Figures with their uncertainty, as tables show them."""

from __future__ import annotations

from collections.abc import Sequence

WITHIN_NOISE = " (within noise)"


def with_interval(value: float, interval: Sequence[float] | None, digits: str = ".3f") -> str:
    """ "0.512 [0.498, 0.526]"; without an interval the value alone."""
    return format(value, digits) + (
        "" if interval is None else f" [{interval[0]:{digits}}, {interval[1]:{digits}}]"
    )


def difference(value: float, interval: Sequence[float], digits: str = "+.3f", none: float = 0.0) -> str:
    """The same, and said to be within noise where the interval holds ``none``, the value of no difference."""
    inside = interval[0] <= none <= interval[1]
    return with_interval(value, interval, digits) + (WITHIN_NOISE if inside else "")


def or_dash(value: float | None, digits: str) -> str:
    """The value, or "-" where there is none."""
    return "-" if value is None else format(value, digits)
