"""Decoding settings as a sweep: one point of it, all combinations, and what points are called in tables
and figures. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

from rdlm.sampling_params import Order


@dataclass(frozen=True)
class Setting:
    """One way of decoding: K, temperature (0 is greedy), what cuts the distribution (nothing by default),
    sampler, and order."""

    num_steps: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    sampler: str = "renoise"
    order: Order = "random"

    def __str__(self) -> str:
        return ", ".join(filter(None, (f"K {self.num_steps}", f"T {self.temperature:g}", self.rest)))

    @property
    def rest(self) -> str:
        """What is not K, temperature or a default: "top-p 0.9, min-p 0.05". Settings with equal K and rest
        form a curve."""
        others = [field for field in fields(self)[2:] if getattr(self, field.name) != field.default]
        return ", ".join(
            f"{field.name.replace('_', '-')} {_short(getattr(self, field.name))}" for field in others
        )

    @property
    def cells(self) -> list[str]:
        """The setting's cells in the columns of CELLS."""
        return [str(self.num_steps), f"{self.temperature:g}", self.rest]


CELLS = ("K", "T", "cut")


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def grid(axes: Mapping[str, Iterable[Any]]) -> list[Setting]:
    """Every combination of the values of the fields named, the last one changing fastest."""
    return [Setting(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


def setting_of(row: Mapping[str, Any]) -> Setting:
    """The setting of a row of a report, which holds its fields among others."""
    return Setting(**{field.name: row[field.name] for field in fields(Setting) if field.name in row})
