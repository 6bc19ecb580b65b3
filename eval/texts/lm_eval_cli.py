"""``rdlm eval lm-eval``: lm_eval's own command line with the model ``rdlm`` in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import typer

from eval.options import numbers
from rdlm.errors import UserError

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Settings of a command that hands every argument over, --help included."""
TASKS = Path(__file__).parent / "tasks"


def lm_eval(context: typer.Context) -> None:
    """lm-eval on a checkpoint in process: every argument is lm_eval's own, the model is `rdlm` unless another is named.

    Two are ours: --blimp FOLDER (local BLiMP files) and --steps 1,4,8 (a run for each K, scored in one pass).

    Example: rdlm eval lm-eval --model rdlm --model_args checkpoint=runs/demo/model,num_steps=8 --blimp FOLDER --tasks blimp_local
    """
    arguments, steps = taken_out(context.args, "--steps")
    ks = None if steps is None else numbers("--steps", steps, int)
    try:
        from eval.texts.lm_eval_adapter import run, run_sweep
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("lm_eval", "datasets"):
            raise
        raise UserError(
            "rdlm eval lm-eval", missing, "is not installed", "run `pip install lm-eval==0.4.13 datasets`"
        ) from error
    with tempfile.TemporaryDirectory(prefix="rdlm-tasks-") as together:
        arguments = with_model(expand_blimp(arguments, Path(together)))
        if ks is None:
            run(arguments)
        else:
            run_sweep(arguments, ks)


def with_model(arguments: list[str]) -> list[str]:
    """lm_eval's own default is a Hugging Face model; here it is ours, unless the arguments or a config file name another."""
    named = any(
        item.partition("=")[0] in ("--model", "-M", "--config", "-C", "--help", "-h") for item in arguments
    )
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    return [*arguments, "--model", "rdlm"] if runs and not named else arguments


def taken_out(arguments: list[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without ``name VALUE`` or ``name=VALUE``, and the value: "" where it is missing, None where the name is."""
    rest, value = [], None
    items = iter(arguments)
    for item in items:
        if item == name or item.startswith(f"{name}="):
            value = item.partition("=")[2] or next(items, "")
        else:
            rest.append(item)
    return rest, value


def expand_blimp(arguments: list[str], together: Path | None = None) -> list[str]:
    """``--blimp FOLDER`` in lm_eval's terms: our task folder as --include_path, the data folder as metadata of the tasks.

    lm_eval takes one --include_path: where the arguments name one too, ``together`` becomes a folder of links to both.
    """
    rest, folder = taken_out(arguments, "--blimp")
    if folder is None:
        return rest
    if not folder or not Path(folder).is_dir():
        raise UserError("--blimp", folder, "is not a folder", "give the folder of BLiMP's 67 JSONL files")
    rest, own = taken_out(rest, "--include_path")
    tasks = TASKS
    if own is not None:
        if not own or not Path(own).is_dir():
            raise UserError("--include_path", own, "is not a folder", "give the folder of your tasks")
        tasks = together or Path(tempfile.mkdtemp(prefix="rdlm-tasks-"))
        for name, source in (("blimp", TASKS), ("own", Path(own).resolve())):
            shutil.copytree(source, tasks / name, copy_function=os.symlink)
    run = [] if rest[:1] == ["run"] else ["run"]
    return [*run, *rest, "--include_path", str(tasks), "--metadata", json.dumps({"blimp": folder})]
