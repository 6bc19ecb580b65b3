"""``rdlm eval lm-eval``: lm_eval's own command line with the model ``rdlm`` in it."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from rdlm.errors import UserError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that hands every argument over, --help included."""
TASKS = Path(__file__).parent / "tasks"


def lm_eval(context: typer.Context) -> None:
    """lm-eval on a checkpoint in process: every argument is lm_eval's own, the model is `rdlm`. [--blimp FOLDER: local BLiMP files.]

    Example: rdlm eval lm-eval --model rdlm --model_args checkpoint=runs/demo/model,num_steps=8 --blimp FOLDER --tasks blimp_local
    """
    arguments = expand_blimp(context.args)
    try:
        from eval.harness import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("lm_eval", "datasets"):
            raise
        raise UserError("rdlm eval lm-eval", missing, "is not installed", "run `pip install lm-eval==0.4.13 datasets`") from error
    run(arguments)


def expand_blimp(arguments: list[str]) -> list[str]:
    """``--blimp FOLDER`` in lm_eval's terms: our task folder as --include_path, the data folder as metadata of the tasks."""
    rest, folder, found = [], "", False
    items = iter(arguments)
    for item in items:
        if item == "--blimp" or item.startswith("--blimp="):
            folder, found = item.partition("=")[2] or next(items, ""), True
        else:
            rest.append(item)
    if not found:
        return rest
    if not folder or not Path(folder).is_dir():
        raise UserError("--blimp", folder, "is not a folder", "give the folder of BLiMP's 67 JSONL files")
    for taken in ("--include_path", "--metadata"):
        if any(item.partition("=")[0] == taken for item in rest):
            raise UserError(taken, "...", "cannot be combined with --blimp, which sets it", "evaluate BLiMP in a run of its own")
    run = [] if rest[:1] == ["run"] else ["run"]
    return [*run, *rest, "--include_path", str(TASKS), "--metadata", json.dumps({"blimp": folder})]
