"""Damaged configs are one line or a valid run, never a traceback. The short form is in `make test`, the long one
among the slow tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rdlm.errors import UserError
from train.config_file import load
from train.pretrain import count_parameters

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
VALUES = [
    "", "~", "true", "-1", "0", "1e400", ".nan", "1e3", "0x10", "0120", "2:00", "9" * 30, "[]", "{}",
    "[1, [2]]", "{a: {b: 1}}", "text",
    "'", '"', "&a [*a]", "*b", "!!binary x", "2020-01-01", "- 1", "? x", "$HOME", "~/x", "$NOWHERE", "\u2028",
    "a: b", "[" * 50, "yes", "null",
    "!x 1", "<<", "%", "@", "`", "|", ">", "1_0", "-.inf", "0o9", "0b1", "é", "\t",
]  # fmt: skip
NUMBERS = [
    f"{sign}{base + off}"
    for sign in ("", "-")
    for base in (0, 2**31, 2**32, 2**63, 2**64)
    for off in (-1, 0, 1)
]
NUMBERS += ["1e308", "-1e308", "5e-324", "0.999999999", "1e-30", ".inf"]
ROUNDS = [pytest.param(25, id="short"), pytest.param(500, id="long", marks=pytest.mark.slow)]


def mutated(text: str, draw: random.Random) -> str:
    """One to three changes: a value, a key, a line lost, doubled, moved or indented, or a character in any
    place."""
    lines = text.splitlines()
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        line = lines[at]
        kind = draw.randrange(7)
        if kind == 0 and ":" in line:
            lines[at] = f"{line.partition(':')[0]}: {draw.choice(VALUES)}"
        elif kind == 1 and ":" in line:
            key, _, value = line.partition(":")
            lines[at] = f"{key[:-1] or draw.choice(VALUES)}:{value}"
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines.insert(draw.randrange(len(lines)), line)
        elif kind == 4:
            lines[at] = " " * draw.randint(0, 5) + line.lstrip()
        elif kind == 5:
            place = draw.randrange(len(line) + 1)
            lines[at] = line[:place] + draw.choice("\x00\t:[]{}#&*!|>'\"%@`,-?é\u2028\ufeff") + line[place:]
        else:
            lines[at] = line.replace(draw.choice("0123456789"), draw.choice(VALUES))
    return "\n".join(lines)


def refusal(path: Path, overrides: list[str]) -> str | None:
    """The line with which a config is refused, None where it is a run."""
    try:
        count_parameters(load(path, overrides))
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, (path.read_text(), overrides)
        return str(error)
    return None


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_damaged_config_is_one_line_or_a_run(config: Path, rounds: int, tmp_path: Path) -> None:
    draw, path, refused = random.Random(config.stem), tmp_path / "config.yaml", 0
    for _ in range(rounds):
        path.write_text(mutated(config.read_text(), draw))
        refused += refusal(path, []) is not None
    assert refused > rounds // 4


def fields(section: dict[str, Any], place: str = "") -> Iterator[str]:
    """The paths of all fields, sections among them."""
    for name, value in section.items():
        yield f"{place}{name}"
        if isinstance(value, dict):
            yield from fields(value, f"{place}{name}.")


@pytest.mark.parametrize("rounds", ROUNDS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_damaged_value_is_one_line_that_names_its_section_or_a_run(config: Path, rounds: int) -> None:
    """Every field that the config may have, those that it leaves out too. Numbers are around the limits of what
    computers count in."""
    draw, refused = random.Random(config.stem), 0
    known = sorted(set(fields(load(config).model_dump(mode="json"))) - {"output"})
    for _ in range(rounds):
        field = draw.choice(known)
        said = refusal(config, [f"{field}={draw.choice(NUMBERS if draw.random() < 0.5 else VALUES)}"])
        if said is not None:
            refused += 1
            assert f"did you mean {field}?" not in said
    assert refused > rounds // 4


def test_a_field_of_another_kind_of_data_is_not_suggested_in_its_own_place() -> None:
    said = refusal(CONFIGS[[path.stem for path in CONFIGS].index("debug")], ["data.packing=windows"])
    assert said is not None and "no such field; remove it, or use one of group" in said


def test_a_damaged_override_is_one_line_or_a_run(tmp_path: Path) -> None:
    draw = random.Random(0)
    keys = ["optimizer.lr", "model", "model.d_model", "objective", "objective.depth", "data.kind",
    "schedule.steps", "a.b.c", "", ".", "seed",
            "evaluation.steps", "optimizer.betas", "output", "blocks", "resident"]  # fmt: skip
    for _ in range(150):
        try:
            load(CONFIGS[2], [f"{draw.choice(keys)}={draw.choice(VALUES)}"])
        except UserError as error:
            assert "\n" not in str(error)
