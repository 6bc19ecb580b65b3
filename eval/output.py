"""Results as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, report: Any) -> None:
    """Write ``report`` at once or not at all; a number that JSON cannot hold (NaN, infinity) is a ValueError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    partial.replace(file)
