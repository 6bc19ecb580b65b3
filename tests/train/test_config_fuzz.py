"""Damaged configs are one line or a valid run, never a traceback."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from rdlm.errors import UserError
from train.pretrain import count_parameters
from train.settings import load

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
VALUES = [
    "", "~", "true", "-1", "0", "1e400", ".nan", "1e3", "0x10", "0120", "2:00", "9" * 30, "[]", "{}",
    "[1, [2]]", "{a: {b: 1}}", "text",
    "'", '"', "&a [*a]", "*b", "!!binary x", "2020-01-01", "- 1", "? x", "$HOME", "~/x", "$NOWHERE", "\u2028",
    "a: b", "[" * 50, "yes", "null",
    "!x 1", "<<", "%", "@", "`", "|", ">", "1_0", "-.inf", "0o9", "0b1", "é", "\t",
]  # fmt: skip
COUNT = 25


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


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_damaged_config_is_one_line_or_a_run(config: Path, tmp_path: Path) -> None:
    draw, path, refused = random.Random(config.stem), tmp_path / "config.yaml", 0
    for _ in range(COUNT):
        text = mutated(config.read_text(), draw)
        path.write_text(text)
        try:
            count_parameters(load(path))
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), text
            assert len(str(error)) < 1000, text
    assert refused > COUNT // 4


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
