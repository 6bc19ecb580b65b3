"""Results as files, each written at once or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_bytes(file: Path, content: bytes) -> None:
    """Make the folders and replace the file in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(content)
    partial.replace(file)


def write_json(file: Path, report: Any) -> None:
    """A number that JSON cannot hold (NaN, infinity) is a ValueError."""
    write_bytes(file, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
