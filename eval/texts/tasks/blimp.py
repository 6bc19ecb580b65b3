"""BLiMP's rows from a local folder, for blimp_local.yaml."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from rdlm.errors import UserError


def load(paradigm: str, blimp: str | None = None, **_: Any) -> datasets.DatasetDict:
    """Rows of FOLDER/paradigm.jsonl as the split "train". ``blimp`` is the folder, which lm-eval passes on
    from its metadata.

    Raises UserError if the folder was not named or the file cannot be read. Other entries of the metadata
    concern the model.
    """
    if blimp is None:
        raise UserError(
            "--blimp",
            None,
            "the tasks of blimp_local need the folder of BLiMP's files",
            "give --blimp FOLDER",
        )
    file = Path(blimp) / f"{paradigm}.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
        pairs = [{name: row[name] for name in ("sentence_good", "sentence_bad")} for row in rows]
    except OSError:
        raise UserError(
            "--blimp", blimp, f"has no readable {file.name}", "give the folder of BLiMP's 67 JSONL files"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("--blimp", str(file), f"is not a file of BLiMP ({error})", "copy it again") from None
    return datasets.DatasetDict({"train": datasets.Dataset.from_list(pairs)})
