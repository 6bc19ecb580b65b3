"""Values of lm_eval's --model_args and --device, checked. They come typed by lm_eval's own parser, or wrongly typed."""

from __future__ import annotations

import logging

import torch

from rdlm.errors import UserError, reason

logger = logging.getLogger("rdlm.eval")

LM_EVAL_DEVICE = "cuda:0"


def usable_device(name: str | None) -> str:
    """What lm_eval's --device can be here. Its default is cuda:0, so without a GPU that means the CPU, as in lm-eval's own models."""
    if name is None or (name == LM_EVAL_DEVICE and not torch.cuda.is_available()):
        logger.info("no GPU is in use: running on the CPU")
        return "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        problem = f"cannot be used ({reason(error)})"
        raise UserError("--device", name, problem, "use cpu, or cuda:N on a machine with one") from None
    return name


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < least
        or (most is not None and value > most)
    ):
        wanted = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"model_args: {name}", value, "is not a whole number in range", f"give {wanted}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"model_args: {name}", value, "is neither True nor False", "write True or False")
    return value
