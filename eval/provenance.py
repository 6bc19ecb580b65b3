"""Where a number comes from (command, code, machine), and how results are written: at once or not at all."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from rdlm import __version__
from rdlm.atomic import replacing_file
from rdlm.checkpoints.folder import CONFIG, WEIGHTS
from rdlm.config.checkpoint import CheckpointConfig
from rdlm.data.manifest import file_sha256


def origin(evaluation: str, folder: Path, config: CheckpointConfig) -> dict[str, Any]:
    """The head of every report: which command made it, where it ran, and which checkpoint it measures."""
    return {
        "evaluation": evaluation,
        "provenance": provenance(),
        "checkpoint": checkpoint_facts(folder, config),
    }


def checkpoint_facts(folder: Path, config: CheckpointConfig) -> dict[str, Any]:
    """What names a checkpoint wherever its folder lies."""
    return {
        "name": config.name,
        "objective": config.objective.name,
        "k_meaning": config.objective.k_meaning,
        "step": config.step,
        "weights_sha256": file_sha256(folder / WEIGHTS),
        "config_sha256": file_sha256(folder / CONFIG),
    }


def machine() -> str:
    """What ran it, in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def provenance() -> dict[str, Any]:
    """JSON facts about this process; ``git_commit`` is None outside a checkout and ends in ``-dirty`` with
    uncommitted changes."""
    program = Path(sys.argv[0])
    return {
        "command": shlex.join(
            [program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]]
        ),
        "rdlm": __version__,
        "git_commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "cpu_cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:  # no git on this machine
        return None
    return found.stdout.strip() or None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def write_bytes(file: Path, content: bytes) -> None:
    """Make the folders and replace the file in one step. Raises UserError."""
    with replacing_file(file) as partial:
        partial.write_bytes(content)


def write_json(file: Path, report: Any) -> None:
    """Raises ValueError for a number that JSON cannot hold (NaN, infinity)."""
    write_bytes(file, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())
