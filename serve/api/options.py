"""Command-line options that ``rdlm serve`` and ``rdlm generate`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointOption = Annotated[
    Path, typer.Option(help="Folder that `rdlm train` exported (OUTPUT/model).", show_default=False)
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[
    str, typer.Option(help="float32 or bfloat16; bfloat16 is several times faster where the CPU has AMX.")
]
CacheOption = Annotated[
    str,
    typer.Option(
        help="shared: one key per position, whatever K is. full: the keys of every step, exact and larger."
    ),
]
