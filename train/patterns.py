"""Patterns of names: what ``optimizer.freeze``, ``optimizer.lr_factors`` and ``lora`` are given."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern stands for a parameter: it matches its name, or the name of a module that it is part
    of."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
